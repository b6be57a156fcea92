"""`bench --against`: what it finds in other versions of this tree, and how reliable its bound is."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from live_server import ROOT

from qwen_megakernel.__main__ import main
from qwen_megakernel.bench import against as bench_against
from qwen_megakernel.bench import worker as bench_worker
from qwen_megakernel.bench.against import (
    WorkerProcess,
    baseline_tree,
    compare_figure,
    first_difference,
    ratio_bound,
    resampled_medians,
)
from qwen_megakernel.bench.frame_kernel import BenchError

QUICK = ("--device", "cpu", "--repeats", "3", "--positions", "20", "--instances", "2")


def bench(*arguments):
    return main(["bench", *QUICK, *arguments])


@pytest.fixture
def copied_tree(tmp_path):
    tree = tmp_path / "copy"
    shutil.copytree(
        ROOT / "qwen_megakernel", tree / "qwen_megakernel", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tree


def plant(tree, old, new):
    """Replace a text that stands once in the whole package."""
    paths = [path for path in tree.rglob("*.py") if old in path.read_text()]
    assert len(paths) == 1, f"{old!r} is in {paths}"
    text = paths[0].read_text()
    assert text.count(old) == 1
    paths[0].write_text(text.replace(old, new))


# ---------------------------------------------------------------------------- whole comparisons


@pytest.mark.slow
def test_a_tree_equals_itself(tmp_path, capsys):
    out = tmp_path / "found.json"
    limits = ("--max-ratio", "1e6", "--max-bound", "1e6")  # other work may take the cores at any time
    assert bench("--against", str(ROOT), "--streams", "2", *limits, "--json", str(out)) == 0
    told = capsys.readouterr()
    found = json.loads(out.read_text())["against"]
    assert found["codes"] == [{"shape": "tiny", "difference": None}]
    assert found["speech"].keys() == {"A instance 1", "B instance 1", "A instance 2", "B instance 2"}
    assert len({*found["speech"].values()}) == 1
    assert [figure["name"] for figure in found["figures"]] == ["frame, 2 streams at 20", "TTFC"]
    for figure, repeats in zip(found["figures"], (3, 2), strict=True):
        assert figure["ratio"] > 0
        assert figure["ratio"] <= figure["bound"] * 1.001
        for version in "AB":
            assert np.shape(figure["raw_us"][version]) == (2, 2, repeats)
            assert np.min(figure["raw_us"][version]) > 100
    assert "- codes of shape tiny: equal" in told.out
    assert "| TTFC | " in told.out
    assert "instance 2 of 2" in told.err


@pytest.mark.slow
def test_other_numerics_are_found_in_the_codes(copied_tree, capsys):
    plant(copied_tree, "scores = scores / batch.divisor", "scores = scores / batch.divisor * 1.01")
    assert bench("--against", str(copied_tree), "--only", "codes", "--streams", "1") == 1
    told = capsys.readouterr().out
    assert "- codes of shape tiny: streams 1: stream 0, frame " in told
    assert "weights differ" not in told
    assert "TTFC" not in told


@pytest.mark.slow
def test_a_slower_version_fails(copied_tree):
    plant(
        copied_tree,
        "codes = self.decode_frame(slots, text_rows, noise).codes",
        'codes = self.decode_frame(slots, text_rows, noise).codes; __import__("time").sleep(0.1)',
    )
    plan = bench_against.Plan("cpu", ("speed",), (), "tiny", (1,), (20,), 2, 3, 1.01, 1.02)
    (found,) = bench_against.run(str(ROOT), plan, lambda line: None, root=copied_tree)
    assert not bench_against.passed(found)
    assert len({*found["speech"].values()}) == 1
    for figure in found["figures"]:
        assert not figure["passed"]
        assert figure["ratio"] > 1.2
        assert np.min(figure["raw_us"]["B"]) > 100_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--instances", "1"), "'1': expected at least 2"),
        (("--only", "soup"), "invalid choice: 'soup'"),
        (("--against-shapes", "0.5b"), "'0.5b': expected some of tiny"),
    ],
)
def test_a_wrong_option_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        bench("--against", "HEAD", *arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------- version A


def test_a_revision_is_extracted(tmp_path):
    root, folder = tmp_path / "root", tmp_path / "A"
    module = root / "qwen_megakernel" / "config.py"
    module.parent.mkdir(parents=True)
    module.write_text("VALUE = 1\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    module.write_text("VALUE = 2\n")
    tree = baseline_tree("HEAD", folder, root)
    assert (tree / "qwen_megakernel" / "config.py").read_text() == "VALUE = 1\n"


def test_what_is_neither_a_folder_nor_a_revision_is_an_error_of_one_line(tmp_path, capsys):
    assert bench("--against", "no-such-revision") == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: no-such-revision: no folder with a checkout, and git says: ")
    assert len(told.err.splitlines()) == 1


def test_a_named_checkpoint_is_refused(tiny_base, capsys):
    assert bench("--against", str(ROOT), "--model", str(tiny_base)) == 1
    assert capsys.readouterr().err == "error: --against compares random weights: leave out --model\n"


def test_a_folder_without_the_package_is_no_version(tmp_path):
    with pytest.raises(BenchError, match="no folder with a checkout"):
        baseline_tree(str(tmp_path), tmp_path / "A", tmp_path)


# ---------------------------------------------------------------------------- processes


def worker(tmp_path, monkeypatch, code):
    """A process that runs `code` instead of the worker."""
    script = tmp_path / "script.py"
    script.write_text(code)
    monkeypatch.setattr(bench_against, "SCRIPT", script)
    return WorkerProcess("A instance 1", tmp_path, "cpu", tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('the reason')", "the process ended: RuntimeError: the reason"),
        ("import os; os.kill(os.getpid(), 9)", "the process ended: exit status -9"),
        ("input(); print('half a rep', end='')", "the process ended: exit status 0"),
    ],
)
def test_a_process_that_dies_is_an_error_of_one_line(code, message, tmp_path, monkeypatch):
    with (
        pytest.raises(BenchError, match=r"^A instance 1: measure: ") as raised,
        worker(tmp_path, monkeypatch, code) as process,
    ):
        process.ask("measure")
    assert str(raised.value) == f"A instance 1: measure: {message}"


def test_a_process_that_does_not_answer_is_killed_with_its_children(tmp_path, monkeypatch):
    code = (
        "import subprocess, sys, time\n"
        "subprocess.Popen(['sleep', '60'])\n"  # holds standard output open, as a compiler would
        "print('compiling', file=sys.stderr, flush=True)\n"
        "time.sleep(60)\n"
    )
    with (
        pytest.raises(BenchError, match=r"build: no reply in 2 s: compiling$"),
        worker(tmp_path, monkeypatch, code) as process,
    ):
        process.ask("build", timeout_s=2)


def test_the_package_of_another_tree_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=f"qwen_megakernel, not from {tmp_path}$"):
        bench_worker.Worker(tmp_path, torch.device("cpu"))


def test_a_module_is_found_by_its_newest_name_and_a_missing_dependency_is_told(tmp_path, monkeypatch):
    package = tmp_path / "some_version"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "decoder.py").write_text("NAME = 'old'\n")
    (package / "megakernel.py").write_text("NAME = 'old'\n")
    (package / "decoding").mkdir()
    (package / "decoding" / "torch_backend.py").write_text("NAME = 'new'\n")
    (package / "codec.py").write_text("NAME = 'not a package'\n")
    (package / "codec_cuda.py").write_text("import no_such_dependency\n")
    monkeypatch.setattr(bench_worker, "PACKAGE", "some_version")
    monkeypatch.syspath_prepend(tmp_path)
    assert bench_worker.find_module("torch").NAME == "new"
    assert bench_worker.find_module("kernel").NAME == "old"
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        bench_worker.find_module("codec")
    with pytest.raises(ModuleNotFoundError, match=r"some_version\.tts_model"):
        bench_worker.find_module("tts")


# ---------------------------------------------------------------------------- codes


def reply(weights=1, **codes):
    return {"weights": weights, "codes": {n.removeprefix("n"): value for n, value in codes.items()}}


def test_the_first_difference_is_the_earliest_frame_of_the_fewest_streams():
    one = np.zeros((3, 1, 16), int)
    two = np.arange(3 * 2 * 16).reshape(3, 2, 16)
    other = two.copy()
    other[2, 0, 0] = 7
    other[1, 1, 5] = 9
    a, b = reply(n1=one, n2=two), reply(n1=one, n2=other)
    assert first_difference(a, a) is None
    where = "streams 2: stream 1, frame 1, codebook 5: A has 53, B has 9"
    assert first_difference(a, b) == where
    b["weights"] = 2
    assert first_difference(a, b) == where + "; the random weights differ, too"


def test_a_digest_sees_one_changed_weight():
    layer = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    before = bench_worker.weights_digest(layer)
    with torch.no_grad():
        layer.weight[3, 4] += 1
    assert bench_worker.weights_digest(layer) != before


# ---------------------------------------------------------------------------- the bound


def measurements(rng, instances, *, level=1.0, between=0.01, within=0.003):
    """Times [instances, 4] around a level, with log-normal differences between the instances."""
    apart = np.exp(between * rng.standard_normal((instances, 1)))
    return level * apart * np.exp(within * rng.standard_normal((instances, 4)))


@pytest.mark.parametrize("instances", [3, 6])
@pytest.mark.parametrize(("between", "within"), [(0.01, 0.002), (0.003, 0.01)])
def test_the_true_ratio_lies_below_the_bound_as_often_as_it_says(instances, between, within):
    rng = np.random.default_rng(instances)
    spread = {"between": between, "within": within}
    covered = 0
    for _ in range(300):
        a = measurements(rng, instances, **spread)
        b = measurements(rng, instances, level=1.05, **spread)
        covered += ratio_bound(a, b, resamples=300) >= 1.05
    assert covered / 300 >= 0.912  # 0.95 less three standard deviations of the count


def test_two_instances_cover_five_cases_of_six():
    rng = np.random.default_rng(0)
    covered = sum(
        ratio_bound(measurements(rng, 2, within=0.0), measurements(rng, 2, within=0.0), resamples=200)
        >= 1
        for _ in range(600)
    )
    assert covered / 600 == pytest.approx(5 / 6, abs=0.04)


def test_the_bound_narrows_with_more_instances_and_finds_what_is_slower():
    rng = np.random.default_rng(0)
    few, many = (
        np.median([ratio_bound(measurements(rng, n), measurements(rng, n), 500) for _ in range(20)])
        for n in (3, 24)
    )
    assert 1.0 < many < few
    slower = ratio_bound(measurements(rng, 6), measurements(rng, 6, level=1.05))
    assert slower > 1.04


def test_a_resample_keeps_the_measurements_of_an_instance_together():
    values = np.array([[1.0, 1.0], [9.0, 9.0]])
    assert {*resampled_medians(values, 200, seed=0)} == {1.0, 5.0, 9.0}
    assert {*resampled_medians(np.array([[1.0, 9.0]]), 200, seed=0)} == {1.0, 5.0, 9.0}


@pytest.mark.parametrize(
    ("limits", "passes"), [((1.06, 1.06), True), ((1.04, 2), False), ((2, 1.04), False)]
)
def test_both_limits_count(limits, passes):
    raw = {"A": [[[100.0, 100.0, 500.0]] * 4] * 3, "B": [[[105.0, 105.0, 900.0]] * 4] * 3}
    plan = bench_against.Plan("cpu", (), (), "tiny", (), (), 3, 3, *limits)
    figure = compare_figure("TTFC", raw, plan)
    assert (figure["a_us"], figure["b_us"]) == (100.0, 105.0)
    assert figure["ratio"] == figure["bound"] == pytest.approx(1.05)
    assert figure["passed"] is passes


def test_samples_that_differ_fail_the_comparison():
    same = {"speech": {"A instance 1": "x", "B instance 1": "x"}}
    assert bench_against.passed(same)
    assert not bench_against.passed({"speech": {"A instance 1": "x", "B instance 1": "y"}})
    assert not bench_against.passed({"codes": [{"shape": "tiny", "difference": "somewhere"}]})
    assert bench_against.passed({})
