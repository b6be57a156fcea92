"""The exchanges of a kernel's frame, by name, as a built kernel lists them (csrc/frame_exchanges.cuh).

An exchange is the set of values that the kernel's CTAs publish under one tag. A frame has a few hundred
exchanges, in a fixed order. The watchdog, the bench and the tests name them by this list.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import islice

from qwen_megakernel.installation.cubin import Cubin

_ENTRY = struct.Struct("<iii")
"""Pass, layer and step."""


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


def listed_exchanges(cubin: Cubin, num_streams: int) -> list[Exchange]:
    """The exchanges that a built kernel lists (csrc/frame_exchanges.cuh), in the order of their tags.

    Args:
        cubin: the frame kernel's.
        num_streams: of the frame.

    Raises:
        ValueError: a number of streams that a frame cannot have.
    """
    facts, most = cubin.facts, cubin.facts["max_columns"]
    if not 1 <= num_streams <= most:
        raise ValueError(f"a frame of {num_streams} streams, allowed: 1 to {most}")
    few = num_streams <= facts["paired_streams"]
    values = _ENTRY.iter_unpack(cubin.values["exchanges_of_few" if few else "exchanges_of_many"])
    count = facts["num_exchanges_of_few"] if few else facts["num_tags"]
    steps = cubin.text("step_names").split()
    return [
        Exchange("predictor" if at_pass >= 0 else "talker", at_pass, layer, steps[step])
        for at_pass, layer, step in islice(values, count)
    ]
