"""Which texts are the same, and what follows from it: what is never a query's negative."""

import itertools
import json
import unicodedata

import numpy as np
import pytest
import regex
import torch
from conftest import make_static_model, make_texts
from datasets import Dataset
from support.texts import ANSWERS, DIFFERENT, SAME

from st_corrector import (
    AnswerCheck,
    Corpus,
    CorpusRetrievalEvaluator,
    CorrectedMultipleNegativesLoss,
    EmbeddingCache,
)
from st_corrector.data import duplicates
from st_corrector.data.query_keys import UNKNOWN, query_keys
from st_corrector.data.text import _UNSPACED, contains_answer, normalized
from st_corrector.losses import multiple_negatives as corrected
from st_corrector.losses.batch import known_rows
from st_corrector.negatives.filters import known_positives


@pytest.mark.parametrize("texts", DIFFERENT.values(), ids=DIFFERENT)
def test_texts_that_differ_in_more_than_case_and_space_are_not_duplicates(texts):
    assert len({normalized(text) for text in texts}) == len(texts)
    corpus = Corpus.from_texts(texts)
    corpus.add_split("train", {"q": "something else"}, {"q": ["0"]})
    assert [corpus.duplicates_of(row).tolist() for row in range(len(texts))] == [[row] for row in range(len(texts))]
    assert known_positives(corpus, corpus.qrels("train"), [0], [-1])[0].tolist() == [0], "the others may be negatives"
    assert [rows.tolist() for rows in corpus.rows_like(texts)] == [[row] for row in range(len(texts))]


def test_what_is_judged_relevant_to_a_query_is_known_by_its_key_whatever_its_positive_is():
    corpus = Corpus.from_texts(["zero", "one", "two", "three", "One", "who asks"])
    corpus.add_split("train", {"q": "Who asks", "r": "who  asks"}, {"q": ["0", "1"], "r": ["2"]})
    qrels, (key, other) = corpus.qrels("train"), query_keys(["Who asks", "something else"]).tolist()
    known = known_positives(corpus, qrels, [3, 3, 3], [key, other, UNKNOWN])
    assert [rows.tolist() for rows in known] == [[0, 1, 2, 3, 4, 5], [3], [3]], "its twin, and its own text, too"


@pytest.mark.parametrize("split", ["train", None])
def test_the_pairs_of_one_query_in_a_batch_are_no_negatives_of_one_another(split):
    corpus = Corpus.from_texts([f"text {n}" for n in range(6)])
    corpus.add_split("train", {"q": "asked"}, {"q": ["0"]})
    qrels, keys = split and corpus.qrels(split), query_keys(["new", "other", "new"]).tolist()
    rows = torch.tensor([3, 4, 5])
    known = known_rows(corpus, qrels, rows, torch.tensor(keys))
    assert [sorted(set(each) - {-1}) for each in known.tolist()] == [[3, 5], [4], [3, 5]]
    unknown = known_rows(corpus, qrels, rows, torch.tensor([-1, -1, -1]))
    assert [sorted(set(each) - {-1}) for each in unknown.tolist()] == [[3], [4], [5]]


@pytest.mark.parametrize("texts", SAME.values(), ids=SAME)
def test_texts_that_differ_in_case_space_and_unicode_form_alone_are_duplicates(texts):
    assert len({normalized(text) for text in texts}) == 1
    corpus = Corpus.from_texts([*texts, "another"])
    assert [corpus.duplicates_of(row).tolist() for row in range(len(texts))] == [list(range(len(texts)))] * len(texts)
    assert corpus.duplicates_of(len(texts)).tolist() == [len(texts)]


def test_what_is_the_same_stays_so_when_it_is_normalized_once_more():
    for text in itertools.chain(*DIFFERENT.values(), *SAME.values()):
        assert normalized(normalized(text)) == normalized(text)


def found_by_dpr(text, answer):
    """DPR's ``has_answer`` with its ``SimpleTokenizer(uncased=True)``."""
    pattern = regex.compile(r"([\p{L}\p{N}\p{M}]+)|([^\p{Z}\p{C}])", regex.IGNORECASE | regex.UNICODE | regex.MULTILINE)

    def tokens(string):
        return [match.group().lower() for match in pattern.finditer(unicodedata.normalize("NFD", string))]

    text, answer = tokens(text), tokens(answer)
    return any(text[start : start + len(answer)] == answer for start in range(len(text) - len(answer) + 1))


@pytest.mark.parametrize(("text", "answer", "found"), ANSWERS)
def test_answers_are_found_where_dprs_scorer_finds_them(text, answer, found):
    assert contains_answer(text, [answer]) is found is found_by_dpr(text, answer)


def test_answers_are_found_where_dprs_scorer_finds_them_in_any_pair_of_texts():
    texts = list(itertools.chain(*DIFFERENT.values(), *SAME.values(), *((text, answer) for text, answer, _ in ANSWERS)))
    both, more = [0, 0], 0
    for text, answer in itertools.product(texts, texts):
        found, by_dpr = contains_answer(text, [answer]), found_by_dpr(text, answer)
        if regex.search(rf"[{_UNSPACED}]", text):
            assert found >= by_dpr, (text, answer)
            more += found > by_dpr
        else:
            assert found == by_dpr, (text, answer)
            both[found] += 1
    assert min(both) > 50 and more, "found and not found"


@pytest.mark.parametrize(
    ("text", "answer", "other"),
    [
        ("北京是中国的首都。", "北京", "东京"),
        ("東京は日本の首都です", "東京", "京都"),
        ("コーヒーを飲む", "コーヒー", "コーラ"),
        ("서울은 한국의 수도이다", "서울", "부산"),
        ("각자", "각", "가"),
        ("กรุงเทพมหานครเป็นเมืองหลวง", "กรุงเทพ", "เชียงใหม่"),
        ("ភ្នំពេញជារាជធានី", "ភ្នំពេញ", "សៀមរាប"),
        ("ນະຄອນຫຼວງວຽງຈັນ", "ວຽງຈັນ", "ປາກເຊ"),
        ("ရန်ကုန်မြို့သည်", "ရန်ကုန်", "မန္တလေး"),
        ("于2008年成立的ABC公司", "2008", "200"),
        ("于2008年成立的ABC公司", "abc", "ab"),
    ],
)
def test_answers_are_found_in_scripts_without_spaces_between_words(text, answer, other):
    assert contains_answer(text, [answer]) and not contains_answer(text, [other])


def test_answers_are_told_apart_by_their_marks_in_evaluation_and_checks():
    corpus = Corpus.from_texts(["कालापन छाया है", "कुछ और", "काल आया"])
    for split in ("train", "dev"):
        corpus.add_split(split, {"q": "word1"}, {"q": ["1"]}, answers={"q": ["काल"]})
    rows = torch.full((1, 100), -1)
    rows[0, :2] = torch.tensor([0, 2])
    metrics = CorpusRetrievalEvaluator(corpus, "dev").score(rows)
    assert (metrics["answer_recall@1"], metrics["answer_recall@5"]) == (0.0, 1.0)
    found = AnswerCheck(corpus)(torch.tensor([1]), torch.tensor([[0, 2]]), torch.tensor([UNKNOWN]))
    assert found.tolist() == [[False, True]]


# ------------------------------------------------------------------ a query's own text


def symmetric(folder):
    """Pairs of duplicate questions, both ways round."""
    queries, texts = make_texts(60)
    pairs = Dataset.from_dict({"anchor": [*queries, *texts], "positive": [*texts, *queries]})
    return Corpus.from_pairs(pairs)


def chains(folder):
    """a → b, b → c, …: every question but the first is a target."""
    texts = make_texts(60)[1]
    return Corpus.from_pairs(Dataset.from_dict({"anchor": texts[:-1], "positive": texts[1:]}))


def triplets(folder):
    """The query is among the negatives of its own row."""
    queries, texts = make_texts(60)
    rows = {"anchor": queries, "positive": texts, "negative": queries}
    return Corpus.from_pairs(Dataset.from_dict(rows), negatives=["negative"])


def questions(folder):
    """As in Quora: each query is a target under its own id, with other spaces here."""
    queries, texts = make_texts(60)
    corpus = Corpus.from_texts([*(f" {query}\n" for query in queries), *texts])
    ids = [str(n) for n in range(60)]
    corpus.add_split("train", dict(zip(ids, queries, strict=True)), {id: [str(60 + int(id))] for id in ids})
    return corpus


def titled(folder):
    """As in ArguAna: each query is the text of a target that has a title besides; a folder in BEIR's layout."""
    queries, texts = make_texts(60)
    (folder / "qrels").mkdir(parents=True)
    targets = [{"_id": f"a{n}", "title": "word7", "text": query} for n, query in enumerate(queries)]
    targets += [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(texts)]
    records = [{"_id": f"a{n}", "text": query} for n, query in enumerate(queries)]
    for name, lines in (("corpus", targets), ("queries", records)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = "".join(f"a{n}\td{n}\t1\n" for n in range(60))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return Corpus.from_beir(folder)


def held_out(folder):
    corpus = symmetric(folder)
    corpus.hold_out(40)
    return corpus


def own_rows(corpus, text):
    """By comparing it with each target in turn."""

    def spaced(string):
        return " ".join(string.split())

    targets = zip(corpus.targets["text"], corpus.texts(range(len(corpus))), strict=True)
    return [row for row, target in enumerate(targets) if spaced(text) in map(spaced, target)]


@pytest.mark.parametrize("make", [symmetric, chains, triplets, questions, titled, held_out])
def test_a_target_with_the_querys_own_text_is_never_its_negative(make, tmp_path, monkeypatch):
    corpus = make(tmp_path / "data")
    model = make_static_model()
    with torch.no_grad():  # so that a text and the same with a title are nearest to one another
        model[0].embedding.weight[model.tokenizer.token_to_id("word7")] *= 0.01
    cache = EmbeddingCache.build(model, corpus, tmp_path / "cache", progress=False)
    loss = CorrectedMultipleNegativesLoss(model, corpus, cache, num_negatives=3)
    selected, forbidden = [], []
    select, candidates = loss.select, corrected.candidates_of

    def recording(*inputs, **settings):
        selected.append(select(*inputs, **settings))
        return selected[-1]

    def noting(batch, negative_rows, *others):
        found = candidates(batch, negative_rows, *others)
        forbidden.append((torch.cat([batch.rows, negative_rows]), found.forbidden))
        return found

    loss.select = recording
    monkeypatch.setattr(corrected, "candidates_of", noting)
    pairs = corpus.pairs("train")[:32]
    loss([model.preprocess(pairs["anchor"]), model.preprocess(pairs["positive"])], torch.tensor(pairs["label"]))
    own = [own_rows(corpus, anchor) for anchor in pairs["anchor"]]
    assert sum(map(len, own)) >= 30, "the corpus has the queries' texts"
    embeddings = model.encode(pairs["anchor"], convert_to_tensor=True)
    hardest = (embeddings @ cache[range(len(corpus))].T).argmax(1).tolist()
    assert sum(row in rows for row, rows in zip(hardest, own, strict=True)) >= 25, "which are their nearest targets"
    ((columns, masked),) = forbidden
    for query, rows in enumerate(own):
        assert not set(rows) & set(selected[0].rows[query].tolist())
        assert masked[query, torch.isin(columns, torch.tensor(rows))].all(), "nor by way of other queries"
    assert (selected[0].rows >= 0).all() and not masked.all()


def test_the_same_question_under_several_ids_is_one_query_to_what_is_left_out(tmp_path):
    queries, texts = make_texts(20)
    corpus = Corpus.from_texts([*texts, *(f"{text} word1" for text in texts)])
    asked = {f"q{n}": query for n, query in enumerate(queries)} | {
        f"r{n}": f"{query.upper()} " for n, query in enumerate(queries)
    }
    corpus.add_split(
        "train", asked, {f"q{n}": [str(n)] for n in range(20)} | {f"r{n}": [str(n + 20)] for n in range(20)}
    )
    qrels = corpus.qrels("train")
    assert len(qrels) == 40, "both are trained on"
    for row in range(20):
        known = known_positives(corpus, qrels, [row, row + 20], [UNKNOWN, UNKNOWN])
        assert [rows.tolist() for rows in known] == [[row, row + 20]] * 2
        assert qrels.asking_for(row).tolist() == [row, row + 20] and qrels.queries_of(row).tolist() == [row]
    # Of another split nothing is known: its judgements may be what is evaluated.
    corpus.add_split("dev", {"d": queries[0]}, {"d": ["5"]})
    assert known_positives(corpus, corpus.qrels("train"), [0], [-1])[0].tolist() == [0, 20]


@pytest.mark.parametrize("titled", [False, True])
def test_a_second_start_reads_no_text(tmp_path, monkeypatch, titled):
    _, texts = make_texts(300)
    texts += [texts[3].upper(), f"{texts[7]}  ", texts[3]]
    lines = [{"_id": str(n), "title": f"word{n}" if titled else "", "text": text} for n, text in enumerate(texts)]
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": texts[5]}) + "\n")
    (tmp_path / "qrels" / "train.tsv").write_text("q\t9\t1\n")

    def asked(corpus):
        rows = range(len(corpus))
        return (
            corpus.fingerprint,
            [corpus.duplicates_of(row).tolist() for row in rows],
            known_positives(corpus, corpus.qrels("train"), [9], [-1])[0].tolist(),
        )

    expected = asked(Corpus.from_beir(tmp_path))
    assert expected[1][3] == ([3] if titled else [3, 300, 302]) and expected[2] == [5, 9]
    read = []
    monkeypatch.setattr(duplicates, "normalized", lambda text: read.append(text) or normalized(text))
    assert asked(Corpus.from_beir(tmp_path)) == expected
    assert read == [texts[5]], "the query's own"
    # By several processes, and where nothing is on disk, it is the same.
    monkeypatch.setattr(duplicates, "_FEWEST_FOR_A_PROCESS", 100)
    for folder in (tmp_path / "elsewhere", tmp_path / "again"):
        assert asked(Corpus.from_beir(tmp_path, cache_dir=folder)) == expected
        assert not [path for path in folder.iterdir() if path.is_dir()], "nothing partial is left"
    monkeypatch.setattr(duplicates, "_RULES", (2, "other tables of Unicode"))
    read.clear()
    assert asked(Corpus.from_beir(tmp_path, cache_dir=tmp_path / "again")) == expected
    in_memory = Corpus(Dataset.from_list([{"id": line["_id"], **line} for line in lines]).remove_columns("_id"))
    assert in_memory.fingerprint == expected[0] and in_memory.duplicates_of(3).tolist() == expected[1][3]


def test_rows_like_finds_every_row_of_every_text():
    corpus = Corpus.from_texts(["A", "b", "a ", "c", "B", "d"], titles=[None, "x", None, None, "x", "d"])
    found = [rows.tolist() for rows in corpus.rows_like(["a", "B", "x b", "c", "e", "a", "d d", "d"])]
    assert found == [[0, 2], [1, 4], [1, 4], [3], [], [0, 2], [5], [5]]
    assert corpus.rows_like([]) == []
    untitled = Corpus.from_texts(["A", "b"])
    assert [rows.tolist() for rows in untitled.rows_like(["b", "a"])] == [[1], [0]]
    assert all(rows.dtype == np.int64 for rows in untitled.rows_like(["b", "z"]))
