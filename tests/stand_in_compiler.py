"""A compiler that does what a test asks, where the test is about what the build does around it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_megakernel.installation import nvrtc

MAKES_JUNK = 'echo junk > "$4"; echo junk > "${4%.cubin}.ptx"'
"""Leaves a cubin and a PTX that no driver takes."""
SCRIPT = """case $# in 2) echo '// Cuda compilation tools, release 13.0, V13.0.88'; exit;; esac
{body}
"""


def put_compiler(home: Path) -> Path:
    """Files by which a compiler is found below `home`; the library's path."""
    library, header = home / "lib" / "libnvrtc.so.13", home / "include" / "cuda_bf16.h"
    for path in (library, header):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return library


def run_instead(monkeypatch: pytest.MonkeyPatch, script: Path, body: str) -> None:
    """Have a shell script compile: its arguments are the library, the headers' option, the source, the
    product and options."""
    script.write_text(SCRIPT.format(body=body))
    monkeypatch.setattr(nvrtc, "_PROCESS", ("/bin/sh", str(script)))
