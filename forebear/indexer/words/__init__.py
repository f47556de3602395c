"""Gradients with respect to word embeddings, and the store that lists them by word."""
