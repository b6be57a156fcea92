"""The files for several GPUs: they name what exists, and agree with each other."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from front_door import HAPROXY
from live_server import ROOT

from qwen_megakernel.serving.observe import Metrics
from qwen_megakernel.tools.serve import OPTIONS, OTHER_VARIABLES

DEPLOY = ROOT / "deploy"
VARIABLES = {option.variable for option in OPTIONS} | OTHER_VARIABLES
FOREIGN = {"DCGM_FI_DEV_GPU_UTIL"}
"""Names of NVIDIA's exporter."""


def read(name):
    return (DEPLOY / name).read_text(encoding="utf-8")


def variables_of(name):
    return dict(re.findall(r"^(QWEN_MEGAKERNEL_\w+)=(.*)$", read(f"environment/{name}.env"), re.M))


def served_metrics():
    sources = ("sessions", "slots", "active", "waiting", "unsent_bytes")
    zero = dict.fromkeys(
        [*(f"num_{name}" for name in sources), "engine_cpu_s", "is_loaded", "num_warm_frames"],
        lambda: 0.0,
    )
    return set(re.findall(r"^(\w+)[{ ]", Metrics(**zero).page().decode(), re.M))


def test_every_figure_of_the_dashboard_is_served():
    panels = json.loads(read("grafana.json"))["panels"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    named = set(re.findall(r"\b(qwen_megakernel_\w+|process_\w+|DCGM_\w+)", asked))
    assert len(panels) >= 8
    assert named - FOREIGN <= served_metrics()
    assert named & FOREIGN


def test_variables_are_the_servers_and_pass_its_checks():
    checks = {option.variable: option.convert for option in OPTIONS}
    for name in ("all", "0", "1"):
        for variable, value in variables_of(name).items():
            if variable != "QWEN_MEGAKERNEL_VOICES":  # this folder need not exist here
                checks[variable](value)
    (container,) = deployment()["spec"]["template"]["spec"]["containers"]
    assert {variable["name"] for variable in container["env"]} <= VARIABLES
    assert {word for word in container["args"] if word.startswith("-")} <= {o.flag for o in OPTIONS}


def test_ports_are_the_same_everywhere():
    servers = re.findall(r"^ +server gpu(\d) (127\.0\.0\.1:(\d+))", read("haproxy.cfg"), re.M)
    assert [variables_of(number)["QWEN_MEGAKERNEL_PORT"] for number, _, _ in servers] == [
        port for _, _, port in servers
    ]
    scraped, _ = yaml.safe_load(read("prometheus.yaml"))["scrape_configs"]
    assert scraped["static_configs"][0]["targets"] == [address for _, address, _ in servers]


def deployment():
    first, _ = yaml.safe_load_all(read("kubernetes.yaml"))
    return first


def test_kubernetes_waits_for_the_drain():
    pod = deployment()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (drain_s,) = [int(v["value"]) for v in container["env"] if v["name"].endswith("_DRAIN_S")]
    before_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > before_s + drain_s
    readiness = container["readinessProbe"]
    # The pod leaves the service by itself, before SIGTERM.
    assert before_s >= readiness["periodSeconds"] * readiness["failureThreshold"]


def test_unit_waits_for_the_drain():
    unit = read("qwen-megakernel@.service")
    stop_s = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.M)[1])
    assert stop_s > int(variables_of("all")["QWEN_MEGAKERNEL_DRAIN_S"]) + 10


def ray_variables():
    return dict(re.findall(r"^(RAY_\w+)=(.*)$", read("environment/ray.env"), re.M))


def test_ray_keeps_sockets_for_longer_than_the_drain():
    (application,) = yaml.safe_load(read("ray_serve.yaml"))["applications"]
    drain_s = int(application["runtime_env"]["env_vars"]["QWEN_MEGAKERNEL_DRAIN_S"])
    assert int(ray_variables()["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"]) >= drain_s + 5


def test_ray_is_told_of_what_exists():
    """Variables of the server, and names in ray_serve.py."""
    (application,) = yaml.safe_load(read("ray_serve.yaml"))["applications"]
    variables = application["runtime_env"]["env_vars"]
    checks = {option.variable: option.convert for option in OPTIONS}
    for name in set(variables) - {"QWEN_MEGAKERNEL_VOICES"}:  # a folder that need not be here
        checks[name](variables[name])
    (deployment,) = application["deployments"]
    policy = deployment["autoscaling_config"]["policy"]["policy_function"]
    tree = ast.parse(read("ray_serve.py"))
    defined = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    paths = (application["import_path"], policy, f"ray_serve:{deployment['name']}")
    assert {path.partition(":")[0] for path in paths} == {"ray_serve"}
    assert {path.partition(":")[2] for path in paths} <= defined


@pytest.mark.parametrize("setting", [{}, {"CORES": str(min(os.sched_getaffinity(0)))}])
def test_unit_pins_its_replica_to_the_cores_that_are_set(setting):
    """The command of the unit as systemd would start it, with a program that tells its cores."""
    unit = read("qwen-megakernel@.service")
    environ = dict(re.findall(r"^Environment=(CORES)=(.*)$", unit, re.M)) | setting
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    words = [re.sub(r"\$\{(\w+)\}", lambda m: environ[m[1]], word) for word in command.split()]
    program = words.index("/opt/tts/bin/qwen-megakernel")
    tell = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
    told = subprocess.run(
        [*words[:program], *tell], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    wanted = {int(setting["CORES"])} if setting else os.sched_getaffinity(0)
    assert set(map(int, told.split())) == wanted


def test_cores_can_be_set_for_each_replica():
    """Both examples name cores, and not the same."""
    cores = [re.search(r"^# CORES=(\S+)$", read(f"environment/{n}.env"), re.M)[1] for n in (0, 1)]
    assert len(set(cores)) == 2


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_unit_is_one_for_systemd(tmp_path):
    unit = read("qwen-megakernel@.service").replace("/opt/tts/bin/qwen-megakernel", "/bin/true")
    (tmp_path / "qwen-megakernel@.service").write_text(unit.replace("/opt/tts/bin/python", "/bin/true"))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "qwen-megakernel@.service"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.skipif(HAPROXY is None, reason="needs HAProxy: apt-get install haproxy")
def test_haproxy_takes_its_configuration():
    checked = subprocess.run(
        [HAPROXY, "-c", "-f", DEPLOY / "haproxy.cfg"],
        env={"QWEN_MEGAKERNEL_TOKEN": "a-secret-for-tests"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr


def test_balancer_says_in_one_line_what_is_wrong(tmp_path):
    words = [DEPLOY / "balancer.py", tmp_path / "admin.sock", "replicas/gpu0", "drain"]
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr == f"balancer.py: {tmp_path / 'admin.sock'}: No such file or directory\n"
