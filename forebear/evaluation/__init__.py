"""What owns the experiments: metrics, audits, the demo, reports."""
