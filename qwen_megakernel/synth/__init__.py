"""Checkpoints of random weights in the official layout."""
