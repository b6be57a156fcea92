"""The demo's own page in a headless Chromium: a conversation, an interruption, and no other host."""

import re
import wave

import numpy as np
import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from browser import open_browser, take_picture, watched_page
from pipecat.frames.protobufs import frames_pb2
from rtvi_client import VOICE_RATE, voice
from test_pipeline_demo import cancelled_turns, scripted_demo

from pipecat_client.scripted import REPLIES

pytestmark = pytest.mark.slow  # a browser beside the bot and the server

QUIET_S, VOICE_S = 8, 1.2


@pytest.fixture(scope="module")
def url(talker):
    with scripted_demo(talker.url) as port:
        yield f"http://localhost:{port}/talk/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser whose microphone hears silence, then a voice, and so on."""
    path = tmp_path_factory.mktemp("microphone") / "voice.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, VOICE_RATE, 0, "NONE", ""))
        file.writeframes(bytes(QUIET_S * 2 * VOICE_RATE) + voice(VOICE_S))
    with open_browser(microphone=path) as browser:
        yield browser


@pytest.fixture
def page(browser, url):
    with watched_page(browser, url) as page:
        yield page


def until_text(page, selector, pattern):
    page.locator(selector).filter(has_text=re.compile(pattern)).first.wait_for()


def test_a_voice_interrupts_the_agent(page, talker):
    before = cancelled_turns(talker)
    page.click("#talk")
    until_text(page, "#said li.agent.cut", r"\w+")
    cut = page.inner_text("#said li.agent.cut >> nth=0")
    assert REPLIES[0].startswith(cut)
    until_text(page, "#interruptions", "interrupted")
    page.locator("#said li.agent >> nth=1").wait_for()  # it takes its turn when the voice has ended
    take_picture(page, "talk")
    page.click("#talk")
    until_text(page, "#state-text", "not connected")
    assert page.is_hidden("#error")
    talker.wait_until_idle()
    assert cancelled_turns(talker) > before


def test_a_typed_text_is_answered(page):
    page.check("#mute")
    page.click("#talk")
    until_text(page, "#said li.agent", r"\w+")
    page.fill("#typed", "Stop.")
    page.press("#typed", "Enter")
    until_text(page, "#said li.me", "Stop")
    until_text(page, "#said li.agent", "You said: Stop.")
    page.click("#talk")
    until_text(page, "#state-text", "not connected")


def test_the_wire_is_pipecats(page):
    """The page's own encoding and decoding of frames, against Pipecat's."""
    written = page.evaluate(
        """async () => {
            const {audioFrame, messageFrame} = await import("./frames.js");
            const frames = [audioFrame(Int16Array.from({length: 300}, (_, i) => 200 * i - 30000), 16000),
                            messageFrame({type: "é", data: {n: 1}})];
            return frames.map((frame) => [...frame]);
        }"""
    )
    audio, message = (frames_pb2.Frame.FromString(bytes(frame)) for frame in written)
    samples = np.frombuffer(audio.audio.audio, "<i2")
    assert samples.tolist() == [200 * i - 30000 for i in range(300)]
    assert (audio.audio.sample_rate, audio.audio.num_channels) == (16_000, 1)
    assert message.message.data == '{"type":"é","data":{"n":1}}'

    frame = frames_pb2.Frame()
    frame.audio.id, frame.audio.name, frame.audio.pts = 2**40, "TTSAudioRawFrame#1", 2**50
    frame.audio.audio, frame.audio.sample_rate, frame.audio.num_channels = b"\x01\x00\xff\xff", 24_000, 1
    read = page.evaluate(
        """async (bytes) => {
            const {parseFrame} = await import("./frames.js");
            const {audio, rate} = parseFrame(Uint8Array.from(bytes).buffer);
            return [[...audio], rate];
        }""",
        list(frame.SerializeToString()),
    )
    assert read == [[1, -1], 24_000]
