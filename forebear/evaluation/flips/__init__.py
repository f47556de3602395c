"""Flip sets: the fewest training rows whose removal, or relabelling, changes a prediction."""
