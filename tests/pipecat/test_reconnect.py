"""A connection breaks, or the server goes away: no sentence is lost, and none is spoken twice."""

import asyncio
import signal
import socket
import threading

import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from conversation import EXACT, TURN, make_service, only, pcm, play, spoken, turn, until
from live_server import LONG, LiveServer, RawClient
from pipecat.frames.frames import (
    CancelFrame,
    InterruptionFrame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSSpeakFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.services.tts_service import TextAggregationMode
from pipecat.tests.utils import SleepFrame
from pipecat.utils.errors import ErrorCategory
from wire_tap import WireTap, num_chunks, num_segments

from qwen_megakernel.serving.native_messages import AudioChunk, Done, Error, Progress, Segment, Started

SENTENCE, TOKEN = TextAggregationMode.SENTENCE, TextAggregationMode.TOKEN


@pytest.fixture(scope="module")
def arguments(brief_base, recording):
    return "--model", str(brief_base), "--speaker-ref", str(recording)


@pytest.fixture
def start(arguments):
    """Makes servers that end with the test."""
    servers = []

    def make(*more):
        servers.append(LiveServer(*arguments, *more))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


def check_whole(down, audio):
    """Check one context: every sample once, and all words once."""
    assert pcm(down) == audio
    assert len(only(down, TTSStartedFrame)) == len(only(down, TTSStoppedFrame)) == 1
    assert spoken(down) == "".join(TURN)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last(line, kind):
    return bool(line.heard) and isinstance(line.heard[-1][1], kind)


@pytest.mark.parametrize(
    ("mode", "cut_when"),
    [
        pytest.param(
            SENTENCE, lambda line: last(line, Started), id="before-audio", marks=pytest.mark.slow
        ),
        pytest.param(
            SENTENCE, lambda line: num_chunks(line) == 2, id="in-first", marks=pytest.mark.slow
        ),
        pytest.param(
            SENTENCE,
            lambda line: num_segments(line) == 1 and last(line, AudioChunk),
            id="in-second",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            SENTENCE, lambda line: num_segments(line) == 2, id="between", marks=pytest.mark.slow
        ),
        pytest.param(
            SENTENCE, lambda line: num_segments(line) == 3, id="before-done", marks=pytest.mark.slow
        ),
        pytest.param(TOKEN, lambda line: num_chunks(line) == 2, id="token", marks=pytest.mark.slow),
        pytest.param(TOKEN, lambda line: last(line, Segment), id="token-before-done"),
    ],
)
def test_cut_line(live_server, undisturbed, mode, cut_when):
    async def scenario():
        async with WireTap(live_server.port) as tap:
            tap.cut_when = cut_when
            service = make_service(tap.url, text_aggregation_mode=mode, **EXACT)
            return tap, *await play(service, turn(*TURN))

    tap, down, errors = asyncio.run(scenario())
    check_whole(down, undisturbed[mode])
    assert [error.category for error in errors] == [ErrorCategory.CONNECTIVITY]
    first, second = tap.lines
    num_spoken = len(first.received(Segment))
    assert " ".join(second.texts()).split() == "".join(TURN[num_spoken:]).split()


def test_line_that_breaks_twice_in_a_sentence(live_server, undisturbed):
    async def scenario():
        async with WireTap(live_server.port) as tap:
            tap.cut_when = lambda line: num_chunks(line) == 2

            def script():
                yield from turn(*TURN)
                yield from until(lambda: len(tap.lines) == 2)
                tap.cut_when = lambda line: num_chunks(line) == 1

            return tap, *await play(make_service(tap.url, **EXACT), script())

    tap, down, _ = asyncio.run(scenario())
    check_whole(down, undisturbed[SENTENCE])
    assert len(tap.lines) == 3


@pytest.mark.slow
def test_server_killed_and_started_again_in_mid_turn(start, undisturbed):
    old = start().wait_until_ready()
    new = []

    async def scenario():
        async with WireTap(old.port) as tap:

            def script():
                yield LLMFullResponseStartFrame()
                yield LLMTextFrame(TURN[0])
                yield LLMTextFrame(TURN[1])
                yield from until(lambda: tap.lines and num_chunks(tap.line) >= 2)
                old.kill()
                yield LLMTextFrame(TURN[2])  # the LLM goes on meanwhile
                yield LLMFullResponseEndFrame()
                new.append(start())
                tap.server_port = new[0].port

            return tap, *await play(make_service(tap.url, **EXACT), script())

    tap, down, errors = asyncio.run(scenario())
    check_whole(down, undisturbed[SENTENCE])
    assert len(tap.lines) == 2
    assert tap.num_refused > 0
    assert not any(error.category.is_permanent for error in errors)
    new[0].wait_for_line(r" turn .*: stop,")
    assert sum(" turn " in line for line in new[0].err) == 1


@pytest.mark.slow
def test_server_shut_down_in_good_order(start, undisturbed):
    """A server that shuts down ends its running speech and refuses new text. The next one speaks it."""
    port = free_port()
    old = start("--port", str(port), "--drain-s", "3").wait_until_ready()

    async def scenario():
        async with WireTap(old.port) as tap:

            def script():
                yield LLMFullResponseStartFrame()
                yield LLMTextFrame("This keeps it busy. ")
                yield LLMTextFrame("And")
                yield from until(lambda: tap.lines and num_chunks(tap.line) >= 1)
                old.process.send_signal(signal.SIGTERM)
                yield from until(lambda: "draining" in "".join(old.err))
                yield LLMTextFrame(" this. ")
                yield LLMFullResponseEndFrame()
                yield from turn(*TURN)
                yield from until(lambda: tap.line.received(Error))
                yield from until(lambda: old.process.poll() is not None)
                start("--port", str(port))

            return tap, *await play(make_service(tap.url, **EXACT), script())

    tap, down, _ = asyncio.run(scenario())
    first, second = (frame.context_id for frame in only(down, TTSStartedFrame))
    codes = [error.code for error in tap.lines[0].received(Error)]
    assert codes[0] == "overloaded"
    assert set(codes) <= {"overloaded", "unknown_context"}  # what followed, and was tried again
    assert pcm(down, first) != b""
    assert pcm(down, second) == undisturbed[SENTENCE]
    assert spoken(down) == "This keeps it busy. And this. " + "".join(TURN)


@pytest.mark.slow
def test_server_that_comes_after_the_bot(start, undisturbed):
    port = free_port()

    def script():
        yield from turn(*TURN)
        start("--port", str(port))

    async def scenario():
        return await play(make_service(f"ws://127.0.0.1:{port}", **EXACT), script())

    down, errors = asyncio.run(scenario())
    check_whole(down, undisturbed[SENTENCE])
    assert "is the server running" in errors[0].error
    assert not any(error.category.is_permanent for error in errors)


@pytest.mark.slow
def test_full_server_is_tried_again(start, undisturbed):
    server = start("--max-connections", "1").wait_until_ready()
    other = server.connect().__enter__()

    def script():
        yield from turn(*TURN)
        yield SleepFrame(sleep=0.5)
        other.close()

    async def scenario():
        return await play(make_service(server.url, **EXACT), script())

    down, errors = asyncio.run(scenario())
    check_whole(down, undisturbed[SENTENCE])
    assert "HTTP 503" in errors[0].error
    assert "all 1 connections are taken" in errors[0].error
    assert {error.category for error in errors} == {ErrorCategory.SERVER}


def test_wrong_token_is_final_and_nothing_stalls(start, undisturbed):
    server = start("--token", "open-sesame").wait_until_ready()

    async def scenario(token):
        return await play(make_service(server.url, token=token, **EXACT), turn(*TURN))

    down, errors = asyncio.run(scenario("something-else"))
    assert pcm(down) == b""
    (error,) = errors
    assert error.category is ErrorCategory.AUTHENTICATION
    assert "HTTP 401 (is the token right?)" in error.error
    down, errors = asyncio.run(scenario("open-sesame"))
    assert errors == []
    check_whole(down, undisturbed[SENTENCE])


def test_what_is_no_server_of_ours_is_final():
    """An echo server accepts the handshake and answers nonsense."""
    from websockets.sync.server import serve

    def echo(websocket):
        for message in websocket:
            websocket.send(message)

    with serve(echo, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        _, errors = asyncio.run(play(make_service(url), [TTSSpeakFrame("Hello.")]))
        server.shutdown()
        thread.join()
    (error,) = errors
    assert error.category is ErrorCategory.INVALID_REQUEST
    assert "does not speak protocol 1" in error.error


def test_server_that_stays_away(start):
    """After the last attempt the service is unusable, and open replies end."""
    url = f"ws://127.0.0.1:{free_port()}"
    service = make_service(url, max_reconnect_attempts=2)
    down, errors = asyncio.run(play(service, [TTSSpeakFrame("Hello."), TTSSpeakFrame("Again.")]))
    assert pcm(down) == b""
    assert "failed to reconnect after 2 attempts" in "".join(error.error for error in errors)
    assert not service.is_usable


@pytest.mark.slow
def test_queue_longer_than_pipecats_patience(start):
    """The server's signs of life keep a context open until its audio comes."""
    server = start("--num-slots", "1").wait_until_ready()

    async def scenario():
        async with WireTap(server.port) as tap:
            service = make_service(tap.url, stop_frame_timeout_s=1.8)

            def script():
                other = RawClient(server)
                other.send(**LONG)
                other.wait_for_audio()
                yield TTSSpeakFrame("I can wait.")
                yield from until(lambda: len(tap.line.received(Progress)) == 4)
                other.reset()

            return tap, *await play(service, script())

    tap, down, errors = asyncio.run(scenario())
    assert errors == []
    assert {progress.state for progress in tap.line.received(Progress)} == {"queued"}
    assert pcm(down) == tap.line.pcm() != b""


def test_interrupted_speech_is_not_taken_up_again(live_server):
    async def scenario():
        async with WireTap(live_server.port) as tap:
            tap.cut_when = lambda line: num_chunks(line) == 2

            def script():
                port = tap.server_port
                yield from turn(*TURN)
                yield from until(lambda: tap.lines)
                tap.server_port = free_port()  # reconnecting fails for now
                yield from until(lambda: tap.num_refused)
                yield InterruptionFrame()
                yield TTSSpeakFrame("What is it?")
                tap.server_port = port

            return tap, *await play(make_service(tap.url, **EXACT), script())

    tap, down, _ = asyncio.run(scenario())
    assert tap.lines[-1].texts() == ["What is it?"]
    assert len(tap.lines[-1].received(Done)) == 1
    assert spoken(down).endswith("What is it?")


def test_pipeline_can_be_cancelled_while_the_server_is_away():
    async def scenario():
        def script():
            yield TTSSpeakFrame("Nobody hears this.")
            yield SleepFrame(sleep=0.3)
            yield CancelFrame()

        # Its tries to reconnect would take 90 s.
        service = make_service(f"ws://127.0.0.1:{free_port()}")
        await asyncio.wait_for(play(service, script()), 60)

    asyncio.run(scenario())


def drop_lines(server, cut_when, num_cuts, **options):
    """Speak `TURN` while connections are dropped."""

    async def scenario():
        async with WireTap(server.port) as tap:
            tap.cut_when, tap.num_more_cuts = cut_when(tap), num_cuts - 1
            service = make_service(tap.url, **EXACT, **options)
            return tap, service, *await play(service, turn(*TURN))

    return asyncio.run(scenario())


@pytest.mark.slow
def test_line_that_breaks_again_and_again_while_audio_flows(live_server, undisturbed):
    """Each connection is dropped after more audio than the one before."""

    def cut_when(tap):
        return lambda line: last(line, AudioChunk) and num_chunks(line) > len(tap.lines)

    tap, service, down, _ = drop_lines(live_server, cut_when, 6, max_reconnect_attempts=3)
    check_whole(down, undisturbed[SENTENCE])
    assert len(tap.lines) == 7
    assert service.is_usable


@pytest.mark.slow
def test_line_that_breaks_again_and_again_before_audio_comes(live_server, undisturbed):
    def cut_when(tap):
        return lambda line: last(line, Started)

    tap, service, down, _ = drop_lines(live_server, cut_when, 5, max_reconnect_attempts=6)
    check_whole(down, undisturbed[SENTENCE])
    assert len(tap.lines) == 6
    assert service.is_usable


def test_line_that_never_brings_audio_is_given_up(live_server):
    def cut_when(tap):
        return lambda line: last(line, Started)

    tap, service, down, errors = drop_lines(live_server, cut_when, 99, max_reconnect_attempts=4)
    assert len(tap.lines) == 4
    begun = [line.heard[0][0] for line in tap.lines]
    assert begun[3] - begun[1] > 2 * 0.3  # the waits grow
    assert pcm(down) == b""
    assert not service.is_usable
    assert "4 times immediately after connecting" in errors[-1].error
