"""The corpus: every target that could be retrieved, in a fixed order, on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from sentence_transformers import SentenceTransformer

from ..errors import CorpusError, InputError
from ..storage.arrow import batched_tables, default_cache_dir, read_or_write_arrow
from ..storage.fingerprint import digest, digest_json
from .beir import RetrievalData, open_folder
from .beir_hub import open_repository
from .columns import (
    TARGETS,
    as_id,
    as_list,
    column_names,
    is_transformed,
    target_tables,
    write_by_content,
)
from .duplicates import TextDigests
from .growth import grown, moved
from .judging import MissingTargets, Sources, judged_queries, query_record, require_limit, require_missing, triples_of
from .own_questions import Question
from .pairs import PairReader, text_tables
from .qrels import Qrels
from .query_keys import query_keys
from .targets import WITHDRAWN, Targets
from .tokens import TextCorpus, TokenizedCorpus, tokenized
from .training_pairs import TrainingPairs

logger = logging.getLogger(__name__)

_QUERIES = pa.schema([("id", pa.string()), ("text", pa.string()), ("answers", pa.list_(pa.string()))])


class Corpus:
    """The ordered targets, by row ``0 … len(corpus) - 1``, and the judged queries of each split.

    Texts, ids and token ids are Arrow files, memory-mapped: a corpus of tens of millions of passages takes no memory.
    Use one of the constructors :meth:`from_texts`, :meth:`from_pairs`, :meth:`from_dataset`, :meth:`from_beir` and
    :meth:`from_hub`.

    Args:
        targets: columns ``id``, ``title`` (may be null) and ``text``, all strings; and ``withdrawn``, booleans, where
            some have been withdrawn (:meth:`extend`).
        qrels: judged queries by split name.
        prompt: precedes each target's text when it is encoded. ``None`` uses the model's own document prompt, as
            ``model.encode_document`` does; ``""`` means none.
        cache_dir: folder for Arrow files derived from the corpus.

    Raises:
        CorpusError: there are no targets, two share an id, or the columns are wrong.
    """

    def __init__(
        self,
        targets: Dataset | Targets,
        qrels: Mapping[str, Qrels] | None = None,
        prompt: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.cache_dir = _folder(cache_dir)
        """The folder of the Arrow files derived from the corpus."""
        self._targets = targets if isinstance(targets, Targets) else Targets(targets, self.cache_dir)
        self.prompt = prompt
        self.name: str | None = None
        """Its name in model cards and reports: set by constructors that know it, or by you."""
        self._qrels = dict(qrels or {})
        self._training_pairs = TrainingPairs(self)

    # ------------------------------------------------------------------ constructors

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        ids: Sequence[str | int] | None = None,
        titles: Sequence[str | None] | None = None,
        *,
        prompt: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Corpus:
        """A corpus of ``texts`` in their order.

        Args:
            texts: any iterable of strings; it is read once and need not fit in memory.
            ids: as many distinct strings, or integers, which stand for their digits (7 is ``"7"``); by default each
                target's row number.
            titles: as many titles or ``None``; see :func:`~st_corrector.data.text.join_title`.

        Raises:
            CorpusError: one string is given instead of several, the lengths differ, a text is not a string, or an id is
                neither a string nor an integer.
        """
        tables = text_tables(texts, ids, titles)
        return cls(write_by_content(tables, _folder(cache_dir)), prompt=prompt, cache_dir=cache_dir)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset | IterableDataset,
        text: str = "text",
        id: str | None = None,
        title: str | None = None,
        *,
        prompt: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Corpus:
        """A corpus from columns of any :class:`datasets.Dataset` or :class:`datasets.IterableDataset`.

        Args:
            dataset: each process reads a stream completely at each call. The same holds for a data set with a transform
                (``with_transform``), whose output is read.
            text, id, title: the columns' names; without ``id`` each target's row number is its id.

        Raises:
            CorpusError: a column is missing, ids are neither strings nor integers, or a text is null.
        """
        found = column_names(dataset)
        if WITHDRAWN in found:
            raise CorpusError(
                f"The dataset has the column {WITHDRAWN!r}, as the targets of a corpus have it: Corpus(dataset) reads "
                f"it. If it is something else, dataset.remove_columns({WITHDRAWN!r})."
            )
        for role, column in (("text", text), ("id", id), ("title", title)):
            if column is not None and column not in found:
                raise CorpusError(
                    f"The dataset has no column {column!r} for {role}; it has {found}. Say which one: "
                    f"from_dataset(dataset, {role}='…')."
                )
        folder, tables = _folder(cache_dir), target_tables(dataset, text, id, title)
        # A transform's output may change without the data set's fingerprint, for example with a lookup table.
        if isinstance(dataset, IterableDataset) or is_transformed(dataset):
            targets = write_by_content(tables, folder)
        else:
            columns = {"text": text} | ({} if id is None else {"id": id}) | ({} if title is None else {"title": title})
            path = folder / f"targets-{digest_json([dataset._fingerprint, columns])}.arrow"
            targets = read_or_write_arrow(path, TARGETS, tables)
        return cls(targets, prompt=prompt, cache_dir=cache_dir)

    @classmethod
    def from_pairs(
        cls,
        splits: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset],
        query: str = "anchor",
        positive: str = "positive",
        negatives: str | Sequence[str] = (),
        *,
        prompt: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Corpus:
        """A corpus from data sets of (query, positive) pairs or (query, positive, negative …) triplets: its targets are
        the distinct texts of all splits, in the order of their first appearance. Rows with the same query text are one
        query with several positives. The triplets' negatives are ordinary targets: the model chooses each step's
        negatives among all targets.

        It reads the outputs of :func:`~sentence_transformers.util.mine_hard_negatives`. A column ``label`` or
        ``labels`` says which texts of ``positive`` are relevant (1) and which are negatives (0), as in its
        ``labeled-pair`` and ``labeled-list``; a query without a relevant text is dropped. Anything else in such a
        column is refused, such as the corpus rows of :meth:`pairs`. Scores instead of labels are refused too, as they
        do not say what is relevant.

        Args:
            splits: split name → data set; a single data set is the split ``"train"``. Each process reads a stream
                completely at each call. A data set's transform (``with_transform``) is applied.
            query: the column of the queries' texts.
            positive: the column of the positives: a text, or a list of relevant texts.
            negatives: column or columns of further texts, or lists of texts; nulls are dropped.

        Raises:
            CorpusError: a split is not a data set, a column is missing, a row lacks its query or its positive, or
                labels or scores do not say which positives are relevant.
        """
        pairs = PairReader(splits, query, positive, as_list(negatives))
        corpus = cls(write_by_content(pairs.targets(), _folder(cache_dir)), prompt=prompt, cache_dir=cache_dir)
        for split, (queries, of_pair, row_of_pair) in pairs.judged.items():
            corpus._add_split(split, [query_record(text, text) for text in queries], of_pair, row_of_pair)
        return corpus

    @classmethod
    def from_beir(
        cls,
        folder: str | os.PathLike[str],
        *,
        max_targets: int | None = None,
        missing_targets: MissingTargets = "error",
        prompt: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Corpus:
        """A corpus from a folder in BEIR's layout: ``corpus.jsonl[.gz]`` (``_id``, ``text``, optional ``title``),
        ``queries.jsonl[.gz]`` (``_id``, ``text``, optional ``answers``) and ``qrels/<split>.tsv``.

        A target is relevant if its score is above 0, and the score is its grade; of a pair that is judged twice the
        highest counts.

        Args:
            max_targets: keep only the first N targets, and the judgements that point at them.
            missing_targets: judgements of targets that are not in the corpus (ArguAna has one) are an error, or dropped
                (``"drop"``) and counted in a warning. A query that loses all its judgements is dropped, too.

        Raises:
            CorpusError: a file is missing or malformed, or judgements name unknown queries or targets.
            InputError: ``missing_targets`` is something else, or ``max_targets`` is below 1.
        """
        missing_targets = require_missing(missing_targets)
        require_limit(max_targets)
        data = open_folder(Path(folder), max_targets)
        return cls._from_retrieval_data(data, max_targets, missing_targets, prompt, cache_dir)

    @classmethod
    def from_hub(
        cls,
        repo_id: str | os.PathLike[str],
        *,
        qrels: str | os.PathLike[str] | None = None,
        qrels_config: str | None = None,
        corpus_config: str = "corpus",
        queries_config: str = "queries",
        split: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        streaming: bool = False,
        max_targets: int | None = None,
        missing_targets: MissingTargets = "error",
        prompt: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Corpus:
        """A corpus from a retrieval data set on the Hub, such as ``mteb/nq``: the configs ``corpus`` (an id, ``text``,
        optional ``title``), ``queries`` (an id, ``text``, optional ``answers``), and ``qrels`` or ``default`` with the
        judgements (``query-id``, ``corpus-id``, ``score``), whose splits become this corpus's. A target is relevant if
        its score is above 0, and the score is its grade; of a pair that is judged twice the highest counts.

        Instead of judgements there may be triplets of ids or lists of ids with labels, as in
        ``Corpus.from_hub("sentence-transformers/msmarco", qrels_config="labeled-list")``. In a repository with several
        languages, as in MTEB, name one: ``corpus_config="en-corpus"``, ``queries_config="en-queries"``,
        ``qrels_config="en-qrels"``.

        Args:
            repo_id: the repository, or a local folder with such a repository's files.
            qrels: the repository (or folder) of the judgements, if it is a separate one, such as ``BeIR/nq-qrels`` for
                ``BeIR/nq``.
            qrels_config: the config of the judgements, if not the default.
            corpus_config: the config of the targets, if not the default.
            queries_config: the config of the queries, if not the default.
            split: read only the judgements of this split, and this split of targets and queries if they have several,
                as in MTEB's reranking data sets.
            revision: commit, branch or tag of ``repo_id``.
            token: by default the one that :mod:`huggingface_hub` finds.
            streaming: read without downloading the files first; the corpus is on disk either way.
            max_targets: keep only the first N targets, and the judgements that point at them.
            missing_targets: as for :meth:`from_beir`.

        Raises:
            CorpusError: a repository, config, split or column is missing or ambiguous, a value is invalid, or
                judgements name unknown queries or targets.
            InputError: ``missing_targets`` is something else, or ``max_targets`` is below 1.
        """
        missing_targets = require_missing(missing_targets)
        require_limit(max_targets)
        data = open_repository(
            os.fspath(repo_id),
            qrels=None if qrels is None else os.fspath(qrels),
            corpus_config=corpus_config,
            queries_config=queries_config,
            qrels_config=qrels_config,
            split=split,
            revision=revision,
            token=token,
            streaming=streaming,
            max_targets=max_targets,
        )
        return cls._from_retrieval_data(data, max_targets, missing_targets, prompt, cache_dir)

    @classmethod
    def _from_retrieval_data(
        cls,
        data: RetrievalData,
        max_targets: int | None,
        missing_targets: MissingTargets,
        prompt: str | None,
        cache_dir: str | os.PathLike[str] | None,
    ) -> Corpus:
        texts, answers, repeated = {}, {}, []
        for record in data.queries:
            if record["_id"] in texts:
                repeated.append(record["_id"])
            texts[record["_id"]], answers[record["_id"]] = record["text"], record["answers"]
        if repeated:
            raise CorpusError(
                f"{data.queries_source} of {data.name} has {len(repeated)} query ids more than once, e.g. "
                f"{repeated[:3]}: judgements find queries by id, so each needs its own."
            )
        # The targets' file is named after their source, so that a large corpus is read once.
        path = _folder(cache_dir) / f"targets-{data.targets_key}.arrow"
        corpus = cls(read_or_write_arrow(path, TARGETS, data.targets), prompt=prompt, cache_dir=cache_dir)
        corpus.name = data.name
        unjudged = set(texts)
        for split, source, triples in data.judgements:
            # Targets beyond the limit are missing on purpose.
            missing = missing_targets if max_targets is None else None
            sources = Sources(source, data.queries_source, data.targets_source)
            corpus._judge(split, triples, texts, answers, missing, sources)
            unjudged.difference_update(corpus.qrels(split).queries["id"])
        if unjudged:
            logger.info(
                "%d of %d queries have no relevant target in any split and are left out.", len(unjudged), len(texts)
            )
        return corpus

    def add_split(
        self,
        split: str,
        queries: Mapping[Any, str],
        relevant: Mapping[Any, str | int | Iterable[str | int] | Mapping[Any, float]],
        answers: Mapping[Any, str | Sequence[str]] | None = None,
        *,
        missing_targets: MissingTargets = "error",
    ) -> None:
        """Add (or replace) the judged queries of ``split``. Ids are strings; an integer stands for its digits.

        Args:
            queries: query id → text.
            relevant: query id → ids of the targets that are relevant to it, a single id, or BEIR's {id: grade}, where
                grades above 0 are relevant. Queries without a relevant target are dropped.
            answers: query id → one or more answer strings, for question answering.
            missing_targets: as for :meth:`from_beir`.

        Raises:
            CorpusError: a judged query is not in ``queries``, a target is not in the corpus, a grade is not a finite
                number, or an id is neither a string nor an integer.
            InputError: ``missing_targets`` is something else.
        """
        texts = {as_id(id, "The id of a query"): text for id, text in queries.items()}
        if len(texts) < len(queries):
            raise CorpusError("Two queries share an id, once as an integer and once as a string: give each its own.")
        for id, text in texts.items():
            if not isinstance(text, str):
                raise CorpusError(
                    f"The text of query {id!r} is a {type(text).__name__}, expected a string: {text!r:.60}"
                )
        given = {
            as_id(id, "The id of a query"): [] if strings is None else as_list(strings)
            for id, strings in (answers or {}).items()
        }
        sources = Sources(f"Split {split!r}", "`queries`", "the corpus")
        self._judge(split, triples_of(relevant), texts, given, require_missing(missing_targets), sources)

    def _judge(
        self,
        split: str,
        triples: Iterable[tuple[str, str, float]],
        texts: Mapping[str, str],
        answers: Mapping[str, Sequence[str]],
        missing: MissingTargets | None,
        sources: Sources,
    ) -> None:
        """Add a split of (query id, target id, grade) triples; see :func:`judged_queries`."""
        self._add_split(split, *judged_queries(triples, texts, answers, self.rows_of, missing, sources))

    def extend(
        self,
        texts: Iterable[str],
        ids: Sequence[str | int] | None = None,
        titles: Sequence[str | None] | None = None,
        *,
        withdrawn: Iterable[str | int] = (),
    ) -> Corpus:
        """This corpus with more targets behind its own, whose rows stay what they are; this one stays as it is, too.

        A text whose id is known and which has not changed is left out, so that tonight's whole export may be given
        again and again. One that has changed becomes a new target, and the earlier one is withdrawn: its row stays, and
        is never selected, mined or ranked. The splits come along. Judgements follow an id; those of a target that is
        withdrawn for good are dropped, and so are queries that lose all of theirs.

        Then :meth:`EmbeddingCache.extend` encodes what is new. ``corpus.targets.save_to_disk(path)`` keeps the result;
        ``Corpus(datasets.load_from_disk(path))`` reads it.

        Args:
            texts, ids, titles: as for :meth:`from_texts`; without ``ids`` each target's row number is its id.
            withdrawn: ids of targets that are no longer there.

        Raises:
            CorpusError: an id occurs twice, an id to withdraw is not in the corpus or is also among ``ids``, no target
                would be left, or what :meth:`from_texts` raises.
        """
        targets, row_now = grown(self._targets, self.cache_dir, texts, ids, titles, withdrawn)
        corpus = Corpus(targets, prompt=self.prompt, cache_dir=self.cache_dir)
        corpus.name = self.name
        for split, qrels in self._qrels.items():
            records, query, row, grade = moved(qrels, row_now, split)
            corpus._add_split(split, records, query, row, grade)
        return corpus

    def hold_out(self, queries: int, split: str = "train", into: str = "dev", seed: int = 0) -> None:
        """Move ``queries`` random queries of the split into a new split. The targets stay the same.

        Raises:
            CorpusError: the split does not have more queries than that, or is missing; or the new split exists already.
        """
        qrels = self.qrels(split)
        if into in self._qrels:
            raise CorpusError(f"There is a split {into!r} already: nothing is held out into it.")
        if not 0 < queries < len(qrels):
            raise CorpusError(
                f"{queries} queries cannot be held out of the {len(qrels)} of split {split!r}: at least one, not all."
            )
        held_out = np.zeros(len(qrels), dtype=bool)
        held_out[np.random.default_rng(seed).choice(len(qrels), queries, replace=False)] = True
        for name, kept in ((into, held_out), (split, ~held_out)):
            pairs, number = kept[qrels.query], np.cumsum(kept) - 1
            records = qrels.queries.select(np.flatnonzero(kept)).to_list()
            self._add_split(name, records, number[qrels.query[pairs]], qrels.row[pairs], qrels.grade[pairs])

    def _add_split(
        self,
        split: str,
        queries: list[dict[str, Any]],
        query_of_pair: Sequence[int] | np.ndarray,
        row_of_pair: Sequence[int] | np.ndarray,
        grade_of_pair: np.ndarray | None = None,
    ) -> None:
        """Add the split's ``queries``, and their judgements by the query's position, the target's row and its grade."""
        path = self.cache_dir / f"queries-{digest_json([split, queries])}.arrow"
        self._qrels[split] = Qrels(
            read_or_write_arrow(path, _QUERIES, batched_tables(queries, _QUERIES)),
            query_of_pair,
            row_of_pair,
            grade_of_pair,
            self.rows_like,
        )

    # ------------------------------------------------------------------ rows, ids, texts

    @property
    def targets(self) -> Dataset:
        """The targets with their columns, which ``save_to_disk`` writes and ``Corpus(load_from_disk(…))`` reads."""
        return self._targets.dataset

    @property
    def is_withdrawn(self) -> np.ndarray | None:
        """Which rows have been withdrawn (:meth:`extend`), bool ``(N,)``; None if there are none."""
        return self._targets.is_withdrawn

    @property
    def withdrawn(self) -> np.ndarray:
        """The rows of targets that have been withdrawn (:meth:`extend`), ascending, int64: they are never selected."""
        return self._targets.withdrawn

    @property
    def withdrawn_digest(self) -> str | None:
        """Tells which rows have been withdrawn, for comparison; None if there are none."""
        return digest(self.withdrawn.tobytes()) if len(self.withdrawn) else None

    @property
    def digests(self) -> TextDigests:
        """Of the targets' texts, by which equal ones are found."""
        return self._targets.digests

    def __len__(self) -> int:
        """The number of rows, those of withdrawn targets among them."""
        return len(self._targets)

    def __repr__(self) -> str:
        withdrawn = [f"{len(self.withdrawn):,} of them withdrawn"] if len(self.withdrawn) else []
        splits = [f"{name}: {len(qrels)} queries" for name, qrels in self._qrels.items()]
        told = "; ".join(each for each in (", ".join(withdrawn), ", ".join(splits)) if each)
        return f"Corpus({len(self):,} targets{'; ' + told if told else ''})"

    def __getitem__(self, row: int) -> dict[str, str | None]:
        """``{"id", "title", "text"}`` of one row."""
        return self._targets[row]

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of ``rows``: integers, or a mask over all targets, such as ``~corpus.is_withdrawn``."""
        return self._targets.ids(rows)

    def rows_of(self, ids: Sequence[str | int], missing: int | None = None) -> np.ndarray:
        """The rows of ``ids``, shape ``(len(ids),)``, in one pass over the id column.

        Args:
            ids: strings, or integers, which stand for their digits; a single string is one id.
            missing: the row for an unknown id, or that of a withdrawn target; by default it is an error.

        Raises:
            CorpusError: an id is not in the corpus and ``missing`` is not given, or it is neither a string nor an
                integer.
        """
        return self._targets.rows_of(ids, missing)

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The texts of ``rows``, see :meth:`ids`, as they are encoded (title joined in, without the prompt)."""
        return self._targets.texts(rows)

    def text_lengths(self) -> np.ndarray:
        """The length of every target's text in bytes, shape ``(N,)``."""
        return self._targets.text_lengths()

    # ------------------------------------------------------------------ identity and duplicates

    @property
    def fingerprint(self) -> str:
        """A digest of the joined texts in order, on which an embedding cache of this corpus depends."""
        return self.digests.fingerprint

    def fingerprint_of(self, rows: int) -> str:
        """The fingerprint of a corpus of the first ``rows`` targets, which this one may have grown from."""
        return self.digests.fingerprint_of(rows)

    def require_rows(self, what: str, rows: int, fingerprint: str | None = None) -> None:
        """Refuse embeddings that are not of these targets in their order.

        Args:
            what: they are called so in the error.
            rows: how many there are.
            fingerprint: of the corpus that they were made of, if that is known.

        Raises:
            InputError: they are of another corpus.
        """
        if rows != len(self):
            raise InputError(
                f"{what} has {rows:,} rows, the corpus {len(self):,} targets, and row i must be target i: pass the "
                "corpus that it was made of (max_targets takes the first ones), or make it again of this one."
            )
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise InputError(
                f"{what} is of a corpus of as many, but other texts, or of the same in another order: pass the corpus "
                "that it was made of, or make it again of this one."
            )

    def text_digests(self, rows: np.ndarray) -> np.ndarray:
        """64 bits of the hash of the joined text of each of ``rows``, int64, by which a text is known in any corpus."""
        return self.digests.of(rows)

    def duplicates_of(self, row: int) -> np.ndarray:
        """All rows with the same joined text as ``row``, itself included, ascending, ignoring case, white space and
        Unicode form (:func:`~st_corrector.data.text.normalized`)."""
        return self.digests.repeated.get(int(row), np.array([row], dtype=np.int64))

    def rows_like(self, texts: Sequence[str]) -> list[np.ndarray]:
        """For each of ``texts``, the rows with the same text, with or without their title, ascending, ignoring case,
        white space and Unicode form."""
        return self.digests.rows_like(texts)

    # ------------------------------------------------------------------ queries

    @property
    def splits(self) -> list[str]:
        """The names of the splits that have judged queries."""
        return list(self._qrels)

    def qrels(self, split: str) -> Qrels:
        """The judged queries of ``split``.

        Raises:
            CorpusError: there is no such split.
        """
        if split not in self._qrels:
            raise CorpusError(
                f"The corpus has no judgements for split {split!r}; it has {self.splits or 'none at all'}."
            )
        return self._qrels[split]

    def pairs(self, split: str) -> Dataset:
        """The training data of ``split``: one row per (query, positive) judgement, with the columns ``anchor``,
        ``positive`` (the target's joined text, without the prompt) and ``label``.

        ``label`` is ``[row, key]``: the positive's corpus row, and by what a loss knows the query
        (:func:`.query_keys`). Any sentence-transformers trainer passes this column to the loss.
        """
        return self._training_pairs.of_split(split)

    def own_pairs(
        self, count: int | None = None, question: Question | None = None, split: str = "train", seed: int = 0
    ) -> Dataset:
        """Training data that the corpus brings with it: targets that no question of ``split`` asks for, each with a
        question of its own, as :meth:`pairs` has them. Add them to these
        (:func:`datasets.concatenate_datasets`), or let ``own_pairs_share`` of
        :class:`~st_corrector.CorrectorTrainingArguments` do it.

        They are drawn at random from all such targets; other splits have no part in it. In training, targets that share
        a question (passages of one article) are not one another's negatives.

        Args:
            count: how many targets, at most; by default all.
            question: ``"title"``, ``"first_sentence"``, one string (or None) for each target, or a function of
                ``{"id", "title", "text"}`` that returns a string or None. By default the title where targets have
                titles, else the first sentence.
            split: the split that is trained on.
            seed: of the draw; the first ones are the same for every ``count``.

        Raises:
            CorpusError: there is no such split, no target has a question, or the function returns something else.
        """
        return self._training_pairs.own(count, question, split, seed)

    def labels(
        self,
        ids: Sequence[str | int],
        anchors: Sequence[str],
        negatives: Sequence[str | int | Sequence[str | int]] | None = None,
    ) -> list[list[int]]:
        """The column ``label`` for a data set of your own: ``[row, key]`` of each pair, as in :meth:`pairs`, and then
        the rows of negatives of your own, padded with −1.

        Args:
            ids: of the positives.
            anchors: the queries, as many.
            negatives: ids of targets that are negatives of each query, whatever is chosen besides: for each a list,
                which may be empty, or one id.

        Raises:
            CorpusError: an id is not in the corpus, there are not as many queries or lists, or a positive is its own
                negative.
        """
        rows, keys = self.rows_of(ids), query_keys(anchors)
        if len(rows) != len(keys) or (negatives is not None and len(rows) != len(negatives)):
            and_lists = "" if negatives is None else f" and {len(negatives)} lists of negatives"
            raise CorpusError(f"{len(rows)} ids, {len(keys)} anchors{and_lists}: give one of each for every pair.")
        columns = [rows, keys]
        if negatives is not None:
            lists = [as_list(each) for each in negatives]
            counts = [len(each) for each in lists]
            padded = np.full((len(rows), max(counts, default=0)), -1, dtype=np.int64)
            padded[np.arange(padded.shape[1]) < np.array(counts)[:, None]] = self.rows_of(
                [id for each in lists for id in each]
            )
            if (own := (padded == rows[:, None]).any(1)).any():
                at = np.flatnonzero(own)
                raise CorpusError(
                    f"{len(at)} pairs have their positive among their negatives, e.g. {ids[int(at[0])]!r} of "
                    f"{anchors[int(at[0])]!r:.60}: leave it out of one of both."
                )
            columns += list(padded.T)
        labels: list[list[int]] = np.stack(columns, axis=1).tolist()
        return labels

    def relevant_to_own(self, key: int) -> np.ndarray:
        """The rows that have the own question with this key (:meth:`own_pairs`), and those whose text it is, ascending.

        Raises:
            CorpusError: this corpus has not been asked for such questions.
        """
        return self._training_pairs.relevant_to_own(key)

    def with_prompt(self, prompt: str | None) -> Corpus:
        """The same targets with another prompt, without the splits."""
        return Corpus(self._targets, prompt=prompt, cache_dir=self.cache_dir)

    # ------------------------------------------------------------------ tokens

    def tokenize(
        self, model: SentenceTransformer, prompt: str | None = None, progress: bool = True
    ) -> TokenizedCorpus | TextCorpus:
        """The token ids of every target under ``model``'s tokenizer, prepared once and kept on disk.

        What :meth:`~st_corrector.data.tokens.TokenizedCorpus.features` returns equals
        ``model.preprocess(texts, prompt=prompt, task="document")``. If rows of token ids cannot give that, the texts
        are tokenized again at each step.

        Args:
            prompt: precedes each text (already resolved: ``None`` and ``""`` mean no prompt).
            progress: show a progress bar while the ids are prepared.

        Raises:
            InputError: a Router has no route for documents.
        """
        return tokenized(self, model, prompt, progress)


def _folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    return default_cache_dir() if cache_dir is None else Path(cache_dir)
