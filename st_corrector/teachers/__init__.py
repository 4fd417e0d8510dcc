"""Teachers: models that say how relevant a target is to a query, by which the encoder that is trained is taught.

In: keys of queries and corpus rows. Out: scores. A teacher does not change during a run, and a step reads nothing of
the size of the corpus.
"""

from .base import AverageTeacher, Teacher
from .cross_encoder import CrossEncoderTeacher
from .embedding import EmbeddingTeacher

__all__ = ["AverageTeacher", "CrossEncoderTeacher", "EmbeddingTeacher", "Teacher"]
