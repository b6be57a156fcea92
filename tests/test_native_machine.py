"""The native protocol under random sequences of a client's actions, against a real server.

`NativeClient` checks the rules of the protocol on every message: one `done` for each context and
nothing after it, streams without gaps, one context at a time, counts that agree with the bytes. The
machine adds rules that follow from its own actions: order, reasons of `done`, allowed errors. Its next
action never depends on what has come so far, so that runs can be repeated.
"""

import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from native_client import WILD, DirectSocket, NativeClient

from qwen_megakernel.serving.native_messages import Cancel, End, Error, Flush, Segment, Speak

TEXTS = ("Hi.", "Hello ", "there, ", "you", " ", "", "\n", "Ça va? ", "It is 3", ".14. ", "好。")
FORMATS = st.sampled_from([("pcm_s16le", 24_000), ("pcm_f32le", 48_000), ("pcm_s16le", 8_000)])
GARBAGE = (
    "x",
    "[]",
    "{}",
    '{"type": "speak"}',
    '{"type": "hello", "protocol": 1}',
    '{"type": "flush", "context_id": "never-opened"}',
    '{"type": "end", "context_id": "?"}',
    '{"type": "cancel", "all": true}',
)


class Talk(RuleBasedStateMachine):
    """One client of one server. Names of contexts follow the order of their opening."""

    server = None
    num_steps = 0

    def __init__(self):
        super().__init__()
        self.client = None
        self.start(("pcm_s16le", 24_000))

    def start(self, audio):
        if self.client is not None:
            self.client.socket.close()
        self.client = NativeClient(self.server, *audio, DirectSocket(self.server), checked=False)
        self.opened: list[str] = []
        self.ended: set[str] = set()
        self.cancelled: set[str] = set()
        self.settled: set[str] = set()
        """Contexts that were received to their end."""
        self.wild: set[str] = set()
        self.flushes: dict[str, int] = {}
        self.num_garbage = 0

    def read(self, limit_s):
        """Receive all messages within `limit_s`."""
        until = time.monotonic() + limit_s
        while (left := until - time.monotonic()) > 0:
            try:
                self.client.receive(left)
            except TimeoutError:
                return

    @property
    def unsettled(self):
        return [name for name in self.opened if name not in self.settled]

    @property
    def growing(self):
        return [n for n in self.unsettled if n not in self.ended and n not in self.cancelled]

    def settle(self, names):
        for name in names:
            self.client.hear(name)
            self.settled.add(name)

    def pick(self, data, names):
        return data.draw(st.sampled_from(names))

    @precondition(lambda self: len(self.unsettled) < 8)
    @rule(text=st.sampled_from(TEXTS), wild=st.integers(0, 5).map(lambda n: n == 0))
    def open(self, text, wild):
        name = f"c{len(self.opened)}"
        self.opened.append(name)
        self.flushes[name] = 0
        if wild:
            self.wild.add(name)
        self.client.send(Speak(name, text, **(WILD if wild else {})))

    @precondition(lambda self: self.growing)
    @rule(data=st.data(), text=st.sampled_from(TEXTS))
    def speak(self, data, text):
        self.client.send(Speak(self.pick(data, self.growing), text))

    @precondition(lambda self: self.growing)
    @rule(data=st.data())
    def flush(self, data):
        name = self.pick(data, self.growing)
        self.flushes[name] += 1
        self.client.send(Flush(name))

    @precondition(lambda self: self.growing)
    @rule(data=st.data())
    def end(self, data):
        name = self.pick(data, self.growing)
        self.ended.add(name)
        self.client.send(End(name))

    @precondition(lambda self: self.opened)
    @rule(data=st.data())
    def cancel(self, data):
        name = self.pick(data, self.opened)
        self.cancelled.add(name)
        self.client.send(Cancel(name))

    @rule()
    def cancel_all(self):
        self.cancelled.update(self.unsettled)
        self.client.send(Cancel())

    @precondition(lambda self: self.cancelled - self.settled)
    @rule()
    def hear_the_cancelled(self):
        self.settle(self.cancelled - self.settled)

    @precondition(lambda self: self.unsettled and not (self.growing or self.wild - self.cancelled))
    @rule()
    def hear_all(self):
        self.settle(self.unsettled)

    @rule(text=st.sampled_from(GARBAGE))
    def garbage(self, text):
        self.num_garbage += 1
        self.client.socket.send(text)

    @rule(limit_s=st.sampled_from([0.0005, 0.01, 0.05]))
    def listen(self, limit_s):
        self.read(limit_s)

    @rule(audio=FORMATS)
    def disconnect(self, audio):
        self.start(audio)

    @invariant()
    def what_came_may_come(self):
        type(self).num_steps += 1
        self.read(0.0002)
        for name in self.opened:
            heard = self.client.heard.get(name)
            if heard is not None:
                self.check_context(name, heard)

    def check_context(self, name, heard):
        for error in heard.of(Error):  # the cancel may have crossed the context's own end
            assert error.code == "unknown_context"
            assert name in self.cancelled
        # One for each flush, and one that the model has ended before its text was complete.
        assert len(heard.of(Segment)) <= self.flushes[name] + 1
        if heard.done is None:
            return
        if heard.done.finish_reason == "cancelled":
            assert name in self.cancelled
        else:
            assert heard.done.finish_reason != "error"
            assert name in self.ended
            frame = self.client.format.sample_rate * 2 // 25
            assert heard.done.samples % frame == 0

    def teardown(self):
        for name in self.unsettled:
            if name in self.wild or len(self.unsettled) > 3:
                self.cancelled.add(name)
                self.client.send(Cancel(name))
            elif name not in self.ended and name not in self.cancelled:
                self.ended.add(name)
                self.client.send(End(name))
        for name in self.opened:
            self.check_context(name, self.client.hear(name))
        started = [name for name in self.client.order if name in self.opened]
        assert started == sorted(started, key=self.opened.index)
        self.client.send(Flush("last"))
        self.client.wait_for(Error, "last", 60)
        stranger = self.client.heard.get("never-opened")
        answered = len(self.client.errors) + (len(stranger.of(Error)) if stranger else 0)
        assert answered == self.num_garbage
        assert {error.code for error in self.client.errors} <= {"bad_request", "unknown_context"}
        self.client.socket.close()


def run(server, examples):
    Talk.server, Talk.num_steps = server, 0
    run_state_machine_as_test(
        Talk,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    server.wait_until_idle()
    assert server.ready()["connections"] == 0
    assert not [line for line in server.err if "Traceback" in line]
    return Talk.num_steps


def test_500_steps(live_server):
    assert run(live_server, 12) >= 300


@pytest.mark.slow
def test_10000_steps(live_server):
    assert run(live_server, 260) >= 10_000
