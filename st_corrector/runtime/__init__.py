"""The machine: the processes that train together, numeric precision, what fits into memory.

Collectives are called by all processes in the same order, and all of them get the same.
"""
