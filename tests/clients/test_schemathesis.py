"""The server agrees with its OpenAPI description: schemathesis tries all that it allows, and more."""

import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("schemathesis", reason="make test-clients has it")

from live_server import DEMO_TOKEN, ROOT, VOICES_OFTEN, LiveServer

NOT_CHECKED = (
    # The description cannot say which rate goes with which encoding, or which voices there are.
    "positive_data_acceptance",
    # Unknown fields are ignored, as by the services whose clients send them.
    "negative_data_rejection",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The demonstration voice. The voices that it is asked to add go to a folder of their own."""
    voices = tmp_path_factory.mktemp("library") / "voices"
    shutil.copytree(ROOT / "demo_voice" / "voices", voices)
    options = ("--model", "demo_voice", "--voices", str(voices), "--token", DEMO_TOKEN)
    server = LiveServer(*options, program=VOICES_OFTEN)
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


def test_schemathesis_passes(server, tmp_path):
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run"),
        f"http://127.0.0.1:{server.port}/openapi.json",
        *("-H", f"Authorization: Bearer {DEMO_TOKEN}", "--exclude-checks", ",".join(NOT_CHECKED)),
        *("--max-examples", "15", "--seed", "1", "--workers", "1", "--no-color"),
        *("--request-timeout", "60", "--suppress-health-check", "all"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert not [line for line in server.err if "Traceback" in line]
