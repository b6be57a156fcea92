"""Join the halves of surrogate pairs, which broken token streams contain: they are not valid Unicode."""

from __future__ import annotations

import re

REPLACEMENT = "\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIRST_HALF = re.compile("[\ud800-\udbff]$")


def repair(text: str) -> str:
    """The text with the halves of each pair joined. A single half becomes U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class SurrogateJoiner:
    """Repairs text that comes in pieces: a pair may begin in one piece and end in the next."""

    def __init__(self) -> None:
        self._half = ""

    def join(self, text: str) -> str:
        """The next piece, repaired. A first half at its end waits for the following piece."""
        text = self._half + text
        match = _FIRST_HALF.search(text)
        self._half = match[0] if match else ""
        return repair(text.removesuffix(self._half))

    def end(self) -> str:
        """The rest if no piece follows: U+FFFD for a half that waits, else an empty text."""
        half, self._half = self._half, ""
        return REPLACEMENT if half else ""
