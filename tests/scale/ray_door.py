"""A Ray of its own on this machine, with the deployment of deploy/ray_serve.py on the CPU."""

from __future__ import annotations

import contextlib
import csv
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from balancer import command
from front_door import HEADERS, TOKEN, free_port
from live_server import ROOT

MAX_CONNECTIONS = 8
"""Of a replica."""
DRAIN_S = 12
LIMIT_S = 240.0
"""For any change of the replicas."""
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Replica:
    """As Ray and its HAProxy know it."""

    name: str
    pid: int
    port: int


class RayDoor:
    """A Ray on this machine, and the front door of its Serve."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self._dashboard, self._gcs = free_port(), free_port()
        self._options = {
            "QWEN_MEGAKERNEL_MODEL": str(ROOT / "demo_voice"),
            "QWEN_MEGAKERNEL_VOICES": str(ROOT / "demo_voice/voices"),
            "QWEN_MEGAKERNEL_DEVICE": "cpu",
            "QWEN_MEGAKERNEL_MAX_CONNECTIONS": str(MAX_CONNECTIONS),
            "QWEN_MEGAKERNEL_DRAIN_S": str(DRAIN_S),
        }
        self.environ = os.environ | self._ray_variables() | self._options
        self.environ["QWEN_MEGAKERNEL_TOKEN"] = TOKEN
        self._log = (folder / "ray.log").open("wb")
        words = [
            "start",
            "--head",
            "--block",
            f"--port={self._gcs}",
            f"--dashboard-port={self._dashboard}",
        ]
        words += ["--num-cpus=8", "--object-store-memory=200000000", f"--temp-dir={folder}/t"]
        self._ray = subprocess.Popen(
            [BIN / "ray", *words],
            env=self.environ,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self.environ["RAY_DASHBOARD_ADDRESS"] = f"http://127.0.0.1:{self._dashboard}"
        self.environ["RAY_ADDRESS"] = f"127.0.0.1:{self._gcs}"
        self._replicas: list[Replica] = []
        wait_until(lambda: self._applications() is not None, "Ray does not answer")

    def _ray_variables(self) -> dict[str, str]:
        """deploy/environment/ray.env, and what keeps this Ray apart from others."""
        lines = (ROOT / "deploy/environment/ray.env").read_text("utf-8").splitlines()
        given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        ray = {name: value.strip('"') for name, value in given.items()}
        ray["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = str(DRAIN_S + 5)
        for name, file in (
            ("CONFIG_FILE_LOC", "haproxy.cfg"),
            ("SOCKET_PATH", "admin.sock"),
            ("SERVER_STATE_BASE", ""),
            ("SERVER_STATE_FILE", "server-state"),
            ("METRICS_SOCKET_PATH", "metrics.sock"),
        ):
            ray[f"RAY_SERVE_HAPROXY_{name}"] = str(self.folder / "h" / file)
        ray["RAY_SERVE_HAPROXY_STATS_PORT"] = str(free_port())
        ray["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(free_port())
        paths = os.pathsep.join([str(ROOT), str(ROOT / "deploy"), os.environ.get("PYTHONPATH", "")])
        return ray | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}

    # -- Ray's side -------------------------------------------------------------------------------

    def serve(self, *words: str) -> None:
        """Ray's command line."""
        result = subprocess.run(
            [BIN / "serve", *words],
            env=self.environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]

    def deploy(self, idle_s: int, **changes: Any) -> None:
        """deploy/ray_serve.yaml with this check's port and variables, and `changes` of autoscaling.

        Another `idle_s` makes Ray replace all replicas.
        """
        config = yaml.safe_load((ROOT / "deploy/ray_serve.yaml").read_text("utf-8"))
        config["http_options"]["port"] = self.port
        (application,) = config["applications"]
        application["runtime_env"]["env_vars"] = self._options | {"QWEN_MEGAKERNEL_IDLE_S": str(idle_s)}
        (deployment,) = application["deployments"]
        deployment["autoscaling_config"] |= changes
        file = self.folder / "config.yaml"
        file.write_text(yaml.safe_dump(config), "utf-8")
        self.serve("deploy", str(file))

    def _applications(self) -> dict[str, Any] | None:
        url = f"http://127.0.0.1:{self._dashboard}/api/serve/applications/"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=5) as answer:
                return json.load(answer)["applications"]
        except (OSError, KeyError, ValueError):
            return None

    def processes(self) -> dict[str, tuple[int, str]]:
        """Process and state of each replica by its name, old ones that drain too."""
        found = {}
        for application in (self._applications() or {}).values():
            for deployment in application["deployments"].values():
                for replica in deployment["replicas"]:
                    found[replica["replica_id"]] = (replica["pid"], replica["state"])
        return found

    def ports(self) -> dict[str, int]:
        """Of the replicas that HAProxy sends clients to, by name."""
        (socket,) = (self.folder / "h").glob("*/admin.sock")
        lines = command(str(socket), "show stat").removeprefix("# ").splitlines()
        found = {}
        for row in csv.DictReader(lines):
            if row["svname"].startswith("SERVE_REPLICA") and row["status"].startswith("UP"):
                found[row["svname"].rpartition("-")[2]] = int(row["addr"].rpartition(":")[2])
        return found

    def up(self) -> list[Replica]:
        """Those that Ray calls running and HAProxy sends clients to, by port."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            ports = self.ports()
            running = {n: pid for n, (pid, state) in self.processes().items() if state == "RUNNING"}
            if set(ports) == set(running):
                found = (Replica(name, running[name], port) for name, port in ports.items())
                return sorted(found, key=lambda replica: replica.port)
        return []

    def wait_until_up(self, number: int, gone: set[str] = frozenset()) -> None:
        """Until so many take clients, and none of those that must be `gone`."""

        def reached() -> bool:
            self._replicas = self.up()
            return len(self._replicas) == number and not gone & {r.name for r in self._replicas}

        wait_until(reached, f"not {number} replicas")

    # -- as tests/scale asks for ------------------------------------------------------------------

    @property
    def replicas(self) -> list[Replica]:
        """As of the last `wait_until_up`."""
        return self._replicas

    def connections(self) -> list[int]:
        """Clients of each replica."""
        return [self.ready(replica.port)["connections"] for replica in self._replicas]

    @staticmethod
    def ready(port: int) -> dict[str, Any]:
        """A replica's own `/ready`."""
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(link):
            link.request("GET", "/ready", headers=HEADERS)
            return json.load(link.getresponse())

    def wait_for_connections(self, *numbers: int) -> None:
        """Until each replica has so many clients."""
        wait_until(lambda: self.connections() == list(numbers), f"not {numbers} connections")

    def kill(self, number: int) -> None:
        """As `kill -9` does."""
        os.kill(self._replicas[number].pid, signal.SIGKILL)

    def stop(self) -> None:
        """End Ray, and whatever it started."""
        with contextlib.suppress(Exception):
            self.serve("shutdown", "-y")
        self._ray.terminate()
        try:
            self._ray.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._ray.pid, signal.SIGKILL)
        self._log.close()


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> float:
    """Seconds until it is true; `AssertionError` if it does not come true in time."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s, what
        time.sleep(0.1)
    return time.monotonic() - start
