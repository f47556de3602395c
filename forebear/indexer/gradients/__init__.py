"""Gradients of single rows from one backward pass over a batch."""
