"""What is told of a run: its record, the model card, the report, their charts.

A record in, text and figures out; what was not measured is not in them.
"""
