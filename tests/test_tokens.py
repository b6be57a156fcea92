"""Named access tokens: each has its own account of connections and turns."""

from __future__ import annotations

import argparse
import asyncio

import pytest
from live_server import LiveServer
from session_stage import Stage
from test_admission import FREE, Caller, refusal

from qwen_megakernel.serving.access import AccessRules, find_token
from qwen_megakernel.serving.admission import Admission, AdmissionLimits, NotAdmitted
from qwen_megakernel.serving.session import Session
from qwen_megakernel.tools.serve import add_arguments, resolve

SECRETS = {"anna": "anna-secret-1", "bob": "bob-secret-22"}
FILE = "# who may speak\nanna anna-secret-1\n\nbob  bob-secret-22\n"


@pytest.fixture
def tokens_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(FILE)
    return path


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return resolve(parser.parse_args(arguments), {})


@pytest.mark.parametrize(
    ("query", "header", "name"),
    [
        (b"", (b"authorization", b"Bearer anna-secret-1"), "anna"),
        (b"", (b"x-api-key", b"bob-secret-22"), "bob"),
        (b"token=bob-secret-22", (b"host", b"localhost"), "bob"),
        (b"", (b"x-api-key", b"bob"), None),
        (b"", (b"authorization", b"Bearer anna-secret-1x"), None),
        (b"", (b"authorization", b"Basic anna-secret-1"), None),
    ],
)
def test_a_request_is_of_the_account_whose_token_it_has(query, header, name):
    assert find_token(AccessRules("0.0.0.0", SECRETS), [header], query) == name


def test_tokens_are_read_from_a_file_and_open_a_public_address(tokens_file):
    assert options("--host", "0.0.0.0", "--tokens-file", str(tokens_file)).tokens_file == SECRETS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no token"),
        ("anna short", "line 1: expected 8 to 256"),
        ("anna", "line 1: expected 8 to 256"),
        ("anna anna-secret-1\nanna other-secret", "line 2: expected NAME SECRET"),
        ("token anna-secret-1", "line 1: expected NAME SECRET"),
        ("a/b anna-secret-1", "line 1: expected NAME SECRET"),
    ],
)
def test_a_file_that_is_wrong_is_refused_without_its_secrets(tokens_file, capsys, text, said):
    tokens_file.write_text(text)
    with pytest.raises(SystemExit):
        options("--tokens-file", str(tokens_file))
    error = capsys.readouterr().err
    assert said in error
    assert "secret-1" not in error


def test_connections_of_a_token_are_counted_wherever_they_come_from():
    admission = Admission(AdmissionLimits(max_connections_per_token=2))
    anna = [Caller(address, token="anna") for address in (None, "203.0.113.7", "203.0.113.8")]
    for caller in anna[:2]:
        admission.enter(caller)
    with pytest.raises(NotAdmitted, match="this token has 2 connections") as refused:
        admission.enter(anna[2])
    assert refused.value.own_limit
    admission.enter(Caller("203.0.113.8", token="bob"))
    admission.leave(anna[0])
    admission.enter(anna[2])


def test_turns_of_a_token_are_limited():
    admission = Admission(AdmissionLimits(max_turns_per_token=3))
    anna, bob = [Caller(None, 2, "anna"), Caller(None, 1, "anna")], Caller(None, 0, "bob")
    for caller in (*anna, bob):
        admission.enter(caller)
    assert "this token has 3 turns" in str(refusal(admission, anna[0], FREE))
    assert refusal(admission, bob, FREE) is None


@pytest.mark.parametrize(
    ("address", "owner"),
    [("203.0.113.7", ("anna", "203.0.113.7", "1")), (None, ("anna", "1"))],
)
def test_the_engine_counts_turns_for_token_address_and_connection(address, owner):
    async def play():
        stage = Stage()
        stage.decoder.capacity = lambda asked: asked_for.append(asked) or FREE
        session = Session(stage.server, "1", address=address, token="anna")
        session.append("a", "Word.")
        assert [turn.options["owner"] for turn in stage.turns] == asked_for == [owner]

    asked_for = []
    asyncio.run(play())


def test_a_server_counts_each_token_for_itself(tiny_base, tokens_file):
    limits = ("--tokens-file", str(tokens_file), "--max-connections-per-token", "1")
    server = LiveServer("--model", str(tiny_base), *limits)
    try:
        server.wait_until_ready()
        assert server.get("/ready")[0] == 401
        with server.connect(additional_headers={"X-API-Key": SECRETS["anna"]}):
            assert server.get("/?token=anna-secret-1")[0] == 426  # HTTP is not a connection
            with pytest.raises(Exception, match="429"):
                server.connect("/?token=anna-secret-1").__enter__()
            with server.connect("/?token=bob-secret-22"):
                pass
        server.wait_for_line("handshake refused with 429: this token has 1 connections already")
        assert "secret" not in "".join(server.err)
    finally:
        server.kill()
