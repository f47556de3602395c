"""Audits of a model beside an earlier version of it."""
