"""Estimate when each word is heard: the model does not say where in the audio a word is.

A segment's words are spread over its audio by how long their letters take to say. While its duration
is not known, the pace of this voice's earlier segments gives the times. With these times a client can
keep, after an interruption, about the words that were heard and not the whole reply.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from qwen_megakernel.serving.spoken_text import Pause, Said, Span

_KANA_HAN = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_UNSPACED = re.compile(_KANA_HAN)
_WORD = re.compile(rf"{_KANA_HAN}[^\w\s]*|(?:(?!{_KANA_HAN})\S)+")
_EXTRA_WEIGHT = (
    (_UNSPACED, 2.0),
    (re.compile(r"[\uac00-\ud7af]"), 1.5),  # Hangul syllables
    (re.compile(r"\d"), 2.0),
    (re.compile(r"[.!?。！？…]"), 4.0),
    (re.compile(r"[,;:，、；：]"), 2.0),
)
FIRST_GUESS = 14.0
"""Letters a second that are assumed before a voice's first segment."""
_FORGET = 0.8
_SHORTEST_S = 0.01
"""Beside pauses, less than this is rounding."""
LEAD_S = 0.1
"""The last word begins at least so many seconds before the end of a segment's audio. Transports finish
some 40 ms before the end is heard, and clients move words that come later to the next reply."""


@dataclass(frozen=True, slots=True)
class TimedWord:
    """A word and its estimated time."""

    text: str
    time_s: float
    """When it begins, in seconds of its context's audio."""
    end_s: float
    """When it ends, in seconds of its context's audio."""
    spaced: bool
    """Whether its script puts spaces between words."""


@dataclass(slots=True)
class Pace:
    """How fast a voice speaks, learned from its finished segments."""

    _units: float = FIRST_GUESS
    _seconds: float = 1.0

    @property
    def units_per_s(self) -> float:
        """Letters a second; see `weight`."""
        return self._units / self._seconds

    def learn(self, units: float, seconds: float) -> None:
        """Add a finished segment. Older ones lose weight."""
        if units > 0 and seconds > 0:
            self._units = _FORGET * self._units + units
            self._seconds = _FORGET * self._seconds + seconds


def weight(text: str) -> float:
    """How long a text takes to say, in letters. Digits, syllable signs and pauses count for more."""
    return len(text) + sum(extra * len(kind.findall(text)) for kind, extra in _EXTRA_WEIGHT)


@dataclass(frozen=True, slots=True)
class _More:
    """What is said before a position of a segment's text and is not written there."""

    position: int
    units: float = 0.0
    """Letters that a word takes beyond its own."""
    pause_s: float = 0.0


@dataclass(slots=True)
class _Segment:
    text: str = ""
    complete: bool = False
    num_chars_given: int = 0
    """Characters up to the end of the last word that was given out."""
    units_given: float = 0.0
    pause_given: float = 0.0
    """Seconds of pauses before that end."""
    more: deque[_More] = field(default_factory=deque)
    """What the text after that end does not show."""
    blank: bool = True
    """Whether there is nothing to say as yet."""

    def next_word(self) -> re.Match[str] | None:
        for match in _WORD.finditer(self.text, self.num_chars_given):
            if any(char.isalnum() for char in match[0]):
                # More text could still lengthen a word at the very end.
                return match if self.complete or match.end() < len(self.text) else None
        return None

    def pass_on(self, end: int) -> None:
        """Count what is before a character."""
        self.units_given += weight(self.text[self.num_chars_given : end])
        self.num_chars_given = end
        while self.more and self.more[0].position <= end:
            more = self.more.popleft()
            self.units_given += more.units
            self.pause_given += more.pause_s

    def time_s(self, units_per_s: float) -> float:
        """When the text so far has been said, from the segment's beginning."""
        return self.units_given / units_per_s + self.pause_given

    @property
    def totals(self) -> tuple[float, float]:
        """Letters and seconds of pauses in the whole text."""
        units = self.units_given + weight(self.text[self.num_chars_given :])
        return (
            units + sum(more.units for more in self.more),
            self.pause_given + sum(more.pause_s for more in self.more),
        )


@dataclass(slots=True)
class WordClock:
    """The words of one context. Text goes in as it arrives, and positions as audio is sent."""

    pace: Pace
    lead_s: float = LEAD_S
    """The last word begins at least so many seconds before the end of its segment."""
    _segments: deque[_Segment] = field(default_factory=deque)
    _start_s: float = 0.0
    _last_s: float = 0.0
    _ended_early: bool = False
    """Whether the audio of the open segment is complete and its text is not."""

    def append(self, text: str) -> None:
        """More text of the open segment, or of a new one."""
        self.add([Said(text, text)])

    def add(self, spans: Iterable[Span]) -> None:
        """More of the open segment, or of a new one, as `TextReader` gives it."""
        for span in spans:
            if self._ended_early:
                return  # it is not spoken
            if not self._segments or self._segments[-1].complete:
                self._segments.append(_Segment())
            segment = self._segments[-1]
            if isinstance(span, Pause):
                segment.more.append(_More(len(segment.text), pause_s=span.seconds))
            else:
                segment.text += span.written
                if (units := weight(span.spoken) - weight(span.written)) != 0:
                    segment.more.append(_More(len(segment.text), units=units))
            segment.blank = segment.blank and span.blank

    def complete_segment(self) -> None:
        """Mark the open segment's text as complete. A segment with nothing to say stays open."""
        if self._ended_early:
            self._ended_early = False
        elif self._segments and not self._segments[-1].blank:
            self._segments[-1].complete = True

    def advance(self, position_s: float) -> list[TimedWord]:
        """The words of the first segment that have begun at a position, by estimate.

        The segment may end at this position, so words of the last `lead_s` wait, except its first word.
        """
        first_s = min(position_s, math.nextafter(self._start_s, math.inf))
        return self._take(self.pace.units_per_s, max(first_s, position_s - self.lead_s))

    def end_segment(self, end_s: float) -> list[TimedWord]:
        """End the first segment's audio. Returns its other words, by its true duration."""
        if not self._segments:
            return []
        segment, duration_s = self._segments[0], max(0.0, end_s - self._start_s)
        self._ended_early = not segment.complete
        segment.complete = True
        units, pause_s = segment.totals
        said_s = duration_s - pause_s
        if said_s < _SHORTEST_S <= duration_s:  # nothing was said, or the pauses were cut off
            said_s = duration_s
        else:
            self.pace.learn(units, said_s)
        words = self._take(units / said_s, end_s, end_s - self.lead_s) if said_s and units > 0 else []
        self._segments.popleft()
        self._start_s = end_s
        return words

    def _take(self, units_per_s: float, until_s: float, latest_s: float = math.inf) -> list[TimedWord]:
        words: list[TimedWord] = []
        if not self._segments:
            return words
        segment = self._segments[0]
        while (match := segment.next_word()) is not None:
            segment.pass_on(match.start())
            time_s = min(latest_s, self._start_s + segment.time_s(units_per_s))
            time_s = max(self._last_s, self._start_s, time_s)
            if time_s >= until_s:
                break
            if words and words[-1].time_s < time_s < words[-1].end_s:
                words[-1] = replace(words[-1], end_s=time_s)
            units = segment.units_given
            segment.pass_on(match.end())
            end_s = time_s + (segment.units_given - units) / units_per_s
            words.append(TimedWord(match[0], time_s, end_s, spaced=not _UNSPACED.match(match[0])))
            self._last_s = time_s
        return words
