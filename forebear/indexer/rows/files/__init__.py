"""Data files of all formats, read as Arrow tables."""
