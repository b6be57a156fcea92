"""Takes a replica out of HAProxy's backend before it stops, and puts it back. Standard library only.

    balancer.py /run/haproxy/admin.sock replicas/gpu0 drain
    balancer.py /run/haproxy/admin.sock replicas/gpu0 ready

A replica in `drain` gets no new clients and keeps those that it has. Exits with 0, or with 1 and one
line that says why.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time

LIMIT_S = 2.0
"""Seconds for a whole exchange with HAProxy."""
SETTLE_S = 0.5
"""Seconds to wait after `drain`. In this time a client that was sent to the replica just before can say
what it wants."""


def command(path: str, text: str) -> str:
    """HAProxy's answer to one command of its runtime API. Raises `OSError`."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(LIMIT_S)
        link.connect(path)
        link.sendall(f"{text}\n".encode())
        answer = b""
        while part := link.recv(65_536):
            answer += part
    return answer.decode().strip()


def main() -> int:
    """Set the state of one replica. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Set the state of a replica in HAProxy.")
    parser.add_argument("socket", help="HAProxy's `stats socket`")
    parser.add_argument("server", help="BACKEND/SERVER, as in haproxy.cfg")
    parser.add_argument("state", choices=("drain", "ready"))
    args = parser.parse_args()
    try:
        said = command(args.socket, f"set server {args.server} state {args.state}")
    except OSError as error:
        said = f"{args.socket}: {error.strerror or error}"
    if said:  # HAProxy says nothing if all is well
        print(f"balancer.py: {said}", file=sys.stderr)
        return 1
    if args.state == "drain":
        time.sleep(SETTLE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
