"""Checks whether the server on this machine takes turns. Exits with 0 or 1. For containers and
supervisors."""

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    """Ask `/ready`, with the token and port that the server reads from its environment."""
    port = os.environ.get("QWEN_MEGAKERNEL_PORT", "8765")
    request = urllib.request.Request(f"http://127.0.0.1:{port}/ready")
    if token := os.environ.get("QWEN_MEGAKERNEL_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    # The proxies of the environment do not reach this machine, so they are not used.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=4):
            return 0
    except OSError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
