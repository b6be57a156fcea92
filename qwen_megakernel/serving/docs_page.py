"""`/openapi.json` and `/docs` describe the HTTP routes. The page loads nothing from other hosts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from qwen_megakernel.serving.openapi import ServerFacts, describe

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; }
pre { overflow-x: auto; padding: 0.6rem; border: 1px solid #8886; border-radius: 4px; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid #8884; padding: 0.25rem 0.5rem; }
td, th { text-align: left; vertical-align: top; }
summary { cursor: pointer; }
"""


def routes(served: Callable[[], Sequence[BaseRoute]], facts: ServerFacts) -> list[BaseRoute]:
    """The two routes. `served` gives all routes of the server."""

    async def description(request: Request) -> Response:
        return JSONResponse(describe(served(), facts))

    async def page(request: Request) -> Response:
        html = _page(describe(served(), facts))
        return HTMLResponse(html, headers={"Content-Security-Policy": _POLICY})

    return [Route("/openapi.json", description), Route("/docs", page)]


def _page(description: dict[str, Any]) -> str:
    title = f"{description['info']['title']} {description['info']['version']}"
    sections = [
        _section(path, method, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        "<meta name=viewport content='width=device-width'>"
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>"
        "<p>HTTP routes. <a href=openapi.json>openapi.json</a> is the same for machines. "
        "The WebSockets are described in docs/PROTOCOL.md.</p>" + "".join(sections) + "</html>"
    )


def _section(path: str, method: str, operation: dict[str, Any]) -> str:
    fields = [(p["name"], p["in"], p["schema"], p["required"]) for p in operation.get("parameters", [])]
    for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
        schema = body["schema"]
        where = "body" if media_type == "application/json" else media_type
        for name, field in schema["properties"].items():
            fields.append((name, where, field, name in schema["required"]))
    responses = "".join(
        f"<tr><td>{status}<td>{escape(response['description'])}"
        for status, response in sorted(operation["responses"].items())
    )
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>"
        + _table(fields)
        + f"<details><summary>Answers</summary><table>{responses}</table></details>"
    )


def _table(fields: Sequence[tuple[str, str, dict[str, Any], bool]]) -> str:
    if not fields:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' *' if required else ''}<td>{where}"
        f"<td><code>{escape(json.dumps(schema, ensure_ascii=False))}</code>"
        for name, where, schema, required in fields
    )
    return f"<table><tr><th>Field<th>In<th>Schema{rows}</table><p>* required</p>"
