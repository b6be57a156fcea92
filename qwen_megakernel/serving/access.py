"""Who may talk to the server: Host, Origin and token, as pure functions of a request's headers.

A port on 127.0.0.1 is not private. Any web page that the user opens may connect a WebSocket to it,
because the same-origin policy does not cover WebSockets. A page whose name is re-pointed to
127.0.0.1 (DNS rebinding) even counts as its own origin. So Host and Origin are checked, with a token
or without.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

Headers = Iterable[tuple[bytes, bytes]]
"""Headers as ASGI gives them: the names are lower-case."""
_SCHEMES = (b"bearer", b"token")
"""Schemes in `Authorization` and `Sec-WebSocket-Protocol`. Deepgram's clients send Token."""
_TOKEN_MARKS = {b"authorization": b" ", b"sec-websocket-protocol": b","}
"""Headers that hold a scheme and a token, and the separator between the two. A page cannot set the
headers of a WebSocket, so it sends the token as a protocol."""
_KEY_HEADERS = (b"x-api-key", b"xi-api-key")
"""Headers that hold the token alone. The second is ElevenLabs'."""
_QUERY_NAMES = ("token", "api_key", "access_token")
"""Fields of a query that may hold the token. The last two are Cartesia's."""
_QUERY_MARK = "authorization"
"""A field of a query that holds what the header of this name would: ElevenLabs'."""


@dataclass(frozen=True, slots=True)
class AccessRules:
    """The access that the command line allows."""

    host: str
    """The address on which the server listens."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Secrets by the names of their accounts. If there are none, nobody needs a token."""
    allow_origins: frozenset[str] = frozenset()
    """Lower-case `scheme://host[:port]`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The HTTP answer to a request that may not pass."""

    status: int
    message: str


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def client_address(peer: tuple[str, int] | None) -> str | None:
    """The address that a client counts under, from the address and the port of its socket.

    It is an IPv4 address, or the first 64 bits of an IPv6 one, which is what a single customer has.
    It is None for this machine: clients behind a local proxy or tunnel all have its address.
    """
    if peer is None or is_loopback(peer[0]):
        return None
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
    except ValueError:
        return peer[0]
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return client_address((str(address.ipv4_mapped), peer[1]))
    return str(ipaddress.ip_network((address, 64), strict=False))


def check_access(
    rules: AccessRules, path: str, headers: Headers, query: bytes, *, kind: str = "websocket"
) -> Refusal | None:
    """None if the request may pass; `kind` is ASGI's type, `http` or `websocket`.

    `/health` and the files of the page need no token.
    """
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value)
    host = b"".join(values.get(b"host", [])).decode("latin-1").lower()
    if is_loopback(rules.host) and not _is_local_name(host):
        return Refusal(403, "this Host is not served here; connect to localhost or 127.0.0.1")
    for origin in values.get(b"origin", []):
        if not _is_origin_allowed(rules, origin.decode("latin-1").lower(), host):
            return Refusal(403, "this Origin is not allowed; the server's --allow-origin permits one")
    if not rules.tokens or _is_open(path, kind) or find_token(rules, headers, query) is not None:
        return None
    return Refusal(401, "token missing or wrong; send it as Authorization: Bearer or X-API-Key")


def find_token(rules: AccessRules, headers: Headers, query: bytes) -> str | None:
    """The name of the account whose token the request carries; None without a valid token."""
    fields = parse_qs(query.decode("latin-1"))
    offered = [value.encode() for name in _QUERY_NAMES for value in fields.get(name, [])]
    headers = [*headers, *((_QUERY_MARK.encode(), v.encode()) for v in fields.get(_QUERY_MARK, []))]
    for name, value in headers:
        if name in _KEY_HEADERS:
            offered.append(value)
        elif (mark := _TOKEN_MARKS.get(name)) is not None:
            scheme, _, credentials = value.partition(mark)
            if scheme.strip().lower() in _SCHEMES:
                offered.append(credentials.strip())
    for account, token in rules.tokens.items():
        if any(hmac.compare_digest(token.encode(), value) for value in offered):
            return account
    return None


def _is_open(path: str, kind: str) -> bool:
    is_page = kind == "http" and (path == "/" or path.startswith("/page/"))
    return is_page or path == "/health"


def _is_local_name(host: str) -> bool:
    # Any port: behind `ssh -L 9000:127.0.0.1:8765` the client rightly says 127.0.0.1:9000.
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name is not None and is_loopback(name)


def _is_origin_allowed(rules: AccessRules, origin: str, host: str) -> bool:
    if origin in rules.allow_origins:
        return True
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc == host != ""
