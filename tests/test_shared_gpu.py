"""Two frame kernels on one GPU at the same time: no deadlock, and the codes that each has alone.

The CTAs of a frame wait for each other. If the GPU began some CTAs of two frames and not all of either,
both would wait for ever. Each launch is cooperative, and these tests run many at the same time: of two
processes by time slicing and under MPS, and of two streams of one process. This file is also the program
of such a process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from live_server import LiveServer

from qwen_megakernel.bench.mps import WITHOUT_MPS, MpsError, running_mps
from qwen_megakernel.bench.shared import SHARING
from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding.kernel_backend import MegakernelBackend
from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    Done,
    End,
    Error,
    Hello,
    Speak,
    encode,
    parse_server_message,
)
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

pytestmark = pytest.mark.gpu

SHAPE = "0.6b"
"""Its frames take every SM, so that two do not fit side by side. Frames of the tiny shape would."""
TEXT = "The train to the coast leaves at nine, so please be on time."
PROMPT_ROWS, STREAMS, TURN_FRAMES, TURNS = 20, 8, 200, 8
SPOKEN_FRAMES = 120
"""Less than the 10 s by which a server runs ahead of playback: it decodes as fast as it can."""
START_S, LIMIT_S = 120.0, 60.0


def make_decoder(sms: int | None) -> MegakernelBackend:
    from kernel_twins import make_kernel

    talker = random_talker(shape_config(SHAPE), "cuda")
    return make_kernel(SHAPE, talker, num_slots=STREAMS, max_positions=512, grid=sms)


def decode_turns(kernel: MegakernelBackend, turns: int) -> tuple[str, list[float]]:
    """A digest of all codes of one turn, which each turn must have; seconds of each frame."""
    hidden, digests, times = kernel._config.hidden_size, set(), []
    prompt = torch.randn(PROMPT_ROWS, hidden, generator=torch.Generator().manual_seed(1))
    text = torch.zeros(STREAMS, hidden, device="cuda")
    for _ in range(turns):
        for slot in range(STREAMS):
            kernel.prefill(slot, prompt, GenerationParams(seed=slot))
        digest = hashlib.sha256()
        for _ in range(TURN_FRAMES):
            start = time.perf_counter()
            digest.update(kernel.decode(range(STREAMS), text).numpy().tobytes())
            times.append(time.perf_counter() - start)
        for slot in range(STREAMS):
            kernel.release(slot)
        digests.add(digest.hexdigest())
    assert len(digests) == 1, "a turn had other codes than the turn before"
    return digests.pop(), times


def run_as_process(turns: int, priority: int, sms: int | None) -> None:
    """Get ready, say so, wait for a line, decode, and print what came of it."""
    with torch.cuda.stream(torch.cuda.Stream(priority=priority)):
        kernel = make_decoder(sms)
        decode_turns(kernel, 1)
        print("ready", flush=True)
        sys.stdin.readline()
        start = time.monotonic()
        digest, times = decode_turns(kernel, turns)
    times.sort()
    found = {
        "digest": digest, "start": start, "end": time.monotonic(), "frames": len(times),
        "median_ms": 1000 * times[len(times) // 2], "longest_ms": 1000 * times[-1],
    }  # fmt: skip
    print(json.dumps(found), flush=True)


def decode_side_by_side(environ: dict[str, str], *each: tuple[int, int, int | None]) -> list[dict]:
    """A process for each (turns, priority of its stream, sms), all decoding at the same time."""
    with ExitStack() as stack:
        processes = []
        for arguments in each:
            process = subprocess.Popen(
                [sys.executable, __file__, *map(str, arguments)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environ},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        timer = threading.Timer(START_S + LIMIT_S, lambda: [process.kill() for process in processes])
        timer.start()
        stack.callback(timer.cancel)
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in processes]
    assert all(lines), "a process failed, or was not done in time; its error is above"
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone() -> dict:
    """What a process finds that has the GPU to itself."""
    (found,) = decode_side_by_side(WITHOUT_MPS, (1, 0, None))
    return found


def assert_same_codes_side_by_side(environ, alone, report, *each) -> None:
    found = decode_side_by_side(environ, *each)
    overlap = min(one["end"] for one in found) - max(one["start"] for one in found)
    assert overlap > 0, "they did not run at the same time"
    for one, (_, priority, sms) in zip(found, each, strict=True):
        report(
            f"priority {priority}, sms {sms or 'all'}: {one['frames']} frames of {STREAMS} streams, "
            f"median {one['median_ms']:.2f} ms, longest {one['longest_ms']:.1f} ms (alone "
            f"{alone['median_ms']:.2f} ms); {overlap:.1f} s together"
        )
        assert one["digest"] == alone["digest"]


@pytest.fixture
def mps():
    """Variables of a daemon of our own."""
    with ExitStack() as stack:
        try:
            variables = stack.enter_context(running_mps())
        except MpsError as error:
            pytest.skip(str(error))
        yield variables


def test_two_processes_take_turns_by_time_slicing(alone, report):
    each = (TURNS, 0, None)
    assert_same_codes_side_by_side(WITHOUT_MPS, alone, report, each, each)


@pytest.mark.parametrize("priority", [0, -1])
def test_two_processes_under_mps_wait_for_room(priority, alone, mps, report):
    """Neither fits beside the other: each takes all SMs. The second may have a higher priority."""
    assert_same_codes_side_by_side(mps, alone, report, (TURNS, 0, None), (TURNS, priority, None))


def test_two_processes_under_mps_fit_side_by_side(alone, mps, report):
    half = torch.cuda.get_device_properties(0).multi_processor_count // 2
    each = (TURNS, 0, half)
    assert_same_codes_side_by_side(mps, alone, report, each, each)


@pytest.mark.parametrize("priority", [0, -1])
def test_two_streams_of_a_process_wait_for_room(priority, report):
    kernels = [make_decoder(None) for _ in range(2)]
    expected, _ = decode_turns(kernels[0], 1)
    found: dict[int, str] = {}

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(priority=number * priority)):
            found[number], _ = decode_turns(kernels[number], TURNS)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(2)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    report(f"two streams, priority {priority}: {time.monotonic() - start:.1f} s")
    assert found == {0: expected, 1: expected}


def turn_of(server: LiveServer, seed: int) -> bytes:
    """The sound of a turn of `SPOKEN_FRAMES`."""
    speak = Speak("a", TEXT, seed=seed, min_frames=SPOKEN_FRAMES, max_frames=SPOKEN_FRAMES)
    with server.connect() as client:
        client.send(encode(Hello(client="test")))
        for message in (speak, End("a")):
            client.send(encode(message))
        sound = b""
        while not isinstance(message := parse_server_message(client.recv(timeout=LIMIT_S)), Done):
            assert not isinstance(message, Error), message
            sound += message.samples if isinstance(message, AudioChunk) else b""
    return sound


@pytest.mark.slow
@pytest.mark.parametrize("sharing", SHARING)
def test_two_servers_speak_side_by_side(sharing, base_0_6b, recording, report):
    options = ("--model", str(base_0_6b), "--speaker-ref", str(recording), "--memory", "2GB")
    with ExitStack() as stack:
        try:
            environ = stack.enter_context(SHARING[sharing]())
        except MpsError as error:
            pytest.skip(str(error))
        servers = [LiveServer(*options, environ=environ) for _ in range(2)]
        for server in servers:
            stack.callback(server.kill)
        for server in servers:
            server.wait_until_ready()
        alone = [turn_of(servers[0], seed) for seed in range(STREAMS)]
        threads = stack.enter_context(ThreadPoolExecutor(2 * STREAMS))
        start = time.monotonic()
        together = [
            [threads.submit(turn_of, server, seed) for seed in range(STREAMS)] for server in servers
        ]
        for turns in together:
            assert [turn.result(LIMIT_S) for turn in turns] == alone
        report(f"{sharing}: two servers, {STREAMS} voices each, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    turns, priority, sms = sys.argv[1:]
    run_as_process(int(turns), int(priority), None if sms == "None" else int(sms))
