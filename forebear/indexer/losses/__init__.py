"""What a model was trained to minimise: losses of logits and targets, their derivatives, and how they are stored."""
