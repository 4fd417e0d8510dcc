"""Stale embeddings of all targets: built, resumed, verified, repaired, read in shards, shared on the Hub.

A model and a corpus in, an :class:`~st_corrector.EmbeddingCache` out; its fingerprint says what it was made from. A
cache never changes while a model trains.
"""
