"""vLLM-Omni's speech over a WebSocket: messages as data, the dialect on a session, and a real server."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import DEMO_TOKEN, LONG, SOON
from session_stage import Stage, StagedTalk
from websockets.exceptions import ConnectionClosed

from qwen_megakernel.serving.events import Reply
from qwen_megakernel.serving.vllm_omni import RULES, VllmOmniDialect
from qwen_megakernel.serving.vllm_omni_messages import PATH, Close, Config, Done, Text, parse_message
from qwen_megakernel.serving.wire import ProtocolError
from qwen_megakernel.turn import RequestError

CONFIG = {"type": "session.config", "response_format": "pcm", "stream_audio": True}


def parse(message_type, **fields):
    return parse_message(json.dumps({"type": message_type, **fields}))


# --- messages as data -------------------------------------------------------------------------------


def test_messages_are_read():
    assert parse("session.config") == Config()
    assert parse(
        "session.config", model="tts-1", voice="slt", task_type="CustomVoice", language="German",
        instructions="Slowly.", response_format="pcm", stream_audio=True, speed=1.5, seed=7,
        split_granularity="sentence", initial_codec_chunk_frames=4, max_new_tokens=100, ref_audio=None,
    ) == Config("slt", "german", "Slowly.", "pcm", 1.5, 7, "sentence")  # fmt: skip
    assert parse("session.config", speaker="slt") == Config("slt")
    assert parse("input.text", text="Hi ") == Text("Hi ")
    assert (parse("input.done"), parse("session.close")) == (Done(), Close())


@pytest.mark.parametrize(
    ("message_type", "fields", "code", "says"),
    [
        ("input.txt", {}, "bad_request", "session.config, input.text, input.done, session.close"),
        ("input.text", {}, "bad_request", "text is missing"),
        ("session.config", {"response_format": "gsm"}, "bad_request", "wav, pcm|mp3"),
        ("session.config", {"stream_audio": True}, "bad_request", "pcm"),
        ("session.config", {"speed": 5}, "bad_request", "speed"),
        ("session.config", {"split_granularity": "word"}, "bad_request", "none, sentence, clause"),
        ("session.config", {"ref_audio": "file:///etc/passwd"}, "unsupported", "ref_audio"),
        ("session.config", {"speaker_embedding": [1.0]}, "unsupported", "speaker_embedding"),
        ("session.config", {"word_timestamps": True}, "unsupported", "word_timestamps"),
        ("session.config", {"instructions": "a" * 1001}, "bad_request", "1000"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(message_type, fields, code, says):
    with pytest.raises(ProtocolError, match=says) as refused:
        parse(message_type, **fields)
    assert refused.value.code == code


# --- the dialect on a session -----------------------------------------------------------------------


class Talk(StagedTalk):
    def __init__(self, config=CONFIG, **limits):
        stage = Stage(RULES, max_messages_per_s=500.0, **limits)
        super().__init__(stage, VllmOmniDialect(stage.session))
        if config is not None:
            self.dialect.receive(json.dumps(config))

    def say(self, *texts, done=True):
        for text in texts:
            self.send("input.text", text=text)
        if done:
            self.send("input.done")

    def send(self, message_type, **fields):
        self.dialect.receive(json.dumps({"type": message_type, **fields}))

    def speak(self, num_samples=1920):
        """Speak all turns. Later ones are opened meanwhile."""
        for turn in self.stage.turns:
            if not turn.finished:
                turn.speak(num_samples)
                turn.finish()


def kinds(lines):
    return ["audio" if isinstance(line, bytes) else line["type"] for line in lines]


def test_an_utterance_is_one_sentence():
    async def script():
        talk = Talk()
        talk.say("One ", "two. ", "Three.")
        talk.speak()
        lines = await talk.heard()
        assert kinds(lines) == ["audio.start", "audio", "audio.done", "session.done"]
        assert lines[0] == {
            "type": "audio.start", "utterance_index": 0, "sentence_index": 0, "format": "pcm",
            "sentence_text": "One two. Three.", "sample_rate": 24_000, "channels": 1,
        }  # fmt: skip
        assert lines[2] == {
            "type": "audio.done", "utterance_index": 0, "sentence_index": 0, "total_bytes": 3840,
            "error": False,
        }  # fmt: skip
        assert lines[3] == {"type": "session.done", "utterance_index": 0, "total_sentences": 1}
        assert talk.stage.turns[0].text == "One two. Three."

    asyncio.run(script())


def test_sentences_are_split_where_a_message_ends_one():
    async def script():
        talk = Talk(CONFIG | {"split_granularity": "sentence"})
        talk.say("One, ", "two. ", "Three.")
        talk.speak()
        await asyncio.sleep(0)
        talk.speak()
        lines = await talk.heard()
        starts = [line for line in lines if not isinstance(line, bytes) and "sentence_text" in line]
        assert [line["sentence_index"] for line in starts] == [0, 1]
        texts = [line["sentence_text"] for line in starts]
        assert texts == ["One, two. ", "Three."]
        assert lines[-1]["total_sentences"] == 2
        assert [turn.text for turn in talk.stage.turns] == ["One, two. ", "Three."]

    asyncio.run(script())


def test_utterances_come_in_order_even_those_without_text():
    async def script():
        talk = Talk()
        talk.say("One.")
        talk.say()
        talk.say("Two.")
        talk.speak()
        lines = await talk.heard()
        talk.speak()
        lines += await talk.heard()
        done = [line for line in lines if isinstance(line, dict) and line["type"] == "session.done"]
        assert [(line["utterance_index"], line["total_sentences"]) for line in done] == [
            (0, 1), (1, 0), (2, 1),
        ]  # fmt: skip

    asyncio.run(script())


def test_each_sentence_is_a_file():
    async def script():
        talk = Talk({"type": "session.config", "split_granularity": "sentence"})
        talk.say("One. ", "Two.")
        talk.speak()
        await asyncio.sleep(0)
        talk.speak()
        lines = await talk.heard()
        files = [line for line in lines if isinstance(line, bytes)]
        assert [file[:4] for file in files] == [b"RIFF", b"RIFF"]
        done = [line for line in lines if not isinstance(line, bytes) and "total_bytes" in line]
        assert [line["total_bytes"] for line in done] == list(map(len, files))

    asyncio.run(script())


def test_the_config_comes_first_and_between_utterances():
    async def script():
        talk = Talk(config=None)
        talk.say("Hi.")
        talk.dialect.receive(json.dumps(CONFIG | {"voice": "bob"}))
        talk.say("Hi ", done=False)
        talk.dialect.receive(json.dumps(CONFIG))
        assert kinds(await talk.heard()) == ["error", "error", "error"]
        assert talk.stage.turns[0].options["voice"] == "bob"
        talk.send("input.done")
        talk.dialect.receive(json.dumps(CONFIG | {"voice": "alloy"}))  # OpenAI's name: the default voice
        talk.speak()
        await talk.heard()
        talk.say("Ho.")
        assert talk.stage.turns[1].options["voice"] is None

    asyncio.run(script())


def test_an_utterance_that_cannot_be_spoken_ends_with_an_error():
    async def script():
        talk = Talk(CONFIG | {"voice": "nobody"})
        talk.say("Hi.")
        lines = await talk.heard()
        assert kinds(lines) == ["audio.start", "error", "audio.done", "session.done"]
        assert (lines[1]["code"], lines[2]["error"]) == ("unknown_voice", True)
        assert "partial_audio" not in lines[1]
        talk.dialect.receive(json.dumps(CONFIG))
        talk.say("Hi.", done=False)
        talk.stage.turns[0].speak()
        before = await talk.heard()
        talk.stage.session.fail(RequestError("internal", "the engine has stopped"))
        lines = await talk.heard()
        assert kinds(before + lines) == [
            "audio.start", "audio", "error", "audio.done", "session.done", "error",
        ]  # fmt: skip
        assert (lines[0]["partial_audio"], lines[0]["action"]) == (True, "discard")

    asyncio.run(script())


def test_the_session_closes_behind_its_speech():
    async def script():
        talk = Talk()
        talk.say("One ", done=False)
        talk.send("session.close")
        talk.say("Two.", done=False)
        assert talk.over is None
        talk.speak()
        assert kinds(await talk.heard())[-1] == "session.done"
        assert talk.over == "closed"

    asyncio.run(script())


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
FIELDS = (
    "text", "voice", "language", "response_format", "stream_audio", "speed", "split_granularity", "seed",
)  # fmt: skip
TYPES = st.sampled_from(["session.config", "input.text", "input.done", "session.close", "x"])
VALUES = JSON | st.lists(JSON, max_size=2) | st.sampled_from(["Hi. ", "pcm", "mp3", "sentence"])
MESSAGES = (
    st.text(max_size=100)
    | st.binary(max_size=100)
    | st.tuples(TYPES, st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4)).map(
        lambda pair: json.dumps({"type": pair[0], **pair[1]})
    )
)


@given(st.lists(MESSAGES, max_size=8))
@settings(max_examples=100, deadline=None)
def test_any_messages_get_answers_with_codes(messages):
    async def script():
        talk = Talk()
        for message in messages:
            talk.dialect.receive(message)
        for event in list(talk.stage.session._outbox._entries):
            if isinstance(event, Reply):
                line = json.loads(event.message)
                assert line["type"] == "error"
                assert line["code"]
                assert line["message"]
        talk.stage.session.close()

    asyncio.run(script())


# --- a real server ----------------------------------------------------------------------------------


def hear(client):
    """The audio of an utterance, and the other messages."""
    audio, lines = b"", []
    while not lines or lines[-1]["type"] != "session.done":
        message = client.recv(timeout=60)
        if isinstance(message, bytes):
            audio += message
        else:
            lines.append(json.loads(message))
            assert lines[-1]["type"] != "error", lines[-1]
    return audio, lines


def send(client, message_type, **fields):
    client.send(json.dumps({"type": message_type, **fields}))


def test_it_speaks_files_and_speaks_again_after_a_client_has_hung_up(demo_server):
    after = len(demo_server.err)
    path = f"{PATH}?token={DEMO_TOKEN}"
    with demo_server.connect(path) as client:
        client.send(json.dumps(CONFIG))
        send(client, "input.text", text=LONG["text"])
        while not isinstance(client.recv(timeout=60), bytes):
            pass
    assert demo_server.frames_of_cancelled_turn(after) < SOON
    with demo_server.connect(path) as client:
        found = {}
        for name in ("pcm", "wav", "mp3", "flac"):
            send(client, "session.config", response_format=name, voice="slt", seed=3)
            for piece in ("Good ", "morning."):
                send(client, "input.text", text=piece)
            send(client, "input.done")
            found[name], lines = hear(client)
            assert lines[-2]["total_bytes"] == len(found[name])
        send(client, "session.close")
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=60)
        assert closed.value.rcvd.code == 1000
    assert len(found["pcm"]) > 24_000
    assert found["wav"][44:] == found["pcm"]
    assert found["mp3"].startswith(b"\xff")
    assert found["flac"].startswith(b"fLaC")
