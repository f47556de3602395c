"""Measures of attribution methods that retrain nothing."""
