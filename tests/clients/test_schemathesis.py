"""The server keeps what its OpenAPI description says: schemathesis asks for all it allows, and more."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("schemathesis", reason="make test-clients has it")

from live_server import DEMO_TOKEN

NOT_CHECKED = (
    # The description cannot say which rate goes with which encoding, or which voices there are.
    "positive_data_acceptance",
    # Fields that nobody knows are ignored, as by the services whose clients send them.
    "negative_data_rejection",
)

NOT_ASKED = r"^/$|^/page/|^/v1/audio/voices"
"""The page is no API. The voice library is a second route of its path, so OPTIONS names a part of its
methods, and its limit of ten voices a minute is a 503. tests/test_voice_library.py asks it."""


def test_schemathesis_passes(demo_server, http_url, tmp_path):
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{http_url}/openapi.json"),
        *("-H", f"Authorization: Bearer {DEMO_TOKEN}", "--exclude-checks", ",".join(NOT_CHECKED)),
        *("--exclude-path-regex", NOT_ASKED),
        *("--max-examples", "15", "--seed", "1", "--workers", "1", "--no-color"),
        *("--request-timeout", "60", "--suppress-health-check", "all"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert not [line for line in demo_server.err if "Traceback" in line]
