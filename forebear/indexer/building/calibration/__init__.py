"""Candidates that a recall takes: measured when an index is built."""
