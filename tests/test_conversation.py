"""What of a conversation a slow decoder never shows: how far ahead of its playback it may run."""

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest

from qwen_megakernel.serving import conversation
from qwen_megakernel.serving.contexts import ContextOver
from qwen_megakernel.serving.conversation import Conversation
from qwen_megakernel.serving.native import NativeDialect
from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    Cancel,
    Done,
    Flush,
    Hello,
    Speak,
    encode,
    parse_server_message,
)
from qwen_megakernel.serving.native_messages import Started as ServerStarted
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.turn import Audio, Finished, Started, Turn

LEAD_S = 1.0
SEGMENT_S = 0.6


class InstantDecoder:
    """Every turn is 0.6 s of silence, at once."""

    default_voice = None
    error = None
    languages = ("auto",)
    reasons = ("stop", "length", "repeat")

    def __init__(self):
        self.voices = {}
        self.opened = []

    def check(self, voice, language, *, instruct):
        pass

    def open_turn(self, text, *, sink, max_lead_s, params, **options):
        reason = self.reasons[len(self.opened) % 3]
        self.opened.append((time.monotonic(), max_lead_s, params.seed))
        samples = int(SEGMENT_S * 24_000)
        sink(Started())
        sink(Audio(np.zeros(samples, np.float32), 0.01))
        sink(Finished(reason, 1, samples, 0.01, 0.02))
        return Turn(lambda: None)


class Reader:
    """Takes everything at once."""

    def __init__(self, decoder):
        self.records, self.over = [], {}
        speech = ServerState(decoder, SimpleNamespace(record=self.records.append))
        self.conversation = Conversation(speech, "1", self)

    def on_output(self, context):
        event = self.conversation.take(context)
        if isinstance(event, Audio):
            context.mark_audio_sent(len(event.samples))
        elif isinstance(event, ContextOver):
            self.over.setdefault(context.context_id, asyncio.get_running_loop().create_future())
            self.over[context.context_id].set_result(None)


async def speak_three_segments(decoder, name, reader):
    for _ in range(3):
        reader.conversation.speak(Speak(name, "Word.", seed=2**64 - 1))
        reader.conversation.flush(name)
    reader.conversation.end(name)
    while name not in reader.over:
        await asyncio.sleep(0.005)


@pytest.fixture
def two_contexts(monkeypatch):
    monkeypatch.setattr(conversation, "MAX_LEAD_S", LEAD_S)

    async def speak():
        decoder = InstantDecoder()
        reader = Reader(decoder)
        for name in ("a", "b"):
            await speak_three_segments(decoder, name, reader)
        return decoder.opened, reader.records

    return asyncio.run(speak())


def test_lead_is_that_of_a_context_and_its_last_segments_wait(two_contexts):
    opened, _ = two_contexts
    for start in (0, 3):  # the next context does not pay for the lead of the one before
        times = [at for at, _, _ in opened[start : start + 3]]
        leads = [lead for _, lead, _ in opened[start : start + 3]]
        assert leads[:2] == pytest.approx([LEAD_S, LEAD_S - SEGMENT_S], abs=0.05)
        assert times[1] - times[0] < 0.05
        assert 2 * SEGMENT_S - LEAD_S - 0.05 < times[2] - times[0] < 2 * SEGMENT_S - LEAD_S + 0.1
        assert 0 <= leads[2] < 0.1


def test_seeds_count_on_and_a_context_is_one_record(two_contexts):
    opened, records = two_contexts
    assert [seed for _, _, seed in opened[:3]] == [2**64 - 1, 0, 1]
    assert [(r.turn, r.chars, r.frames, r.finish_reason) for r in records] == [
        ("1-1", 15, 3, "length"),  # the first that is not `stop`
        ("1-2", 15, 3, "length"),
    ]
    assert records[0].rtf == pytest.approx(0.06 / (3 * SEGMENT_S), abs=1e-4)


def test_a_cancel_between_two_messages_leaves_the_counts_true():
    """The reader may hear a cancel while the writer waits between `started` and the audio."""

    async def talk():
        posted, sent = [], []
        speech = ServerState(InstantDecoder(), SimpleNamespace(record=lambda record: None))
        dialect = NativeDialect(speech, "1", posted.append, None)
        for message in (Hello(), Speak("a", "Word."), Flush("a")):
            dialect.receive(encode(message))

        async def send(data):
            sent.append(parse_server_message(data))
            if isinstance(sent[-1], ServerStarted):
                dialect.receive(encode(Cancel("a")))

        await asyncio.sleep(0.05)
        while posted:
            await dialect.write(posted.pop(0), send)
        return sent

    *before, done = asyncio.run(talk())
    assert isinstance(done, Done)
    assert done.finish_reason == "cancelled"
    chunks = [message for message in before if isinstance(message, AudioChunk)]
    assert done.samples == sum(len(chunk.samples) for chunk in chunks) // 2
    assert len(chunks) == 1  # what was handed over goes out, what waited does not


def test_a_cancel_drops_what_waits_for_the_socket():
    async def talk():
        posted, sent = [], []
        speech = ServerState(InstantDecoder(), SimpleNamespace(record=lambda record: None))
        dialect = NativeDialect(speech, "1", posted.append, None)
        for message in (Hello(), Speak("a", "Word."), Flush("a")):
            dialect.receive(encode(message))
        await asyncio.sleep(0.05)
        assert dialect.unsent_bytes == SEGMENT_S * 24_000 * 4
        dialect.receive(encode(Cancel("a")))
        assert dialect.unsent_bytes == 0

        async def send(data):
            sent.append(parse_server_message(data))

        for item in posted:
            await dialect.write(item, send)
        return sent

    _, *after = asyncio.run(talk())
    assert [(type(message), message.samples) for message in after] == [(Done, 0)]
