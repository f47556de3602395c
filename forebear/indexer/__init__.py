"""What owns the model: data, training, the pass over the training rows, curvature, the stored index."""
