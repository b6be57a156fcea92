"""deploy/ray_serve.py without a cluster: what it refuses, and how many replicas it asks for."""

from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve", reason="needs deploy/requirements-ray.txt")

from ray_serve import NEEDED, ByLoad, build, check_ray, server_options
from test_deployment import ray_variables

TOKEN = {"QWEN_MEGAKERNEL_TOKEN": "a-secret-for-tests"}


def test_environment_file_has_what_is_needed():
    check_ray(ray_variables(), drain_s=30)


@pytest.mark.parametrize("name", NEEDED)
def test_ray_without_a_setting_is_refused(name):
    environ = {k: v for k, v in ray_variables().items() if k != name}
    with pytest.raises(ValueError, match=f"{name}={NEEDED[name]}"):
        check_ray(environ, drain_s=10)


def test_drain_longer_than_rays_is_refused():
    with pytest.raises(ValueError, match=r"is 35, .* QWEN_MEGAKERNEL_DRAIN_S=31; 36 is the least"):
        check_ray(ray_variables(), drain_s=31)


def test_wrong_options_are_an_error_and_not_the_end_of_the_process():
    with pytest.raises(ValueError, match="QWEN_MEGAKERNEL_NUM_SLOTS: expected a whole number"):
        server_options(TOKEN | {"QWEN_MEGAKERNEL_NUM_SLOTS": "many"})
    with pytest.raises(ValueError, match="has no --token"):
        server_options({})


@pytest.mark.parametrize("args", [{"replicas": "2"}, {"max_replicas": "0"}, {"max_replicas": "x"}])
def test_wrong_arguments_of_serve_run_are_named(args):
    (name,) = args
    with pytest.raises(
        ValueError, match=f"{name}={args[name]}: expected min_replicas=N, max_replicas=N"
    ):
        build(args)


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("auto", 1)])
def test_a_replica_takes_a_gpu_where_it_runs_on_one(monkeypatch, device, gpus):
    for name, value in (TOKEN | {"QWEN_MEGAKERNEL_DEVICE": device}).items():
        monkeypatch.setenv(name, value)
    deployment = build({"max_replicas": "3"})._bound_deployment
    assert deployment.ray_actor_options["num_gpus"] == gpus
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3


def context(*loads):
    metrics = {"load": dict(enumerate(loads))} if loads else {}
    return SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=4)


def test_replicas_follow_the_load():
    assert ByLoad(0.7)(context(0.35)) == (pytest.approx(0.5), {})
    assert ByLoad(0.7)(context(0.7, 0.7)) == (pytest.approx(2), {})
    assert ByLoad(0.5)(context(1.0, 0.9)) == (pytest.approx(3.8), {})


def test_without_figures_nothing_changes():
    assert ByLoad()(context()) == (4, {})
