"""Prompt rows to codes: decoder backends and their KV cache."""
