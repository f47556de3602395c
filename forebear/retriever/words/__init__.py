"""Scores from words: gradients of word embeddings, and tf-idf."""
