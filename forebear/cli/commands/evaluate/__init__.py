"""The commands of ``forebear evaluate``."""
