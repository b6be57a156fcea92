#!/usr/bin/env python3
"""The server's command line; `python -m qwen_megakernel serve` is the same."""

from __future__ import annotations

import sys

from qwen_megakernel.tools.serve import main

if __name__ == "__main__":
    sys.exit(main())
