"""The linear datamodeling score: draws of rows, scores of methods and baselines, the measure, its report."""
