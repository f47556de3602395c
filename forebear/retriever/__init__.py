"""What owns the question: the method table, query vectors, searches, exact scores."""
