"""Training data: targets, queries and judgements from any layout, as texts and as tokens; and how a model encodes a
document.

Readers in, a :class:`~st_corrector.Corpus` out. All higher wings identify a target by its row, 0 … N − 1; its embedding
always comes from :class:`~.encoding.DocumentEncoder`, which equals ``model.encode_document``.
"""
