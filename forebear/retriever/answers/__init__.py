"""What comes back: tables of results, the file they are written to, score matrices, signs."""
