"""Which of what the search finds become a batch's negatives: filters of false negatives, and the selector.

Known positives, and what has a query's own text, are never among them.
"""
