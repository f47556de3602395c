"""Predicted effects against those of models trained again."""
