"""A server for clients that live in another environment (`make test-clients`).

`SERVER_PYTHON` names the interpreter of the server's environment.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import DEMO_TOKEN, LiveServer


@pytest.fixture(scope="session")
def demo_server() -> Iterator[LiveServer]:
    """The demonstration voice behind a token."""
    options = ("--model", "demo_voice", "--voices", "demo_voice/voices", "--token", DEMO_TOKEN)
    server = LiveServer(*options)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


@pytest.fixture
def http_url(demo_server: LiveServer) -> str:
    """The server's address for HTTP."""
    return f"http://127.0.0.1:{demo_server.port}"
