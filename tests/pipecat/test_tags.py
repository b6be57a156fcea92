"""Tags and respellings through the Pipecat service: what the server is told, what the bot says."""

import asyncio

import numpy as np
import pytest

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from conversation import make_service, only, pcm, play, spoken, turn
from pipecat.frames.frames import TTSTextFrame
from pipecat.services.tts_service import TextAggregationMode
from slow_cases import slow_after
from wire_tap import WireTap

from pipecat_client.megakernel_tts import MegakernelTTSService
from qwen_megakernel.serving.native_messages import Segment, Speak

CODE = MegakernelTTSService.SPELL("AB. 12")
PAUSE = MegakernelTTSService.PAUSE_TAG(1.5)
TAGGED = (
    f"Ask Nguyen for {CODE[:4]}",
    f"{CODE[4:]} now. ",
    f"Then wait.{PAUSE[:9]}",
    f"{PAUSE[9:]} And go.",
)
SAID = "Ask Nguyen for AB. 12 now. Then wait. And go."


def longest_silence(sound):
    quiet = np.flatnonzero(np.frombuffer(sound, np.int16) != 0)
    return int(np.diff(quiet).max()) - 1


@pytest.mark.parametrize("mode", slow_after(1, list(TextAggregationMode)))
def test_tags_are_whole_on_the_wire_and_are_no_words_of_the_bot(live_server, mode):
    async def scenario():
        async with WireTap(live_server.port) as tap:
            service = make_service(
                tap.url, text_aggregation_mode=mode, markup=True, lexicon={"nguyen": "win"},
                seed=5, temperature=2.0,
            )  # fmt: skip
            down, errors = await play(service, turn(*TAGGED))
            return tap, down, errors

    tap, down, errors = asyncio.run(scenario())
    assert not errors
    segments = tap.line.received(Segment)
    assert len(segments) > 1  # how many, Pipecat decides
    assert [word.text for segment in segments for word in segment.estimated_words] == SAID.split()
    assert all(speak.markup and speak.lexicon == {"nguyen": "win"} for speak in tap.line.sent(Speak)[:1])
    assert spoken(down) == SAID
    sound = pcm(down)
    assert longest_silence(sound) >= 36_000
    assert len(sound) // 2 == round(sum(segment.duration_s for segment in segments) * 24_000)
    # Words are heard where they are: those after the pause come at least that much later.
    times = {frame.text: frame.pts for frame in only(down, TTSTextFrame)}
    assert times["And"] - times["wait."] >= 1.5e9


def test_without_markup_the_server_is_given_the_text_as_it_is(live_server):
    async def scenario():
        async with WireTap(live_server.port) as tap:
            await play(make_service(tap.url, seed=5), turn(f"Wait {PAUSE} here."))
            return tap

    (speak,) = asyncio.run(scenario()).line.sent(Speak)
    assert (speak.text, speak.markup, speak.lexicon, speak.speed) == (
        f"Wait {PAUSE} here.",
        None,
        None,
        None,
    )
