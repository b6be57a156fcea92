"""`tune`: what it tries and chooses, the file that it keeps, and its users. All times were measured."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_megakernel.__main__ import main
from qwen_megakernel.bench import tune
from qwen_megakernel.bench.setting_search import (
    Trial,
    compare,
    confirm,
    grid_candidates,
    ring_candidates,
    search,
)
from qwen_megakernel.build_tts import build, frame_digest, frame_library
from qwen_megakernel.installation import kernel_tuning
from qwen_megakernel.installation.cubin import read_cubin
from qwen_megakernel.installation.kernel_tuning import Setting, Target, Tuning
from qwen_megakernel.installation.nvrtc import find_compiler
from qwen_megakernel.synth.config import shape_config
from qwen_megakernel.tools.kernel_checks import check_tuning
from qwen_megakernel.tools.machine import Gpu, Gpus
from qwen_megakernel.tools.machine_code import resources

DEFAULT = Setting()
TARGET = Target("NVIDIA H200", 132, "90a", "large", "kHidden = 1024, kLayers = 28", "0123456789abcdef")
FASTER = {"1": (0.95, 0.96), "8": (0.97, 0.99)}

RING_22 = {1: (1159, 1162, 1152, 1151), 8: (1353, 1384, 1346, 1339)}
RING_42 = {1: (1286, 1284, 1245, 1258), 8: (1477, 1475, 1419, 1417)}
"""Microseconds of a frame on an H200 with rings of 22 and of 42 slots (docs/experiments.md)."""
CTAS_132 = {1: (1805,), 8: (2089,)}
CTAS_120 = {1: (1915,), 8: (2120,)}
"""Microseconds of a frame of another kernel, on an H100."""
KEPT_17_PERCENT = {1: (610,), 8: (636,)}
KEPT_34_PERCENT = {1: (604,), 8: (614,)}
KEPT_75_PERCENT = {1: (612,), 8: (647,)}
KEPT_NOTHING = {1: (602,), 8: (637,)}
"""Microseconds of the predictor alone, with eight-bit weights on an H200, by the part that L2 keeps."""


def measured(times: dict[Setting, dict[int, tuple[int, ...]]], calls: Counter | None = None):
    """Three instances that give a setting's measurements in turn, each beginning with another one."""

    def instance(first: int):
        left = {
            (setting, n): cycle(values[first % len(values) :] + values[: first % len(values)])
            for setting, by_streams in times.items()
            for n, values in by_streams.items()
        }

        def time(setting: Setting, streams: int) -> float:
            if calls is not None:
                calls[setting] += 1
            return float(next(left[setting, streams]))

        return time

    return [instance(first) for first in range(3)]


def same_codes(_: Setting) -> bool:
    return True


def tried(knobs, times, draws_same_codes=same_codes):
    """The choice of a search, and its trials by setting."""
    trials: list[Trial] = []
    best = search(knobs, (1, 8), measured(times), draws_same_codes, trials.append)
    return best, {trial.setting: trial for trial in trials}


# ---------------------------------------------------------------------------- what is chosen


def test_a_ring_that_was_a_tenth_faster_is_chosen():
    short = Setting(ring_slots=22)
    best, trials = tried({"ring_slots": [22]}, {DEFAULT: RING_42, short: RING_22})
    assert best == short
    assert trials[short].ratios[1][0] == pytest.approx(0.915, abs=0.01)
    assert trials[short].ratios[1][0] <= trials[short].ratios[1][1] < 0.95
    assert confirm(best, (1, 8), measured({DEFAULT: RING_42, short: RING_22})).is_faster


def test_what_was_slower_is_not_chosen():
    long, small = Setting(ring_slots=42), Setting(grid=120)
    times = {DEFAULT: RING_22, long: RING_42}
    assert tried({"ring_slots": [42]}, times)[0] == DEFAULT
    assert tried({"grid": [120]}, {DEFAULT: CTAS_132, small: CTAS_120})[0] == DEFAULT


def test_what_is_faster_for_some_streams_alone_is_not_chosen():
    none, third = Setting(l2_share=0.0), Setting(l2_share=0.34)
    times = {DEFAULT: KEPT_NOTHING, third: KEPT_34_PERCENT, none: KEPT_75_PERCENT}
    best, trials = tried({"l2_share": [0.34, 0.0]}, times)
    assert trials[third].ratios[8][1] < 1 < trials[third].ratios[1][0]
    assert best == DEFAULT


def test_the_one_that_gains_most_where_it_gains_least_is_chosen():
    third, most = Setting(l2_share=0.34), Setting(l2_share=0.17)
    times = {DEFAULT: KEPT_75_PERCENT, third: KEPT_34_PERCENT, most: KEPT_17_PERCENT}
    best, trials = tried({"l2_share": [0.17, 0.34]}, times)
    assert trials[most].is_faster
    assert trials[third].is_faster
    assert best == third


def test_knobs_are_turned_on_top_of_what_was_chosen():
    short = Setting(ring_slots=22)
    smaller = replace(short, grid=128)
    slower = {n: tuple(1.02 * us for us in values) for n, values in RING_22.items()}
    times = {DEFAULT: RING_42, short: RING_22, smaller: slower}
    best, trials = tried({"ring_slots": [22], "grid": [128]}, times)
    assert best == short
    assert trials[smaller].base == short


def test_a_setting_with_other_codes_is_neither_timed_nor_chosen():
    short, calls = Setting(ring_slots=22), Counter()
    timers = measured({DEFAULT: RING_42, short: RING_22}, calls)
    trials: list[Trial] = []
    best = search({"ring_slots": [22]}, (1, 8), timers, lambda setting: setting != short, trials.append)
    assert (best, calls) == (DEFAULT, Counter())
    assert [(t.setting, t.same_codes, t.ratios, t.is_faster) for t in trials] == [
        (short, False, {}, False)
    ]


def test_settings_take_turns_so_that_a_drift_meets_both():
    """A clock that slows by a percent with each measurement makes no setting faster."""
    clock = 1159.0

    def drifting(setting: Setting, streams: int) -> float:
        nonlocal clock
        clock *= 1.01
        return clock

    trial = compare(DEFAULT, Setting(grid=128), (1, 8), [drifting] * 3)
    assert [ratio for ratio, _ in trial.ratios.values()] == pytest.approx([1, 1], abs=1e-3)
    assert not trial.is_faster


def test_a_setting_that_changes_nothing_is_seldom_taken():
    """Of settings with equal times, a better one is found by chance in at most one draw of a hundred."""
    rng = np.random.default_rng(5)
    taken = sum(
        compare(
            DEFAULT,
            Setting(grid=128),
            (1, 8),
            [lambda setting, n: rng.normal(1159.0, 6.0) for _ in range(3)],
        ).is_faster
        for _ in range(100)
    )
    assert taken <= 3


# ---------------------------------------------------------------------------- what is tried


def test_rings_are_tried_around_the_default_as_far_as_they_fit():
    assert ring_candidates(22, 8, 43) == [14, 18, 26, 30]
    assert ring_candidates(22, 8, 24) == [14, 18, 24]
    assert ring_candidates(10, 8, 10) == [8]
    assert ring_candidates(8, 8, 8) == []


@pytest.mark.parametrize(("sms", "grids"), [(170, [128, 149]), (132, [128, 130]), (128, [])])
def test_smaller_grids_make_no_cta_compute_more(sms, grids):
    config = shape_config("0.6b")
    assert grid_candidates(config, sms, 8) == grids
    strips = (4096 // 16, 6144 // 16, 3072 // 16, 2048 // 16, 2 * 1024 // 16)
    for grid in grids:
        assert [-(-n // grid) for n in strips] == [-(-n // sms) for n in strips]


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no CUDA compiler")
@pytest.mark.parametrize(("arch", "slots"), [("90a", 8), ("90a", 30), ("120a", 8)])
def test_other_rings_compile_the_narrow_kernel_without_spills(arch, slots, shared_builds):
    product = build(frame_library(shape_config("0.6b"), arch, ring_slots=slots), arch)
    facts = read_cubin(product).facts
    assert facts["ring_slots"] == slots <= facts["most_ring_slots"]
    # The kernel for up to 32 streams spills with every ring (csrc/machine_code.md).
    narrow = [kernel for kernel in resources(product) if kernel.kernel == "frame_kernel_narrow"]
    assert [kernel.spill_bytes for kernel in narrow] == [0]


# ---------------------------------------------------------------------------- the file


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tuning(cache) -> Tuning:
    """A tuning that is in the file."""
    made = Tuning(TARGET, Setting(ring_slots=14, l2_share=0.25, grid=128), FASTER)
    made.save()
    return made


def found(target: Target) -> tuple[Tuning | None, list[str]]:
    lines: list[str] = []
    return kernel_tuning.find(target, lines.append), lines


def test_what_is_kept_is_found_again(tuning):
    assert found(TARGET) == (tuning, [])
    assert str(tuning) == (
        "a ring of 14 slots, 25 % of L2, 128 CTAs; frames take less by 5.0 % for 1 stream, "
        "3.0 % for 8 streams"
    )
    assert kernel_tuning.kept("NVIDIA H200") == [TARGET.path]
    assert kernel_tuning.kept("NVIDIA GeForce RTX 5090") == []


def test_a_machine_that_was_not_tuned_hears_nothing(cache):
    assert found(TARGET) == (None, [])


@pytest.mark.parametrize(
    "other",
    [
        {"gpu": "NVIDIA GeForce RTX 5090"},
        {"form": "small"},
        {"geometry": "kHidden = 2048, kLayers = 28"},
    ],
)
def test_gpus_forms_and_shapes_have_files_of_their_own(tuning, other):
    assert found(replace(TARGET, **other)) == (None, [])


@pytest.mark.parametrize(
    ("change", "why"),
    [({"digest": "f" * 16}, "it is of other kernels"), ({"sms": 66}, "it is of another sms")],
)
def test_a_tuning_of_something_else_is_ignored_with_a_word(tuning, change, why):
    result, lines = found(replace(TARGET, **change))
    assert result is None
    assert lines == [f"the tuning {TARGET.path} is ignored: {why}; tune again"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: content.update(schema=2), "schema is 2, expected 1"),
        (lambda content: content["setting"].update(grid=133), "grid is 133, expected 1 to 132"),
        (lambda content: content["setting"].update(grid=True), "grid is True"),
        (lambda content: content["setting"].update(l2_share=1.5), "l2_share is 1.5, expected 0 to 1"),
        (lambda content: content["setting"].update(ring_slots="14"), "ring_slots is '14'"),
        (lambda content: content["setting"].update(pieces=3), "pieces"),
        (lambda content: content.pop("target"), "target"),
        (lambda content: content["ratios"].update({"1": 0.9}), "it is not a tuning"),
    ],
)
def test_a_file_that_does_not_hold_a_tuning_is_ignored_with_a_word(tuning, change, why):
    content = json.loads(TARGET.path.read_text())
    change(content)
    TARGET.path.write_text(json.dumps(content))
    result, lines = found(TARGET)
    assert result is None
    assert len(lines) == 1
    assert why in lines[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_a_file_that_is_broken_is_ignored_with_a_word(tuning, content):
    TARGET.path.write_text(content)
    result, lines = found(TARGET)
    assert (result, len(lines)) == (None, 1)


def test_a_winner_is_kept_and_the_next_one_takes_its_place(cache):
    for slots in (14, 18):
        final = compare(
            DEFAULT,
            Setting(ring_slots=slots),
            (1, 8),
            measured({DEFAULT: RING_42, Setting(ring_slots=slots): RING_22}),
        )
        said = tune.keep(TARGET, final)
        assert f"a ring of {slots} slots" in said
        assert str(TARGET.path) in said
        assert found(TARGET)[0].setting == Setting(ring_slots=slots)
    assert [path.name for path in cache.iterdir()] == [TARGET.path.name]


def test_where_the_default_wins_an_older_tuning_goes(tuning):
    slow = Setting(ring_slots=42)
    lost = compare(DEFAULT, slow, (1, 8), measured({DEFAULT: RING_22, slow: RING_42}))
    assert tune.keep(TARGET, lost).startswith("Kept: the default.")
    assert found(TARGET) == (None, [])
    assert tune.keep(TARGET, None).startswith("Kept: the default.")  # the file is gone


def test_the_table_has_every_trial_and_what_came_of_it():
    _, trials = tried(
        {"ring_slots": [22, 30, 14]},
        {DEFAULT: RING_42, Setting(ring_slots=22): RING_22, Setting(ring_slots=14): RING_42},
        lambda setting: setting.ring_slots != 30,
    )
    lines = tune.table(list(trials.values()), (1, 8)).splitlines()
    assert lines[0] == "| tried | beside | 1 stream (at most) | 8 streams (at most) |  |"
    assert lines[2].startswith("| a ring of 22 slots | the default | 0.9")
    assert lines[2].endswith("| faster |")
    assert lines[3] == "| a ring of 30 slots | the default | - | - | draws other codes |"
    assert lines[4].endswith(("| not faster beyond doubt |", "| slower |"))


def test_doctor_shows_a_tuning_and_names_a_stale_one(cache):
    found = Gpus((Gpu("NVIDIA GeForce RTX 5090", "580.95.05", (12, 0), 33.2, 34.2),))
    none = check_tuning(found)
    assert (none.status, none.fix) == ("ok", None)
    assert "none; python -m qwen_megakernel tune" in none.detail
    geometry = "kHidden = 1024"
    digest = frame_digest(geometry, "120a")
    target = Target(found.gpus[0].name, 170, "120a", "small", geometry, digest)
    tuning = Tuning(target, Setting(grid=128), {"1": (0.95, 0.96)})
    tuning.save()
    tuned = check_tuning(found)
    assert (tuned.status, tuned.detail) == (
        "ok",
        "small form: 128 CTAs; frames take less by 5.0 % for 1 stream",
    )
    other = replace(found.gpus[0], name="NVIDIA H200", capability=(9, 0))
    assert check_tuning(Gpus((other,))).detail == none.detail
    replace(tuning, target=replace(target, digest="before")).save()
    stale = check_tuning(found)
    assert (stale.status, stale.fix) == ("warn", "python -m qwen_megakernel tune")
    assert stale.detail == f"{target.path} is ignored: it is of other kernels"
    target.path.write_text("{}")
    assert "is ignored: it is not a tuning" in check_tuning(found).detail
    assert check_tuning(Gpus(installed=False)).status == "skipped"


# ---------------------------------------------------------------------------- the command


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 1
    assert capsys.readouterr().err == (
        "error: tuning needs a CUDA GPU, and torch finds none; see `doctor`\n"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["large", "small"])
def test_on_a_gpu_it_keeps_only_what_is_faster(form, cache, capsys):
    if form == "large" and torch.cuda.get_device_capability() >= (12, 0):
        pytest.skip("this GPU has room for the small form alone")
    assert main(["tune", "tiny", "--form", form]) == 0
    said = capsys.readouterr().out
    assert "Kept: " in said
    assert "draws other codes" not in said
    config, device = shape_config("tiny"), torch.device("cuda", 0)
    target = tune.tuning_target(config, device, form)
    kept = kernel_tuning.find(target, print)
    assert (kept is None) == ("Kept: the default" in said)
    if kept is not None:
        bench = tune.Bench(config, device, tune.build_rings(config, target))
        again = bench.confirm(kept.setting, tuple(map(int, kept.ratios)))
        assert again.same_codes
        assert again.worst < 1.01
