"""A cross-encoder's scores: asked for once, kept over steps, runs and kills, shared by processes."""

import os
import signal
import sqlite3

import numpy as np
import pytest
import torch
from conftest import FORKS, make_bert_model
from sentence_transformers import CrossEncoder

from st_corrector import CrossEncoderTeacher, InputError, NonFiniteError, StorageError, TeacherError
from st_corrector.teachers.store import ScoreStore


class Counting:
    """Says of a pair something that both texts decide, and notes what it was asked."""

    def __init__(self, outputs=1):
        self.asked, self.outputs = [], outputs

    def predict(self, pairs, batch_size, show_progress_bar):
        self.asked.extend(pairs)
        scores = [
            [len(set(query.split()) & set(text.split())) - len(text) / 100] * self.outputs for query, text in pairs
        ]
        return np.array(scores)


def keys_of(corpus, rows):
    return torch.tensor(corpus.pairs("train")["label"])[list(rows), 1]


def expected(corpus, queries, rows):
    anchors, texts = corpus.pairs("train")["anchor"], corpus.texts(rows)
    said = Counting().predict([(anchors[query], text) for query in queries for text in texts], 1, False)
    return torch.tensor(said).view(len(queries), len(rows)).float()


def test_a_pair_is_scored_once_and_remembered_in_other_runs(corpus, tmp_path):
    model, path = Counting(), tmp_path / "scores.sqlite"
    teacher = CrossEncoderTeacher(model, corpus, path, identity="counting")
    keys, rows = keys_of(corpus, [3, 4]), torch.tensor([8, 3, 8])
    wanted = torch.tensor([[True, True, False], [False, False, True]])
    scores = teacher.scores(keys, rows, wanted)
    assert torch.isnan(scores[~wanted]).all() and teacher.pairs_scored == len(model.asked) == 3
    torch.testing.assert_close(scores[wanted], expected(corpus, [3, 4], [8, 3, 8])[wanted])
    torch.testing.assert_close(teacher.scores(keys, rows), expected(corpus, [3, 4], [8, 3, 8]))
    assert len(model.asked) == len(set(model.asked)) == 4, "one was missing, the same target at another place was not"
    another = Counting()
    later = CrossEncoderTeacher(another, corpus, path, corpus.pairs("train"), identity="counting")
    torch.testing.assert_close(later.scores(keys, rows), expected(corpus, [3, 4], [8, 3, 8]))
    assert not another.asked and later.pairs_scored == 0
    assert torch.isnan(teacher.scores(torch.tensor([-1]), rows)).all() and not teacher.knows(torch.tensor([-1])).any()


def test_a_real_cross_encoder_is_known_by_its_weights(corpus, tmp_path):
    make_bert_model(tmp_path)
    torch.manual_seed(0)
    model = CrossEncoder(str(tmp_path / "bert-right"), num_labels=1, device="cpu", local_files_only=True)
    teacher = CrossEncoderTeacher(model, corpus, tmp_path / "scores.sqlite")
    keys, rows = keys_of(corpus, range(3)), torch.arange(4)
    anchors = corpus.pairs("train")["anchor"]
    pairs = [(anchors[query], text) for query in range(3) for text in corpus.texts(range(4))]
    said = torch.from_numpy(np.asarray(model.predict(pairs, show_progress_bar=False))).view(3, 4)
    torch.testing.assert_close(teacher.scores(keys, rows), said, atol=1e-5, rtol=1e-5)
    assert said.std() > 1e-4, "different texts are different"
    CrossEncoderTeacher(model, corpus, tmp_path / "scores.sqlite")
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    with pytest.raises(TeacherError, match=r"holds the scores of another model .*choose another path"):
        CrossEncoderTeacher(model, corpus, tmp_path / "scores.sqlite")


def add_until_killed(path, began):
    store = ScoreStore(path, "model")
    for step in range(100_000):
        numbers = np.arange(50) + 50 * step
        store.add(np.full(50, step), numbers, numbers / 7)
        if step == 3:
            began.set()


def test_what_was_added_survives_a_kill_whole(tmp_path):
    path = tmp_path / "scores.sqlite"
    for _ in range(3):
        began = FORKS.Event()
        process = FORKS.Process(target=add_until_killed, args=(path, began))
        process.start()
        assert began.wait(60)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        store = ScoreStore(path, "model")
        assert len(store) % 50 == 0 and len(store) >= 200, "each step's fifty, or none of them"
        steps = len(store) // 50
        numbers = np.arange(50 * steps)
        np.testing.assert_array_equal(store.find(numbers // 50, numbers), numbers / 7)
        store.close()


def open_together(path, barrier):
    barrier.wait(60)
    ScoreStore(path, "model").close()


def test_processes_that_begin_a_file_together_all_open_it(tmp_path):
    for attempt in range(4):
        barrier = FORKS.Barrier(6)
        path = tmp_path / f"{attempt}.sqlite"
        processes = [FORKS.Process(target=open_together, args=(path, barrier)) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 6


def add_own(path, first, done):
    store = ScoreStore(path, "model")
    for step in range(40):
        numbers = first + np.arange(20) + 20 * step
        store.add(np.zeros(20, dtype=np.int64), numbers, numbers * 1.0)
        assert not np.isnan(store.find(np.zeros(20), numbers)).any()
    done.set()


def test_two_processes_write_at_once(tmp_path):
    path, done = tmp_path / "scores.sqlite", [FORKS.Event() for _ in range(2)]
    # One half of what they add is the same.
    processes = [
        FORKS.Process(target=add_own, args=(path, first, each)) for first, each in zip((0, 400), done, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert all(each.is_set() for each in done) and [process.exitcode for process in processes] == [0, 0]
    store = ScoreStore(path, "model")
    assert len(store) == 1200
    np.testing.assert_array_equal(store.find(np.zeros(1200), np.arange(1200)), np.arange(1200.0))


def test_what_cannot_be_kept_or_compared_is_refused(corpus, tmp_path):
    with pytest.raises(InputError, match="pass identity='…'"):
        CrossEncoderTeacher(Counting(), corpus, tmp_path / "scores.sqlite")
    (tmp_path / "text").write_text("no database, but long enough to look like something else " * 100)
    with pytest.raises(TeacherError, match="holds no scores"):
        ScoreStore(tmp_path / "text", "model")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="cannot be kept there"):
        ScoreStore(tmp_path / "folder", "model")
    two = CrossEncoderTeacher(Counting(outputs=2), corpus)
    with pytest.raises(InputError, match="says 2 numbers of each pair, expected one"):
        two.scores(keys_of(corpus, [0]), torch.arange(2))
    broken = Counting()
    broken.predict = lambda pairs, **settings: np.full(len(pairs), np.nan)
    teacher = CrossEncoderTeacher(broken, corpus, tmp_path / "broken.sqlite", identity="broken")
    with pytest.raises(NonFiniteError, match="score is NaN or infinite"):
        teacher.scores(keys_of(corpus, [0]), torch.arange(2))
    assert len(teacher.store) == 0, "nothing of it is remembered"


def test_a_failed_write_leaves_what_was_there(tmp_path):
    store = ScoreStore(tmp_path / "scores.sqlite", "model")
    store.add([1], [1], np.array([0.5]))
    other = sqlite3.connect(tmp_path / "scores.sqlite")
    store._connected().execute("PRAGMA query_only = ON")
    with pytest.raises(StorageError, match=r"1 scores cannot be written .*Those before are kept"):
        store.add([2], [2], np.array([0.25]))
    store._connected().execute("PRAGMA query_only = OFF")
    store.add([3], [3], np.array([0.75]))
    np.testing.assert_array_equal(store.find([1, 2, 3], [1, 2, 3]), [0.5, np.nan, 0.75])
    other.close()
