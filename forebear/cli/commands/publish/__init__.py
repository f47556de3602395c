"""Commands by which others come to an index."""
