"""Rows of text with labels, read from files, folders, the hub and Python lists."""
