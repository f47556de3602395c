"""`audit poison`: phrases that plant a behaviour."""
