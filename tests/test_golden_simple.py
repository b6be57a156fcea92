"""Scripted conversations in the simple protocol stay as recorded, message by message.

`scripted_talk.py` says what is compared. `{"text": ...}` is a turn. A gate before the decoder decides
how far it gets.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from golden_records import Golden
from scripted_talk import FULL, Server, Stage, check, gated, wait_until

from qwen_megakernel import TTSDecoder

ENDLESS = {"text": "The quick brown fox jumps over the lazy dog.", "temperature": 10, "top_k": 0}
"""Options of a turn that only a cancel ends: see `live_server.LONG`."""
REFUSED = (
    b"\0\1",
    b'{"text": "Hi."}',
    "",
    "{",
    "[]",
    "7",
    "null",
    '{"text": 7}',
    '{"text": null}',
    "{}",
    '{"cancel": false}',
    '{"cancel": "yes"}',
    '{"text": ""}',
    '{"text": " \\n"}',
    '{"text": "", "more": false}',
    '{"text": "a", "more": 1}',
    '{"text": "\\udc00"}',
    '{"text": "a", "text": "b"}',
    '{"text": "a", "temperature": NaN}',
    '{"text": "a", "temperature": 10.5}',
    '{"text": "a", "temperature": "hot"}',
    '{"text": "a", "temperature": true}',
    '{"text": "a", "top_k": 1e3}',
    '{"text": "a", "top_k": -1}',
    '{"text": "a", "seed": -1}',
    '{"text": "a", "seed": 18446744073709551616}',
    '{"text": "a", "chunk_tokens": 0}',
    '{"text": "a", "chunk_tokens": 65}',
    '{"text": "a", "speaker_ref": 7}',
    '{"text": "a", "speaker_ref": "nobody"}',
    '{"text": "a", "speaker_ref": "../../etc/passwd"}',
    '{"text": "a", "language": 7}',
    '{"text": "a", "language": "klingon"}',
    f'{{"text": "a", "language": "{"a" * 41}"}}',
    f'{{"text": "{"a" * 4097}"}}',
    "[" * 60_000,
)


@pytest.fixture(scope="module")
def golden(request) -> Golden:
    return Golden("golden_simple", request.config.getoption("--record"))


@pytest.fixture(scope="module")
def tts(brief_base, recording) -> Iterator[TTSDecoder]:
    with gated(TTSDecoder.load(brief_base, num_slots=4, device="cpu", backend="torch")) as tts:
        tts.add_voice("default", tts.clone_voice(recording.read_bytes()))
        yield tts


def script_two_queued_texts(stage: Stage) -> None:
    client = stage.client()
    stage.gate.allow(0)
    client.say(text="Hello there.", seed=1)
    client.say(
        text="How are you?", seed=2, language="en", speaker_ref="default", temperature=0.9, top_k=50,
        chunk_tokens=3, more=None, unknown="is ignored",
    )  # fmt: skip
    stage.gate.allow(None)
    client.hear(2)
    client.say(
        text="Once again.", seed=3, temperature=0, speaker_ref="", language="German", chunk_tokens=1
    )
    client.hear()
    client.hang_up()


def script_live_text(stage: Stage) -> None:
    client = stage.client()
    stage.gate.allow(1)
    client.say(text="Hello there, how are ", more=True, seed=4)
    client.hear_audio(1)
    client.say(text="you", more=True, seed=99, language="klingon")
    client.say(text="?", more=True)
    client.say(text="", more=False)
    client.say(text="Queued ", more=True, seed=5)
    client.say(text="and ended.")
    stage.gate.allow(None)
    client.hear(2)
    client.say(text="", more=True, seed=6)
    client.say(text="Late.")
    client.hear()
    client.say(text="", more=True, seed=11)
    client.say(text=" ")
    client.hear()


def script_cancel(stage: Stage) -> None:
    client = stage.client()
    client.say(cancel=True)
    client.hear()
    stage.gate.allow(2)
    client.say(**ENDLESS, seed=0)
    client.hear_audio(2)
    client.say(text="Queued.", seed=1)
    client.say(text="Queued too, and live.", more=True)
    client.say(text="ignored beside it", cancel=True)
    client.hear(2)
    stage.wait_for_cancel()
    client.say(text="After the cancel.", seed=7)
    stage.gate.allow(None)
    client.hear(2)
    client.say(cancel=True)
    client.hear()


def script_cancel_before_any_audio(stage: Stage) -> None:
    client = stage.client()
    stage.gate.allow(0)
    client.say(text="Not a word of it.", seed=1, more=True)
    stage.wait_for_slot()
    client.say(cancel=True)
    stage.wait_for_cancel()
    stage.gate.allow(None)
    client.hear()


def script_refused_messages(stage: Stage) -> None:
    client = stage.client()
    for message in REFUSED:
        client.say(message)
        client.hear()
    client.say(text="Hello there.", seed=108)
    client.hear()


def script_refused_messages_while_it_speaks(stage: Stage) -> None:
    client = stage.client()
    stage.gate.allow(0)
    client.say(text="Hello ", more=True, seed=9)
    client.say(text="a" * 4091, more=True)
    client.say("nonsense")
    client.say('{"type": "hello", "protocol": 1}')
    client.hear(3)
    client.say(text="there.")
    stage.gate.allow(None)
    client.hear()


def script_queue_is_full(stage: Stage) -> None:
    client = stage.client()
    stage.gate.allow(0)
    for seed in range(10):
        client.say(text="Hello.", seed=seed)
    client.hear()
    stage.wait_for_slot()
    client.say(cancel=True)
    client.hear(8)
    stage.wait_for_cancel()
    stage.gate.allow(None)
    client.hear()


def script_engine_is_full(stage: Stage) -> None:
    client = stage.client()
    stage.tts.capacity = lambda owner: FULL
    client.say(text="One too many.", seed=1)
    client.hear()
    del stage.tts.capacity
    client.say(text="Room again.", seed=10)
    client.hear()


def script_client_hangs_up(stage: Stage) -> None:
    client = stage.client()
    stage.gate.allow(2)
    client.say(**ENDLESS, seed=0)
    client.say(text="Never spoken.", seed=1)
    client.hear_audio(2)
    client.hang_up()
    stage.wait_for_cancel()


def script_frames_that_close(stage: Stage) -> None:
    large, broken = stage.client("large"), stage.client("broken")
    large.say(text="a" * 70_000)
    large.hear_close()
    broken.socket.socket.sendall(b"\x81\x82\0\0\0\0\xff\xff")  # a masked text message, no UTF-8
    broken.hear_close()


def script_drain(stage: Stage) -> None:
    busy, idle = stage.client("busy"), stage.client("idle")
    stage.gate.allow(0)
    busy.say(text="Hello there.", seed=1)
    busy.say(text="Never spoken.", seed=2)
    busy.say(text="Nor this, which is live.", seed=3, more=True)
    stage.wait_for_slot()
    stage.wait_for_contexts(3)
    drained = stage.server.drain()
    busy.hear(2)
    busy.say(text="Too late.")
    busy.hear()
    idle.say(text="Too late.")
    idle.hear()
    stage.handshake()
    stage.gate.allow(None)
    busy.hear()
    busy.hear_close()
    idle.hear_close()
    drained.result(10)


def script_drain_cuts(stage: Stage) -> None:
    client = stage.client()
    stage.gate.allow(2)
    client.say(**ENDLESS, seed=0)
    client.hear_audio(2)
    drained = stage.server.drain()
    stage.wait_for_cancel()
    stage.gate.allow(None)
    client.hear()
    client.hear_close()
    drained.result(10)


def script_handshakes(stage: Stage) -> None:
    loading = Server(None)
    stage.handshake(server=loading)
    loading.stop()
    stage.handshake(origin="https://evil.example")
    stage.handshake("/nothing")
    stage.client("first")
    stage.handshake()


def script_engine_dies(stage: Stage) -> None:
    busy, queued = stage.client("busy"), stage.client("idle")
    stage.gate.allow(2)
    busy.say(**ENDLESS, seed=0)
    busy.say(text="Queued.", seed=1)
    busy.hear_audio(2)
    stage.gate.error = RuntimeError("device lost")
    stage.gate.allow(None)
    busy.hear(2)
    wait_until(lambda: stage.tts.error is not None)
    queued.say(text="Too late.")
    queued.hear()
    stage.handshake()


SCRIPTS = {
    script: {}
    for script in (
        script_two_queued_texts,
        script_live_text,
        script_cancel,
        script_cancel_before_any_audio,
        script_refused_messages,
        script_refused_messages_while_it_speaks,
        script_queue_is_full,
        script_engine_is_full,
        script_client_hangs_up,
        script_frames_that_close,
        script_drain,
    )
} | {script_drain_cuts: {"drain_s": 0.1}, script_handshakes: {"max_connections": 1}}
"""The scripts, with the settings of their servers."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_conversations_are_as_recorded(golden, tts, script):
    check(golden, script, tts, **SCRIPTS[script])


def test_token_is_asked_for_as_recorded(golden, tts):
    def script_token(stage: Stage) -> None:
        stage.handshake()
        stage.handshake("/?token=wrong-secret")

    check(golden, script_token, tts, tokens={"token": "a-secret-for-tests"})


def test_an_engine_that_dies_says_so_as_recorded(golden, brief_base):
    with gated(TTSDecoder.load(brief_base, num_slots=4, device="cpu", backend="torch")) as tts:
        check(golden, script_engine_dies, tts)
