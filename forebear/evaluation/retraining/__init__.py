"""Measures that retrain the classifier without some rows."""
