"""Files: written whole or not at all, locked, fetched from and pushed to the Hub; Arrow tables; digests of contents.

Nothing here knows what a model or a corpus is. A process killed while writing leaves nothing that looks complete.
"""
