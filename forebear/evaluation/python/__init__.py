"""What Python callers import: explanations, saliency, audits and evaluations as functions."""
