"""Labels of pairs, as corpus.pairs makes them."""

from st_corrector.data.query_keys import query_keys


def label(row, query):
    """What a pair of this positive and query is labelled with."""
    return [row, int(query_keys([query])[0])]


def rows_in(pairs):
    """The positives' rows of a data set of pairs."""
    return [row for row, _ in pairs["label"][:]]
