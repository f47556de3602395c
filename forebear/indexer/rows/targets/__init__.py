"""The label column of a source: one label a row, several, or numbers."""
