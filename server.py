#!/usr/bin/env python3
"""The server's command line, the same as `python -m qwen_megakernel serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen_megakernel.__main__ import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server. Returns the exit code."""
    return run_command("serve", sys.argv[1:] if argv is None else argv, prog="server.py")


if __name__ == "__main__":
    sys.exit(main())
