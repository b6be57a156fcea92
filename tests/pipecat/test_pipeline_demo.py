"""`pipeline_demo.py` as a process: its page, conversations over RTVI, errors if it cannot run."""

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec

import httpx
import numpy as np
import pytest
from slow_cases import slow_after

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from live_server import ROOT, LiveServer
from refusing_proxy import RefusingProxy
from rtvi_client import VOICE_RATE, RtviClient, voice

from pipecat_client import pipeline_demo
from pipecat_client.scripted import REPLIES
from training.listening import word_errors

DEMO = "pipecat_client/pipeline_demo.py"


def environment():
    keys = {name for name in os.environ if name.endswith("_API_KEY")}
    return {name: value for name, value in os.environ.items() if name not in keys}


def run_demo(*arguments):
    return subprocess.run(
        [sys.executable, DEMO, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


@contextmanager
def scripted_demo(tts_url, *options):
    """Run the scripted demo. Gives the port of its page."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, DEMO, "--scripted", "--tts-url", tts_url, "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/status", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def demo_port(live_server):
    with scripted_demo(live_server.url) as port:
        yield port


def test_page_is_served(demo_port):
    with urllib.request.urlopen(f"http://localhost:{demo_port}/client/", timeout=240) as response:
        assert b"<html" in response.read().lower()


def test_greeting_and_answer(demo_port):
    async def scenario():
        async with RtviClient(demo_port) as client:
            await client.wait(lambda: client.count("bot-stopped-speaking") == 1)
            await client.wait(lambda: client.words().endswith(REPLIES[0][-4:]))
            greeting, heard = client.words(), len(client.audio)
            seen = len(client.messages)
            await client.say("send-text", content="Good morning to you.")
            await client.wait(lambda: client.count("bot-stopped-speaking") == 2)
            # The last word may come a moment after the last sound.
            await client.wait(lambda: client.words(seen).endswith("you."))
            return greeting, heard, client.words(seen), len(client.audio), client.messages

    greeting, heard, answer, heard_in_all, messages = asyncio.run(scenario())
    assert greeting == REPLIES[0]
    assert answer == "You said: Good morning to you."
    assert 0 < heard < heard_in_all
    assert any(message["type"] == "metrics" for message in messages)


@pytest.mark.slow
def test_greeting_is_understood(listener):
    checkpoint = ROOT / "demo_voice"
    server = LiveServer("--model", str(checkpoint), "--voices", str(checkpoint / "voices"))

    async def scenario(port):
        async with RtviClient(port) as client:
            await client.wait(lambda: client.words().endswith(REPLIES[0][-4:]))
            await client.wait(lambda: client.messages[-1]["type"] == "bot-stopped-speaking")
            return bytes(client.audio)

    try:
        with scripted_demo(server.wait_until_ready().url, "--voice", "rms") as port:
            pcm = asyncio.run(scenario(port))
    finally:
        server.kill()
    heard = listener.write_down(np.frombuffer(pcm, "<i2").astype(np.float32) / 32768)
    errors, words = word_errors(REPLIES[0], heard)
    assert errors <= words // 2, heard


@pytest.fixture(scope="module")
def talker_port(talker):
    with scripted_demo(talker.url) as port:
        yield port


async def barge_in(port, interrupt, answer):
    """The words that were heard of the greeting, and those from the beginning of the answer on.

    A word that was heard while the interruption was on its way may be told after it.
    """
    async with RtviClient(port) as client:
        await client.wait(lambda: len(client.words().split()) >= 3)
        await interrupt(client)
        await client.wait(lambda: client.count("bot-interrupted") == 1)
        silence = asyncio.create_task(client.speak(bytes(20 * 2 * VOICE_RATE)))
        await client.wait(lambda: answer in client.words())
        silence.cancel()
        words = client.words()
        return words[: words.index(answer)].rstrip(), words[words.index(answer) :]


def cancelled_turns(server):
    return sum(": cancelled," in line for line in server.err)


@pytest.mark.slow
def test_barge_in_by_text(talker, talker_port):
    before = cancelled_turns(talker)
    cut, answer = asyncio.run(
        barge_in(
            talker_port,
            lambda client: client.say("send-text", content="Stop."),
            "You said: Stop.",
        )
    )
    assert REPLIES[0].startswith(cut)
    assert 3 <= len(cut.split()) < len(REPLIES[0].split())
    assert answer == "You said: Stop."
    talker.wait_until_idle()
    assert cancelled_turns(talker) > before


def test_barge_in_by_voice(talker, talker_port):
    """With the real voice detector. When the voice ends, the bot takes its turn."""
    before = cancelled_turns(talker)
    begins = " ".join(REPLIES[1].split()[:3])
    cut, answer = asyncio.run(barge_in(talker_port, lambda client: client.speak(voice(1.0)), begins))
    assert REPLIES[0].startswith(cut)
    assert 3 <= len(cut.split()) < len(REPLIES[0].split())
    assert REPLIES[1].startswith(answer)
    talker.wait_until_idle()
    assert cancelled_turns(talker) > before


def test_help_explains_itself():
    result = run_demo("--help")
    assert result.returncode == 0
    for word in ("--scripted", "OPENAI_API_KEY", "ssh -L 7860:localhost:7860", "--half-duplex", "-t {"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "package", "line"),
    slow_after(
        1,
        [
            (["--stt", "openai"], None, "--stt openai needs the variable OPENAI_API_KEY"),
            (
                ["--scripted", "--local"],
                "pyaudio",
                "pipecat_client/requirements-microphone.txt",
            ),
            (
                ["--stt", "whisper"],
                "faster_whisper",
                "pipecat_client/requirements-whisper.txt",
            ),
        ],
    ),
)
def test_what_is_missing_is_one_line(arguments, package, line):
    if package is not None and find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    result = run_demo(*arguments)
    assert result.returncode == 1
    (said,) = [line for line in result.stderr.splitlines() if "INFO" not in line]
    assert said.endswith(line)


@pytest.mark.parametrize("listed", ["", "intranet.example", "*"])
def test_proxy_is_not_asked_for_a_language_model_on_this_machine(monkeypatch, listed):
    with RefusingProxy() as proxy, socket.socket() as unserved:
        unserved.bind(("127.0.0.1", 0))
        for name, value in (proxy.environ | {"no_proxy": listed}).items():
            monkeypatch.setenv(name, value)
        pipeline_demo.reach_loopback_directly()
        for host in ("localhost", "127.0.0.1", "[::1]"):
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"http://{host}:{unserved.getsockname()[1]}/v1/models")
    assert proxy.asked == []
    assert bool(urllib.request.proxy_bypass("intranet.example")) == bool(listed)
