"""Questions of clients over HTTP: one process that holds indexes and models open, and answers many at once."""
