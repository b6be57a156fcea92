"""Servers for the tests of agents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer


@pytest.fixture(scope="module")
def talker(tiny_base: Path, recording: Path) -> Iterator[LiveServer]:
    """A server whose sentences do not end, so that each can be interrupted."""
    server = LiveServer("--model", str(tiny_base), "--speaker-ref", str(recording))
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()
