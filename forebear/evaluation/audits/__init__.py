"""Audits of a model and of its training rows."""
