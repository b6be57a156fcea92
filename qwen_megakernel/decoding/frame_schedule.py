"""The exchanges of a kernel's frame, by name, as a built kernel lists them (csrc/frame_schedule.cuh).

An exchange is the set of values that the kernel's CTAs publish under one tag. A frame has a few hundred
exchanges, in a fixed order. The watchdog, the bench and the tests name them by this list.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Exchange:
    """One exchange of a frame."""

    model: str
    """`talker` or `predictor`; a sampled code counts as the predictor's."""
    predictor_pass: int
    """Pass p ends with the row at position p, 0 to 15. Pass c + 1 begins with code c. -1: the talker."""
    layer: int
    """The model's layer. A head comes after the last one; a code and a projection before the first."""
    step: str
    """qkv, attention, out, gate_up, down, head, projection or code."""

    def __str__(self) -> str:
        if self.step == "code":
            return f"code {self.predictor_pass - 1}"
        in_pass = f" pass {self.predictor_pass}" if self.predictor_pass >= 0 else ""
        in_layer = "" if self.step in ("head", "projection") else f" layer {self.layer}"
        return f"{self.model}{in_pass}{in_layer} {self.step}"


def parse_exchanges(text: str) -> list[Exchange]:
    """What `frame_exchanges` of csrc/kernel_tts.h gives: a line each, in the order of their tags."""
    found = []
    for line in text.splitlines():
        model, predictor_pass, layer, step = line.split()
        found.append(Exchange(model, int(predictor_pass), int(layer), step))
    return found
