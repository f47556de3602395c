"""Short codes of long gradients, and the candidates that they propose."""
