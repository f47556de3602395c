"""Indexes on a model hub: the folder that is published, with its card, and the way there and back."""
