"""The codes and the sound of turns in fp32 on a CPU stay as recorded.

Two checkpoints speak in groups. The turns of a group speak at the same time. `golden_records.py` says
how a record is compared, and how it is made anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from golden_records import Golden, codes_difference, digest, margin, sound_difference, watched_margins
from listener import Listener
from live_server import ROOT
from torch import Tensor

from qwen_megakernel import GenerationParams, SamplingParams, TTSDecoder
from qwen_megakernel.config import HOP, Guards
from qwen_megakernel.turn import Audio

GREETING = "Good evening, this is the front desk."
TEXT = "Hello there, how are you doing today? It is fine weather."
LIVE_GREETING = (GREETING[:18], GREETING[18:21], GREETING[21:])
LIVE = (TEXT[:30], TEXT[30:])
REFERENCE_TEXT = "What was said in the recording."
GREEDY = SamplingParams(0.0, 0, 1.0, 1.05)
NUCLEUS = SamplingParams(1.1, 0, 0.8, 1.2)


def params(seed: int, max_frames: int, **options) -> GenerationParams:
    return GenerationParams(seed=seed, max_frames=max_frames, **options)


@dataclass(frozen=True)
class Case:
    """One turn. Its seed distinguishes it from the others of its group."""

    name: str
    params: GenerationParams
    pieces: Sequence[str] = (TEXT,)
    """Pieces of the text. More than one is live text: the others are appended once sound has come."""
    options: dict = field(default_factory=dict)


DEMO_VOICE = (
    (
        Case("whole text", params(1, 40), (GREETING,), {"voice": "slt"}),
        Case("live text", params(102, 40), LIVE_GREETING, {"voice": "slt"}),
        Case("another voice", params(203, 40), ("Thank you for waiting.",), {"voice": "rms"}),
    ),
    (
        Case(
            "whole layout", params(4, 24), ("Thank you.",), {"voice": "awb", "streaming": False}
        ),
        Case("greedy", params(105, 24, talker=GREEDY), ("Thank you.",), {"voice": "kal16"}),
    ),
)  # fmt: skip
TINY_BASE = (
    (Case("alone", params(11, 12), options={"voice": "speaker"}),),
    (
        Case("in context", params(12, 10), options={"voice": "in-context"}),
        Case("whole layout", params(113, 8), options={"voice": "in-context", "streaming": False}),
        Case("live text", params(14, 14), LIVE, {"voice": "speaker", "language": "german"}),
        Case("greedy", params(15, 10, talker=GREEDY, predictor=GREEDY), options={"voice": "speaker"}),
        Case("nucleus", params(16, 8, talker=NUCLEUS, predictor=NUCLEUS), options={"voice": "speaker"}),
        Case("waits for a slot", params(17, 5), options={"voice": "speaker", "chunk_frames": 3}),
    ),
    (
        Case(
            "silence", params(18, 40, guards=Guards(silence_s=0.16, silence_rms=10.0)), ("Hi.",),
            {"voice": "speaker"},
        ),
        Case("repeats", params(19, 40, guards=Guards(repeat_frames=1)), options={"voice": "speaker"}),
        Case(
            "budget", params(20, 40, guards=Guards(base_frames=3, frames_per_token=1)), ("Hi.",),
            {"voice": "speaker"},
        ),
    ),
)  # fmt: skip
CUSTOM_VOICE = (
    (
        Case("preset", params(31, 8), options={"voice": "vivian"}),
        Case("dialect", params(32, 8), ("你好。",), {"voice": "dylan", "language": "chinese"}),
    ),
)


class CodesKept:
    """A decoder backend that keeps the codes of each turn, by the turn's seed."""

    def __init__(self, real) -> None:
        self._real = real
        self._seeds: dict[int, int] = {}
        self.codes: dict[int, list[Tensor]] = {}

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def prefill(self, slot: int, rows: Tensor, params: GenerationParams, *shared) -> None:
        self._seeds[slot] = params.seed
        self.codes[params.seed] = []
        self._real.prefill(slot, rows, params, *shared)

    def launch(self, slots: Sequence[int], text_rows: Tensor):
        frame = self._real.launch(slots, text_rows)
        for slot, codes in zip(slots, frame.device_codes, strict=True):
            self.codes[self._seeds[slot]].append(codes.clone())
        return frame


@pytest.fixture(scope="module")
def golden(request) -> Golden:
    return Golden("golden", request.config.getoption("--record"))


@contextmanager
def loaded(folder, num_slots: int) -> Iterator[TTSDecoder]:
    with TTSDecoder.load(folder, num_slots=num_slots, device="cpu", backend="torch") as tts:
        tts._engine._backend = CodesKept(tts._engine._backend)
        yield tts


@pytest.fixture(scope="module")
def demo_voice() -> Iterator[TTSDecoder]:
    with loaded(ROOT / "demo_voice", 4) as tts:
        tts.load_voices(ROOT / "demo_voice" / "voices")
        yield tts


@pytest.fixture(scope="module")
def base(tiny_base, recording) -> Iterator[TTSDecoder]:
    data = recording.read_bytes()
    with loaded(tiny_base, 5) as tts:
        tts.add_voice("speaker", tts.clone_voice(data))
        tts.add_voice("in-context", tts.clone_voice(data, REFERENCE_TEXT))
        yield tts


@pytest.fixture(scope="module")
def custom_voice(tiny_custom_voice) -> Iterator[TTSDecoder]:
    with loaded(tiny_custom_voice, 2) as tts:
        yield tts


def speak_group(tts: TTSDecoder, group: Sequence[Case]) -> dict[str, dict]:
    """Speak the turns of a group at the same time. Returns the record of each, by name."""
    listeners = [Listener() for _ in group]
    turns = [
        tts.open_turn(
            case.pieces[0],
            sink=listener,
            ended=len(case.pieces) == 1,
            params=case.params,
            **case.options,
        )
        for case, listener in zip(group, listeners, strict=True)
    ]
    for case, turn, listener in zip(group, turns, listeners, strict=True):
        if len(case.pieces) > 1:
            listener.wait_for_audio()
            for piece in case.pieces[1:]:
                turn.append(piece)
            turn.end()
    return {
        case.name: outcome(case, listener, tts._engine._backend)
        for case, listener in zip(group, listeners, strict=True)
    }


def outcome(case: Case, listener: Listener, backend: CodesKept) -> dict:
    """The record of a turn: its end, its chunks, its codes, the sound."""
    finished = listener.wait()
    codes = backend.codes[case.params.seed][: finished.num_frames]
    chunks = [len(event.samples) // HOP for event in listener.events if isinstance(event, Audio)]
    assert finished.num_samples == len(listener.samples) == sum(chunks) * HOP
    return {
        "finish_reason": finished.reason,
        "frames": finished.num_frames,
        # Where live text is cut depends on when it comes, and is not part of the record.
        "chunks": " ".join(map(str, chunks)) if len(case.pieces) == 1 else None,
        "codes": [" ".join(map(str, row.tolist())) for row in codes],
        "sound": digest(listener.samples),
    }


def difference(record: dict, found: dict) -> str | None:
    """The first difference, if there is one."""
    if of_codes := codes_difference(record["codes"], found["codes"]):
        return of_codes
    for name in ("finish_reason", "frames", "chunks"):
        if record[name] != found[name]:
            return f"{name} is {found[name]}, the record has {record[name]}"
    return sound_difference(record["sound"], found["sound"])


GROUPS = [
    *(("demo_voice", group) for group in DEMO_VOICE),
    *(("base", group) for group in TINY_BASE),
    *(("custom_voice", group) for group in CUSTOM_VOICE),
]


@pytest.mark.parametrize(
    ("checkpoint", "group"), GROUPS, ids=lambda x: x if isinstance(x, str) else x[0].name
)
def test_turns_are_as_recorded(request, golden, checkpoint, group):
    tts = request.getfixturevalue(checkpoint)
    if golden.recording:
        with watched_margins(tts._engine._backend._real) as margins:
            found = speak_group(tts, group)
        for name, outcome in found.items():
            margins.check(f"{checkpoint}: {name} and its group")
            golden.write(f"{checkpoint}: {name}", outcome)
        pytest.skip("recorded")
    for name, outcome in speak_group(tts, group).items():
        if found := difference(golden.case(f"{checkpoint}: {name}"), outcome):
            golden.fail(f"{checkpoint}: {name}", found)


# --- the comparison itself ------------------------------------------------------------------------


def test_a_small_change_of_the_sound_is_found():
    samples = np.random.default_rng(1).uniform(-0.1, 0.1, 4 * HOP).astype(np.float32)
    record = digest(samples)
    rounded = samples * (1 + np.random.default_rng(2).uniform(-1e-6, 1e-6, len(samples)))
    assert sound_difference(record, digest(rounded)) is None
    late, click = np.roll(samples, 1), samples.copy()
    click[2 * HOP + 7] += 1e-2
    for changed in (late, 1.002 * samples, click, samples[:-HOP]):
        assert sound_difference(record, digest(changed)) is not None
    assert "frame 2 differs" in sound_difference(record, digest(click))


def test_the_first_code_that_differs_is_named():
    assert codes_difference(["1 2 3", "4 5 6"], ["1 2 3", "4 5 6"]) is None
    assert "frame 1, codebook 2: the code is 7" in codes_difference(
        ["1 2 3", "4 5 6"], ["1 2 3", "4 5 7"]
    )
    assert "1 frames" in codes_difference(["1 2 3", "4 5 6"], ["1 2 3"])


def test_margins():
    """Margins: best to second, a cut code to one that would win, a winner to the cut."""
    nothing = torch.zeros(1, 4)
    scores = torch.tensor([[3.0, 2.5, 1.0, 0.0]])
    assert margin(scores, scores, nothing) == 0.5
    cut = torch.tensor([[3.0, 2.5, -torch.inf, -torch.inf]])
    assert margin(scores, cut, nothing) == 0.5
    # Without the cut, noise would make code 2 win. It is 1.5 away from being let in.
    assert margin(scores, cut, torch.tensor([[0.0, -9.0, 9.0, 0.0]])) == 1.5
    # The winner is the last code that is kept, 1.5 away from being cut.
    assert margin(scores, cut, torch.tensor([[-9.0, 9.0, 0.0, 0.0]])) == 1.5
