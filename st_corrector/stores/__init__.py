"""Where served embeddings are: files, FAISS indices, and vector stores that are upgraded while they serve.

An address in, a reader out. Rows are those of the corpus; in a store they are found by its ids.
"""
