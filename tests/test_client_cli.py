"""The command-line client, run as its user runs it, against a real server."""

import ast
import asyncio
import importlib.util
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import wave
from functools import partial

import numpy as np
import pytest
from live_server import LONG, ROOT, LiveServer
from refusing_proxy import RefusingProxy
from warm_process import run_warm
from websockets.sync.server import serve

CLIENT = ROOT / "pipecat_client" / "test_client.py"


def run(*arguments, stdin="", environ=None):
    return run_warm(CLIENT, *arguments, text=stdin, environ=environ)


def failure(*arguments, **options):
    """The only line of a failed run."""
    result = run(*arguments, **options)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def client_module():
    spec = importlib.util.spec_from_file_location("cli_client", CLIENT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_client_stands_alone():
    tree = ast.parse(CLIENT.read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy", "websockets", "sounddevice"}


def test_figures_and_wav(live_server, tmp_path):
    out = tmp_path / "x.wav"
    result = run(
        "--url", live_server.url, "--text", "Hello there.", "--out", str(out), "--json", "--seed", "1"
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    with wave.open(str(out)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24_000)
        assert file.getnframes() == figures["samples"] > 0
    assert figures["ttfc_ms"] > 0
    assert figures["ttfb_ms"] >= figures["ttfc_ms"] * 0.5
    assert figures["ttfa_ms"] is None or figures["ttfa_ms"] >= figures["ttfb_ms"]
    assert figures["rtf"] > 0
    assert figures["chunks"] > 0
    assert figures["duration_s"] == pytest.approx(figures["samples"] / 24_000, abs=1e-3)


@pytest.mark.parametrize("count", [0, 1, 1920])
def test_written_file_says_that_its_speech_is_synthetic(client_module, tmp_path, count):
    path = tmp_path / "x.wav"
    client_module.write_wav(path, np.linspace(-1.5, 1.5, count, dtype=np.float32))
    with wave.open(str(path)) as file:
        assert (file.getnframes(), file.getframerate()) == (count, 24_000)
        pcm = np.frombuffer(file.readframes(count), "<i2")
    assert not count or (pcm[0], pcm[-1]) == (-32_767, 32_767 if count > 1 else -32_767)
    content = path.read_bytes()
    assert struct.unpack("<I", content[4:8])[0] == len(content) - 8
    name, size = struct.unpack("<4sI", content[44 + 2 * count :][:8])
    info = content[44 + 2 * count + 8 :]
    assert (name, len(info)) == (b"LIST", size)
    assert info[:8] == b"INFOICMT"
    length = struct.unpack("<I", info[8:12])[0]
    assert info[12:].rstrip(b"\0").decode() == client_module.SYNTHETIC
    assert len(info[12:]) == length
    assert length % 2 == 0


def test_words_for_people(live_server):
    options = ("--voice", "default", "--language", "en", "--temperature", "0.5", "--top-k", "20")
    result = run("--url", live_server.url, "--text", "Hi.", *options, "--chunk-tokens", "2")
    assert result.returncode == 0, result.stderr
    for word in ("TTFC", "TTFA", "RTF", "chunks", "underruns", "finished"):
        assert word in result.stdout


def test_stdin_file_and_streamed_text(live_server, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("One two three four.")
    typed = ("--stream-text", "--words-per-second", "50", "--json")
    for arguments, stdin in ((("--stdin",), "One two three four."), (("--file", str(file)), "")):
        result = run("--url", live_server.url, *arguments, *typed, stdin=stdin)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["samples"] > 0


@pytest.mark.slow
def test_streamed_text_and_files_give_the_same_wav_as_the_whole_text(live_server, tmp_path):
    text = " Hello  there,\n\n  my\tfriend.\u00a0 How are you?\n"
    file = tmp_path / "text.txt"
    file.write_text(text)
    typed = ("--stream-text", "--words-per-second", "200")
    here = ("--url", live_server.url, "--seed", "3", "--temperature", "2", "--chunk-tokens", "1")
    sounds = []
    for number, (source, stdin) in enumerate(
        [
            (("--text", text), ""),
            (("--text", text, *typed), ""),
            (("--file", str(file)), ""),
            (("--file", str(file), *typed), ""),
            (("--stdin",), text),
            (("--stdin", *typed), text),
        ]
    ):
        out = tmp_path / f"{number}.wav"
        result = run(*here, *source, "--out", str(out), stdin=stdin)
        assert result.returncode == 0, result.stderr
        sounds.append(out.read_bytes())
    assert len(set(sounds)) == 1
    assert len(sounds[0]) > 10_000


def test_refusals_are_one_line(live_server):
    here = ("--url", live_server.url, "--text", "Hi.")
    assert "unknown_voice" in failure(*here, "--voice", "nobody")
    assert "unknown_language" in failure(*here, "--language", "klingon")
    assert "bad_request" in failure(*here, "--temperature", "99")
    assert "cannot write" in failure(*here, "--out", "/nowhere/x.wav")


class BusyServer:
    """Refuses so many tries, each on a connection of its own, and then sends a frame of silence."""

    def __init__(self, num_refusals, later_s):
        self.num_refusals, self.later_s, self.heard = num_refusals, later_s, []
        self._server = serve(self._answer, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}"

    def _answer(self, connection):
        self.heard.append(json.loads(connection.recv())["text"])
        if len(self.heard) <= self.num_refusals:
            refusal = {"error": "full", "code": "overloaded", "retry_after_s": self.later_s}
            connection.send(json.dumps(refusal))
        else:
            connection.send(np.zeros(1920, "<f4").tobytes())
            connection.send(json.dumps({"done": True, "finish_reason": "stop", "samples": 1920}))

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()


@pytest.mark.parametrize("options", [(), ("--stream-text",)])
def test_a_busy_server_is_asked_again_when_it_said(options):
    with BusyServer(2, later_s=0.2) as server:
        result = run("--url", server.url, "--text", "Hello there.", "--json", *options)
    assert result.returncode == 0, result.stderr
    assert len(server.heard) == 3
    assert len(set(server.heard)) == 1
    assert json.loads(result.stdout)["samples"] == 1920
    assert result.stderr.count("try again in 0.2 s") == 2


def test_a_server_that_is_busy_for_longer_is_not_waited_for():
    with BusyServer(9, later_s=5) as server:
        said = failure("--url", server.url, "--text", "Hi.", "--timeout", "4")
    assert len(server.heard) == 1
    assert "try again in 5 s" in said


def test_unreadable_text_is_one_line():
    assert "empty" in failure("--text", " ")
    assert "empty" in failure("--stdin")
    assert "cannot read" in failure("--file", "/nowhere")


def test_no_server_is_one_line():
    assert "connection refused" in failure("--url", f"ws://127.0.0.1:{free_port()}", "--text", "Hi.")


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1:1", "ws://[", "ws://127.0.0.1:port"])
def test_wrong_address_is_one_line(url):
    assert "not a WebSocket address" in failure("--url", url, "--text", "Hi.")


def test_loading_and_guarded_server_is_one_line(tiny_base):
    token = "a-secret-for-tests"
    server = LiveServer("--model", str(tiny_base), environ={"QWEN_MEGAKERNEL_TOKEN": token})
    try:
        here = ("--url", server.url, "--text", "Hi.")
        assert "--token" in failure(*here, environ={"QWEN_MEGAKERNEL_TOKEN": "wrong"})
        assert "HTTP 503" in failure(*here, "--token", token)
    finally:
        server.kill()


def test_silent_server_times_out():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted = []
        threading.Thread(target=lambda: accepted.append(listener.accept()), daemon=True).start()
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
        assert "error" in failure("--url", url, "--text", "Hi.", "--timeout", "0.5")


def test_play_without_a_sound_card_says_so(live_server):
    assert "--play" in failure("--url", live_server.url, "--text", "Hi.", "--play")


def test_playhead_counts_underruns_and_audible_start(client_module):
    playhead = client_module.Playhead()
    silence, tone = np.zeros(4800, np.float32), np.full(2400, 0.1, np.float32)
    playhead.add(silence, 1.0)  # plays until 1.2
    playhead.add(tone, 1.1)  # in time: heard from 1.2 to 1.3
    playhead.add(tone, 1.5)  # 200 ms late
    playhead.add(tone, 1.55)  # in time again
    assert (playhead.chunks, playhead.underruns) == (4, 1)
    assert playhead.stalled_s == pytest.approx(0.2)
    assert playhead.first_chunk_s == 1.0
    assert playhead.first_audible_s == pytest.approx(1.2)


def test_audible_start_is_found_across_a_chunk_border(client_module):
    playhead = client_module.Playhead()
    for start in range(0, 4800, 100):
        level = 0.1 if start >= 2400 else 0.001
        playhead.add(np.full(100, level, np.float32), start / 24_000)
    assert playhead.first_audible_s == pytest.approx(0.1, abs=0.0101)


def test_speech_on_a_machine_with_a_proxy(live_server):
    with RefusingProxy() as proxy:
        result = run("--url", live_server.url, "--text", "Hi.", environ=proxy.environ)
    assert result.returncode == 0, result.stderr
    assert proxy.asked == []


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "[::1]"])
def test_proxy_is_not_asked_for_loopback(host):
    with RefusingProxy() as proxy:
        failure("--url", f"ws://{host}:{free_port()}", "--text", "Hi.", environ=proxy.environ)
    assert proxy.asked == []


def test_proxy_is_asked_for_other_machines():
    with RefusingProxy() as proxy:
        failure("--url", "ws://192.0.2.1:8765", "--text", "Hi.", environ=proxy.environ)
    assert proxy.asked == ["CONNECT 192.0.2.1:8765 HTTP/1.1"]


def test_out_that_cannot_be_written_is_noticed_before_the_synthesis(tmp_path):
    """There is no server, so the synthesis cannot have begun."""
    here = ("--url", f"ws://127.0.0.1:{free_port()}", "--text", "Hi.", "--out")
    assert "it is a folder" in failure(*here, str(tmp_path))
    assert "its folder does not exist" in failure(*here, str(tmp_path / "nowhere" / "x.wav"))
    assert "cannot write /proc/x.wav" in failure(*here, "/proc/x.wav")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_out_in_a_read_only_folder_is_noticed_before_the_synthesis(tmp_path):
    tmp_path.chmod(0o555)
    here = ("--url", f"ws://127.0.0.1:{free_port()}", "--text", "Hi.")
    assert "Permission denied" in failure(*here, "--out", str(tmp_path / "x.wav"))


def test_failed_turn_leaves_the_old_file_and_no_new_one(tmp_path):
    old, new = tmp_path / "old.wav", tmp_path / "new.wav"
    old.write_bytes(b"recorded yesterday")
    for out in (old, new):
        url = f"ws://127.0.0.1:{free_port()}"
        assert "connection refused" in failure("--url", url, "--text", "Hi.", "--out", str(out))
    assert old.read_bytes() == b"recorded yesterday"
    assert not new.exists()


def num_samples(path):
    with wave.open(str(path)) as file:
        return file.getnframes()


def test_audio_is_kept_where_the_disk_turns_out_to_be_full(live_server, tmp_path):
    here = ("--url", live_server.url, "--text", "Hi.", "--seed", "1", "--out")
    line = failure(*here, "/dev/full", environ={"TMPDIR": str(tmp_path)})
    assert "cannot write /dev/full: No space left on device" in line
    (kept,) = tmp_path.iterdir()
    assert str(kept) in line
    assert num_samples(kept) > 0


def hear_sigint():
    """Where the tests run in a shell's background, their processes would ignore the signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def break_off(server, out, disturb):
    """The client's exit code and its last words, where a long speech breaks off: `disturb(client)`."""
    options = ["--temperature", "10", "--top-k", "0", "--seed", "0", "--out", str(out)]
    command = [sys.executable, str(CLIENT), "--url", server.url, "--text", LONG["text"], *options]
    client = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_sigint)
    try:
        deadline = time.monotonic() + 120
        while not server.ready()["active"] and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(1)  # some chunks come
        disturb(client)
        _, said = client.communicate(timeout=120)
    finally:
        client.kill()
    assert num_samples(out) > 0
    return client.returncode, said


def test_audio_that_came_is_kept_when_the_server_is_killed(brief_base, recording, tmp_path):
    server = LiveServer("--model", str(brief_base), "--speaker-ref", str(recording)).wait_until_ready()
    try:
        code, said = break_off(server, tmp_path / "x.wav", lambda client: server.kill())
    finally:
        server.kill()
    assert code == 1
    assert f"s that came to {tmp_path / 'x.wav'}" in said
    assert said.count("\n") == 1


def test_audio_that_came_is_kept_when_the_client_is_stopped(live_server, tmp_path):
    live_server.wait_until_idle()
    stop = partial(subprocess.Popen.send_signal, sig=signal.SIGINT)
    assert break_off(live_server, tmp_path / "x.wav", stop)[0] == 130


@pytest.mark.parametrize("how", ["--file", "--stdin", "--text"])
def test_byte_order_mark_is_not_spoken(client_module, how, tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfHello.\r\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    values = {"--file": [str(file)], "--stdin": [], "--text": ["\ufeffHello.\n"]}
    args = client_module.parse_arguments([how, *values[how]])
    assert client_module.read_text(args) == "Hello.\n"


@pytest.mark.parametrize("how", ["--file", "--stdin", "--text"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_text_that_is_not_utf_8_is_refused_by_name(how, locale, tmp_path):
    text = b"Gr\xfc\xdfe"
    file = tmp_path / "latin1.txt"
    file.write_bytes(text)
    values = {"--file": [file], "--stdin": [], "--text": [text]}
    result = subprocess.run(
        [sys.executable, CLIENT, "--url", f"ws://127.0.0.1:{free_port()}", how, *values[how]],
        input=text,
        capture_output=True,
        env={**os.environ, "LC_ALL": locale},
        timeout=240,
    )
    assert result.returncode == 1
    assert result.stderr.startswith(b"error: the text must be UTF-8")
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a \ud83d b", "a \ufffd b"), ("\ude00", "\ufffd"), ("a \ud83d\ude00", "a \U0001f600")],
)
def test_halves_of_surrogate_pairs_are_repaired(client_module, text, expected):
    args = client_module.parse_arguments(["--text", text])
    assert client_module.read_text(args) == expected


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_reader_that_has_left_is_no_error(live_server, form):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(CLIENT), "--url", live_server.url, "--text", "Hi.", *form]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=240)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


def test_figures_that_cannot_be_printed_are_an_error(live_server):
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(CLIENT), "--url", live_server.url, "--text", "Hi."]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=240)
    assert result.returncode == 1
    assert result.stderr == b"error: cannot print the figures: No space left on device\n"


def test_play_without_portaudio_names_portaudio(live_server, tmp_path):
    (tmp_path / "sounddevice.py").write_text('raise OSError("PortAudio library not found")')
    command = [sys.executable, str(CLIENT), "--url", live_server.url, "--text", "Hi.", "--play"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    assert result.returncode == 1
    assert "apt install libportaudio2" in result.stderr
    assert "pip install" not in result.stderr


@pytest.mark.parametrize(("later", "said"), [({"retry_after_s": 6.5}, "; try again in 6.5 s"), ({}, "")])
def test_a_busy_server_s_time_to_come_back_is_told(client_module, later, said):
    class Socket:
        async def recv(self):
            return json.dumps({"error": "no room", "code": "overloaded", **later})

    async def hear():
        return [message async for message in client_module.receive(Socket(), 10)]

    with pytest.raises(client_module.ClientError) as refused:
        asyncio.run(hear())
    assert str(refused.value) == f"server: no room (overloaded){said}"
