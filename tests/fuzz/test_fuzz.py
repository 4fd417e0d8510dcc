"""Any input gives a result or a ``StCorrectorError``: never another exception, a hang, or memory beyond a bound."""

import json
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from targets import TARGETS, cache, escapes_nothing

MOST_MEMORY = 1 << 30
TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # halves of characters, too
NUMBER = st.one_of(st.integers(), st.integers(10**17, 10**25), st.floats())
SCALAR = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
JSON = st.recursive(
    SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)), max_leaves=8
)


def dumped(value):
    return json.dumps(value).encode()


def mutated(data):
    """Some bytes changed, taken out or put in."""
    return st.lists(st.tuples(st.integers(0, max(len(data) - 1, 0)), st.binary(max_size=3)), max_size=4).map(
        lambda changes: _changed(data, changes)
    )


def _changed(data, changes):
    for position, piece in changes:
        data = data[:position] + piece + data[position + len(piece) + (position % 2) :]
    return data


RECORD = st.fixed_dictionaries(
    {}, optional={"_id": st.one_of(TEXT, SCALAR), "text": st.one_of(TEXT, JSON), "title": JSON, "answers": JSON}
)
LINE = st.one_of(
    RECORD.map(dumped),
    st.tuples(TEXT, TEXT).map(lambda both: dumped({"_id": both[0] or "1", "text": both[1]})),
    JSON.map(dumped),
    st.binary(max_size=40),
    st.sampled_from(
        [b"[" * 50_000, b"9" * 5_000, b'{"_id": 1, "text": "\\ud83d"}', b"", b"\xef\xbb\xbf{}", b"NaN", b"\x00"]
    ),
)
LINES = st.tuples(st.lists(LINE, max_size=6), st.sampled_from([b"\n", b"\r\n", b"\r"])).map(
    lambda parts: parts[1].join(parts[0])
)
CELL = st.one_of(
    TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([b"q1", b"1", b"0", b"nan", b"1e999", b"", b"score", b'"', b"\xff"]),
)
ROWS = st.lists(st.lists(CELL, max_size=5).map(b"\t".join), max_size=6).map(b"\n".join)
NAMES = ["ridge", "mlp", "kernel-ridge", "ridge-mlp", "identity"]
SETTINGS = ["hidden", "depth", "steps", "seed", "loss", "activation", "learning_rate", "normalize", "dim"]
SETTINGS += ["num_features", "bandwidth", "regularization", "forgetting", "bias", "self"]
USUAL = st.one_of(st.sampled_from([1, 2, 0.5, 16, "ce", "mse", "gelu", True, False]), JSON)
CORRECTOR = st.tuples(
    st.one_of(st.sampled_from(NAMES), TEXT),
    st.one_of(st.dictionaries(st.one_of(st.sampled_from(SETTINGS), TEXT), USUAL, max_size=4), JSON),
).map(lambda both: both[0].encode("utf-8", "replace") + b"\n" + dumped(both[1]))


def described():
    """A manifest whose entries are changed, or whose bytes are."""
    whole = json.loads(WHOLE)
    keys = [*whole, "more"]
    entries = st.dictionaries(st.sampled_from(keys), JSON, max_size=2).map(lambda change: dumped({**whole, **change}))
    shards = st.lists(
        st.one_of(st.sampled_from(whole["shards"]), JSON, st.fixed_dictionaries({"bytes": JSON, "sha256": JSON})),
        max_size=4,
    ).map(lambda given: dumped({**whole, "shards": given}))
    counts = st.fixed_dictionaries({name: st.integers(-2, 10**20) for name in ("rows", "dim", "shard_size")}).map(
        lambda change: dumped({**whole, **change})
    )
    return st.one_of(st.just(WHOLE), entries, shards, counts, mutated(WHOLE), JSON.map(dumped), st.binary(max_size=60))


def recorded():
    """The record of a run in which some value is another or gone, or whose bytes are changed."""
    places = list(places_in(RECORDED))
    replaced = st.tuples(st.sampled_from(places), JSON).map(lambda change: with_another(RECORDED, *change))
    removed = st.sampled_from([place for place in places if place]).map(lambda place: with_another(RECORDED, place))
    changed = st.one_of(replaced, removed).map(dumped)
    nested = dumped(RECORDED).replace(b'{"max_steps": 3}', b'{"deep": ' + b"[" * 600 + b"]" * 600 + b"}")
    some = st.sampled_from([dumped(RECORDED), nested, b"[" * 50_000, b"9" * 5_000])
    return st.one_of(some, changed, mutated(dumped(RECORDED)), JSON.map(dumped))


def places_in(document, place=()):
    """Where values are in JSON: keys and positions down to each."""
    yield place
    if isinstance(document, (dict, list)):
        for key, inner in document.items() if isinstance(document, dict) else enumerate(document):
            yield from places_in(inner, (*place, key))


def with_another(document, place, *value):
    """JSON with another value in a place, or none."""
    if not place:
        return value[0]
    document, (first, *rest) = document.copy(), place
    if rest or value:
        document[first] = with_another(document[first], rest, *value)
    else:
        del document[first]
    return document


CHOSEN = {"id": "t", "text": "a", "corrected_score": 0.5, "score": 1, "has_answer": None}
RECORDED = {
    "schema": 1,
    "model": {"name": None, "dim": 2},
    "arguments": {"max_steps": 3},
    "losses": {
        "": {
            "settings": {"scale": 20.0},
            "corpus": {"targets": 5, "splits": {"train": 3}},
            "cache": {"dtype": "int8"},
            "counts": {"targets_encoded": 7},
            "removed": {"answer": 1},
            "diverged": False,
            "examples": [
                {"query": "q", "positive": "p", "choices": [{"step": 0, "positive_score": 1.0, "negatives": [CHOSEN]}]}
            ],
        }
    },
    "steps": 3,
    "seconds": 1.5,
    "log": [{"loss": 1.0, "step": 1}],
    "evaluations": {"before": {"mrr@10": 0.5}},
    "versions": {"torch": "2"},
}
WHOLE = (cache() / "manifest.json").read_bytes()
INPUTS = {
    "jsonl": LINES,
    "gzip": st.one_of(LINES, st.binary(max_size=200)),
    "qrels": st.one_of(ROWS, st.binary(max_size=100)),
    "manifest": described(),
    "build": described(),
    "corrector": st.one_of(CORRECTOR, st.binary(max_size=60)),
    "record": recorded(),
}


def peak_memory(reset=False):
    """Of this process, in bytes, since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("inputs", [150, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("target", TARGETS)
def test_any_input_gives_a_result_or_an_error_of_ours(target, inputs, report):
    outcomes, slowest = [], 0.0

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(INPUTS[target])
    def take(data):
        nonlocal slowest
        began = time.monotonic()
        outcomes.append(escapes_nothing(target, data))
        slowest = max(slowest, time.monotonic() - began)

    before = peak_memory(reset=True)
    take()
    grown = peak_memory() - before
    assert grown < MOST_MEMORY and slowest < 20
    assert 0 < sum(outcomes) < len(outcomes), "some are taken, some refused"
    taken = sum(outcomes)
    report(
        f"fuzz: {target}",
        inputs=len(outcomes),
        taken=taken,
        refused=len(outcomes) - taken,
        slowest_s=round(slowest, 3),
        memory_grown_mb=round(grown / 1e6),
    )
