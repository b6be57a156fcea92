"""Values of options, as the command line and the environment give them.

Each function reads one value. What it raises, a `ValueError`, says what is allowed.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable
from pathlib import Path

from qwen_megakernel.serving.lexicon import read_lexicons
from qwen_megakernel.serving.openai_messages import VOICE_NAMES

MAX_REFERENCE_BYTES = 20 << 20
TOKEN_NAME = "token"
"""The name of the account of `--token`."""


def port(text: str) -> int:
    """A port, 0 to 65535."""
    if not text.isdecimal() or int(text) > 65_535:
        raise ValueError("expected a port, 0 to 65535 (0 takes a free one)")
    return int(text)


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise ValueError("expected a whole number, 1 to 1000000")
    return int(text)


def size(text: str) -> int:
    """A number of bytes, from text such as `5.6GB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", text)
    if match is None or not float(match[1]):
        raise ValueError("expected a size, such as 5.6GB or 800MB")
    return int(float(match[1]) * {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}[match[2]])


def limit(text: str) -> int:
    """A whole number; 0 is no limit."""
    return 0 if text == "0" else count(text)


def seconds(text: str) -> float:
    """Seconds, 0 to 3600."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 3600.0:  # NaN fails too
        raise ValueError("expected seconds, 0 to 3600")
    return value


def seconds_from(least: float) -> Callable[[str], float]:
    """Reads seconds, `least` to 3600."""

    def parse(text: str) -> float:
        if seconds(text) < least:
            raise ValueError(f"expected seconds, {least:g} to 3600")
        return float(text)

    return parse


def flag(text: str) -> bool:
    """Whether something is switched on."""
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
    if text.lower() not in known:
        raise ValueError("expected 1 or 0")
    return known[text.lower()]


def token(text: str) -> str:
    """A secret."""
    if not re.fullmatch(r"[!-~]{8,256}", text):
        raise ValueError("expected 8 to 256 visible ASCII characters")
    return text


def tokens_file(text: str) -> dict[str, str]:
    """Secrets by account, from a file with a line `NAME SECRET` for each."""
    tokens: dict[str, str] = {}
    for number, line in enumerate(readable_file(text).read_text("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, secret = line.strip().partition(" ")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or name in (*tokens, TOKEN_NAME):
            raise ValueError(f"{text} line {number}: expected NAME SECRET with a name of its own")
        try:
            tokens[name] = token(secret.strip())
        except ValueError as error:
            raise ValueError(f"{text} line {number}: {error}") from None
    if not tokens:
        raise ValueError(f"{text}: has no token")
    return tokens


def lexicons(text: str) -> dict[str | None, dict[str, str]]:
    """Words and respellings by voice, from a file."""
    return read_lexicons(readable_file(text).read_bytes(), text)


def origin(text: str) -> str:
    """An origin, in lower case."""
    if not re.fullmatch(r"https?://[^/\s?#@*]+", text):
        raise ValueError("expected one origin, such as https://app.example.org or http://localhost:3000")
    return text.lower()


def openai_voice(text: str) -> tuple[str, str]:
    """A voice's name at OpenAI, and the name of this server's voice."""
    name, _, voice = text.partition("=")
    if name not in VOICE_NAMES or not voice:
        raise ValueError(f"expected NAME=VOICE with a NAME of {', '.join(VOICE_NAMES)}")
    return name, voice


def network(text: str) -> str:
    """An address, or a network of them."""
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        raise ValueError("expected an address or a network, such as 10.0.0.7 or 10.0.0.0/8") from None


def readable_file(text: str) -> Path:
    """A file that can be read, and is not too large."""
    path = Path(text)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise ValueError(f"{text}: not a file that can be read")
    if path.stat().st_size > MAX_REFERENCE_BYTES:
        raise ValueError(f"{text}: larger than {MAX_REFERENCE_BYTES >> 20} MiB")
    return path


def folder(text: str) -> Path:
    """A folder that exists."""
    path = Path(text)
    if not path.is_dir():
        raise ValueError(f"{text}: not a folder")
    return path


def device(text: str) -> str:
    """A device of torch, or `auto`."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise ValueError("expected auto, cpu, cuda or cuda:N")
    return text


def some_text(text: str) -> str:
    """Text that is not blank."""
    if not text.strip():
        raise ValueError("expected some text")
    return text


def choice(*names: str) -> Callable[[str], str]:
    """Reads one of these names."""

    def convert(text: str) -> str:
        if text not in names:
            raise ValueError(f"expected {' or '.join(names)}")
        return text

    return convert
