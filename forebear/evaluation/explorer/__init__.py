"""The explorer: test rows, what is behind each prediction, and what each training row drives, in a browser."""
