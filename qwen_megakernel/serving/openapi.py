"""The HTTP routes in OpenAPI 3.1, and the same description as a page.

A route that has no description here is listed with its path and methods only. OpenAPI has no
WebSockets: docs/PROTOCOL.md describes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.routing import BaseRoute, Route

from qwen_megakernel import __version__
from qwen_megakernel.serving import (
    cartesia_messages,
    deepgram_messages,
    elevenlabs_messages,
    openai_messages,
    voice_messages,
)
from qwen_megakernel.serving.message_rules import LEXICON, SPEED, or_none

Schema = dict[str, Any]
_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}]
_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": (
            "X-API-Key: TOKEN, xi-api-key: TOKEN, Authorization: Token TOKEN and ?token=TOKEN "
            "do the same."
        ),
    }
}
_STATUSES = {
    "400": "A field is wrong, or cannot be served.",
    "401": "The token is missing or wrong.",
    "403": "It is the operator's, or the server keeps no voices.",
    "404": "There is no such thing.",
    "405": "The path has no such method.",
    "409": "The name is taken, or there are too many.",
    "413": "The body is too long.",
    "426": "This is a WebSocket.",
    "429": "This address has enough connections. Retry-After says when to come back.",
    "500": "The engine has failed.",
    "503": "The server is loading, draining or full. Retry-After says when to come back.",
    "507": "The folder cannot be written.",
}
_ANYWHERE = ("401", "405")
_WHILE_READY = ("503",)
_SPEAKING = ("400", "413", "429", "500", "503")


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The facts on which the description depends."""

    max_text_chars: int
    has_token: bool


def describe(routes: Iterable[BaseRoute], facts: ServerFacts) -> Schema:
    """The OpenAPI description of the HTTP routes among `routes`."""
    known = _operations(facts)
    paths: dict[str, Schema] = {}
    for route in routes:
        if isinstance(route, Route):
            for method in sorted((route.methods or {"GET"}) - {"HEAD"}):
                key = (route.path, method)
                operation = known.get(key) or _UNDESCRIBED
                paths.setdefault(route.path, {})[method.lower()] = operation
    description: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "qwen-megakernel", "version": __version__},
        "paths": paths,
    }
    if facts.has_token:
        description["components"] = {"securitySchemes": _SCHEMES}
        description["security"] = _SECURITY
    return description


def _operations(facts: ServerFacts) -> dict[tuple[str, str], Schema]:
    """The descriptions by path and method."""
    openai_error = _object({"error": _object({"message": _STRING, "type": _STRING})})
    cartesia_error = _object({"title": _STRING, "message": _STRING, "error_code": _STRING})
    deepgram_error = _object({"err_code": _STRING, "err_msg": _STRING})
    elevenlabs_error = _object({"detail": _object({"status": _STRING, "message": _STRING})})
    speech = _object(_openai_fields(facts), required=["input"])
    bytes_request = _object(_cartesia_fields(facts), required=["transcript"])
    text = _object({"text": _text(facts)}, required=["text"])
    model, voice = _object({"id": _STRING}), _object({"id": _STRING, "name": _STRING})
    voice_path = [_parameter("voice", "path", {"type": "string", "minLength": 1})]
    name_path = [_parameter("name", "path", {"type": "string", "minLength": 1})]
    one_voice = openai_messages.VOICES_PATH + "/{name}"
    spoken = elevenlabs_messages.SPEECH_PATH + "/{voice}"
    named = _object({"voice_id": _STRING, "name": _STRING})
    elevenlabs_speech = _operation(
        "ElevenLabs: speak a text", None, _SPEAKING, elevenlabs_error,
        body=_object(_elevenlabs_fields(facts), required=["text"]),
        parameters=[*voice_path, *_elevenlabs_query()],
    )  # fmt: skip
    health = _operation("Whether the process can work", _STATE, ("500", "503"))
    new_voice = _operation(
        "Add a voice", voice, ("403", "409", "507", *_SPEAKING), openai_error,
        body=_new_voice(), media_type="multipart/form-data", done="201",
    )  # fmt: skip
    page = _operation("A page for people with a browser", None, ("426",))
    page["responses"]["426"]["content"] = {"text/plain": {}}
    page_file = _operation("A file of the page", None, ("404",), parameters=name_path)
    for operation in (health, page, page_file):  # they need no token
        operation["security"] = []
        del operation["responses"]["401"]
    return {
        ("/health", "GET"): health,
        ("/ready", "GET"): _operation("The phase, and what is served", _STATE, _WHILE_READY),
        ("/metrics", "GET"): _operation("Prometheus metrics", None),
        (openai_messages.SPEECH_PATH, "POST"): _operation(
            "OpenAI: speak a text", None, _SPEAKING, openai_error, body=speech
        ),
        (openai_messages.VOICES_PATH, "GET"): _operation(
            "Voices", _object({"voices": _array(voice)}), _WHILE_READY, openai_error
        ),
        (openai_messages.VOICES_PATH, "POST"): new_voice,
        (one_voice, "GET"): _operation(
            "A voice", voice, ("404", *_WHILE_READY), openai_error, parameters=name_path
        ),
        (one_voice, "DELETE"): _operation(
            "Delete a voice that a client added", _object({"id": _STRING}),
            ("403", "404", *_WHILE_READY), openai_error, parameters=name_path,
        ),
        (one_voice + "/preview", "POST"): _operation(
            "A sentence that a voice speaks, as a WAV file", None, ("404", *_SPEAKING), openai_error,
            parameters=name_path,
        ),
        (openai_messages.MODELS_PATH, "GET"): _operation(
            "OpenAI: models", _object({"data": _array(model)}), _WHILE_READY, openai_error
        ),
        (openai_messages.AUDIO_MODELS_PATH, "GET"): _operation(
            "Models, for Open WebUI", _object({"models": _array(voice)}), _WHILE_READY, openai_error
        ),
        (cartesia_messages.BYTES_PATH, "POST"): _operation(
            "Cartesia: speak a text", None, _SPEAKING, cartesia_error, body=bytes_request
        ),
        (cartesia_messages.VOICES_PATH, "GET"): _operation(
            "Cartesia: voices", _object({"data": _array(voice), "has_more": {"type": "boolean"}}),
            ("400", *_WHILE_READY), cartesia_error, parameters=_cartesia_page(),
        ),
        (cartesia_messages.VOICES_PATH + "/{voice}", "GET"): _operation(
            "Cartesia: a voice", voice, ("404", *_WHILE_READY), cartesia_error, parameters=voice_path
        ),
        (deepgram_messages.PATH, "POST"): _operation(
            "Deepgram: speak a text", None, _SPEAKING, deepgram_error, body=text,
            parameters=_deepgram_query(),
        ),
        (spoken, "POST"): elevenlabs_speech,
        (spoken + "/stream", "POST"): elevenlabs_speech,
        (spoken + "/stream/with-timestamps", "POST"): elevenlabs_speech
        | {"summary": "ElevenLabs: speak a text, as lines of JSON with the times of its characters"},
        (elevenlabs_messages.VOICES_PATH, "GET"): _operation(
            "ElevenLabs: voices", _object({"voices": _array(named)}), _WHILE_READY, elevenlabs_error
        ),
        (elevenlabs_messages.VOICES_PATH + "/{voice}", "GET"): _operation(
            "ElevenLabs: a voice", named, ("404", *_WHILE_READY), elevenlabs_error, parameters=voice_path
        ),
        (elevenlabs_messages.VOICE_PAGES_PATH, "GET"): _operation(
            "ElevenLabs: voices, in pages",
            _object({"voices": _array(named), "has_more": {"type": "boolean"}}),
            ("400", *_WHILE_READY), elevenlabs_error, parameters=_elevenlabs_page(),
        ),
        ("/", "GET"): page,
        ("/page/{name}", "GET"): page_file,
        ("/openapi.json", "GET"): _operation("This description", _object({"openapi": _STRING})),
        ("/docs", "GET"): _operation("This description, as a page", None),
    }  # fmt: skip


def _operation(
    summary: str,
    answer: Schema | None = None,
    statuses: Sequence[str] = (),
    error: Schema | None = None,
    *,
    body: Schema | None = None,
    media_type: str = "application/json",
    parameters: Sequence[Schema] = (),
    done: str = "200",
) -> Schema:
    """One operation. `answer` is a JSON answer, None another one. `media_type` is the body's, `done` the
    description of success."""
    content = {"*/*": {}} if answer is None else {"application/json": {"schema": answer}}
    responses: Schema = {done: {"description": "It is done.", "content": content}}
    for status in (*_ANYWHERE, *statuses):
        refusal = {"application/json": {"schema": error or _object({})}}
        responses[status] = {"description": _STATUSES[status], "content": refusal}
    operation: Schema = {"summary": summary, "responses": responses}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {media_type: {"schema": body}}}
    if parameters:
        operation["parameters"] = list(parameters)
    return operation


_UNDESCRIBED: Schema = {
    "summary": "",
    "responses": {"default": {"description": "See docs/PROTOCOL.md."}},
}

# --- what requests hold ------------------------------------------------------------------------

_STRING: Schema = {"type": "string"}
_STATE: Schema = {"type": "object"}
_SEED: Schema = {"type": ["integer", "null"], "minimum": 0, "maximum": 2**64 - 1}
_MAYBE_STRING: Schema = {"type": ["string", "null"]}


def _object(properties: dict[str, Schema], required: Sequence[str] | None = None) -> Schema:
    """A JSON object. All fields are required if `required` is None."""
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _choice(values: Iterable[Any], default: Any = None) -> Schema:
    schema: Schema = {"enum": [*values, None]}
    return schema if default is None else {**schema, "default": default}


def _text(facts: ServerFacts) -> Schema:
    return {"type": "string", "pattern": "[^\\s]", "minLength": 1, "maxLength": facts.max_text_chars}


def _openai_fields(facts: ServerFacts) -> dict[str, Schema]:
    longest = openai_messages.MAX_INSTRUCTIONS_CHARS
    voice = {"type": "object", "properties": {"id": _STRING}, "required": ["id"]}
    return {
        "input": _text(facts),
        "model": _MAYBE_STRING,
        "voice": {"anyOf": [_MAYBE_STRING, voice]},
        "instructions": {**_MAYBE_STRING, "maxLength": longest},
        "response_format": _choice(openai_messages.RESPONSE_FORMATS, "mp3"),
        "stream_format": _choice(openai_messages.STREAM_FORMATS, "audio"),
        "speed": or_none(SPEED).schema,
        "language": _MAYBE_STRING,
        "seed": _SEED,
        "trim_leading_silence": {"type": ["boolean", "null"]},
        "markup": {"type": ["boolean", "null"]},
        "lexicon": or_none(LEXICON).schema,
    }


def _cartesia_fields(facts: ServerFacts) -> dict[str, Schema]:
    output = {
        "type": ["object", "null"],
        "properties": {
            "container": _choice(["raw", "wav", "mp3"], "raw"),
            "encoding": _choice(cartesia_messages.ENCODINGS, "pcm_s16le"),
            "sample_rate": _choice(cartesia_messages.SAMPLE_RATES, 24_000),
            "bit_rate": _choice(cartesia_messages.BIT_RATES),
        },
    }
    voice = {"type": "object", "properties": {"id": _MAYBE_STRING, "mode": {"const": "id"}}}
    return {
        "transcript": _text(facts),
        "voice": {"anyOf": [_MAYBE_STRING, voice]},
        "output_format": output,
        "model_id": _MAYBE_STRING,
        "language": _MAYBE_STRING,
        "seed": _SEED,
    }


def _new_voice() -> Schema:
    """A form with a recording or with a description."""
    consent = {"type": "string", "minLength": 1, "maxLength": voice_messages.MAX_CONSENT_CHARS}
    fields: dict[str, Schema] = {
        "name": {"type": "string", "pattern": f"^{voice_messages.NAME.pattern}$"},
        "recording": {"type": "string", "format": "binary"},
        "consent": consent,
        "transcript": _STRING,
        "description": {"type": "string", "minLength": 1},
    }
    recorded, described = ["name", "recording", "consent"], ["name", "description"]
    return {
        **_object(fields, required=["name"]),
        "anyOf": [{"required": recorded}, {"required": described}],
    }


def _cartesia_page() -> list[Schema]:
    limit = {"type": "integer", "minimum": 1, "maximum": cartesia_messages.MAX_PAGE}
    strings = [_parameter(name, "query", _STRING) for name in ("starting_after", "ending_before", "q")]
    return [_parameter("limit", "query", limit), *strings]


def _deepgram_query() -> list[Schema]:
    encodings = deepgram_messages.ENCODINGS
    rates = sorted({rate for each in encodings.values() for rate in each.sample_rates})
    containers = sorted({name for each in encodings.values() for name in each.containers})
    low, high = 4_000, 256_000
    fields: dict[str, Schema] = {
        "model": _STRING,
        "encoding": {"enum": list(encodings), "default": "mp3"},
        "container": {"enum": containers},
        "sample_rate": {"enum": rates},
        "bit_rate": {"type": "integer", "minimum": low, "maximum": high},
        "language": _STRING,
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    }
    return [_parameter(name, "query", schema) for name, schema in fields.items()]


def _elevenlabs_fields(facts: ServerFacts) -> dict[str, Schema]:
    settings = {
        "type": ["object", "null"],
        "properties": {"speed": or_none(SPEED).schema},
    }
    return {
        "text": _text(facts),
        "model_id": _MAYBE_STRING,
        "language_code": _MAYBE_STRING,
        "voice_settings": settings,
        "seed": _SEED,
    }


def _elevenlabs_query() -> list[Schema]:
    formats = list(elevenlabs_messages.OUTPUT_FORMATS)
    fields: dict[str, Schema] = {
        "output_format": {"enum": formats, "default": elevenlabs_messages.DEFAULT_FORMAT},
        "enable_ssml_parsing": {"type": "boolean"},
    }
    return [_parameter(name, "query", schema) for name, schema in fields.items()]


def _elevenlabs_page() -> list[Schema]:
    size = {"type": "integer", "minimum": 1, "maximum": elevenlabs_messages.MAX_PAGE}
    strings = [_parameter(name, "query", _STRING) for name in ("next_page_token", "search")]
    return [_parameter("page_size", "query", size), *strings]


def _parameter(name: str, where: str, schema: Schema) -> Schema:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}
