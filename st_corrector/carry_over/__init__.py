"""Served embeddings of an earlier model, mapped to a newer one's without encoding the corpus again.

Files of vectors or a FAISS index in, the same kind of file out: every vector stays in its place, or the input is
refused before any computation.
"""
