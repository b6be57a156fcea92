"""The first rows that prompts share, and the key by which a decoder may keep them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SharedRows:
    """How much of a prompt is shared, and with whom."""

    key: int
    """The same for prompts whose first `count` rows are the same."""
    count: int
