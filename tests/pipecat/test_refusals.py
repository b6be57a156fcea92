"""A refusal of the server ends the reply at once, is reported as an error, and leaves no text behind."""

import asyncio

import pytest
from slow_cases import slow_after

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

from pipecat_client import journal_service, megakernel_tts
from pipecat_client.megakernel_tts import MegakernelTTSService
from qwen_megakernel.serving.native_messages import Done, Error, Speak

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
    """Frames, errors and the recording. A script may be made from tap and service."""

    async def scenario():
        async with WireTap(server.port) as tap:
            service = make_service(tap.url, **options)
            down, errors = await play(service, script(tap, service))
            return down, [error.error for error in errors], tap

    return asyncio.run(scenario())


def held(down):
    """The text that the conversation holds."""
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
    """For any reason of the server; here it is a setting that the client's checks miss."""
    service, told = make_service(live_server.url, text_aggregation_mode=mode), []
    service.add_event_handler("on_error", lambda _, error: told.append(error))

    def script():
        service._settings.top_k = -1
        yield from turn(*TURN)
        yield from until(lambda: told)
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
    """A turn has one error, however long the LLM writes: three would make the service unusable."""

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
@pytest.mark.parametrize("words", slow_after(1, ["estimated", "off"]))
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
    """Replies that are complete without a sound, such as an ellipsis or a smiley."""

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


def speaks_after_refusals(server, refusals, num_texts=1):
    """Seconds from each refusal to the next `speak`, as the proxy saw them; and the recording."""

    def script(tap, service):
        tap.busy = list(refusals)
        yield from (TTSSpeakFrame("This is said.") for _ in range(num_texts))
        yield from until(lambda: tap.lines and len(tap.lines[0].received(Done)) == num_texts)

    down, errors, tap = converse(server, script)
    assert errors == []
    assert len(only(down, TTSStartedFrame)) == len(only(down, TTSStoppedFrame)) == num_texts
    refused_at = [
        at
        for at, message in tap.line.heard
        if isinstance(message, Error)
        if message.code == "overloaded"
    ]
    asked_at = [at for at, message in tap.line.said if isinstance(message, Speak)]
    assert len(refused_at) == len(refusals)
    return [min(later for later in asked_at if later > at) - at for at in refused_at]


def test_text_is_sent_again_when_the_server_says(live_server):
    """Each wait is the time of its refusal, and longer than a wait without a given time."""
    first_s, second_s = speaks_after_refusals(live_server, [2.5, 1.5])
    assert first_s >= 2.4
    assert second_s >= 1.4


def test_a_server_may_ask_for_less_than_the_usual_wait(live_server, monkeypatch):
    monkeypatch.setattr(megakernel_tts, "RETRY_S", 300.0)
    speaks_after_refusals(live_server, [0.2])


def test_a_server_cannot_ask_for_more_than_a_minute(live_server, monkeypatch):
    monkeypatch.setattr(journal_service, "MAX_RETRY_S", 0.5)
    (after_s,) = speaks_after_refusals(live_server, [1e6])
    assert after_s >= 0.4


def test_of_two_refusals_the_later_time_counts(live_server):
    """Both replies were sent before the first refusal. Neither is sent again before its time."""
    waits_s = speaks_after_refusals(live_server, [2.5, 0.2], num_texts=2)
    assert max(waits_s) >= 2.4


def test_a_reply_that_waits_is_not_given_up(live_server):
    """Pipecat ends a reply that is silent for a while, which is shorter than the server's wait."""

    def script(tap, service):
        tap.busy = [6.0]
        yield TTSSpeakFrame("This is said.")
        yield from until(lambda: tap.lines and tap.lines[0].received(Done))

    down, errors, _ = converse(live_server, script, stop_frame_timeout_s=4.0)
    assert errors == []
    assert held(down) == "This is said."
    assert pcm(down) != b""
