"""Answers from trained models: loading, decoding, streaming."""
