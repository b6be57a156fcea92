"""What cleaning leaves of a text: nothing if there is nothing to say, and otherwise whole words."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listener import Listener
from live_server import ROOT, LiveServer, collect, send
from native_client import NativeClient

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.config import Guards
from qwen_megakernel.prompt.text_cleaning import MAX_LEAD, TextCleaner
from qwen_megakernel.serving.native_messages import Done, End, Flush, Segment

SILENT = {
    "full stop": ".",
    "dots": "...",
    "ellipsis": "…",
    "4096 dots": "." * 4096,
    "dash": "—",
    "rule": "---",
    "quotes": '""',
    "stars": "***",
    "bullets": "- \n* \n",
    "emoji": "😀",
    "emoji family": "👨\u200d👩\u200d👧\u200d👦",
    "emoji with a skin tone": "👍🏽",
    "flag": "🇩🇪",
    "flag of tags": "🏴\U000e0067\U000e0062\U000e007f",
    "zero width space": "\u200b",
    "byte order mark": "\ufeff",
    "word joiner": "\u2060",
    "soft hyphen": "\u00ad",
    "direction mark": "\u200f",
    "joiners": "\u200c\u200d",
    "NBSP": "\u00a0",
    "white space": " \t\r\n\u3000\u2028",
    "NUL": "\0",
    "bell": "\a",
    "replacement characters": "\ufffd\ufffd",
    "variation selector": "\ufe0f",
    "combining marks": "\u0301\u0301",
    "Hangul filler": "\u3164",
    "private use": "\ue000",
}
CLEANED = {
    "Hello there.": "Hello there.",
    "“Hello,” she said — (quietly).": "“Hello,” she said — (quietly).",
    "« Bonjour », ça va ?": "« Bonjour », ça va ?",
    "¿Qué?": "¿Qué?",
    "Hello" + 500 * " " + "there.": "Hello there.",
    "One,\n            two.\r\n\tThree.": "One, two. Three.",
    "front\u00a0desk": "front desk",
    "Good eve\u00adning, the fr\u200bont de\ufeffsk\0.": "Good evening, the front desk.",
    "\ufeffHello.": "Hello.",
    "Great! 🎉🎉 Now go on.": "Great! Now go on.",
    "Hello🎈there": "Hello there",
    "---\nThen this.": "Then this.",
    "- One\n- Two": "One - Two",
    "... and then": "and then",
    "STOP!!!!!!!! NOW??!?!": "STOP!!! NOW??!?!",
    "Chapter 1 .............. 5": "Chapter 1 ... 5",
    "H" + 60 * "\u0301\u0316\u0338" + "ello.": "H\u0301\u0316\u0338\u0301ello.",
    "e\u0301te\u0301 =\u0338": "e\u0301te\u0301 =\u0338",
    "a \u0301b": "a b",
    "1️⃣ first": "1 first",
    "20 ℃, № 5, ㎏, 5°, 3 €, 7 %": "20 ℃, № 5, ㎏, 5°, 3 €, 7 %",
    "می\u200cخواهم": "می\u200cخواهم",
    "क्\u200dष": "क्\u200dष",
    "می\u200c\u200c\u200cخواهم": "می\u200cخواهم",
    "ab\u200cc\u200dd": "abcd",
    "你好，世界。": "你好，世界。",
    "สวัสดีครับ": "สวัสดีครับ",
    "مرحبا بالعالم": "مرحبا بالعالم",
    "$": "$",
    "&": "&",
}


def cleaned(*pieces):
    cleaner = TextCleaner()
    return "".join([cleaner.clean(piece) for piece in pieces])


@pytest.mark.parametrize("text", SILENT.values(), ids=SILENT.keys())
def test_nothing_is_left_where_there_is_nothing_to_say(text):
    assert cleaned(text) == ""


@pytest.mark.parametrize("text", CLEANED)
def test_what_is_left(text):
    assert cleaned(text).rstrip() == CLEANED[text]


CHARACTERS = "aé1 \n\u00a0.-«(!\u200b\u200c\u200d\u0301क्م\u0338😀🏽\ufe0f℃$\0中"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(CHARACTERS, max_size=8) | st.text(max_size=4), max_size=10))
def test_any_split_is_cleaned_as_the_whole(pieces):
    assert cleaned(*pieces) == cleaned("".join(pieces))


@settings(max_examples=200, deadline=None)
@given(st.text(CHARACTERS) | st.text())
def test_letters_and_numbers_stay_and_cleaning_again_changes_nothing(text):
    def words(text):
        return [
            c for c in text if unicodedata.category(c)[0] in "LN" and c not in "\u115f\u1160\u3164\uffa0"
        ]

    once = cleaned(text)
    assert words(once) == words(text)
    assert cleaned(once) == once
    assert "  " not in once


def test_what_is_held_before_the_first_word_is_bounded():
    cleaner = TextCleaner()
    for _ in range(1000):
        assert cleaner.clean("( .,") == ""
    assert len(cleaner.clean("a")) <= MAX_LEAD + 1


@pytest.fixture(scope="module")
def tts():
    with TTSDecoder.load(ROOT / "demo_voice", num_slots=2, device="cpu") as loaded:
        loaded.load_voices(ROOT / "demo_voice" / "voices")
        yield loaded


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("text", [".", "…", "😀", "---", "\ufeff", "\0", "\u200b"])
def test_text_that_says_nothing_ends_without_sound_or_slot(tts, text, streaming):
    listener = Listener()
    tts.open_turn(text, sink=listener, ended=True, streaming=streaming)
    finished = listener.wait()
    assert (finished.reason, finished.num_samples) == ("stop", 0)
    assert len(listener.events) == 1, "it was given a slot"
    assert len(tts.synthesize(text, streaming=streaming)) == 0


@pytest.mark.slow
def test_cleaned_text_sounds_as_the_text_that_is_left(tts):
    params = GenerationParams(seed=1)
    clean = tts.synthesize("Good evening, this is the front desk.", params=params)
    odd = "\ufeffGood eve\u00adning,\n      this is the\u00a0front de\u200bsk. 🎉"
    assert (tts.synthesize(odd, params=params) == clean).all()


def test_cleaning_can_be_turned_off(tiny_base):
    guards = Guards(repeat_frames=0, base_frames=2, frames_per_token=0)
    params = GenerationParams(max_frames=2, guards=guards)
    with TTSDecoder.load(tiny_base, num_slots=1, text_cleaning=False) as raw:
        assert len(raw.synthesize("...", params=params)) > 0


# --- through a server -------------------------------------------------------------------------------


def test_the_simple_protocol_answers_with_no_samples(live_server):
    with live_server.connect() as client:
        for text in (".", "😀", "\u200b"):
            send(client, text=text)
            audio, done = collect(client)
            assert len(audio) == 0
            assert (done["finish_reason"], done["samples"]) == ("stop", 0)


def test_a_native_context_goes_on_after_a_segment_that_says_nothing(live_server):
    with NativeClient(live_server) as client:
        client.speak("a", "🎉🎉 ")
        client.send(Flush("a"))
        client.speak("a", "...")
        client.send(End("a"))
        messages = []
        while not (messages and isinstance(messages[-1], Done)):
            messages.append(client.receive(30))
    segments = [message for message in messages if isinstance(message, Segment)]
    assert [(s.duration_s, s.finish_reason) for s in segments] == [(0.0, "stop")] * 2
    assert (messages[-1].finish_reason, messages[-1].samples) == ("stop", 0)


def test_the_command_line_client_ends_well(live_server, tmp_path):
    out = tmp_path / "silence.wav"
    client = ROOT / "pipecat_client" / "test_client.py"
    command = [sys.executable, client, "--url", live_server.url, "--text", "…", "--out", out]
    for options in ([], ["--json"]):
        result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240)
        assert (result.returncode, result.stderr) == (0, "")
        assert out.is_file()
    figures = json.loads(result.stdout)
    assert (figures["samples"], figures["finish_reason"]) == (0, "stop")


@pytest.mark.slow
def test_a_server_speaks_everything_where_cleaning_is_off(tmp_path):
    demo_voice = ROOT / "demo_voice"
    options = ("--model", str(demo_voice), "--voices", str(demo_voice / "voices"))
    server = LiveServer(*options, "--text-cleaning", "off").wait_until_ready()
    try:
        with server.connect() as client:
            send(client, text="...", speaker_ref="rms", seed=1)
            assert collect(client)[1]["samples"] > 0
    finally:
        server.kill()
