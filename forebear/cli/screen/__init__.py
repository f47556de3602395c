"""What is printed: messages, progress, tables, answers."""
