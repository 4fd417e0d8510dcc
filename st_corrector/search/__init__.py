"""Search of the corrected corpus: correct, score, select, in one pass over the cache.

Queries and a corrector in, rows and scores out. Every way (strips on a CPU, a fused kernel, several processes) finds
what the naive search finds; a shortlist alone may miss some, and measures its recall.
"""
