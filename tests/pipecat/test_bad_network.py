"""Delay, jitter, loss and stalls on the way: no word is lost, and none is spoken twice."""

import asyncio
import json
import sys

import pytest
from slow_cases import slow_after

pytest.importorskip("pipecat.services.tts_service", reason="needs pipecat_client/requirements.txt")

from conversation import EXACT, TURN, make_service, metrics, only, pcm, play, spoken, turn
from live_server import ROOT
from pipecat.frames.frames import TTSStartedFrame, TTSStoppedFrame
from pipecat.services.tts_service import TextAggregationMode
from slow_link import SlowLink

from pipecat_client.playback import Gaps
from pipecat_client.settings import ServerTTSMetricsData

CLIENT = ROOT / "pipecat_client" / "test_client.py"


def test_only_what_comes_too_late_is_a_gap():
    gaps = Gaps()
    for seconds, now in ((1.0, 10.0), (1.0, 10.1), (1.0, 12.5), (1.0, 12.6)):
        gaps.receive(seconds, now)
    assert (gaps.count, gaps.seconds) == (1, 0.5)
    gaps.pause()
    gaps.receive(1.0, 99.0)
    assert (gaps.count, gaps.seconds) == (1, 0.5)


@pytest.mark.parametrize("mode", slow_after(1, list(TextAggregationMode)))
@pytest.mark.parametrize("cut_after", [None, 8], ids=["whole", "cut"])
def test_reply_over_a_bad_network(live_server, undisturbed, mode, cut_after):
    async def scenario():
        async with SlowLink(live_server.port, cut_after=cut_after) as link:
            # Pipecat waits for audio longer than a stall, but not longer than a break and reconnect.
            options = {"text_aggregation_mode": mode, "stop_frame_timeout_s": 3.0}
            return link, *await play(make_service(link.url, **EXACT, **options), turn(*TURN))

    link, down, errors = asyncio.run(scenario())
    assert link.num_stalls >= 1
    assert link.num_connections == len(errors) + 1 == (1 if cut_after is None else 2)
    assert pcm(down) == undisturbed[mode]
    # The gaps are counted, and how long they were. After a break the last `done` tells all of them.
    (figures,) = metrics(down, ServerTTSMetricsData)
    assert figures.gaps >= 1
    assert figures.gap_s >= 0.3
    assert spoken(down) == "".join(TURN)
    assert len(only(down, TTSStartedFrame)) == len(only(down, TTSStoppedFrame)) == 1


@pytest.mark.parametrize(
    "words", slow_after(1, ["", "--stream-text --words-per-second 50"]), ids=["at-once", "typed"]
)
def test_client_over_a_bad_network(live_server, tmp_path, words):
    async def run(url, name):
        out = tmp_path / name
        arguments = (
            "--url",
            url,
            "--text",
            "".join(TURN),
            "--seed",
            "11",
            "--temperature",
            "2",
            *words.split(),
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, CLIENT, *arguments, "--chunk-tokens", "1", "--json", "--out", out,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        figures, _ = await asyncio.wait_for(process.communicate(), 240)
        assert process.returncode == 0
        return json.loads(figures), out.read_bytes()

    async def scenario():
        _, undisturbed = await run(live_server.url, "near.wav")
        async with SlowLink(live_server.port) as link:
            return undisturbed, *await run(link.url, "far.wav"), link

    undisturbed, figures, sound, link = asyncio.run(scenario())
    assert link.num_stalls >= 1
    assert sound == undisturbed
    assert figures["ttfb_ms"] > 2 * 80
    assert figures["underruns"] >= 1  # the gaps are counted, and how long they were
    assert figures["stalled_ms"] > 500
