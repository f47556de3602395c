"""Spans of a text: found, masked, and stored with their rows' gradients."""
