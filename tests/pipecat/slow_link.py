"""A TCP proxy that behaves like a bad network: delay, jitter, loss, stalls, and a line that breaks."""

from __future__ import annotations

import asyncio
import random

DELAY_S = 0.08
JITTER_S = 0.04
STALL_S = 1.0
LOSS = 0.02
RESEND_S = 0.24
"""Until TCP has noticed that a packet was lost and sent it again; what follows waits for it."""


class SlowLink:
    """`async with SlowLink(port) as link: connect(link.url)`. Bytes keep their order, as in TCP."""

    def __init__(
        self,
        server_port: int,
        *,
        stall_every: int = 6,
        cut_after: int | None = None,
        loss: float = LOSS,
    ) -> None:
        """The line stalls each `stall_every` packets of the server, and breaks once at `cut_after`."""
        self.server_port, self.stall_every, self.cut_after = server_port, stall_every, cut_after
        self.loss = loss
        self.num_connections = 0
        self.num_stalls = self.num_lost = 0
        self._random = random.Random(0)
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> SlowLink:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.server_port)
        pumps = [
            asyncio.create_task(self._pump(reader, to_server, stalls=False)),
            asyncio.create_task(self._pump(from_server, writer, stalls=True)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for end in (to_server, writer):
            end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, stalls: bool
    ) -> None:
        packets: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivery = asyncio.create_task(self._deliver(packets, writer))
        clock = asyncio.get_running_loop().time
        due, number = 0.0, 0
        try:
            while data := await reader.read(4096):
                number += 1
                if stalls and number == self.cut_after:
                    self.cut_after = None
                    return
                due = max(due, clock() + DELAY_S + self._random.uniform(0, JITTER_S))
                if self._random.random() < self.loss:
                    self.num_lost += 1
                    due += RESEND_S
                if stalls and number % self.stall_every == 0:
                    self.num_stalls += 1
                    due += STALL_S
                packets.put_nowait((due, data))
            packets.put_nowait((due, b""))
            await delivery
        finally:
            delivery.cancel()

    @staticmethod
    async def _deliver(
        packets: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            due, data = await packets.get()
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            if not data:
                return
            writer.write(data)
            await writer.drain()
