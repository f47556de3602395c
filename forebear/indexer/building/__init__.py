"""Building an index, changing it, calibrating it and checking it."""
