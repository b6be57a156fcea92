"""Scripted conversations in the native protocol stay as recorded, message by message.

`scripted_talk.py` says what is compared. docs/PROTOCOL.md has the messages.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from golden_records import Golden
from scripted_talk import FULL, Stage, check, gated, wait_until

from qwen_megakernel import TTSDecoder

PLAIN: dict = {}
"""The fields of `hello` besides the version."""
ENDLESS = {
    "text": "The quick brown fox jumps over the lazy dog.",
    "temperature": 10,
    "top_k": 0,
    "seed": 0,
}
"""Options of a turn that only a cancel ends: see `live_server.LONG`."""
FORMATS = (
    {"encoding": "pcm_f32le", "sample_rate": 48_000},
    {"encoding": "pcm_s16le", "sample_rate": 8_000},
    {"encoding": "pcm_s16le", "sample_rate": 16_000},
)
REFUSED = (
    b'{"type": "cancel"}',
    "nonsense",
    "[]",
    "{}",
    '{"text": "Hi."}',
    '{"type": 7}',
    '{"type": "dance"}',
    '{"type": "hello", "protocol": 1}',
    '{"type": "speak"}',
    '{"type": "speak", "context_id": "a"}',
    '{"type": "speak", "context_id": "a", "text": null}',
    '{"type": "speak", "context_id": "a", "text": "\\udc00"}',
    '{"type": "speak", "context_id": "a b", "text": "Hi."}',
    '{"type": "speak", "context_id": "a", "text": "Hi.", "new": 1}',
    '{"type": "speak", "context_id": "a", "text": "Hi.", "text": "Hi."}',
    '{"type": "speak", "context_id": "a", "text": "Hi.", "temperature": 11}',
    '{"type": "speak", "context_id": "a", "text": "Hi.", "top_k": 0.5}',
    '{"type": "speak", "context_id": "a", "text": "Hi.", "seed": -1}',
    '{"type": "speak", "context_id": "a", "text": "Hi.", "chunk_frames": 9}',
    '{"type": "speak", "context_id": "a", "text": "Hi.", "voice": 7}',
    f'{{"type": "speak", "context_id": "a", "text": "Hi.", "instruct": "{"a" * 1001}"}}',
    '{"type": "flush", "context_id": "a"}',
    '{"type": "end", "context_id": "a"}',
    '{"type": "cancel", "context_id": "a"}',
    '{"type": "flush"}',
)
UNSPEAKABLE = (
    '{"type": "hello", "protocol": 2, "new": 1}',
    '{"type": "hello", "protocol": 1, "audio": {"encoding": "speex"}}',
    '{"type": "hello", "protocol": 1, "audio": {"sample_rate": 44100}}',
)


@pytest.fixture(scope="module")
def golden(request) -> Golden:
    return Golden("golden_native", request.config.getoption("--record"))


@pytest.fixture(scope="module")
def tts(brief_base, recording) -> Iterator[TTSDecoder]:
    with gated(TTSDecoder.load(brief_base, num_slots=4, device="cpu", backend="torch")) as tts:
        tts.add_voice("default", tts.clone_voice(recording.read_bytes()))
        yield tts


def speak(client, context_id: str, text: str, **options) -> None:
    client.say(type="speak", context_id=context_id, text=text, **options)


def tell(client, what: str, context_id: str) -> None:
    client.say(type=what, context_id=context_id)


def script_two_contexts(stage: Stage) -> None:
    """Spoken in the order of their opening, whichever has its text first."""
    client = stage.client(hello={"client": "tests/1"})
    stage.gate.allow(0)
    speak(client, "a", "Hello ", voice="default", language="en", seed=1)
    speak(client, "b", "How are you?", seed=2, chunk_frames=2)
    tell(client, "end", "b")
    speak(client, "a", "there.")
    tell(client, "end", "a")
    stage.gate.allow(None)
    client.hear(6)
    client.hang_up()


def script_segments(stage: Stage) -> None:
    """Each flush begins a new take. A choice holds until another one is made."""
    client = stage.client(hello={"audio": {"encoding": "pcm_f32le"}})
    stage.gate.allow(0)
    speak(client, "a", " ", seed=3)
    tell(client, "flush", "a")
    speak(client, "a", "Hello there. ", temperature=0.0, top_k=0, language="de", chunk_frames=1)
    tell(client, "flush", "a")
    tell(client, "flush", "a")
    speak(client, "a", "How are you?")
    tell(client, "flush", "a")
    speak(client, "a", "I am fine.", seed=90, language="french")
    tell(client, "end", "a")
    stage.gate.allow(None)
    client.hear(5)


def script_live_text(stage: Stage) -> None:
    client = stage.client(hello=PLAIN)
    stage.gate.allow(1)
    speak(client, "a", "Hello there, how are ", seed=4)
    client.hear()
    client.hear_audio(1)
    for piece in ("you", " to", "day", "?"):
        speak(client, "a", piece, seed=5, language="german")
    tell(client, "end", "a")
    stage.gate.allow(None)
    client.hear(2)


def script_nothing_to_say(stage: Stage) -> None:
    client = stage.client(hello=PLAIN)
    speak(client, "a", " \n", seed=1)
    speak(client, "a", "")
    tell(client, "end", "a")
    client.hear()


def script_formats(stage: Stage) -> None:
    for number, audio in enumerate(FORMATS):
        client = stage.client(f"client {number}", hello={"audio": audio})
        speak(client, "a", "Hello there.", seed=6)
        tell(client, "end", "a")
        client.hear(3)


def script_cancel(stage: Stage) -> None:
    client = stage.client(hello=PLAIN)
    client.say(type="cancel")
    stage.gate.allow(2)
    speak(client, "a", **ENDLESS)
    speak(client, "b", "Queued.", seed=1)
    speak(client, "c", "Spoken after the cancel.", seed=7)
    tell(client, "end", "c")
    client.hear()
    client.hear_audio(2)
    tell(client, "cancel", "b")
    client.hear()
    tell(client, "cancel", "a")
    client.hear()
    tell(client, "cancel", "a")
    client.hear()
    stage.gate.allow(None)
    client.hear(3)


def script_cancel_all(stage: Stage) -> None:
    client = stage.client(hello=PLAIN)
    stage.gate.allow(2)
    speak(client, "a", **ENDLESS)
    speak(client, "b", "Queued.", seed=1)
    speak(client, "c", "Queued too.", seed=2)
    client.hear()
    client.hear_audio(2)
    client.say(type="cancel")
    client.hear(3)
    stage.gate.allow(None)
    speak(client, "d", "After all.", seed=8)
    tell(client, "end", "d")
    client.hear(3)


def script_refused_messages(stage: Stage) -> None:
    client = stage.client(hello=PLAIN)
    for message in REFUSED:
        client.say(message)
        client.hear()
    speak(client, "a", "Hello there.", seed=9)
    tell(client, "end", "a")
    client.hear(3)


def script_what_cannot_be_served(stage: Stage) -> None:
    """An error and a `done`: the context is over, and its id cannot be used again."""
    client = stage.client(hello=PLAIN)
    stage.gate.allow(0)
    speak(client, "good", "Hello ", seed=10)
    refused = (
        {"voice": "nobody"},
        {"voice": "../../etc/passwd"},
        {"language": "klingon"},
        {"instruct": "whisper"},
    )
    for number, options in enumerate(refused):
        speak(client, f"bad{number}", "Hi.", seed=1, **options)
        client.hear(2)
        speak(client, f"bad{number}", "more")
        client.hear()
    speak(client, "good", "there.")
    tell(client, "end", "good")
    for what in ("end", "flush"):
        tell(client, what, "good")
    speak(client, "good", "more")
    client.hear(3)
    stage.gate.allow(None)
    client.hear(3)
    tell(client, "flush", "good")
    speak(client, "good", "again")
    client.hear(2)


def script_limits(stage: Stage) -> None:
    client = stage.client(hello=PLAIN)
    stage.gate.allow(0)
    speak(client, "long", "a" * 4000, seed=1)
    speak(client, "long", "a" * 97)
    client.hear()
    speak(client, "longer", "a" * 4097)
    client.hear()
    for number in range(7):
        speak(client, f"c{number}", "x", seed=number)
    speak(client, "ninth", "x")
    client.hear()
    tell(client, "cancel", "c3")
    client.hear()
    speak(client, "ninth", "Hello.", seed=11)
    tell(client, "end", "ninth")
    for name in ("long", "c0", "c1", "c2", "c4", "c5", "c6"):
        tell(client, "cancel", name)
        client.hear()
    stage.gate.allow(None)
    client.hear(3)
    client.say("a" * 70_000)
    client.hear_close()


def script_first_messages(stage: Stage) -> None:
    """A `type` makes the connection native. `hello` must come first, and only once."""
    client = stage.client()
    client.audio_format = PLAIN
    for message in (
        '{"type": "speak", "context_id": "a", "text": "Hi."}',
        '{"text": "Hi."}',
        '{"type": "hello"}',
        '{"type": "hello", "protocol": 1, "client": "\\n"}',
        '{"type": "hello", "protocol": 1, "audio": {"volume": 1}}',
        '{"type": "hello", "protocol": 1, "audio": null}',
    ):
        client.say(message)
        client.hear()
    for number, message in enumerate(UNSPEAKABLE):
        refused = stage.client(f"refused {number}")
        refused.say(message)
        refused.hear()
        refused.hear_close()


def script_progress(stage: Stage) -> None:
    """Progress is reported for each open context for which nothing was sent for a second."""
    speaking, waiting = stage.client("speaking", hello=PLAIN), stage.client("waiting", hello=PLAIN)
    stage.gate.allow(0)
    speak(speaking, "a", "Hello there.", seed=1)
    tell(speaking, "end", "a")
    speak(speaking, "b", "Queued.", seed=2)
    speak(waiting, "a", "Hello ", seed=3)
    speaking.hear_progress(2)
    waiting.hear_progress(1)


def script_client_hangs_up(stage: Stage) -> None:
    client = stage.client(hello=PLAIN)
    stage.gate.allow(2)
    speak(client, "a", **ENDLESS)
    speak(client, "b", "Never spoken.", seed=1)
    client.hear()
    client.hear_audio(2)
    client.hang_up()
    stage.wait_for_cancel()


def script_engine_is_full(stage: Stage) -> None:
    client = stage.client(hello=PLAIN)
    stage.tts.capacity = lambda owner: FULL
    speak(client, "a", "One too many.", seed=1)
    client.hear(2)
    del stage.tts.capacity
    speak(client, "b", "Room again.", seed=12)
    tell(client, "end", "b")
    client.hear(3)


def script_drain(stage: Stage) -> None:
    busy, idle = stage.client("busy", hello=PLAIN), stage.client("idle", hello=PLAIN)
    stage.gate.allow(0)
    speak(busy, "a", "Hello there.", seed=1)
    tell(busy, "end", "a")
    speak(busy, "b", "Never spoken.", seed=2)
    stage.wait_for_slot()
    stage.wait_for_contexts(2)
    drained = stage.server.drain()
    busy.hear(2)
    speak(idle, "a", "Too late.")
    idle.hear()
    stage.gate.allow(None)
    busy.hear(3)
    busy.hear_close()
    idle.hear_close()
    drained.result(10)


def script_drain_cuts(stage: Stage) -> None:
    client = stage.client(hello=PLAIN)
    stage.gate.allow(2)
    speak(client, "a", **ENDLESS)
    client.hear()
    client.hear_audio(2)
    drained = stage.server.drain()
    client.hear()
    client.hear_close()
    stage.gate.allow(None)
    drained.result(10)


def script_engine_dies(stage: Stage) -> None:
    busy, idle = stage.client("busy", hello=PLAIN), stage.client("idle", hello=PLAIN)
    stage.gate.allow(2)
    speak(busy, "a", **ENDLESS)
    speak(busy, "b", "Queued.", seed=1)
    busy.hear()
    busy.hear_audio(2)
    stage.gate.error = RuntimeError("device lost")
    stage.gate.allow(None)
    busy.hear(4)
    wait_until(lambda: stage.tts.error is not None)
    speak(idle, "a", "Too late.")
    idle.hear()


SCRIPTS = {
    script: {}
    for script in (
        script_two_contexts,
        script_segments,
        script_live_text,
        script_nothing_to_say,
        script_formats,
        script_cancel,
        script_cancel_all,
        script_refused_messages,
        script_what_cannot_be_served,
        script_limits,
        script_first_messages,
        script_progress,
        script_client_hangs_up,
        script_engine_is_full,
        script_drain,
    )
} | {script_drain_cuts: {"drain_s": 0.1}}
"""The scripts, with the settings of their servers."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_conversations_are_as_recorded(golden, tts, script):
    check(golden, script, tts, **SCRIPTS[script])


def test_an_engine_that_dies_says_so_as_recorded(golden, brief_base):
    with gated(TTSDecoder.load(brief_base, num_slots=4, device="cpu", backend="torch")) as tts:
        check(golden, script_engine_dies, tts)
