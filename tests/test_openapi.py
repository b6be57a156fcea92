"""The HTTP routes, described for machines and for people."""

import asyncio
import re

import httpx
import pytest
from starlette.routing import Route

from qwen_megakernel.serving.app import App, ServerSettings
from qwen_megakernel.serving.openapi import ServerFacts, describe

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE")


@pytest.fixture(scope="module")
def routes():
    """The routes of a server that has not loaded a model."""
    gate = App(ServerSettings(tokens={"t": "t"})).asgi
    return gate._app.routes


def test_every_route_is_described_and_nothing_else(routes):
    served = {
        (route.path, method.lower())
        for route in routes
        if isinstance(route, Route)
        for method in route.methods - {"HEAD"}
    }
    paths = describe(routes, ServerFacts(4096, has_token=True))["paths"]
    assert {(path, method) for path, methods in paths.items() for method in methods} == served
    undescribed = [
        path for path, methods in paths.items() for each in methods.values() if not each["summary"]
    ]
    assert undescribed == []


def test_a_405_names_all_methods_of_its_path(routes):
    described = describe(routes, ServerFacts(4096, has_token=True))["paths"]
    allowed = {path: {method.upper() for method in methods} for path, methods in described.items()}
    allowed = {path: names | ({"HEAD"} if "GET" in names else set()) for path, names in allowed.items()}
    wanted = {(path, method) for path in allowed for method in METHODS if method not in allowed[path]}

    async def ask_all():
        transport = httpx.ASGITransport(App(ServerSettings()).asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return {
                (path, method): await client.request(method, re.sub(r"{\w+}", "a", path))
                for path, method in wanted
            }

    for (path, method), answer in asyncio.run(ask_all()).items():
        named = (answer.status_code, answer.headers.get("Allow"))
        assert named == (405, ", ".join(sorted(allowed[path]))), (path, method)


def test_limits_and_token_are_this_servers(routes):
    short = describe(routes, ServerFacts(50, has_token=False))
    speech = short["paths"]["/v1/audio/speech"]["post"]["requestBody"]["content"]
    assert speech["application/json"]["schema"]["properties"]["input"]["maxLength"] == 50
    assert "security" not in short


def test_a_voice_is_added_with_a_form(routes):
    post = describe(routes, ServerFacts(4096, has_token=True))["paths"]["/v1/audio/voices"]["post"]
    form = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"name", "recording", "consent", "transcript", "description"}
    assert {"201", "429", "500"} <= set(post["responses"])
    assert "200" not in post["responses"]


def test_a_server_serves_both(live_server):
    status, page = live_server.get("/docs")
    assert status == 200
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)  # nothing from other hosts
    assert "<script" not in page
    for path in ("/v1/audio/speech", "/tts/bytes", "/v1/speak", "/voices/{voice}", "/v2/voices"):
        assert f"POST {path}" in page or f"GET {path}" in page
    assert '"openapi":"3.1.0"' in live_server.get("/openapi.json")[1]
