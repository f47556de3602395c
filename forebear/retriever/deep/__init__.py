"""Scores from gradients beyond the head: candidates from sketches, exact dots for these."""
