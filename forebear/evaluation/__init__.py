"""Experiments on an index: measures, retrainings, audits, perturbations, explanations, the demo, reports."""
