"""The estimated times of words."""

import pytest

from qwen_megakernel.serving.word_timing import FIRST_GUESS, LEAD_S, Pace, WordClock, weight


def clock(text, pace=None, *, complete=True):
    result = WordClock(pace or Pace())
    result.append(text)
    if complete:
        result.complete_segment()
    return result


def texts(words):
    return [word.text for word in words]


def test_words_come_as_audio_does():
    words = clock("Hello there, my friend.")
    assert texts(words.advance(0.01)) == ["Hello"]
    assert texts(words.advance(0.02)) == []
    assert texts(words.advance(6 / FIRST_GUESS + LEAD_S + 0.01)) == ["there,"]
    assert texts(words.advance(100)) == ["my", "friend."]


def test_the_true_duration_decides_about_the_rest():
    words = clock("aaaa bbbb cccc dddd")
    words.advance(0.01)
    rest = words.end_segment(19.0)  # one letter a second
    assert [(w.text, w.time_s) for w in rest] == [("bbbb", 5.0), ("cccc", 10.0), ("dddd", 15.0)]


def test_segments_follow_each_other():
    words = clock("One two.")
    words.append("Three four.")
    words.complete_segment()
    assert texts(words.advance(0.9)) == ["One", "two."]  # guessed too early; no word of the next
    assert words.end_segment(2.0) == []
    first, second = words.end_segment(4.0)
    assert first.time_s == 2.0
    assert 2.0 < second.time_s < 4.0


def test_times_never_go_back():
    words = clock("a bb ccc dddd eeeee ffffff", Pace(1000.0, 1.0))
    times = [word.time_s for word in [*words.advance(0.003), *words.end_segment(50.0)]]
    assert times == sorted(times)


def test_an_unfinished_word_waits():
    words = clock("Hel", complete=False)
    assert words.advance(5.0) == []
    words.append("lo wor")
    assert texts(words.advance(5.0)) == ["Hello"]
    words.complete_segment()
    assert texts(words.advance(5.0)) == ["wor"]


def test_pace_is_learned_and_shared():
    pace = Pace()
    for _ in range(20):
        clock("x" * 100, pace).end_segment(20.0)
    assert pace.units_per_s == pytest.approx(5.0, rel=0.05)


def test_scripts_without_spaces():
    words = clock("你好，world。").advance(100)
    assert [(w.text, w.spaced) for w in words] == [("你", False), ("好，", False), ("world。", True)]
    assert weight("你好") > weight("ab")


def test_punctuation_alone_is_no_word():
    assert texts(clock("Well — 'yes' ... 🙂").advance(100)) == ["Well", "'yes'"]


def test_without_text_or_audio_there_is_nothing():
    assert WordClock(Pace()).advance(1.0) == []
    assert WordClock(Pace()).end_segment(1.0) == []
    assert clock("One.").end_segment(0.0) == []


def test_words_of_a_short_sound_begin_before_its_end():
    words = clock("Say something, type something, or just interrupt me.", Pace(300.0))
    times = [word.time_s for word in [*words.advance(0.15), *words.end_segment(0.15)]]
    assert len(times) == 8
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] == pytest.approx(0.15 - LEAD_S)
    words = clock("One two.")
    assert [word.time_s for word in words.end_segment(0.05)] == [0, 0]  # nor before its beginning
