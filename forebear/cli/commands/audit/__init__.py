"""The commands of ``forebear audit``."""
