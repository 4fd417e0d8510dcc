"""Hard negatives for other trainers.

In: a model, a corpus, a cache with or without a corrector. Out: data sets in sentence-transformers' formats, as Parquet
files that are written whole or not at all. What is found is what a training step would choose.
"""

from .formats import MinedFormat
from .mine import load_mined, mine_negatives, push_mined

__all__ = ["MinedFormat", "load_mined", "mine_negatives", "push_mined"]
