"""Floods and junk over every dialect: the limits of docs/limits.md hold, and honest speech goes on."""

import contextlib
import http.client
import json
import re

import pytest
from live_server import SOON, LiveServer, RawClient, first_chunk, send

TEXT = "Good morning, how are you?"
MAX_CHARS = 50
MAX_MESSAGE_BYTES = 65_536
NUM_SLOTS = 2


class Dialect:
    """A WebSocket dialect: its path, and the form of a text, of its cancel and of the answers."""

    def __init__(self, path, messages, cancel, stopped, is_audio, first=()):
        self.path, self._messages, self._cancel, self.first = path, messages, cancel, first
        self.stopped, self.is_audio = stopped, is_audio

    def say(self, text, more=False, name="a"):
        """The messages of a text. If the dialect names texts, each name is used once."""
        return self._messages(text, more, name)

    def cancel(self, name="a"):
        """The message that stops a text."""
        return self._cancel | ({"context_id": name} if "context_id" in self._cancel else {})


def is_binary(message):
    return isinstance(message, bytes)


CLOSE = {"close_context": True}
DIALECTS = {
    "native": Dialect(
        "/",
        lambda text, more, name: [
            {"type": "speak", "context_id": name, "text": text},
            *([] if more else [{"type": "end", "context_id": name}]),
        ],
        {"type": "cancel"},
        lambda line: line.get("type") == "done",
        is_binary,
        [{"type": "hello", "protocol": 1}],
    ),
    "simple": Dialect(
        "/",
        lambda text, more, name: [{"text": text, "more": more}],
        {"cancel": True},
        lambda line: line.get("done"),
        is_binary,
    ),
    "Cartesia": Dialect(
        "/tts/websocket",
        lambda text, more, name: [{"context_id": name, "transcript": text, "continue": more}],
        {"context_id": "a", "cancel": True},
        lambda line: line["type"] == "done",
        lambda message: json.loads(message)["type"] == "chunk",
    ),
    "Deepgram": Dialect(
        "/v1/speak",
        lambda text, more, name: [
            {"type": "Speak", "text": text},
            *([] if more else [{"type": "Flush"}]),
        ],
        {"type": "Clear"},
        lambda line: line["type"] == "Cleared",
        is_binary,
    ),
    "ElevenLabs": Dialect(
        "/v1/text-to-speech/default/multi-stream-input?output_format=pcm_24000",
        lambda text, more, name: [
            {"context_id": name, "text": text},
            # It is closed twice: the first close lets it speak what was flushed.
            *([] if more else [{"context_id": name, "flush": True}, {"context_id": name, **CLOSE}]),
        ],
        {"context_id": "a", **CLOSE},
        lambda line: line.get("isFinal"),
        lambda message: bool(json.loads(message).get("audio")),
    ),
}
PATHS = sorted(
    {
        "/v1/audio/speech/stream",
        "/v1/text-to-speech/default/stream-input",
        *(dialect.path for dialect in DIALECTS.values()),
    }
)


@pytest.fixture(params=DIALECTS)
def dialect(request):
    return DIALECTS[request.param]


@pytest.fixture(scope="module")
def server(tiny_base, recording):
    """A server whose turns do not end by themselves."""
    server = LiveServer(
        *("--model", str(tiny_base), "--speaker-ref", str(recording)),
        *("--num-slots", str(NUM_SLOTS), "--max-text-chars", str(MAX_CHARS)),
    )
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


@pytest.fixture
def client(server, dialect):
    """A client that reads all messages, so that the server need not wait for it."""
    with server.connect(dialect.path, max_queue=None) as client:
        say(client, dialect.first)
        yield client
    server.wait_until_idle()
    assert not [line for line in server.err if re.search("ERROR|Traceback", line)]


def say(client, messages):
    for fields in messages:
        client.send(json.dumps(fields))


def codes_of(lines):
    """The codes of the errors among these messages."""
    codes = [line.get("code") or line.get("error_code") for line in lines if "isFinal" not in line]
    numbered = [line["error"] for line in lines if isinstance(line.get("code"), int)]  # ElevenLabs
    return numbered or [code.lower() for code in codes if code]


def codes_until_audio(client, dialect):
    """The codes of the errors that came before audio."""
    lines = []
    while not dialect.is_audio(message := client.recv(timeout=240)):
        lines.append(json.loads(message))
    return codes_of(lines)


# --- messages ---------------------------------------------------------------------------------------


def test_empty_texts_open_no_turns(server, client, dialect):
    for _ in range(900):
        say(client, dialect.say("", more=True))
    assert server.ready()["active"] <= 1
    say(client, [dialect.cancel(), *dialect.say(TEXT, name="b")])
    assert set(codes_until_audio(client, dialect)) <= {"bad_request"}


def test_a_text_of_single_characters_is_as_long_as_any_other(server, client, dialect):
    """Deepgram's texts have no end of their own. Text that does not fit is the next one, up to 32."""
    deepgram = dialect is DIALECTS["Deepgram"]
    num_fit = 32 * MAX_CHARS if deepgram else MAX_CHARS
    for _ in range(num_fit + 100):  # letters without a space: a word that may go on
        say(client, dialect.say("a", more=True))
    say(client, [dialect.cancel(), *dialect.say(TEXT, name="b")])
    lines = []
    while not lines or not dialect.stopped(lines[-1]):
        message = client.recv(timeout=240)
        if not (deepgram and is_binary(message)):  # Deepgram's full texts are spoken meanwhile
            lines.append(json.loads(message))
    if deepgram:
        assert set(codes_of(lines)) == {"overloaded"}
    else:
        assert codes_of(lines) == ["text_too_long"] * 100
    assert codes_until_audio(client, dialect) == []


def test_every_piece_of_junk_is_answered_and_the_next_text_is_spoken(client, dialect):
    for number in range(300):
        client.send(["{", '{"nonsense": 1}', "[]", b"\0"][number % 4])
    say(client, dialect.say(TEXT))
    assert codes_until_audio(client, dialect) == ["bad_request"] * 300


def test_texts_that_are_cancelled_at_once_leave_no_turns(server, client, dialect):
    after = len(server.err)
    for name in map(str, range(100)):
        say(client, [*dialect.say(TEXT, name=name), dialect.cancel(name)])
    num_stopped = 0
    while num_stopped < 100:
        message = client.recv(timeout=240)
        num_stopped += not is_binary(message) and bool(dialect.stopped(json.loads(message)))
    server.wait_until_idle()
    turns = [re.search(r"turn \S+: (\w+), .*frames (\d+)", line) for line in server.err[after:]]
    assert {turn[1] for turn in turns if turn} <= {"cancelled"}
    assert max((int(turn[2]) for turn in turns if turn), default=0) < SOON
    say(client, dialect.say(TEXT))
    assert codes_until_audio(client, dialect) == []


def test_texts_that_never_end_keep_no_slot_from_others(server, dialect):
    with contextlib.ExitStack() as stack:
        for _ in range(2 * NUM_SLOTS):
            silent = stack.enter_context(server.connect(dialect.path, max_queue=None))
            say(silent, [*dialect.first, *dialect.say("Hello there ", more=True)])
        honest = stack.enter_context(server.connect())
        send(honest, text=TEXT, seed=1)
        assert first_chunk(honest)
    server.wait_until_idle()


# --- frames -----------------------------------------------------------------------------------------


def close_frame(client):
    """Code and reason of the close frame, after whatever comes before it."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.socket.recv(65_536):
            data += part
    while data and data[0] != 0x88:
        length, head = (data[1], 2) if data[1] < 126 else (int.from_bytes(data[2:4], "big"), 4)
        data = data[head + length :]
    return int.from_bytes(data[2:4], "big"), data[4:].decode()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("frames", "code", "reason"),
    [
        (b"\x01\x81\0\0\0\0{" + b"\0\x80\0\0\0\0" * 128, 1008, "more than 128 fragments"),
        (b"\x89\x80\0\0\0\0" * 65, 1008, "more than 64 pings"),
        (b"\x81\xff" + (MAX_MESSAGE_BYTES + 1).to_bytes(8, "big") + bytes(4), 1009, "65537 bytes"),
    ],
    ids=["fragments", "pings", "a long message"],
)
def test_a_socket_that_breaks_a_limit_is_closed(server, path, frames, code, reason):
    client = RawClient(server, path=path)
    try:
        client.socket.sendall(frames)
        closed_with, because = close_frame(client)
        assert closed_with == code
        assert reason in because
    finally:
        client.hang_up()


# --- requests ---------------------------------------------------------------------------------------

REQUESTS = {
    "/v1/audio/speech": ("input", lambda answer: answer["error"]["code"]),
    "/tts/bytes": ("transcript", lambda answer: answer["error_code"]),
    "/v1/speak": ("text", lambda answer: answer["err_code"].lower()),
    "/v1/text-to-speech/default": ("text", lambda answer: answer["detail"]["status"]),
    "/v1/text-to-speech/default/stream/with-timestamps": (
        "text",
        lambda answer: answer["detail"]["status"],
    ),
}


def post(server, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=240)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", REQUESTS)
def test_a_request_beyond_a_limit_is_refused_with_a_code(server, path):
    field, code_of = REQUESTS[path]
    for body, status, code in (
        ("a" * (MAX_MESSAGE_BYTES + 1), 413, "text_too_long"),
        (json.dumps({field: "a" * (MAX_CHARS + 1)}), 400, "text_too_long"),
        ("{", 400, "bad_request"),
        ("[" * 10_000, 400, "bad_request"),
        (json.dumps({field: " "}), 400, "bad_request"),
    ):
        answer = post(server, path, body)
        assert (answer[0], code_of(json.loads(answer[1]))) == (status, code), body[:20]
    assert server.ready()["connections"] == 0
