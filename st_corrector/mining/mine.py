"""Hard negatives for other trainers: chosen as the loss chooses them, written in sentence-transformers' formats."""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from ..cache.embedding_cache import EmbeddingCache
from ..correctors import Corrector
from ..data.corpus import Corpus
from ..errors import InputError
from ..losses.corrected_corpus import CorrectedCorpus
from ..negatives.settings import NegativeSettings
from ..storage.files import make_folder, whole
from ..storage.fingerprint import differences
from ..storage.hub import push_folder
from .formats import Formats, MinedFormat
from .miner import Miner

_MANIFEST = "mined.json"
_PART = "mined-{:05d}.parquet"
_PARTS = re.compile(r"mined-\d{5}\.parquet")
_QUERIES = 2_048  # of a part, which is written whole or not at all
_AT_ONCE = 64  # queries of one search


def mine_negatives(
    model: SentenceTransformer,
    corpus: Corpus,
    cache: EmbeddingCache | CorrectedCorpus,
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    corrector: Corrector | None = None,
    negatives: NegativeSettings | None = None,
    output_format: MinedFormat = "triplet",
    output_scores: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """The hardest negatives of every query of a split, for any trainer: without re-embedding the corpus, with the
    sampler, the false-negative rules and the checks of the loss.

    What comes out is what :func:`sentence_transformers.util.mine_hard_negatives` makes, and trains in a
    ``MultipleNegativesRankingLoss`` or a ``CrossEncoderTrainer``. A query is mined once, whatever its number of
    positives; margins hold below the one of them that scores lowest. The folder holds Parquet files of 2,048 queries
    each; if interrupted, the same call goes on, and a call that finds all of them reads them. Memory does not grow with
    the number of queries.

    Args:
        model: encodes the queries.
        corpus: the targets, with the split's judgements.
        cache: embeddings of all targets: those of ``model``, with which ``corrector`` is left out; those of an earlier
            state of it, with the corrector that training has left (:meth:`Corrector.from_pretrained`); or
            ``loss.corrected`` of a training that is under way.
        path: a folder for the files.
        split: whose queries.
        corrector: maps the cache to what ``model`` would say now.
        negatives: how many, by which sampler and rules; ``share_negatives``, ``in_batch_negatives`` and hardness have
            no part in it.
        output_format: the columns. ``"triplet"``: ``anchor``, ``positive``, ``negative``, a row for each negative;
            ``"n-tuple"``: ``negative_1`` … ``negative_k``, without queries that have fewer; ``"labeled-pair"``:
            ``anchor``, ``positive``, ``label``, where 0 is a negative; ``"labeled-list"``: the same with lists, a row
            for each query, ``labels``; ``"ids"``: ``query-id``, ``positive-id`` and the list ``negative-ids``.
        output_scores: add the model's similarities: ``scores``, of the positive and then the negatives; in the labeled
            formats ``score`` or ``scores`` instead of labels.
        batch_size: texts in one forward pass.
        seed: of samplers that draw.
        progress: show a progress bar.

    Returns:
        The data set, memory-mapped.

    Raises:
        InputError: the format is unknown; the cache is of another corpus or model; a corrector is given for a corrected
            corpus; or the folder holds what was mined otherwise.
        StorageError: the folder cannot be written.
    """
    if output_format not in get_args(MinedFormat):
        raise InputError(f"output_format must be one of {', '.join(get_args(MinedFormat))}, got {output_format!r}.")
    settings = negatives or NegativeSettings(num_negatives=3)
    if settings.num_negatives < 1:
        raise InputError("num_negatives=0 mines nothing: ask for at least one negative.")
    miner = Miner(model, corpus, cache, corrector, settings, split, batch_size)
    folder = Path(path)
    make_folder(folder)
    how = {"format": output_format, "scores": output_scores, "seed": seed, "parts": -(-len(miner.qrels) // _QUERIES)}
    _require_same(folder, {**miner.fingerprint, **how})
    formats = Formats(corpus, miner.qrels, settings.num_negatives, output_scores)
    count = len(miner.qrels)
    with tqdm(total=count, desc="Mining negatives", unit=" queries", disable=not progress) as bar:
        for number, start in enumerate(range(0, count, _QUERIES)):
            end, part = min(start + _QUERIES, count), folder / _PART.format(number)
            if not part.exists():
                # Each part draws by itself, so that a run that goes on draws what it would have drawn.
                with torch.random.fork_rng(devices=[]):
                    # Of the CPU alone: torch.manual_seed would seed the GPUs of a training that is under way.
                    torch.default_generator.manual_seed(seed * 1_000_003 + number)
                    batches = (np.arange(n, min(n + _AT_ONCE, end)) for n in range(start, end, _AT_ONCE))
                    found = [mined for queries in batches for mined in miner.mine(queries)]
                with whole(part) as partial:
                    pq.write_table(formats.table(found, output_format), partial)
            bar.update(end - start)
    return load_mined(folder)


def load_mined(path: str | os.PathLike[str]) -> Dataset:
    """What :func:`mine_negatives` has written into a folder, memory-mapped.

    Raises:
        InputError: there is nothing of the kind, or not all of it.
    """
    files = sorted(str(file) for file in Path(path).glob("mined-*.parquet") if _PARTS.fullmatch(file.name))
    if not files:
        raise InputError(f"{path} holds no mined negatives: mine_negatives(…, path) writes them.")
    parts = json.loads((Path(path) / _MANIFEST).read_text(encoding="utf-8"))["parts"]
    if len(files) < parts:
        raise InputError(f"{path} holds {len(files)} of {parts} files: the same mine_negatives(…, path) goes on.")
    found = Dataset.from_parquet([glob.escape(file) for file in files])
    assert isinstance(found, Dataset)
    return found


def push_mined(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
) -> str:
    """Upload what :func:`mine_negatives` has written, with a card that says how it was mined; the commit's address.

    Raises:
        InputError: there is nothing of the kind.
    """
    folder, found = Path(path), load_mined(path)
    how = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    return push_folder(
        folder,
        repo_id,
        repo_type="dataset",
        card=_card(how, found),
        commit_message=f"Hard negatives, {len(found):,} rows",
        private=private,
        token=token,
        revision=revision,
        instead_of=["mined-*.parquet", _MANIFEST],
    )


def _require_same(folder: Path, how: dict[str, Any]) -> None:
    """Refuse a folder that holds what was mined otherwise; note in an empty one how it is mined."""
    path = folder / _MANIFEST
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if different := differences(found, how):
            raise InputError(
                f"{folder} holds negatives that were mined otherwise:\n  "
                + "\n  ".join(different)
                + "\nChoose another "
                "folder, or delete this one."
            )
        return
    with whole(path) as partial:
        partial.write_text(json.dumps(how, indent=1) + "\n", encoding="utf-8")


def _card(how: dict[str, Any], found: Dataset) -> str:
    """The data set's card."""
    return f"""---
tags:
- sentence-transformers
- hard-negatives
configs:
- config_name: default
  data_files: mined-*.parquet
---

# Hard negatives

{len(found):,} rows with the columns {", ".join(f"`{name}`" for name in found.column_names)}, in the format `{how["format"]}` of sentence-transformers' `mine_hard_negatives`. They were chosen from the whole corpus by [st-corrector](https://github.com/st-corrector/st-corrector) with `{how["negatives"]}`.

```python
from datasets import load_dataset

dataset = load_dataset("…", split="train")
```
"""  # noqa: E501
