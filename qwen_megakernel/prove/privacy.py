"""Keeps paths, host names, user names and secrets out of a report."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "QWEN_MEGAKERNEL_TOKEN")
_MIN_LENGTH = 4
"""The fewest characters of a name that is replaced. Shorter names occur in ordinary words."""
_SOUND = "mp3"
"""Key of a clip's sound, which is data and not text."""


def secrets(*folders: Path) -> dict[str, str]:
    """Texts to hide and their replacements, the longest first."""
    found = {str(folder.resolve()): folder.name for folder in folders}
    found |= {str(folder): folder.name for folder in folders if folder.is_absolute()}
    found |= {str(Path.cwd()): ".", str(Path.home()): "~"}
    found |= {os.environ[name]: "(token)" for name in _TOKENS if os.environ.get(name)}
    names = {socket.gethostname(): "(host)", socket.getfqdn(): "(host)"}
    with_user = f"/home/{getpass.getuser()}"
    found |= {name: word for name, word in names.items() if name not in ("localhost", "")}
    found[with_user] = "~"
    usable = {text: word for text, word in found.items() if len(text) >= _MIN_LENGTH}
    return dict(sorted(usable.items(), key=lambda pair: -len(pair[0])))


def scrubbed(value: Any, hidden: Mapping[str, str]) -> Any:
    """JSON values without any of the hidden texts; sound is left as it is."""
    if isinstance(value, str):
        for text, word in hidden.items():
            value = value.replace(text, word)
        return value
    if isinstance(value, Mapping):
        return {k: v if k == _SOUND else scrubbed(v, hidden) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(one, hidden) for one in value]
    return value


def without_sound(value: Any) -> Any:
    """JSON values without the clips' data."""
    if isinstance(value, Mapping):
        return {k: without_sound(v) for k, v in value.items() if k != _SOUND}
    return [without_sound(one) for one in value] if isinstance(value, list) else value
