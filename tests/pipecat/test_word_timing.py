"""The estimated times of words."""

import pytest

from qwen_megakernel.serving.sound_map import WINDOW_S
from qwen_megakernel.serving.spoken_text import Pause, Said
from qwen_megakernel.serving.word_timing import FIRST_GUESS, LEAD_S, Pace, WordClock, weight


def clock(text, pace=None, *, complete=True):
    result = WordClock(pace or Pace())
    result.append(text)
    if complete:
        result.complete_segment()
    return result


def levels(*parts):
    """The power of parts: seconds of sound if positive, of silence if negative."""
    return [1e-2 if part > 0 else 1e-8 for part in parts for _ in range(round(abs(part) / WINDOW_S))]


def texts(words):
    return [word.text for word in words]


def starts(words):
    return [round(word.time_s, 6) for word in words]


def test_words_come_as_audio_does():
    words = clock("Hello there, my friend.")
    words.hear(levels(0.01))
    assert texts(words.advance()) == ["Hello"]
    words.hear(levels(0.01))
    assert texts(words.advance()) == []
    words.hear(levels(6 / FIRST_GUESS + LEAD_S))
    assert texts(words.advance()) == ["there,"]
    words.hear(levels(10))
    assert texts(words.advance()) == ["my", "friend."]


def test_the_first_word_begins_with_the_sound():
    words = clock("Hello there.")
    words.hear(levels(-0.5))
    assert words.advance() == []
    words.hear(levels(0.1))
    assert starts(words.advance()) == [0.5]


def test_no_word_begins_in_silence():
    words = clock("One two, three.", Pace(10.0))
    words.hear(levels(0.8, -1.0))
    assert texts(words.advance()) == ["One", "two,"]
    words.hear(levels(0.2))
    (third,) = words.advance()
    assert (third.text, third.time_s) == ("three.", pytest.approx(1.8))


@pytest.mark.parametrize("text", ["aaa bbb, ccc ddd", "aaa bbb — ccc ddd", "'aaa bbb,' ccc ddd"])
def test_a_pause_is_where_the_text_shows_one(text):
    # By letters alone it is nearer to the end of the third word.
    words = clock(text)
    words.hear(levels(-0.2, 1.0, -0.4, 0.4, -0.3))
    told = words.end_segment(2.3)
    assert len(told) == 4
    assert told[2].time_s == pytest.approx(1.6)
    assert told[0].time_s == pytest.approx(0.2, abs=0.06)
    assert told[3].end_s == pytest.approx(2.0)


def test_a_pause_far_from_any_word_is_none_between_words():
    words = clock("aaaaaaaaaaaaaaaaaaaa bbbb")
    words.hear(levels(0.2, -0.4, 2.3))  # 2.5 s of sound, a tenth of a second for a letter
    assert starts(words.end_segment(2.9)) == [0.0, pytest.approx(2.5)]


def test_a_pause_that_was_asked_for_is_between_its_words():
    words = WordClock(Pace())
    words.add([Said("aaa bbb", "aaa bbb"), Pause(0.5), Said(" ccc ddd", " ccc ddd")])
    words.complete_segment()
    words.hear(levels(1.2, -0.5, 0.3))
    assert starts(words.end_segment(2.0))[2] == pytest.approx(1.7)


def test_a_short_pause_is_not_the_long_one_that_was_asked_for():
    words = WordClock(Pace())
    words.add([Said("aaa bbb", "aaa bbb"), Pause(0.5), Said(" ccc ddd", " ccc ddd")])
    words.complete_segment()
    words.hear(levels(0.4, -0.2, 0.4, -0.6, 0.8))
    assert starts(words.end_segment(2.4)) == pytest.approx([0.0, 0.6, 1.6, 2.0], abs=0.06)


def test_the_sound_that_has_come_slows_a_guess_that_is_too_fast():
    words = clock("aaaa bbbb cccc dddd", Pace(1000.0))
    words.hear(levels(19.0))  # a second for a letter, if no more comes
    assert starts(words.advance()) == [0.0, 5.0, 10.0, 15.0]


def test_words_are_held_until_they_are_due():
    words = clock("aaaa bbbb cccc dddd", Pace(10.0))
    words.hear(levels(1.9))
    assert texts(words.advance(0.6)) == ["aaaa", "bbbb"]
    assert texts(words.advance(0.9)) == []
    assert texts(words.end_segment(1.9)) == ["cccc", "dddd"]


def test_the_true_duration_decides_about_the_rest():
    words = clock("aaaa bbbb cccc dddd")
    words.hear(levels(0.01))
    words.advance()
    words.hear(levels(18.99))
    rest = words.end_segment(19.0)  # one letter a second
    assert [(w.text, round(w.time_s, 6)) for w in rest] == [
        ("bbbb", 5.0),
        ("cccc", 10.0),
        ("dddd", 15.0),
    ]


def test_segments_follow_each_other():
    words = clock("One two.")
    words.append("Three four.")
    words.complete_segment()
    words.hear(levels(0.9))
    assert texts(words.advance()) == ["One", "two."]  # no word of the next
    words.hear(levels(1.1))
    assert words.end_segment(2.0) == []
    words.hear(levels(-0.5, 1.5))
    first, second = words.end_segment(4.0)
    assert first.time_s == 2.5
    assert 2.5 < second.time_s < 4.0


def test_times_never_go_back():
    words = clock("a bb ccc dddd eeeee ffffff", Pace(1000.0, 1.0))
    words.hear(levels(0.1))
    told = words.advance()
    words.hear(levels(9.9))
    times = starts([*told, *words.end_segment(10.0)])
    assert len(times) == 6
    assert times == sorted(times)


def test_an_unfinished_word_waits():
    words = clock("Hel", complete=False)
    words.hear(levels(5.0))
    assert words.advance() == []
    words.append("lo wor")
    assert texts(words.advance()) == ["Hello"]
    words.complete_segment()
    assert texts(words.advance()) == ["wor"]


@pytest.mark.parametrize("silence", [0.0, 10.0])
def test_pace_is_learned_from_sound_and_shared(silence):
    pace = Pace()
    for _ in range(20):
        words = clock("x" * 100, pace)
        words.hear(levels(-silence, 20.0, -silence))
        words.end_segment(20.0 + 2 * silence)
    assert pace.units_per_s == pytest.approx(5.0, rel=0.05)


def test_silence_teaches_no_pace_and_has_its_words():
    pace = Pace()
    words = clock("aaaa bbbb", pace)
    words.hear(levels(-0.9))
    assert words.advance() == []
    assert starts(words.end_segment(0.9)) == [0.0, 0.5]
    assert pace.units_per_s == FIRST_GUESS


def test_scripts_without_spaces():
    words = clock("你好，world。")
    words.hear(levels(100))
    assert [(w.text, w.spaced) for w in words.advance()] == [
        ("你", False), ("好，", False), ("world。", True),
    ]  # fmt: skip
    assert weight("你好") > weight("ab")


def test_punctuation_alone_is_no_word():
    words = clock("Well — 'yes' ... 🙂")
    words.hear(levels(100))
    assert texts(words.advance()) == ["Well", "'yes'"]


def test_without_text_or_audio_there_is_nothing():
    assert WordClock(Pace()).advance() == []
    assert WordClock(Pace()).end_segment(1.0) == []
    assert clock("One.").end_segment(0.0) == []


def test_words_of_a_short_sound_begin_before_its_end():
    words = clock("Say something, type something, or just interrupt me.", Pace(300.0))
    words.hear(levels(0.15))
    times = starts([*words.advance(), *words.end_segment(0.15)])
    assert len(times) == 8
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] == pytest.approx(0.15 - LEAD_S)
    words = clock("One two.")
    words.hear(levels(0.05))
    assert starts(words.end_segment(0.05)) == [0, 0]  # nor before its beginning
