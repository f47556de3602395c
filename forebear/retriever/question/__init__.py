"""What is asked: the table of methods, the choices of a question, the models and the inverse curvature."""
