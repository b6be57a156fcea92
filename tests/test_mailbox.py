"""Events of the engine on their way to the event loop: in order, and with few wake-ups."""

from __future__ import annotations

import asyncio
import threading

from qwen_megakernel.serving.mailbox import Mailbox


class CountingLoop:
    """An event loop that counts how often another thread wakes it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self.num_wakes = loop, 0

    def call_soon_threadsafe(self, function, *args) -> None:
        self.num_wakes += 1
        self._loop.call_soon_threadsafe(function, *args)


def post_all(events: list[int], fails: frozenset[int] = frozenset()) -> tuple[list[int], int]:
    """Post events in pairs from a thread while the loop is busy. Returns what came, and the wake-ups."""
    came: list[int] = []

    def take(event: int) -> None:
        if event in fails:
            raise ValueError(event)
        came.append(event)

    async def scenario() -> int:
        loop, mailbox = CountingLoop(asyncio.get_running_loop()), Mailbox()
        thread = threading.Thread(target=lambda: [mailbox.post(loop, take, event) for event in events])
        thread.start()
        thread.join()  # the loop cannot run meanwhile
        while len(came) < len(events) - len(fails):
            await asyncio.sleep(0)
        return loop.num_wakes

    return came, asyncio.run(asyncio.wait_for(scenario(), 60))


def test_what_comes_together_wakes_the_loop_once():
    came, num_wakes = post_all(list(range(200)))
    assert came == list(range(200))
    assert num_wakes == 1


def test_an_event_that_fails_takes_no_other_with_it(caplog):
    came, _ = post_all([1, 2, 3], fails=frozenset([2]))
    assert came == [1, 3]
    assert "could not be delivered" in caplog.text


def test_events_that_come_while_others_are_delivered_are_not_lost():
    came: list[int] = []

    async def scenario() -> None:
        loop, mailbox = asyncio.get_running_loop(), Mailbox()

        def pour(first: int) -> None:
            for number in range(first, first + 2000):
                mailbox.post(loop, came.append, number)

        thread = threading.Thread(target=pour, args=(0,))
        thread.start()
        while thread.is_alive() or len(came) < 2000:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(scenario(), 60))
    assert came == list(range(2000))


def test_a_closed_loop_is_left_alone():
    loop, mailbox = asyncio.new_event_loop(), Mailbox()
    loop.close()
    mailbox.post(loop, print, "nobody hears this")
    mailbox.post(loop, print, "nor this")
    assert not mailbox._calls
