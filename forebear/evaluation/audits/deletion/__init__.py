"""``audit deletion``: what leaving training rows out would change."""
