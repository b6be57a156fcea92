"""The container's files are linted and agree with the package. No test builds the image."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from live_server import ROOT, LiveServer

from qwen_megakernel.tools.serve import OPTIONS, OTHER_VARIABLES

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
TOKEN = "a-secret-for-tests"


def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def instructions(name):
    """The rest of each line that begins with an instruction, joined with its continuation lines."""
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def test_dockerfile_passes_hadolint():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("needs tests/requirements.txt")
    linted = subprocess.run(
        [hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=240
    )
    assert (linted.stdout, linted.returncode) == ("", 0)


def test_install_script_is_a_shell_script():
    script = DEPLOY / "install.sh"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], timeout=240).returncode == 0
    assert f"/src/{script.relative_to(ROOT)} /src /opt/tts" in instructions("RUN")


def test_the_server_runs_as_nobody_in_particular():
    users = instructions("USER")
    assert users
    assert users[-1].isdecimal()
    assert int(users[-1]) > 0
    service = compose()["services"]["tts"]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]


def test_variables_are_the_servers():
    known = {option.variable for option in OPTIONS} | OTHER_VARIABLES
    set_here = set(re.findall(r"QWEN_MEGAKERNEL_\w+", " ".join(instructions("ENV"))))
    assert "QWEN_MEGAKERNEL_HOST" in set_here
    assert set_here | set(compose()["services"]["tts"]["environment"]) <= known


def test_a_token_is_asked_for_and_the_port_stays_here():
    service = compose()["services"]["tts"]
    assert service["environment"]["QWEN_MEGAKERNEL_TOKEN"].startswith("${QWEN_MEGAKERNEL_TOKEN:?")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_weights_and_voices_are_volumes():
    mounted = {volume.split(":")[1] for volume in compose()["services"]["tts"]["volumes"]}
    assert mounted == {"/weights", "/voices"} == set(re.findall(r'"(/\w+)"', instructions("VOLUME")[0]))
    assert {volume.split(":")[0] for volume in compose()["services"]["tts"]["volumes"]} == set(
        compose()["volumes"]
    )


def test_options_of_the_command_exist():
    flags = {option.flag for option in OPTIONS}
    given = [word for word in compose()["services"]["tts"]["command"] if word.startswith("-")]
    assert set(given) <= flags
    assert instructions("ENTRYPOINT") == ['["qwen-megakernel", "serve"]']


def test_all_that_a_wheel_needs_is_copied():
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line.removeprefix("!") for line in kept if line.startswith("!")}
    assert {"pyproject.toml", "README.md", "LICENSE", "requirements.txt", "deploy"} <= kept
    assert {"qwen_megakernel", "pipecat_client", "csrc", "demo_voice"} <= kept
    assert all((ROOT / name).exists() for name in kept)


def health(port, **environ):
    (check,) = re.findall(r"CMD (\[.*\])", " ".join(instructions("HEALTHCHECK")))
    assert shlex.split(check.strip("[]").replace(",", " ")) == ["python", "/opt/tts/healthcheck.py"]
    environ = {
        **os.environ,
        "QWEN_MEGAKERNEL_PORT": str(port),
        "http_proxy": "http://127.0.0.1:9",
    } | environ
    command = [sys.executable, DEPLOY / "healthcheck.py"]
    return subprocess.run(command, env=environ, capture_output=True, timeout=240).returncode


def test_health_is_readiness(tiny_base, recording):
    options = ["--model", str(tiny_base), "--speaker-ref", str(recording), "--token", TOKEN]
    server = LiveServer(*options)
    try:
        server.wait_until_ready()
        assert health(server.port, QWEN_MEGAKERNEL_TOKEN=TOKEN) == 0
        assert health(server.port) == 1
    finally:
        server.kill()
    assert health(server.port, QWEN_MEGAKERNEL_TOKEN=TOKEN) == 1
