"""Training rows changed word by word, and what retraining on them does."""
