"""Scores of spans of a row: what changes when the span is masked."""
