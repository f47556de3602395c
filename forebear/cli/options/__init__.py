"""Options that several commands share, as typed groups."""
