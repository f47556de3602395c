"""Facts about a bare transformers network and its tokenizer, found by structure or by running it on a text."""
