"""The first rows that prompts share, and the key under which a decoder may keep them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SharedRows:
    """How many rows of a prompt are shared, and with which prompts."""

    key: int
    """Equal for prompts whose first `count` rows are the same."""
    count: int
