"""Search of the corrected corpus: correct, score, select, in one pass over the cache.

Queries and a corrector in, rows and scores out. Every method (strips on a CPU, a fused kernel, several processes) finds
what the naive search finds. Only a shortlist may miss some; it measures its recall.
"""
