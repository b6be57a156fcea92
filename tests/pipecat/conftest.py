"""Servers for the tests of agents."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer


@pytest.fixture(scope="session")
def undisturbed(live_server: LiveServer) -> dict[Any, bytes]:
    """The correct audio of `TURN`, by mode."""
    from conversation import EXACT, TURN, make_service, pcm, play, turn
    from pipecat.services.tts_service import TextAggregationMode

    async def speak(mode: TextAggregationMode) -> bytes:
        service = make_service(live_server.url, text_aggregation_mode=mode, **EXACT)
        down, errors = await play(service, turn(*TURN))
        assert errors == []
        assert pcm(down) != b""
        return pcm(down)

    return {mode: asyncio.run(speak(mode)) for mode in TextAggregationMode}


@pytest.fixture(scope="module")
def talker(tiny_base: Path, recording: Path) -> Iterator[LiveServer]:
    """A server whose sentences do not end, so that each can be interrupted."""
    server = LiveServer("--model", str(tiny_base), "--speaker-ref", str(recording))
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()
