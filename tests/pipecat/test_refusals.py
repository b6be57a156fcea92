"""What the server refuses ends the reply at once, is told to the developer, and is not remembered."""

import asyncio

import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from conversation import LONG_SETTINGS, TURN, make_service, only, pcm, play, spoken, turn, until
from live_server import LiveServer
from pipecat.frames.frames import (
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
    TTSUpdateSettingsFrame,
)
from pipecat.services.tts_service import TextAggregationMode
from pipecat.transcriptions.language import Language
from wire_tap import WireTap, num_chunks

from pipecat_client.megakernel_tts import MegakernelTTSService
from qwen_megakernel.serving.native_messages import Error, Speak

Settings = MegakernelTTSService.Settings
WRONG = [
    ({"temperature": 12.0}, "temperature is out of range, allowed: 0 to 10"),
    ({"temperature": float("nan")}, "temperature is out of range"),
    ({"temperature": "0.7"}, "temperature is a string, expected a number"),
    ({"top_k": -1}, "top_k is out of range, allowed: 0 to 65536"),
    ({"top_k": 1.5}, "top_k is a fraction, expected an integer"),
    ({"chunk_frames": 12}, "chunk_frames is out of range, allowed: 1 to 8"),
    ({"instruct": "Slowly. " * 150}, "instruct is longer than 1000 characters"),
    ({"seed": -1}, "seed is out of range"),
    ({"voice": 3}, "voice is a number, expected a string"),
]


def converse(server, script, **options):
    """Frames, errors and the recording; a script may be made from tap and service."""

    async def scenario():
        async with WireTap(server.port) as tap:
            service = make_service(tap.url, **options)
            down, errors = await play(service, script(tap, service))
            return down, [error.error for error in errors], tap

    return asyncio.run(scenario())


def held(down):
    """What the conversation holds."""
    return " ".join(frame.text for frame in only(down, TTSTextFrame) if frame.append_to_context)


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_wrong_setting_is_refused_when_the_service_is_made(values, message):
    with pytest.raises(ValueError, match=message):
        MegakernelTTSService(settings=Settings(**values))


def test_wrong_change_of_settings_is_told_and_changes_nothing(live_server):
    changes = [*(values for values, _ in WRONG), {"voice": "nobody"}, {"language": "tlh"}]

    def script(tap, service):
        for values in changes:
            yield TTSUpdateSettingsFrame(delta=Settings(**values))
        yield TTSUpdateSettingsFrame(delta=Settings(temperature=0.5, language=Language.EN_GB))
        yield TTSSpeakFrame("Hello.")

    down, errors, tap = converse(live_server, script)
    assert len(errors) == len(changes)
    for error, (_, message) in zip(errors, WRONG, strict=False):
        assert "the settings stay as they are" in error
        assert message in error
    assert "voice nobody is unknown; known: default" in errors[-2]
    assert "language tlh is unknown; known: " in errors[-1]
    (speak,) = tap.line.sent(Speak)
    assert (speak.temperature, speak.top_k, speak.language, speak.voice) == (0.5, None, "english", None)
    assert pcm(down) != b""


@pytest.mark.parametrize("mode", list(TextAggregationMode))
def test_refused_speak_ends_the_reply_at_once(live_server, mode):
    """Whatever the server refuses it for: here a setting that slipped by the checks."""
    service = make_service(live_server.url, text_aggregation_mode=mode)

    def script():
        service._settings.top_k = -1
        yield from turn(*TURN)
        yield from until(service.get_audio_contexts)
        yield from until(lambda: not service.get_audio_contexts(), 5)  # Pipecat itself waits 10 s
        service._settings.top_k = 5
        yield TTSSpeakFrame("This can be said.")

    down, errors = asyncio.run(play(service, script()))
    assert "top_k is out of range, allowed: 0 to 65536 (bad_request)" in errors[0].error
    assert sum("bad_request" in error.error for error in errors) == 1
    assert len(only(down, TTSStartedFrame)) == len(only(down, TTSStoppedFrame)) == 2
    assert held(down) == "This can be said."
    assert pcm(down) != b""


def test_rest_of_a_failed_reply_is_not_asked_for(live_server):
    """One error for a turn, however long the LLM goes on: three would make the service unusable."""

    def script(tap, service):
        yield LLMFullResponseStartFrame()
        yield from map(LLMTextFrame, ("This is 0. ", "This is 1. "))
        yield from until(lambda: tap.lines and tap.line.received(Error))
        yield from map(LLMTextFrame, ("This is 2. ", "This is 3. ", "This is 4. "))
        yield LLMFullResponseEndFrame()

    down, errors, _ = converse(live_server, script, voice="nobody")
    assert sum("(unknown_voice)" in error for error in errors) == 1
    assert not any("consecutive" in error for error in errors)
    assert len(only(down, TTSStartedFrame)) == len(only(down, TTSStoppedFrame)) == 1
    assert held(down) == ""


@pytest.mark.parametrize("mode", list(TextAggregationMode))
@pytest.mark.parametrize("words", ["estimated", "off"])
def test_only_what_was_heard_is_kept_when_the_server_is_gone_for_good(
    brief_base, recording, mode, words
):
    server = LiveServer("--model", str(brief_base), "--speaker-ref", str(recording)).wait_until_ready()

    def script(tap, service):
        yield LLMFullResponseStartFrame()
        yield LLMTextFrame("The first sentence has a great many words, and breaks off amid them all. ")
        yield LLMTextFrame("The second")
        yield from until(lambda: tap.lines and num_chunks(tap.line) >= 3)
        server.kill()
        yield from until(lambda: not service.is_usable)
        yield LLMTextFrame(" is never sent. And the third is not, either.")
        yield LLMFullResponseEndFrame()

    options = {"max_reconnect_attempts": 2, "text_aggregation_mode": mode, "word_timestamps": words}
    try:
        down, errors, tap = converse(server, script, **LONG_SETTINGS, **options)
    finally:
        server.kill()
    assert any("failed to reconnect after 2 attempts" in error for error in errors)
    assert "never" not in held(down)
    assert "third" not in held(down)
    if words == "estimated":
        # Not even the rest of the sentence that broke off.
        assert held(down).startswith("The")
        assert "amid" not in held(down)
    assert pcm(down) == tap.line.pcm() != b""


def test_texts_that_say_nothing_leave_the_service_usable(live_server):
    """Replies that are complete without a sound, as the server makes of an ellipsis or a smiley."""

    def script(tap, service):
        tap.mute = True
        for _ in range(4):
            yield TTSSpeakFrame("So.")
        yield from until(lambda: not service.get_audio_contexts())
        tap.mute = False
        yield TTSSpeakFrame("This is heard.")

    down, errors, _ = converse(live_server, script)
    assert errors == []
    assert pcm(down) != b""
    assert spoken(down).endswith("This is heard.")
