"""Fine-tuning a classifier, and the folder that a training run leaves."""
