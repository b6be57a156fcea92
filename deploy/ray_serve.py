"""Ray Serve: one replica a GPU, each with the application of `qwen-megakernel serve` (docs/scaling.md).

    serve run ray_serve:build max_replicas=4
    serve deploy ray_serve.yaml

The server's options are its variables, such as QWEN_MEGAKERNEL_MODEL. With QWEN_MEGAKERNEL_DEVICE=cpu a
replica takes no GPU. environment/ray.env has what Ray itself needs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import aiohttp
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingContext
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from qwen_megakernel.serving.app import App
from qwen_megakernel.serving.observe import configure_logging, log
from qwen_megakernel.serving.process import FAILURE_POLL_S, MOST_FOLLOWING
from qwen_megakernel.serving.server_state import ENGINE_STOPPED
from qwen_megakernel.tools.serve import PREFIX, add_arguments, load_decoder, resolve, server_settings

NEEDED = {
    # Its HAProxy sends audio straight from a replica. Through Ray's proxy in Python each message would
    # be a call of an actor, without flow control.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # The application runs in the loop that sends, which waits for clients that read slowly.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
"""Variables of Ray, in the environment of `ray start`."""
DRAINING_VARIABLE, DRAINING_DEFAULT_S = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", 30.0
"""For how long Ray keeps the sockets of a replica that goes."""
AFTER_DRAIN_S = 5.0
"""Between the end of the server's own drain and that time."""
DRAIN_POLL_S = 0.2
"""How often a replica asks Ray whether it goes. Ray does not tell it."""
SETTLE_S = 1.5
"""From then until it refuses clients. Ray's HAProxy has taken it out meanwhile."""
TARGET_LOAD = 0.7
ARGUMENTS = {"min_replicas": 1, "max_replicas": 1}
"""Of `build`, with their defaults."""


class _Parser(argparse.ArgumentParser):
    """Without its own end of the process, which would take Ray's worker along."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong."""
        raise ValueError(message)


def server_options(environ: Mapping[str, str]) -> argparse.Namespace:
    """The server's options from its variables; `ValueError` names one that is wrong.

    Ray listens on all addresses, so a token is needed. `--host` and `--port` are Ray's to say.
    """
    parser = _Parser("ray_serve")
    add_arguments(parser)
    return resolve(parser.parse_args([]), {**environ, f"{PREFIX}HOST": "0.0.0.0"})


def check_ray(environ: Mapping[str, str], drain_s: float) -> None:
    """Raise `ValueError` if Ray would send clients otherwise than this file expects."""
    for name, value in NEEDED.items():
        if environ.get(name) != value:
            raise ValueError(f"`ray start` needs {name}={value} in its environment")
    kept_s = float(environ.get(DRAINING_VARIABLE, DRAINING_DEFAULT_S))
    if kept_s < drain_s + AFTER_DRAIN_S:
        raise ValueError(
            f"{DRAINING_VARIABLE} is {kept_s:g}, so Ray would cut turns before the end of "
            f"{PREFIX}DRAIN_S={drain_s:g}; {drain_s + AFTER_DRAIN_S:g} is the least"
        )


class ByLoad:
    """An autoscaling policy: as many replicas as hold the present load at `target` of each."""

    def __init__(self, target: float = TARGET_LOAD) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"target {target}: expected more than 0 and at most 1")
        self._target = target

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas, with a fraction, and no state. Ray rounds up and applies limits and delays."""
        loads = context.aggregated_metrics.get("load")
        if not loads:  # nothing is reported yet
            return context.target_num_replicas, {}
        return sum(loads.values()) / self._target, {}


@serve.deployment
@serve.ingress()
class Speech:
    """One replica: a model on a GPU of its own."""

    async def __init__(self) -> None:
        """Load the model. Ray sends clients once this is done."""
        options = server_options(os.environ)
        configure_logging(options.log_format)
        check_ray(os.environ, options.drain_s)
        self._app = App(server_settings(options, options.port))
        self._decoder = await asyncio.to_thread(load_decoder, options, self._app.report)
        self._app.start_serving(self._decoder)
        self._tasks = {asyncio.create_task(self._exit_when_failed())}
        self._port: int | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray serves."""
        proxies = list(self._app.settings.trusted_proxies)
        app = ProxyHeadersMiddleware(self._app.asgi, proxies) if proxies else self._app.asgi

        # uvicorn takes a function for an application of ASGI 3, but not a bound method.
        async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                await self._live(receive, send)
                return
            if self._port is None:
                self._port = scope["server"][1]
                self._tasks.add(asyncio.create_task(self._drain_when_told()))
            if not proxies:
                scope["client"] = None  # it is Ray's HAProxy, which would be counted as one client
            await app(scope, receive, send)

        return asgi

    def check_health(self) -> None:
        """Raise once the engine has died, as `/health` says."""
        if self._decoder.error is not None:
            raise RuntimeError(ENGINE_STOPPED)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `ByLoad`."""
        return {"load": self._app.load}

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for task in self._tasks:
            task.cancel()
        self._decoder.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _drain_when_told(self) -> None:
        """Let turns end and close the sockets, once Ray's own health check says that the replica goes.

        Ray by itself would go on with the sockets that are open, and then cut them in mid-turn.
        """
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5)) as client:
            while not await self._is_going(client):
                await asyncio.sleep(DRAIN_POLL_S)
        await asyncio.sleep(SETTLE_S)
        await self._app.drain()

    async def _is_going(self, client: aiohttp.ClientSession) -> bool:
        try:
            async with client.get(f"http://127.0.0.1:{self._port}/-/healthz") as answer:
                return answer.status == 503 and "DRAINING" in await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("Ray's health check does not answer: %s", error or type(error).__name__)
            return False

    async def _exit_when_failed(self) -> None:
        """End the process once the engine has died, so that Ray starts another replica at once."""
        while self._decoder.error is None:
            await asyncio.sleep(FAILURE_POLL_S)
        await self._app.fail()
        os._exit(1)


def build(args: dict[str, str]) -> Application:
    """The deployment, with `min_replicas` and `max_replicas` of `serve run`; `ValueError` for others."""
    given: dict[str, int] = {}
    for name, text in args.items():
        if name not in ARGUMENTS or not str(text).isdecimal() or not int(text):
            known = ", ".join(f"{known}=N" for known in ARGUMENTS)
            raise ValueError(f"{name}={text}: expected {known} with N from 1")
        given[name] = int(text)
    options = server_options(os.environ)
    return Speech.options(
        ray_actor_options={"num_gpus": 0 if options.device == "cpu" else 1},
        # The application itself says that it is full, so that HAProxy asks another replica.
        max_ongoing_requests=(options.max_connections or MOST_FOLLOWING) + options.spare_sockets,
        autoscaling_config={
            **ARGUMENTS,
            **given,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,
            "look_back_period_s": 15,
            "policy": {"policy_function": ByLoad},
        },
    ).bind()
