"""Effects: what happens to a prediction, in nats, if training rows are left out and the model is fitted again."""
