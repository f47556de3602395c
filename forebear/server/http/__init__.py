"""Requests and answers: what clients may send, what stands before the routes, and what they get."""
