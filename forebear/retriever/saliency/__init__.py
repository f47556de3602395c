"""Which words of the query a prediction rests on, and gradients of that saliency."""
