"""Reporting of a run: its record, the model card, the report, their charts.

A record in, text and figures out; they contain only what was measured.
"""
