import json
import math
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib
import pytest
import torch
from conftest import make_static_model, make_texts
from support import runs

from st_corrector import (
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectorTrainer,
    InputError,
    StorageError,
)
from st_corrector.reporting.charts import loss_charts, run_charts, staleness_figure, staleness_png
from st_corrector.reporting.record import Choice, Chosen, Example, LossRecord, RunRecord
from st_corrector.reporting.report import write_report

VOID = {"meta", "col", "br"}
HOSTILE = (
    """"'><script>alert`1`</script><img src=x onerror=alert`2`> javascript:alert`3` {{ 7 * 7 }} &amp; $\\a$ --> é"""
)


class Page(HTMLParser):
    """A page that is well-formed: its elements in order, its text, its definitions and tables."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.style = ""
        self.cells: list[list[str]] = []
        self.facts: dict[str, str] = {}
        self.items: list[str] = []
        self.declared: list[str] = []
        self._open: list[str] = []
        self._inner: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_decl(self, decl):
        self.declared.append(decl)

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)
            self._inner.append([])
        if tag == "tr":
            self.cells.append([])

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)
        assert "svg" in self._open, "elsewhere a slash closes nothing"

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> in {self._open}"
        self._open.pop()
        content = " ".join("".join(self._inner.pop()).split())
        if tag == "dt":
            self._term = content
        elif tag == "dd":
            self.facts[self._term] = content
        elif tag in ("th", "td") and "table" in self._open:
            self.cells[-1].append(content)
        elif tag == "li" and self._open[-1] == "ul":
            self.items.append(content)

    def handle_data(self, data):
        if self._open[-1:] == ["style"]:
            self.style += data
        elif self._open:
            self.text.append(data)
            for each in self._inner:
                each.append(data)

    def _note(self, tag, attrs):
        self.elements.append((tag, tuple(sorted(name for name, _ in attrs))))
        self.attributes += [(tag, name, value or "") for name, value in attrs]


def page_of(record, folder) -> Page:
    """Its report, which must be well-formed, run nothing and refer to nothing outside of itself."""
    html = write_report(record, folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.declared == ["DOCTYPE html"]
    tags = Counter(tag for tag, _ in page.elements)
    assert tags["html"] == tags["main"] == tags["h1"] == 1
    for tag in ("script", "link", "img", "iframe", "object", "embed", "base", "form", "a", "foreignobject", "image"):
        assert not tags[tag]
    for tag, name, value in page.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action")
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
        if name in ("style", "clip-path", "fill", "href", "xlink:href", "class"):
            assert "url(" not in value.replace("url(#", "") and "://" not in value and "javascript" not in value
        if tag == "svg" and name == "aria-label":
            assert value
    assert "@import" not in page.style and "url(" not in page.style
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    return page


MEASURED = ("drift", "corrected_error", "corrected_error_unseen", "fidelity", "fidelity_stale", "hardness")
MEASURED += ("harder_than_positive", "seen", "age", "recall", "removed_by_answer")


def make_log(steps=60, every=10, prefix="", measured=MEASURED) -> list[dict]:
    """What a run logs, of values that can be told apart, and entries that are not about training."""
    log = [{"eval_loss": 1.5, "step": 0}]
    for number, step in enumerate(range(every, steps + 1, every), 1):
        share = number / (steps / every)
        log.append(
            {
                "loss": 4.0 - share,
                "task_loss": 3.0 - share,
                "step": step,
                **{f"{prefix}{name}": round(share / (n + 2), 4) for n, name in enumerate(measured)},
                f"{prefix}seconds_encode": 1.0 * every,
                f"{prefix}seconds_select": 0.5 * every,
                f"{prefix}seconds_correct": 0.25 * every,
            }
        )
    return [*log, {"train_runtime": 12.0, "train_loss": 2.0, "step": steps}]


def make_loss(examples=3, choices=(0, 30, 60), negatives=6, text="a passage about something") -> LossRecord:
    def choice(step):
        taken = [
            Chosen(f"t{step + n}", f"{text} {n} " * (1 if n else 20), 0.6 - 0.02 * n, 0.61 - 0.03 * n, n == 1)
            for n in range(negatives)
        ]
        return Choice(step, 0.59, taken)

    return LossRecord(
        settings={"num_negatives": negatives, "corrector": "MLPCorrector(dim=8, hidden=4)", "sampler": "top_k"},
        corpus={"name": "nq", "targets": 1234, "fingerprint": "f0", "splits": {"train": 17}},
        cache={"dtype": "float32", "dim": 8, "bytes": 39488, "fingerprint": {"weights": "w0"}},
        counts={"targets_encoded": 4321, "targets_verified": 21, "targets_reencoded": 7},
        removed={"answer": 90, "max_score": 6},
        examples=[Example(f"query {n}", f"positive {n}", [choice(step) for step in choices]) for n in range(examples)],
    )


def make_record(losses=None, **fields) -> RunRecord:
    return RunRecord(
        **{
            "model": {"name": "some/model", "parameters": 98765, "trainable": 43210, "dim": 8, "similarity": "cosine"},
            "arguments": {"learning_rate": 5e-5, "max_steps": 60, "bf16": True},
            "losses": {"": make_loss()} if losses is None else losses,
            "steps": 60,
            "seconds": 3725.0,
            "processes": 2,
            "log": make_log(),
            "evaluations": {
                "before": {"mrr@10": 0.2, "recall@20": 0.5, "something": 7.0},
                "30": {"mrr@10": 0.3, "recall@20": 0.6, "something": 8.0},
                "after": {"mrr@10": 0.412, "recall@20": 0.45, "something": 9.5},
            },
            "versions": {"st-corrector": "1.2.3", "torch": "9.9"},
            **fields,
        }
    )


def test_the_headline_says_what_the_record_says(tmp_path):
    page = page_of(make_record(), tmp_path)
    assert page.facts == {
        "Model": "some/model",
        "Parameters": "98,765, 43,210 trained",
        "Steps": "60",
        "Time": "1 h 2 min",
        "Processes": "2",
        "Corpus": "nq, 1,234 targets",
        "Corrector": "MLPCorrector",
        "Negatives": "6 a query, top_k",
        "Diverged": "no",
    }
    assert page.cells[:4] == [
        ["metric", "before", "after", "difference"],
        ["mrr@10", "20.0 %", "41.2 %", "+21.2"],
        ["recall@20", "50.0 %", "45.0 %", "−5.0"],
        ["something", "7", "9.5", "+2.5"],
    ]
    assert ["answer", "90", "1.5"] in page.cells and ["max_score", "6", "0.1"] in page.cells
    for row in (
        ["Encoded for the loss, positives and negatives", "4,321"],
        ["Encoded to verify candidates, without gradient", "21"],
        ["Encoded for the cache alone, or to compare a teacher with the encoder", "7"],
        ["Re-embedding at every step: 60 steps × 1,234 targets", "74,040"],
        ["learning_rate", "5e-05"],
        ["bf16", "yes"],
        ["splits: train", "17"],
        ["fingerprint: weights", "w0"],
        ["torch", "9.9"],
    ):
        assert row in page.cells


def test_the_summary_follows_from_the_record(tmp_path):
    assert page_of(make_record(), tmp_path).items == [
        "In the last tenth of the log the cache had drifted by 0.500 (1 − cos to fresh embeddings), and correction "
        "left 0.333 of it.",
        "Of what fresh embeddings would select, the corrected cache selected 20 % and the cache as built 17 %, as last "
        "measured (logged at step 60).",
        "In the last tenth of the log 12 % of the chosen negatives scored above their positive: the examples below "
        "show whether they are false negatives.",
        "4,349 targets were encoded while training, 5.9 % of the 74,040 that re-embedding the corpus at every step "
        "would have taken for the cache alone.",
        "Late negatives in the examples below that contain an answer of their query, and so are likely false ones: 3 "
        "of 18.",
    ]


def test_the_summary_tells_of_a_corrector_that_failed(tmp_path):
    record = make_record()
    record.losses[""].diverged = True
    for entry in record.series:
        entry["corrected_error"] = 0.75
    page = page_of(record, tmp_path)
    assert page.facts["Diverged"] == "yes: the corrector was given up"
    assert len(page.items) == 5 and page.items[0].startswith("The corrector made things worse")
    assert page.items[1].endswith("by 0.500 (1 − cos to fresh embeddings), and what was corrected was 0.750 off.")


def test_curves_are_those_of_the_log():
    record = make_record()
    charts = {chart.kind.title: chart for chart in run_charts(record) + loss_charts(record, "")}
    assert list(charts) == [
        *("Task loss", "Evaluation", "Drift and correction", "Fidelity", "Hardness", "Harder than the positive"),
        *("Seen before", "Age", "Recall of the shortlist", "Removed by rules", "Time"),
    ]
    drift = charts["Drift and correction"].lines[0]
    assert (drift.steps, drift.values) == (
        [entry["step"] for entry in record.series],
        [entry["drift"] for entry in record.series],
    )
    assert charts["Evaluation"].lines[0].values == [0.2, 0.3, 0.412] and charts["Evaluation"].lines[0].steps[1] == 30
    assert [(line.label, set(line.values)) for line in charts["Time"].lines] == [
        *(("encode", {1.0}), ("select", {0.5}), ("correct", {0.25})),
    ]
    assert [line.label for line in charts["Removed by rules"].lines] == ["answer"]
    assert "cache from 0.0833 at step 10 to 0.5 at step 60" in charts["Drift and correction"].description


def test_examples_show_what_was_taken_early_and_late(tmp_path):
    page = page_of(make_record({"": make_loss(examples=1)}), tmp_path)
    text = " ".join(" ".join(page.text).split())
    row = next(cells for cells in page.cells if cells and cells[0].startswith("query 0"))
    assert row[0].endswith("positive 0")
    assert row[1].startswith("Before training: 1 of 6 above the positive, 1 with an answer +0.020 ▲ above the positive")
    assert row[2].startswith("After step 60: 1 of 6 above the positive")
    assert "−0.010 ✓ contains an answer" in row[1] and "t1 · chosen at −0.010" in row[1]
    assert "2 more" in row[1] and "1 in between" in text and "After step 30:" in text


def test_a_negative_that_was_taken_early_is_marked(tmp_path):
    record = make_record({"": make_loss(examples=1, choices=(0, 3))})
    assert sum("taken early, too" in part for part in page_of(record, tmp_path).text) == 3  # t3, t4 and t5


def test_texts_of_strangers_are_inert(tmp_path):
    def record(text):
        loss = make_loss(examples=2, text=text)
        loss.settings = {**loss.settings, "corrector": text, "sampler": text, text: text}
        loss.corpus["name"], loss.corpus["fingerprint"], loss.cache["fingerprint"] = text, text, {text: text}
        loss.removed = {text: 3}
        for example in loss.examples:
            example.query = example.positive = text
            for negative in example.choices[0].negatives:
                negative.id = text
        log = [{**entry, f"removed_by_{text}": 5} if "loss" in entry else entry for entry in make_log()]
        evaluations = {when: {f"{text}@10": 0.5} for when in ("before", "30", "after")}
        versions = {"st-corrector": text, text: text}
        return make_record(
            {"": loss},
            model={"name": text, "parameters": 1, "trainable": 1},
            arguments={text: text},
            log=log,
            evaluations=evaluations,
            versions=versions,
        )

    harmless, hostile = "x" * len(HOSTILE), HOSTILE
    expected, page = page_of(record(harmless), tmp_path), page_of(record(hostile), tmp_path)
    assert page.elements == expected.elements, "the texts have made elements or attributes"
    assert page.style == expected.style
    text = "".join(page.text)
    assert text.count(hostile) == "".join(expected.text).count(harmless) > 20, "they are shown as they are"


def test_texts_that_no_file_can_hold(tmp_path):
    record = make_record({"": make_loss(text="half \ud83d of one, and \x00 and \u202e")})
    record.log[1]["removed_by_\ud83d"] = 2
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record
    assert "half ? of one" in "".join(page_of(record, tmp_path).text)


@pytest.mark.parametrize(
    "odd", [None, True, "text", [], {}, [{"a": [1]}], math.nan, -math.inf, 1e300, -1, 2**62], ids=repr
)
def test_odd_values_in_a_record_are_shown_or_left_out(odd, tmp_path):
    loss = make_loss(examples=1)
    loss.settings = dict.fromkeys(loss.settings, odd)
    loss.corpus = dict.fromkeys(loss.corpus, odd)
    loss.cache = dict.fromkeys(loss.cache, odd)
    record = make_record({"": loss}, log=make_log(measured=["drift", "removed_by_answer"]))
    record.model = dict.fromkeys(record.model, odd)
    record.arguments = {"it": odd}
    record.log = [{"loss": odd, "step": odd}, *({**dict.fromkeys(entry, odd), "step": 5} for entry in record.log)]
    if isinstance(odd, float):
        record.evaluations = {"before": {"mrr@10": odd}, "after": {"mrr@10": 0.5}}
        record.seconds = loss.examples[0].choices[0].positive_score = odd
    record.save(tmp_path)
    text = "".join(page_of(RunRecord.load(tmp_path), tmp_path).text)
    named = "a model without a name" if odd in (None, [], {}) else str(odd)
    assert f"Training report: {named}" in text and "from the record of the run" in text, "from its head to its end"


@pytest.mark.parametrize(
    ("fields", "absent", "present"),
    [
        ({"log": []}, ["Task loss", "had drifted"], ["Evaluation", "Late negatives"]),
        ({"losses": {"": make_loss(examples=0)}}, ["early and late", "examples below"], ["Filters"]),
        ({"losses": {}}, ["In short", "Filters"], ["Task loss", "Versions"]),
        ({"evaluations": {}}, ["Retrieval from the whole corpus", "mrr@10"], ["Drift and correction"]),
        ({"versions": {}, "arguments": {}, "model": {}}, ["Versions", "Parameters"], ["a model without a name"]),
        ({"steps": 0, "log": [], "evaluations": {}}, ["re-embedding the corpus"], ["Nothing was logged."]),
    ],
    ids=["log", "examples", "losses", "evaluations", "versions", "steps"],
)
def test_what_was_not_measured_is_not_shown(fields, absent, present, tmp_path):
    text = "".join(page_of(make_record(**{"log": make_log(measured=["drift"]), **fields}), tmp_path).text)
    assert not [each for each in absent if each in text]
    assert not [each for each in present if each not in text]


def test_a_loss_without_a_cache(tmp_path):
    loss = make_loss(examples=0)
    loss.cache, loss.removed, loss.settings["corrector"] = None, {}, "None"
    log = [{"loss": 1.0, "task_loss": 1.0, "step": step} for step in (10, 20)]
    page = page_of(make_record({"": loss}, log=log), tmp_path)
    assert page.facts["Negatives"] == "the other queries' positives" and "Corrector" not in page.facts
    assert page.items == [] and "No rule on false negatives was applied." in "".join(page.text)


def test_several_losses_have_a_section_each(tmp_path):
    log = [a | b for a, b in zip(make_log(prefix="one/"), make_log(prefix="two#1/"), strict=True)]
    for entry in log:
        entry.pop("two#1/fidelity", None)
        entry.pop("two#1/fidelity_stale", None)
    record = make_record({"one": make_loss(), "two#1": make_loss(examples=0)}, log=log)
    page = page_of(record, tmp_path)
    text = "".join(page.text)
    assert text.count("In short") == text.count("Drift and correction") == 2
    assert text.count("Task loss") == text.count("Fidelity") == text.count("Versions") == 1
    figure = staleness_figure(record)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        *("Drift and correction: one", "Fidelity: one", "Drift and correction: two#1"),
    ]


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path):
    record = make_record()
    record.series[2]["drift"], record.series[3]["drift"] = math.nan, math.inf
    (drift,) = (chart for chart in loss_charts(record, "") if chart.kind.title == "Drift and correction")
    assert drift.lines[0].steps == [10, 20, 50, 60]
    assert drift.caption.endswith("Not drawn: 2 values that are not finite.")
    assert "Not drawn: 2 values" in "".join(page_of(record, tmp_path).text)


def test_a_long_log_makes_a_small_page_that_says_what_a_point_is(tmp_path):
    record = make_record(steps=10_000, log=make_log(10_000, 10))
    assert len(record.series) == 1000
    text = "".join(page_of(record, tmp_path).text)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert text.count("Each point is the mean of 5 logged values.") == 10  # of every chart but the evaluation's
    line = loss_charts(record, "")[0].lines[0]
    assert line.pooled(5).values[0] == pytest.approx(sum(line.values[:5]) / 5) and len(line.pooled(5).values) == 200


def test_the_same_record_gives_the_same_file(tmp_path):
    first = write_report(make_record(), tmp_path / "first.html").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert write_report(make_record(), tmp_path / "second.html").read_bytes() == first
        again = staleness_png(make_record())
    assert again == staleness_png(make_record())


def test_the_figure_of_the_model_card(monkeypatch):
    record = make_record()
    figure = staleness_figure(record)
    drift, fidelity = figure.axes
    assert drift.lines[1].get_ydata().tolist() == [entry["corrected_error"] for entry in record.series]
    assert fidelity.lines[0].get_ydata().tolist() == [entry["fidelity_stale"] for entry in record.series]
    assert staleness_png(record).startswith(b"\x89PNG")
    assert staleness_figure(make_record(log=[])) is None and staleness_png(make_record(log=[])) is None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert staleness_png(record) is None


def test_a_missing_matplotlib_and_a_missing_folder_are_named(tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="cannot be written"):
        write_report(make_record(), tmp_path / "nowhere" / "report.html")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=re.escape('pip install "st-corrector[report]"')):
        write_report(make_record(), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_report_of_a_real_run(tmp_path):
    queries, texts = make_texts(120)
    corpus = Corpus.from_texts(texts)
    ids = [str(n) for n in range(len(texts))]
    corpus.add_split("train", dict(zip(ids, queries, strict=True)), {id: [id] for id in ids})
    chosen = runs.arguments(
        tmp_path / "out",
        corrector_settings={"hidden": 8},
        relative_margin=0.02,
        probe_every=4,
        per_device_train_batch_size=12,
        max_steps=12,
        learning_rate=0.02,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="no",
        use_cpu=True,
    )
    evaluator = CorpusRetrievalEvaluator(corpus, "train", write_csv=False)
    trainer = CorrectorTrainer(make_static_model(), chosen, corpus=corpus, evaluator=evaluator)
    trainer.train()
    record = RunRecord.load(tmp_path / "out")
    page = page_of(record, tmp_path)
    text = "".join(page.text)
    assert page.facts["Steps"] == "12" and page.facts["Corpus"].endswith("120 targets")
    (loss,) = trainer._corrected_losses().values()
    assert ["Encoded for the loss, positives and negatives", f"{loss.targets_encoded:,}"] in page.cells
    assert ["relative_margin", f"{loss.removed['relative_margin']:,}"] in [row[:2] for row in page.cells]
    for chart in ("Task loss", "Evaluation", "Drift and correction", "Fidelity", "Hardness", "Age", "Time"):
        assert chart in text
    drifts = [entry["drift"] for entry in trainer.state.log_history if "drift" in entry]
    assert f"had drifted by {drifts[-1]:.3f}" in text
    for example in record.losses[""].examples:
        assert example.query in text and example.positive in text
        assert [choice.step for choice in example.choices] == [0, 12]
        for negative in example.choices[-1].negatives:
            assert negative.text in text
    assert torch.tensor(drifts).isfinite().all() and json.dumps(record.evaluations)
