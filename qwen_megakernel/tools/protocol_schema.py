"""`python -m qwen_megakernel protocol-schema`: JSON Schema of the native protocol's text messages.

`serving.native_messages` declares the messages. docs/protocol.schema.json is this command's output.
"""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from qwen_megakernel.serving.message_rules import object_schema
from qwen_megakernel.serving.native_messages import CLIENT_TYPES, PROTOCOL, SERVER_TYPES

DESCRIPTION = (
    "Text messages of the WebSocket; audio is binary (see PROTOCOL.md). The server refuses a field that "
    "it does not know. A later server may add fields, which a client passes over."
)


def message_schema(name: str, cls: type) -> dict[str, Any]:
    """JSON Schema of one message.

    Args:
        name: its `type` on the wire.
        cls: its dataclass.
    """
    schema = object_schema(cls)
    schema["properties"] = {"type": {"const": name}, **schema["properties"]}
    schema["required"] = ["type", *schema["required"]]
    if name in CLIENT_TYPES:
        schema["additionalProperties"] = False
    return {"description": inspect.getdoc(cls), **schema}


def protocol_schema() -> dict[str, Any]:
    """The whole schema: any message, the messages of each side, and each message by its `type`."""
    sides = {"client_message": CLIENT_TYPES, "server_message": SERVER_TYPES}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Native protocol, version {PROTOCOL}",
        "description": DESCRIPTION,
        "oneOf": [{"$ref": f"#/$defs/{side}"} for side in sides],
        "$defs": {
            **{
                side: {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in types]}
                for side, types in sides.items()
            },
            **{
                name: message_schema(name, cls)
                for types in sides.values()
                for name, cls in types.items()
            },
        },
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`python -m qwen_megakernel protocol-schema` has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the schema."""
    print(json.dumps(protocol_schema(), indent=2))
    return 0
