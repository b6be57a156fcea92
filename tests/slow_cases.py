"""Cases of a parametrized test that only the slow run takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def slow_after(count: int, cases: Sequence[Any]) -> list[Any]:
    """The first `count` cases as they are, and the others with the mark `slow`.

    A case that is a tuple has a value for each argument.
    """
    others = (case if isinstance(case, tuple) else (case,) for case in cases[count:])
    return [*cases[:count], *(pytest.param(*values, marks=pytest.mark.slow) for values in others)]
