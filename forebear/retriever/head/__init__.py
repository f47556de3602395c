"""Scores from features and residuals of the final layer, which factorise exactly."""
