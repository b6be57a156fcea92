"""Estimate when each word is heard: the model does not say where in the audio a word is.

A segment's words are spread over the sound in its audio by how long their letters take to say. Silence
takes no letters, and a pause is the gap between two words, if possible one that the text shows. While
the segment goes on, the pace of this voice's earlier segments gives the times. With these times a client
can keep, after an interruption, about the words that were heard and not the whole reply.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from qwen_megakernel.serving.sound_map import WINDOW_S, SoundMap
from qwen_megakernel.serving.spoken_text import Pause, Said, Span

_KANA_HAN = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_UNSPACED = re.compile(_KANA_HAN)
_WORD = re.compile(rf"{_KANA_HAN}[^\w\s]*|(?:(?!{_KANA_HAN})\S)+")
_EXTRA_WEIGHT = (
    (_UNSPACED, 2.0),
    (re.compile(r"[\uac00-\ud7af]"), 1.5),  # Hangul syllables
    (re.compile(r"\d"), 2.0),
    (re.compile(r"[.!?。！？…,;:，、；：]"), 2.0),  # a word is longer before a pause
)
_PAUSE_SIGN = re.compile(r"[.!?。！？…,;:，、；：—–-]")
FIRST_GUESS = 17.0
"""Letters a second of sound that are assumed before a voice's first segment: English at 160 words a
minute, of which a tenth is pauses."""
MAX_PACES = 256
"""Voices whose pace is remembered. A client may send any name."""
_FORGET = 0.8
_SHORTEST_S = 0.01
"""Less sound than this is none."""
_UNSHOWN_S = 0.3
"""A pause where the text shows none is as unlikely as one that is so many seconds from its place."""
_FARTHEST_S = 0.6
"""A pause that is farther from its place than this is none between words."""
_ASKED = 0.25
"""How much the distance counts where a pause was asked for, and one that is long enough is heard."""
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
        """Letters a second of sound; see `weight`."""
        return self._units / self._seconds

    def with_more(self, units: float, seconds: float) -> float:
        """Letters a second, if a segment has begun with so many letters in so many seconds."""
        return (self._units + units) / (self._seconds + seconds)

    def learn(self, units: float, seconds: float) -> None:
        """Add a finished segment: letters, and seconds of sound. Older ones lose weight."""
        if units > 0 and seconds > 0:
            self._units = _FORGET * self._units + units
            self._seconds = _FORGET * self._seconds + seconds


PaceOf = Callable[[str | None], Pace]
"""The pace of a voice by its name; None is the default voice."""


def voice_paces() -> PaceOf:
    """Paces that all clients of a dialect share, for `MAX_PACES` voices."""

    @lru_cache(maxsize=MAX_PACES)
    def pace_of(voice: str | None) -> Pace:
        return Pace()

    return pace_of


def weight(text: str) -> float:
    """How long a text takes to say, in letters. Digits and syllable signs count for more, and so do
    signs of a pause, since the word before a pause is drawn out."""
    if text.isalpha() and text.isascii():  # most words; the rest of this is slow
        return len(text)
    return len(text) + sum(extra * len(kind.findall(text)) for kind, extra in _EXTRA_WEIGHT)


@dataclass(frozen=True, slots=True)
class _More:
    """What is said before a position of a segment's text and is not written there."""

    position: int
    units: float = 0.0
    """Letters that a word takes beyond its own."""
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Word:
    """A word of a segment, and the letters up to its begin and its end."""

    text: str
    begin: float
    end: float
    shown: bool
    """Whether a sign shows a pause before it."""
    pause_s: float
    """Seconds of the pause that is asked for before it."""


@dataclass(slots=True)
class _Segment:
    text: str = ""
    complete: bool = False
    blank: bool = True
    """Whether there is nothing to say as yet."""
    words: list[_Word] = field(default_factory=list)
    """The words whose end is known."""
    num_given: int = 0
    """Words that were given out."""
    more: deque[_More] = field(default_factory=deque)
    """What the text after the last of `words` does not show."""
    _num_chars: int = 0
    """Characters up to the end of the last of `words`."""
    _units: float = 0.0
    """Letters up to there."""
    _pause_s: float = 0.0
    """Seconds of the pauses that are asked for since the last of `words`."""

    def find_words(self) -> None:
        """Bring `words` up to date."""
        for match in _WORD.finditer(self.text, self._num_chars):
            # More text could still lengthen a word at the very end.
            if match.end() == len(self.text) and not self.complete:
                return
            if any(char.isalnum() for char in match[0]):
                shown = self._shows_pause(match.start())
                self._pass_on(match.start())
                begin, pause_s, self._pause_s = self._units, self._pause_s, 0.0
                self._pass_on(match.end())
                self.words.append(_Word(match[0], begin, self._units, shown, pause_s))

    def _shows_pause(self, begin: int) -> bool:
        """Whether there is a sign of a pause between the last of `words` and a character."""
        since = self._num_chars
        while since and not self.text[since - 1].isalnum():
            since -= 1
        return bool(_PAUSE_SIGN.search(self.text, since, begin))

    def _pass_on(self, end: int) -> None:
        """Count what is before a character."""
        self._units += weight(self.text[self._num_chars : end])
        self._num_chars = end
        while self.more and self.more[0].position <= end:
            more = self.more.popleft()
            self._units += more.units
            self._pause_s += more.pause_s

    @property
    def num_units(self) -> float:
        """Letters of the whole text."""
        rest = weight(self.text[self._num_chars :])
        return self._units + rest + sum(more.units for more in self.more)


@dataclass(slots=True)
class _Course:
    """How the letters of a segment go on with the seconds of its sound: straight from point to point."""

    units: list[float] = field(default_factory=lambda: [0.0])
    sound_s: list[float] = field(default_factory=lambda: [0.0])
    s_per_unit: float = 0.0
    """After the last point."""

    def add(self, units: float, sound_s: float) -> None:
        """Another point."""
        self.units.append(units)
        self.sound_s.append(sound_s)

    def at(self, units: float) -> float:
        """Seconds of sound when so many letters have been said."""
        right = bisect.bisect_right(self.units, units)
        if right == len(self.units):
            return self.sound_s[-1] + (units - self.units[-1]) * self.s_per_unit
        (u0, u1), (s0, s1) = self.units[right - 1 : right + 1], self.sound_s[right - 1 : right + 1]
        return s0 + (units - u0) / (u1 - u0) * (s1 - s0)


@dataclass(slots=True)
class WordClock:
    """The words of one context. Text goes in as it arrives, and the levels of its audio."""

    pace: Pace
    lead_s: float = LEAD_S
    """The last word begins at least so many seconds before the end of its segment."""
    _segments: deque[_Segment] = field(default_factory=deque)
    _sound: SoundMap = field(default_factory=SoundMap)
    """Of the first segment."""
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

    def hear(self, levels: Iterable[float]) -> None:
        """More audio of the first segment: the power of each `WINDOW_S` (`LevelMeter`)."""
        self._sound.add(levels)

    def advance(self, until_s: float = math.inf) -> list[TimedWord]:
        """The words of the first segment that have begun in the audio so far, and before `until_s`.

        The segment may end here, so words of the last `lead_s` wait, except its first word.
        """
        if not self._segments or not self._sound.sound_s:
            return []
        segment = self._segments[0]
        segment.find_words()
        course = self._course(segment, ended=False)
        words: list[TimedWord] = []
        for word in segment.words[segment.num_given :]:
            if course.at(word.begin) >= self._sound.sound_s:
                break  # its sound has not come
            timed = self._time(word, course, math.inf)
            heard_s = self._start_s + self._sound.duration_s - (self.lead_s if segment.num_given else 0)
            if timed.time_s >= min(until_s, heard_s):
                break
            words.append(self._give(segment, timed))
        return words

    def end_segment(self, end_s: float) -> list[TimedWord]:
        """End the first segment's audio. Returns its other words, by all of its sound."""
        if not self._segments:
            self._sound = SoundMap()
            return []
        segment = self._segments[0]
        self._ended_early = not segment.complete
        segment.complete = True
        segment.find_words()
        if self._sound.sound_s >= _SHORTEST_S:
            self.pace.learn(segment.num_units, self._sound.sound_s)
        else:  # all is silence: words are anywhere in it
            self._sound.fill(max(0.0, end_s - self._start_s))
        words: list[TimedWord] = []
        if end_s > self._start_s:
            course, latest_s = self._course(segment, ended=True), end_s - self.lead_s
            for word in segment.words[segment.num_given :]:
                words.append(self._give(segment, self._time(word, course, latest_s)))
        self._segments.popleft()
        self._sound, self._start_s = SoundMap(), end_s
        return words

    def _course(self, segment: _Segment, *, ended: bool) -> _Course:
        """By the pauses so far, and from there by the pace, or to the end of what is `ended`."""
        course, sound_s, num_units = _Course(), self._sound.sound_s, segment.num_units
        passed = 0
        for pause in [*self._sound.pauses, None]:
            units, since = course.units[-1], course.sound_s[-1]
            # What is written so far lasts at least as long as what was heard.
            course.s_per_unit = (sound_s - since) / (num_units - units) if num_units > units else 0.0
            if not ended:
                slow = 1 / self.pace.with_more(units, since)
                course.s_per_unit = max(course.s_per_unit, slow)
            if pause is None or not course.s_per_unit:
                break
            found = _word_after(segment.words, passed + 1, course, *pause)
            if found is not None:
                passed = found
                course.add(segment.words[found - 1].end, pause[0])
                course.add(segment.words[found].begin, pause[0])
        return course

    def _time(self, word: _Word, course: _Course, latest_s: float) -> TimedWord:
        """Not before the last word, nor after `latest_s` if that is possible."""
        begin_s = self._start_s + self._sound.begins_at(course.at(word.begin))
        begin_s = max(self._last_s, self._start_s, min(latest_s, begin_s))
        end_s = self._start_s + self._sound.ends_at(course.at(word.end))
        spaced = not _UNSPACED.match(word.text)
        return TimedWord(word.text, begin_s, max(end_s, begin_s + WINDOW_S), spaced)

    def _give(self, segment: _Segment, word: TimedWord) -> TimedWord:
        """Note that the next word is given out."""
        segment.num_given += 1
        self._last_s = word.time_s
        return word


def _word_after(
    words: list[_Word], first: int, course: _Course, sound_s: float, silence_s: float
) -> int | None:
    """The number of the word before which a pause is, from `first` on; None if there is no such word.

    Args:
        words: of the segment.
        first: the number of the first that may be it.
        course: up to here.
        sound_s: seconds of sound before the pause.
        silence_s: seconds of the pause.
    """
    best, least = None, _FARTHEST_S
    units = course.units[-1] + (sound_s - course.sound_s[-1]) / course.s_per_unit
    reach = _FARTHEST_S / _ASKED / course.s_per_unit
    number = max(first, bisect.bisect_left(words, units - reach, key=lambda word: word.begin))
    while number < len(words) and (word := words[number]).begin < units + reach:
        cost = abs(word.begin - units) * course.s_per_unit
        if word.pause_s:
            cost = cost * _ASKED if silence_s >= word.pause_s - WINDOW_S else math.inf
        elif not word.shown:
            cost += _UNSHOWN_S
        if cost < least:
            best, least = number, cost
        number += 1
    return best
