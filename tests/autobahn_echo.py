"""An echo server behind the server's own socket protocols, for Autobahn's fuzzing client.

    python tests/autobahn_echo.py --port 9001 &
    wstest -m fuzzingclient -s tests/autobahn.json

`wstest` is in the package `autobahntestsuite`, which needs Python 2.7. Most of its cases expect an echo,
which the server itself does not give. The limits are the server's, except those on bytes of a message,
fragments and pings: some cases are larger than any message that the server takes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import uvicorn

from qwen_megakernel.serving import process, protocols
from qwen_megakernel.serving.app import ServerSettings


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """An ASGI application that sends every message back."""
    assert scope["type"] == "websocket"
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send(message | {"type": "websocket.send"})


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=9001)
    listener = process.bind("127.0.0.1", parser.parse_args().port)
    protocols.MAX_FRAGMENTS = protocols.MAX_CONTROL_FRAMES = 1 << 20
    app: Any = SimpleNamespace(asgi=echo, settings=ServerSettings(max_text_chars=2_000_000))
    asyncio.run(uvicorn.Server(process._uvicorn_config(app)).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
