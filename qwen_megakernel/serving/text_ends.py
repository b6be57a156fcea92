"""Whether a piece of text ends a sentence or a clause. Standard library only."""

from __future__ import annotations

import re

_CLOSING = r"[\"'”’)\]»]*\s*$"
SENTENCE_END = re.compile(rf"[.!?…。！？]{_CLOSING}")
CLAUSE_END = re.compile(rf"[.!?…。！？,;:，、；：]{_CLOSING}")
