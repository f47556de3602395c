"""The classifier: its tokenizer, its head, its layers, and its forward pass."""
