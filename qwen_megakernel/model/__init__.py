"""Talker and code predictor in PyTorch, and how codes are drawn."""
