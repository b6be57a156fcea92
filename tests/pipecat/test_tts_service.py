"""The Pipecat service in Pipecat's test pipeline, against a real server process."""

import asyncio

import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from conversation import (
    ENDLESS,
    LONG_SETTINGS,
    TURN,
    make_service,
    metrics,
    names,
    only,
    pcm,
    play,
    spoken,
    turn,
    until,
)
from pipecat.frames.frames import (
    AggregatedTextFrame,
    AggregatedTextProgressFrame,
    InterruptionFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    MetricsFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
    TTSUpdateSettingsFrame,
)
from pipecat.metrics.metrics import TTFBMetricsData, TTSUsageMetricsData
from pipecat.services.tts_service import TextAggregationMode
from pipecat.tests.utils import SleepFrame
from pipecat.transcriptions.language import Language
from pipecat.utils.errors import ErrorCategory
from refusing_proxy import RefusingProxy
from wire_tap import WireTap, num_chunks

from pipecat_client.handshake import connect_options
from pipecat_client.megakernel_tts import MegakernelTTSService
from pipecat_client.settings import ServerTTSMetricsData
from qwen_megakernel.serving.native_messages import AudioChunk, Cancel, Done, Hello, Segment, Speak

WORDS = (TTSTextFrame, AggregatedTextProgressFrame, MetricsFrame)


def converse(server, script, **options):
    """Frames, errors and the recording of one pipeline. A script may be made from tap and service."""

    async def scenario():
        async with WireTap(server.port) as tap:
            service = make_service(tap.url, **options)
            frames = script(tap, service) if callable(script) else script
            down, errors = await play(service, frames)
            return down, errors, tap

    return asyncio.run(scenario())


def context_ids(frames, kind=TTSStartedFrame):
    return [frame.context_id for frame in only(frames, kind)]


def test_one_utterance(live_server):
    down, errors, tap = converse(live_server, [TTSSpeakFrame("Hello there, my friend.")])
    assert errors == []
    assert names(down, *WORDS) == [
        "AggregatedTextFrame",
        "TTSStartedFrame",
        "TTSAudioRawFrame",
        "LLMAssistantPushAggregationFrame",
        "TTSStoppedFrame",
    ]
    assert pcm(down) == tap.line.pcm() != b""
    assert {(f.sample_rate, f.num_channels) for f in only(down, TTSAudioRawFrame)} == {(24_000, 1)}
    assert spoken(down) == "Hello there, my friend."
    assert tap.line.outline() == "sfe"


def test_sentences_of_a_turn_share_a_context(live_server):
    down, errors, tap = converse(live_server, turn(*TURN))
    assert errors == []
    assert len(set(context_ids(down, TTSAudioRawFrame))) == 1
    assert len(only(down, TTSStartedFrame)) == len(only(down, TTSStoppedFrame)) == 1
    assert [f.text.strip() for f in only(down, AggregatedTextFrame) if f.will_be_spoken] == [
        text.strip() for text in TURN
    ]
    assert tap.line.outline() == "sfsfsfe"
    assert [text.strip() for text in tap.line.texts()] == [text.strip() for text in TURN]
    segments = tap.line.received(Segment)
    assert [segment.index for segment in segments] == [0, 1, 2]
    assert sum(s.duration_s for s in segments) == pytest.approx(len(pcm(down)) / 48_000)
    assert pcm(down) == tap.line.pcm()


def test_tokens_are_handed_on_as_they_come(live_server):
    tokens = ("Hel", "lo ", "there ", "my ", "friend. ", "And ", "more.")
    down, errors, tap = converse(
        live_server, turn(*tokens), text_aggregation_mode=TextAggregationMode.TOKEN
    )
    assert errors == []
    assert tap.line.texts() == list(tokens)
    assert tap.line.outline() == "sssssfsse"
    assert len(only(down, TTSStartedFrame)) == len(only(down, TTSStoppedFrame)) == 1
    assert spoken(down) == "Hello there my friend. And more."
    assert pcm(down) == tap.line.pcm() != b""
    (usage,) = metrics(down, TTSUsageMetricsData)
    assert usage.value == len("".join(tokens))


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_sample_rates(live_server, rate):
    down, errors, tap = converse(
        live_server, [TTSSpeakFrame("Hello.")], seed=1, temperature=0.0, sample_rate=rate
    )
    assert errors == []
    assert {frame.sample_rate for frame in only(down, TTSAudioRawFrame)} == {rate}
    (done,) = tap.line.received(Done)
    assert len(pcm(down)) == 2 * done.samples == 2 * round(rate * done.duration_s) > 0


# ---------------------------------------------------------------------------- words


@pytest.mark.parametrize("mode", list(TextAggregationMode))
def test_words_are_timed_within_their_audio(live_server, mode):
    down, _, tap = converse(live_server, turn(*TURN), text_aggregation_mode=mode)
    words = only(down, TTSTextFrame)
    assert " ".join(word.text for word in words) == "".join(TURN)
    assert len(words) == len("".join(TURN).split())
    times = [word.pts for word in words]
    assert times == sorted(times)
    span_s = (times[-1] - times[0]) / 1e9
    assert 0 < span_s < len(tap.line.pcm()) / 48_000


def test_without_word_times_sentences_are_text(live_server):
    down, _, _ = converse(live_server, turn(*TURN), word_timestamps="off")
    assert [frame.text.strip() for frame in only(down, TTSTextFrame)] == [t.strip() for t in TURN]


# ---------------------------------------------------------------------------- interruption


def interrupted(down):
    """Where the interruption is among the frames."""
    return next(i for i, frame in enumerate(down) if isinstance(frame, InterruptionFrame))


def test_interruption_and_a_new_turn_at_once(live_server):
    def script(tap, service):
        yield from turn(ENDLESS)
        yield from until(lambda: tap.lines and num_chunks(tap.line) >= 5)
        yield InterruptionFrame()
        yield TTSUpdateSettingsFrame(delta=MegakernelTTSService.Settings(temperature=0.9, top_k=50))
        yield from turn(*TURN)

    down, errors, tap = converse(live_server, script, **LONG_SETTINGS)
    assert errors == []
    first, second = context_ids(down)
    after = down[interrupted(down) :]
    assert pcm(down[: interrupted(down)], first) != b""
    assert pcm(after, first) == b""
    assert len(tap.lines) == 1
    cancelled, complete = tap.line.received(Done)
    assert [cancel.context_id for cancel in tap.line.sent(Cancel)] == [cancelled.context_id]
    assert cancelled.finish_reason == "cancelled"
    assert complete.finish_reason == "stop"
    assert pcm(after, second) == tap.line.pcm()[-2 * complete.samples :]
    assert context_ids(after, TTSStoppedFrame) == [second]
    assert " ".join(f.text for f in only(after, TTSTextFrame)) == "".join(TURN)
    live_server.wait_until_idle()


def test_interruption_while_the_llm_still_writes(live_server):
    def script(tap, service):
        yield LLMFullResponseStartFrame()
        yield LLMTextFrame("This will not be heard to its end. And this")
        yield from until(lambda: tap.lines and tap.line.sent(Speak))
        yield InterruptionFrame()
        yield from until(lambda: tap.line.received(Done))
        yield TTSSpeakFrame("Pardon.")

    down, errors, tap = converse(live_server, script, **LONG_SETTINGS | {"temperature": 0.9})
    assert errors == []
    assert tap.line.outline() == "sfcsfe"
    assert pcm(down[interrupted(down) :], context_ids(down)[0]) == b""
    assert len(pcm(down, context_ids(down)[1])) == 2 * tap.line.received(Done)[1].samples > 0


def test_uninterruptible_speech_goes_on(live_server):
    def script(tap, service):
        notice = TTSSpeakFrame("This call may be recorded.")
        notice.interruptible = False
        yield notice
        yield TTSSpeakFrame(ENDLESS)
        yield from until(lambda: tap.lines and len(tap.line.sent(Speak)) == 2)
        yield InterruptionFrame()
        yield SleepFrame(sleep=0.2)

    down, errors, tap = converse(live_server, script)
    assert errors == []
    kept, dropped = (speak.context_id for speak in tap.line.sent(Speak))
    assert [cancel.context_id for cancel in tap.line.sent(Cancel)] in ([dropped], [])
    (done,) = [done for done in tap.line.received(Done) if done.context_id == kept]
    assert len(pcm(down, context_ids(down)[0])) == 2 * done.samples > 0


# ---------------------------------------------------------------------------- metrics


def test_ttfb_of_overlapping_contexts(live_server):
    """The second reply is asked for while the first speaks, and has its own clock."""

    def script(tap, service):
        tap.delay_s = 0.02
        yield TTSSpeakFrame("Hello there, my friend. " * 3)
        yield TTSSpeakFrame("And good bye.")

    down, _, tap = converse(live_server, script)
    first, second = metrics(down, TTFBMetricsData)
    audio = [(at, m) for at, m in tap.line.heard if isinstance(m, AudioChunk)]
    asked = [at for at, m in tap.line.said if isinstance(m, Speak)]
    arrived = [next(at for at, m in audio if m.stream == number) for number in (1, 2)]
    for figure, at, since in zip((first, second), arrived, asked, strict=True):
        # The service asks before the proxy hears of it, and hears after the proxy.
        assert at - since - 0.01 <= figure.value < at - since + 1
    assert second.value > first.value


def test_interruption_before_audio_reports_no_ttfb(live_server):
    def script(tap, service):
        tap.delay_s = 0.3
        yield TTSSpeakFrame("This is never heard.")
        yield from until(lambda: tap.lines and tap.line.sent(Speak))
        yield InterruptionFrame()
        yield SleepFrame(sleep=0.5)

    down, _, _ = converse(live_server, script)
    assert pcm(down) == b""
    assert metrics(down, TTFBMetricsData) == []


def test_usage_and_server_figures(live_server):
    down, _, tap = converse(live_server, turn(*TURN))
    assert sum(usage.value for usage in metrics(down, TTSUsageMetricsData)) == len("".join(TURN)) - 2
    (figures,) = metrics(down, ServerTTSMetricsData)
    (done,) = tap.line.received(Done)
    assert (figures.ttfc_ms, figures.rtf, figures.duration_s) == (
        done.ttfc_ms,
        done.rtf,
        done.duration_s,
    )
    assert figures.ttfc_ms > 0


# ---------------------------------------------------------------------------- settings


def test_settings_change_from_one_sentence_to_the_next(live_server):
    change = MegakernelTTSService.Settings(language=Language.DE_AT, temperature=0.5, seed=3)
    script = [
        TTSSpeakFrame("Hello."),
        TTSUpdateSettingsFrame(delta=change),
        TTSSpeakFrame("Guten Tag."),
    ]
    _, errors, tap = converse(live_server, script, language=Language.EN_GB, voice="default")
    assert errors == []
    before, after = tap.line.sent(Speak)
    assert (before.language, before.temperature, before.voice) == ("english", None, "default")
    assert (after.language, after.temperature, after.seed) == ("german", 0.5, 3)
    (hello,) = tap.line.sent(Hello)
    assert hello.client.startswith("pipecat_client/")


def test_the_same_seed_gives_the_same_sentence_wherever_it_stands(live_server):
    down, _, _ = converse(live_server, turn("Say it again. ", "Say it again. ", "Now."), seed=5)
    audio = pcm(down)
    again, _, _ = converse(live_server, [TTSSpeakFrame("Say it again.")], seed=5)
    length = len(pcm(again))
    assert audio[:length] == audio[length : 2 * length] == pcm(again)


# ---------------------------------------------------------------------------- errors


def test_unknown_voice(live_server):
    def script(tap, service):
        yield TTSSpeakFrame("Nobody says this.")
        yield from until(lambda: tap.lines and tap.line.received(Done))
        yield TTSUpdateSettingsFrame(delta=MegakernelTTSService.Settings(voice="default"))
        yield TTSSpeakFrame("Somebody says this.")

    down, errors, tap = converse(live_server, script, voice="nobody")
    assert "voice nobody is unknown" in errors[0].error
    assert "known: default" in errors[0].error
    assert not any(error.category.is_permanent for error in errors)
    failed, complete = tap.line.received(Done)
    assert (failed.finish_reason, complete.finish_reason) == ("error", "stop")
    assert len(pcm(down)) == 2 * complete.samples > 0
    assert context_ids(down, TTSStoppedFrame) == context_ids(down)


def test_a_text_beyond_the_limit_is_an_error_and_no_stall(live_server):
    def script(tap, service):
        yield TTSSpeakFrame("word " * 1000)
        yield TTSSpeakFrame("This fits.")

    down, errors, tap = converse(live_server, script)
    assert "5000 characters was not spoken; the server takes 4096" in errors[0].error
    assert len(tap.line.sent(Speak)) == 1
    assert len(pcm(down)) == 2 * tap.line.received(Done)[0].samples > 0


@pytest.mark.slow
def test_a_turn_beyond_the_limit_goes_on_in_another_context(live_server):
    sentence = f"{'word ' * 300}end. "
    down, errors, tap = converse(live_server, turn(*[sentence] * 4), seed=1)
    assert errors == []
    assert tap.line.outline() in ("sfsfesfse", "sfsfesfsfe")
    assert [done.finish_reason for done in tap.line.received(Done)] == ["stop", "stop"]
    assert len(only(down, TTSStartedFrame)) == len(only(down, TTSStoppedFrame)) == 1
    assert pcm(down) == tap.line.pcm()


@pytest.mark.slow
def test_more_utterances_than_the_server_opens_contexts(live_server):
    down, errors, tap = converse(live_server, [TTSSpeakFrame(f"This is {n}.") for n in range(12)])
    assert errors == []
    assert [speak.text for speak in tap.line.sent(Speak)] == [f"This is {n}." for n in range(12)]
    assert pcm(down) == tap.line.pcm()


def test_settings_are_complete(live_server):
    """If a default is missing, Pipecat logs an error at start, and nothing else shows it."""
    service = make_service("ws://127.0.0.1:1", voice="default")
    service._settings.validate_complete()
    assert service.settings.voice == "default"
    assert service.settings.language is None
    assert make_service("ws://127.0.0.1:1", language="de-DE").settings.language == "german"
    assert make_service("ws://127.0.0.1:1", language=Language.ZH_TW).settings.language == "chinese"
    assert ErrorCategory.APPLICATION.is_permanent is False


def test_speech_on_a_machine_with_a_proxy(live_server, monkeypatch):
    with RefusingProxy() as proxy:
        for name, value in proxy.environ.items():
            monkeypatch.setenv(name, value)
        down, errors = asyncio.run(play(make_service(live_server.url), turn(*TURN)))
    assert errors == []
    assert proxy.asked == []
    assert pcm(down) != b""


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "LOCALHOST", "[::1]"])
def test_proxy_is_not_asked_for_loopback(host):
    assert connect_options(f"ws://{host}:8765", None)["proxy"] is None


@pytest.mark.parametrize("url", ["ws://192.0.2.1:8765", "wss://speech.example"])
def test_proxy_of_the_environment_serves_other_machines(url):
    assert "proxy" not in connect_options(url, None)


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1:1", "ws://[", "ws://127.0.0.1:port"])
def test_wrong_address_is_final(url):
    service = make_service(url, max_reconnect_attempts=2)
    _, errors = asyncio.run(play(service, [TTSSpeakFrame("Hello.")]))
    assert [error.category for error in errors] == [ErrorCategory.INVALID_REQUEST]
    assert "not an address like ws://host:port" in errors[0].error
