"""What is trained on: targets, queries and judgements from any layout, as texts and as tokens; and how a model encodes
a document.

Readers in, a :class:`~st_corrector.Corpus` out. A target is known by its row, 0 … N − 1, everywhere above; its
embedding is always that of :class:`~.encoding.DocumentEncoder`, which equals ``model.encode_document``.
"""
