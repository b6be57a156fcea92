"""The beginning that prompts have in common: what a prompt says of it, and a decoder may keep it by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SharedRows:
    """How much of a prompt is shared, and with whom."""

    key: int
    """The same for prompts whose first `count` rows are the same."""
    count: int
