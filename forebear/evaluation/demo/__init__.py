"""The demonstration: a generated corpus and the whole flow on it."""
