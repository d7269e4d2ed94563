"""Answers during training, and what they are worth."""
