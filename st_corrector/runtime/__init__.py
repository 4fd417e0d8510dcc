"""The machine: processes that train together, numeric precision, memory limits.

All processes call collectives in the same order, and all get the same result.
"""
