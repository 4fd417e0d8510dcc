import pytest
import torch
import torch.nn.functional as F
from support.drifts import DIM, fit, pairs, unit

from st_corrector import (
    IdentityCorrector,
    InputError,
    KernelRidgeCorrector,
    MLPCorrector,
    RidgeCorrector,
    RidgeMLPCorrector,
)
from st_corrector.correctors import CORRECTORS, make_corrector


@pytest.mark.parametrize("name", CORRECTORS)
@pytest.mark.parametrize("normalize", [True, False])
def test_before_its_first_step_every_corrector_is_the_stale_baseline(name, normalize):
    stale = unit(30, DIM) if normalize else torch.randn(30, DIM)
    corrector = make_corrector(name, DIM, normalize=normalize)
    expected = IdentityCorrector(DIM, normalize=normalize)(stale)
    assert torch.equal(corrector(stale), expected)
    torch.testing.assert_close(expected, stale)


@pytest.mark.parametrize(
    "corrector",
    [
        MLPCorrector(DIM, hidden=64, learning_rate=3e-3),
        MLPCorrector(DIM, hidden=64, learning_rate=3e-3, loss="mse", activation="relu"),
        MLPCorrector(DIM, hidden=64, steps=3),
        MLPCorrector(DIM, hidden=64, depth=3, activation="silu"),
        RidgeCorrector(DIM),
        KernelRidgeCorrector(DIM, num_features=64),
        RidgeMLPCorrector(DIM, hidden=32),
    ],
    ids=repr,
)
def test_a_corrector_learns_the_drift(corrector):
    *_, (stale, fresh, _) = pairs(201)
    metrics = fit(corrector, 200)
    assert metrics[-1]["correction_loss"] < metrics[0]["correction_loss"]
    corrected = corrector(stale)
    before, after = (1 - (each * fresh).sum(-1).mean() for each in (stale, corrected))
    assert after < 0.35 * before, "on rows that it has never seen"
    torch.testing.assert_close(corrected.norm(dim=-1), torch.ones(len(stale)))


def test_kernel_features_follow_what_no_affine_map_can():
    """A drift that depends on where a target lies: two clusters that move in opposite directions."""
    centre, step = unit(DIM, seed=1), 0.3 * unit(DIM, seed=2)

    def pair(seed):
        side = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)[:, None]
        stale = torch.nn.functional.normalize(side * centre + 0.3 * unit(40, DIM, seed=seed), dim=-1)
        return stale, F.normalize(stale + step * (stale @ centre).square()[:, None], dim=-1)

    errors = {}
    for make in (RidgeCorrector, KernelRidgeCorrector):
        corrector = make(DIM, bias=1e-3, regularization=0.1)
        for seed in range(60):
            corrector.fit_step(*pair(seed), unit(2, DIM), 20.0)
        stale, fresh = pair(1000)
        errors[make] = (1 - (corrector(stale) * fresh).sum(-1)).mean()
    assert errors[KernelRidgeCorrector] < 0.5 * errors[RidgeCorrector]


def test_identity_learns_nothing():
    corrector = IdentityCorrector(DIM)
    assert fit(corrector, 2) == [{}, {}] and corrector.state_dict() == {}


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_the_mlp_minimises_the_papers_losses(loss):
    corrector = MLPCorrector(DIM, hidden=16, loss=loss)
    fit(corrector, 3)
    stale, fresh, queries = next(pairs(1))
    expected = corrector(stale)
    if loss == "mse":  # Eq. 5
        value = sum((g - h) @ (g - h) for g, h in zip(fresh, expected, strict=True)) / len(stale)
    else:  # Eq. 6
        value = 0.0
        for x in queries:
            p = torch.softmax(torch.stack([20 * x @ g for g in fresh]), 0)
            p_h = torch.softmax(torch.stack([20 * x @ h for h in expected]), 0)
            value = value - (p * p_h.log()).sum() / len(queries)
    torch.testing.assert_close(corrector.fit_step(stale, fresh, queries, 20.0)["correction_loss"], value)


def test_the_closed_form_is_the_weighted_ridge_solution_over_the_whole_stream():
    corrector = RidgeCorrector(DIM, regularization=0.7, forgetting=0.9, bias=0.3)
    fit(corrector, 25)
    # Naively: all pairs at once, each step weighted by what is left of it, λ as extra rows.
    rows, targets = [], []
    for step, (stale, fresh, _) in enumerate(pairs(25)):
        weight = 0.9 ** ((24 - step) / 2)
        rows.append(weight * torch.cat([stale, torch.full((len(stale), 1), 0.3)], 1).double())
        targets.append(weight * (fresh - stale).double())
    rows.append(0.7**0.5 * torch.eye(DIM + 1, dtype=torch.float64))
    targets.append(torch.zeros(DIM + 1, DIM, dtype=torch.float64))
    solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution
    stale = unit(9, DIM, seed=77)
    expected = F.normalize(stale + (torch.cat([stale, torch.full((9, 1), 0.3)], 1).double() @ solution).float(), dim=-1)
    torch.testing.assert_close(corrector(stale), expected, atol=1e-5, rtol=1e-4)
    assert (expected - stale).abs().max() > 0.01


@pytest.mark.parametrize("name", CORRECTORS)
def test_a_restored_corrector_goes_on_as_the_original(name):
    original = make_corrector(name, DIM)
    stream = list(pairs(8))
    for step in stream[:4]:
        original.fit_step(*step, scale=20.0)
    restored = type(original)(**original.config)
    restored.load_state_dict({key: value.clone() for key, value in original.state_dict().items()})
    for step in stream[4:]:
        for corrector in (original, restored):
            corrector.fit_step(*step, scale=20.0)
    probe = unit(5, DIM, seed=9)
    assert torch.equal(original(probe), restored(probe))
    if name != "identity":
        assert not torch.equal(original(probe), type(original)(**original.config)(probe))


def test_the_state_is_a_copy():
    corrector = MLPCorrector(DIM, hidden=8)
    fit(corrector, 1)
    state = corrector.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    fit(corrector, 3)
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_fitting_gives_no_gradient_to_what_comes_in():
    stale, fresh, queries = next(pairs(1))
    fresh.requires_grad_(), queries.requires_grad_()
    for corrector in (MLPCorrector(DIM), RidgeCorrector(DIM)):
        metrics = corrector.fit_step(stale, fresh, queries, 20.0)
        assert fresh.grad is None and queries.grad is None
        assert not metrics["correction_loss"].requires_grad


def test_the_mlps_settings_do_what_they_say():
    probe = unit(5, DIM, seed=9)

    def after(times, **settings):
        corrector = MLPCorrector(DIM, **settings)
        step = next(pairs(1))
        for _ in range(times):
            corrector.fit_step(*step, scale=20.0)
        return corrector(probe)

    assert torch.equal(after(1, steps=3), after(3)) and not torch.equal(after(1), after(3))
    assert torch.equal(after(2, seed=4), after(2, seed=4)) and not torch.equal(after(2, seed=4), after(2, seed=5))
    assert not torch.equal(after(2, activation="tanh"), after(2)) and after(2, hidden=7).shape == (5, DIM)


@pytest.mark.parametrize("name", ["mlp", "ridge"])
def test_nothing_is_learnt_from_what_is_not_finite(name):
    corrector = make_corrector(name, DIM)
    fit(corrector, 2)
    before = corrector.state_dict()
    stale, fresh, queries = next(pairs(1))
    fresh[3, 2] = torch.nan
    with pytest.raises(InputError, match="The correction loss is nan"):
        corrector.fit_step(stale, fresh, queries, 20.0)
    assert all(torch.equal(value, before[key]) for key, value in corrector.state_dict().items())


def test_making_an_mlp_moves_nobodys_random_numbers(monkeypatch):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeds the GPUs"))
    MLPCorrector(DIM)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPCorrector(0), "dimension as a positive integer, got 0"),
        (lambda: MLPCorrector(DIM, activation="sin"), "activation 'sin' is not one of gelu, relu"),
        (lambda: MLPCorrector(DIM, loss="l1"), r"loss 'l1' is neither 'ce' \(Eq. 6\) nor 'mse'"),
        (lambda: MLPCorrector(DIM, hidden=0), "hidden, depth and steps must be at least 1"),
        (lambda: RidgeCorrector(DIM, regularization=0), "regularization must be positive"),
        (lambda: RidgeCorrector(DIM, forgetting=1.1), r"forgetting in \(0, 1\], got 1.0 and 1.1"),
        (lambda: make_corrector("lstm", DIM), "corrector 'lstm' is not one of identity, ridge"),
        (lambda: make_corrector(IdentityCorrector(3), DIM), "is for dimension 3, the embeddings have 12"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---------------------------------------------------------------------- pull-back


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", CORRECTORS)
def test_pulled_back_embeddings_are_corrected_to_the_fresh_ones(name, normalize):
    corrector = make_corrector(name, DIM, normalize=normalize)
    fit(corrector, 40)
    fresh = unit(50, DIM, seed=31)
    pulled = corrector.pull_back(fresh)
    torch.testing.assert_close(corrector(pulled.stale), fresh, atol=1e-5, rtol=0)
    assert not pulled.damped and pulled.residual.max() < 1e-5
    if name != "identity":
        assert (pulled.stale - fresh).abs().max() > 0.02, "the stale frame is another one"


def test_an_ill_conditioned_map_is_damped_and_says_so():
    corrector = RidgeCorrector(DIM)
    corrector.weight = -torch.eye(DIM)
    corrector.weight[0, 0] = -1 + 1e-6
    corrector.weight[1:, 1:] += torch.eye(DIM - 1)
    fresh = unit(20, DIM)
    pulled = corrector.pull_back(fresh)
    assert pulled.damped and torch.isfinite(pulled.stale).all()
    assert pulled.stale.norm(dim=-1).max() < 10, "no row is blown up"
    assert pulled.residual.max() > 1e-3, "what could not be solved is reported"
    torch.testing.assert_close((corrector.forward(pulled.stale))[:, 1:].norm(dim=-1), torch.ones(20), atol=0.1, rtol=0)


def test_an_mlp_that_is_no_contraction_keeps_its_best_and_says_so():
    corrector = MLPCorrector(DIM, hidden=64, activation="relu")
    with torch.no_grad():
        corrector.network[2].weight.normal_(0, 3.0, generator=torch.Generator().manual_seed(0))
    fresh = unit(20, DIM)
    pulled = corrector.pull_back(fresh)
    start = corrector.correction(fresh).norm(dim=-1)
    assert pulled.damped and torch.isfinite(pulled.stale).all() and (pulled.residual <= start + 1e-6).all()
    missing = (pulled.stale + corrector.correction(pulled.stale) - fresh).norm(dim=-1)
    torch.testing.assert_close(missing, pulled.residual, atol=1e-4, rtol=1e-4)


def test_correcting_the_queries_is_correcting_the_corpus():
    corrector = RidgeCorrector(DIM, normalize=False)
    fit(corrector, 10)
    queries, stale = unit(7, DIM, seed=1), unit(30, DIM, seed=2)
    transformed, offset, of_features = corrector.on_query_side(queries)
    assert of_features is None
    torch.testing.assert_close(transformed @ stale.T + offset[:, None], queries @ corrector(stale).T)
    assert (transformed - queries).abs().max() > 0.02 and offset.abs().max() > 0.01
