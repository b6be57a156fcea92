"""A TCP proxy that behaves like a bad network: delay, jitter, and lost packets that stall the line.

Bytes keep their order, as in TCP. What follows a lost packet waits until that packet is sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import Self

PACKET_BYTES = 1400
"""Bytes that are lost or delayed together."""
MIN_RESEND_S = 0.2
"""The shortest time after which TCP sends a lost packet again."""


@dataclass(frozen=True, slots=True)
class Network:
    """The faults of the network, in each direction."""

    delay_s: float
    jitter_s: float
    """The most that is added to the delay. The addition is drawn evenly from 0 on."""
    loss: float
    """Share of the packets that are lost, 0 to 1."""

    @property
    def resend_s(self) -> float:
        """How long a lost packet stalls the line."""
        return max(MIN_RESEND_S, 2 * (self.delay_s + self.jitter_s))


class BadNetwork:
    """`async with BadNetwork(host, port, network, seed) as proxy: connect to proxy.port`."""

    def __init__(self, host: str, port: int, network: Network, seed: int) -> None:
        """Forward to the server at `host` and `port`. The same seed loses the same packets."""
        self._target, self._network = (host, port), network
        self._random = random.Random(seed)
        self._server: asyncio.Server | None = None
        self.num_stalls = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    @property
    def port(self) -> int:
        """The proxy's port."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(*self._target)
        pumps = [
            asyncio.create_task(self._pump(reader, to_server)),
            asyncio.create_task(self._pump(from_server, writer)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for end in (to_server, writer):
            end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        packets: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivery = asyncio.create_task(_deliver(packets, writer))
        clock, due_at = asyncio.get_running_loop().time, 0.0
        try:
            while data := await reader.read(PACKET_BYTES):
                due_at = max(due_at, clock() + self._delay_s())
                packets.put_nowait((due_at, data))
            packets.put_nowait((due_at, b""))
            await delivery
        finally:
            delivery.cancel()

    def _delay_s(self) -> float:
        """Draw the delay of the next packet."""
        delay_s = self._network.delay_s + self._random.uniform(0, self._network.jitter_s)
        if self._random.random() < self._network.loss:
            self.num_stalls += 1
            delay_s += self._network.resend_s
        return delay_s


async def _deliver(packets: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            due_at, data = await packets.get()
            await asyncio.sleep(due_at - asyncio.get_running_loop().time())
            if not data:
                return
            writer.write(data)
            await writer.drain()
