"""A lexicon's words, spelt codes and pauses: what is spoken, whatever pieces the text comes in."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_megakernel.serving.lexicon import MAX_WORDS, Lexicon, check_lexicon, read_lexicons
from qwen_megakernel.serving.spoken_text import Pause, Said, TextReader

WORDS = {
    "nguyen": "win", "Qwen": "kwen", "US": "U S", "sql": "sequel", "sql server": "sequel server",
    "New York": "noo york", "重庆": "崇庆", "c++": "see plus plus",
}  # fmt: skip


def read(pieces, *, words=None, markup=False):
    """All spans of a text in pieces, with what touches put together."""
    reader = TextReader(None if words is None else Lexicon(words), markup=markup)
    merged: list = []
    for span in [*(span for piece in pieces for span in reader.append(piece)), *reader.end()]:
        if isinstance(span, Said) and merged and isinstance(merged[-1], Said):
            before = merged.pop()
            span = Said(before.written + span.written, before.spoken + span.spoken)
        if span != Said("", ""):
            merged.append(span)
    return merged


def spoken(text, **how):
    return "".join(
        span.spoken if isinstance(span, Said) else f"[{span.seconds:g}]" for span in read([text], **how)
    )


def written(text, **how):
    return "".join(span.written for span in read([text], **how) if isinstance(span, Said))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ask Nguyen.", "Ask win."),
        ("NGUYEN's dog", "win's dog"),
        ("Nguyens and annguyen", "Nguyens and annguyen"),
        ("qwen, Qwen, QWEN", "qwen, kwen, QWEN"),
        ("Join us in the US, or the USA.", "Join us in the U S, or the USA."),
        ("sql, SQL Server and sql-like", "sequel, sequel server and sequel-like"),
        ("New York is not New Yorkshire", "noo york is not New Yorkshire"),
        ("我去重庆了", "我去崇庆了"),
        ("C++ or C+", "see plus plus or C+"),
        ("nguye\u0301n, nguyen\u0301", "nguye\u0301n, nguyen\u0301"),
        ("no word of it", "no word of it"),
        ("<spell>sql</spell>", "<spell>sequel</spell>"),
    ],
)
def test_words_of_a_lexicon_are_replaced_whole(text, expected):
    assert spoken(text, words=WORDS) == expected
    assert written(text, words=WORDS) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Code <spell>ABC 123</spell>.", "Code A B C, 1 2 3."),
        ("<spell>ab-12</spell>", "A B, 1 2"),
        ("<SPELL>+49 (89) 123</spell>", "+ 4 9, 8 9, 1 2 3"),
        ("to<spell>12</spell>4", "to 1 2 4"),
        ("<spell>e\u0301a</spell>", "E\u0301 A"),
        ("open <spell>AB", "open A B"),
        ("stray </spell> end", "stray  end"),
        ("Wait <break time='500ms'/> here", "Wait [0.5] here"),
        ('<break time="1.5s" />go', "[1.5]go"),
        ("<break time=2s>go", "[2]go"),
        ("<break/>a<break></break>b", "[0.5]a[0.5]b"),
        ("<break 300ms>", "[0.5]"),
        ('<break time="900s"/>', "[10]"),
        ('a <break time="0s"/>b', "a b"),
        ("<spell>A<break time='1s'/>B</spell>", "A[1] B"),
        ('<emotion value="sad"/>Oh <b>no</b>', "Oh no"),
        ("a<emotion value='sad'/>b", "a b"),
        ("1 < 2 and 3 > 2, a <b then c> d", "1 < 2 and 3 > 2, a <b then c> d"),
        ("I <3 you, <", "I <3 you, <"),
        ("cut <break tim", "cut "),
        ("cut <spe", "cut "),
        ("<a <spell>B</spell>", "<a B"),
        (f"<break {'x' * 200}>", f"<break {'x' * 200}>"),
    ],
)
def test_tags_are_followed_and_never_spoken(text, expected):
    assert spoken(text, markup=True) == expected


def test_a_client_sees_its_words_without_tags():
    text = 'Ask Nguyen: <spell>AB 12</spell>.<break time="1s"/>Then<emotion value="x"/>go.'
    assert written(text, words=WORDS, markup=True) == "Ask Nguyen: AB 12. Then go."
    assert spoken(text, words=WORDS, markup=True) == "Ask win: A B, 1 2.[1]Then go."


@pytest.mark.parametrize("text", ["", "<spell>Qwen</spell> <br", "\ud83d", " \n<break/>"])
def test_without_markup_and_lexicon_text_is_untouched(text):
    reader = TextReader()
    assert reader.append(text) == ([Said(text, text)] if text else [])
    assert reader.end() == []


def test_a_pause_is_told_when_its_tag_is_whole():
    reader = TextReader(markup=True)
    assert reader.append("Hi <break ti") == [Said("Hi ", "Hi ")]
    assert reader.append('me="1s"/') == []
    assert reader.append("> you") == [Pause(1.0), Said(" you", " you")]


def test_a_word_is_held_back_only_while_it_may_be_one_of_the_lexicon():
    reader = TextReader(Lexicon(WORDS))
    assert reader.append("The ngu") == [Said("The ", "The ")]
    assert reader.append("lls s") == [Said("ngulls ", "ngulls ")]
    assert reader.end() == [Said("s", "s")]


BITS = st.sampled_from(
    [
        *WORDS, "Nguyen", "SQL Server", " ", " ", ", ", "<spell>", "</spell>", "<break/>", "<", ">", "/",
        "e", '<break time="250ms" />', "<emotion value='x' />", "<b", ' a="1"', "=", '"', "'", "x1", "ß",
        "\u0301", "\ud83d\ude00", "\ud83d", "😀", "\n", "</", "ab-1", "break", "time='2s'", "y" * 90,
    ]
)  # fmt: skip


@settings(deadline=None)
@given(
    bits=st.lists(BITS, max_size=14),
    cuts=st.lists(st.integers(0, 300), max_size=20),
    one_by_one=st.booleans(),
    markup=st.booleans(),
)
def test_any_split_of_a_text_gives_the_same(bits, cuts, one_by_one, markup):
    text = "".join(bits)
    edges = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = list(text) if one_by_one else [text[a:b] for a, b in pairwise(edges)]
    for words in (None, WORDS):
        if words is None and not markup:
            continue
        assert read(pieces, words=words, markup=markup) == read([text], words=words, markup=markup)


@pytest.mark.parametrize(
    "entries",
    [
        {"": "x"},
        {" a": "x"},
        {"a": " "},
        {"a" * 65: "x"},
        {"a": "x" * 129},
        {str(n): "x" for n in range(MAX_WORDS + 1)},
    ],
)
def test_a_lexicon_that_cannot_be_is_refused_in_one_line(entries):
    with pytest.raises(ValueError, match="expected") as refusal:
        check_lexicon(entries)
    assert "\n" not in str(refusal.value)
    check_lexicon(WORDS)


def test_a_file_has_words_for_all_voices_and_for_one():
    data = b"# for all\nc++ = see plus plus\n a = b = c\n\n[anna]\nsql = sequel\n"
    assert read_lexicons(data, "words.txt") == {
        None: {"c++": "see plus plus", "a = b": "c"},
        "anna": {"sql": "sequel"},
    }


@pytest.mark.parametrize(
    ("data", "expected"), [(b"a = b\nword", "words.txt line 2"), (b"\xff = b", "words.txt: not UTF-8")]
)
def test_a_file_that_cannot_be_read_is_refused_by_its_line(data, expected):
    with pytest.raises(ValueError, match=expected):
        read_lexicons(data, "words.txt")
