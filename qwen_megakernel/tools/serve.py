"""`python -m qwen_megakernel serve`, and `python server.py`: the server."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_megakernel.config import SAMPLINGS
from qwen_megakernel.installation.build_environment import ARCH_VARIABLE, PREBUILT_VARIABLE
from qwen_megakernel.serving.access import is_loopback
from qwen_megakernel.serving.app import Phase, ServerSettings
from qwen_megakernel.serving.observe import configure_logging, log
from qwen_megakernel.serving.process import Report, bind
from qwen_megakernel.serving.process import run as serve
from qwen_megakernel.tools import option_values as values
from qwen_megakernel.tools.banner import banner, show, time_spent

if TYPE_CHECKING:
    from qwen_megakernel.tts_model import TTSDecoder

_STARTED = time.monotonic()
PREFIX = "QWEN_MEGAKERNEL_"
OTHER_VARIABLES = {f"{PREFIX}CACHE", ARCH_VARIABLE, PREBUILT_VARIABLE}
"""Variables that other modules read."""
BACKENDS = ("auto", "torch", "megakernel")
DTYPES = ("auto", "bf16", "fp32")

EXAMPLE = f"""\
Every option has a variable of the same name, as shown in [brackets]; the command line wins.
--allow-origin, --trusted-proxy and --openai-voice take several, separated by commas in their
variables.

example:
  {PREFIX}TOKEN=$(openssl rand -hex 16) %(prog)s --speaker-ref me.wav --port 9000
"""


@dataclass(frozen=True)
class Option:
    """One option: its flag, its variable `QWEN_MEGAKERNEL_...`, its check."""

    flag: str
    default: Any
    convert: Callable[[str], Any]
    help: str
    metavar: str
    repeatable: bool = False

    @property
    def name(self) -> str:
        """The option's attribute of the parsed arguments."""
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def variable(self) -> str:
        """The option's environment variable."""
        return PREFIX + self.name.upper()


MODEL_OPTIONS = (
    Option(
        "--model",
        "Qwen/Qwen3-TTS-12Hz-0.6B-Base",
        values.some_text,
        "checkpoint on disk or Hugging Face",
        "NAME",
    ),
    Option("--revision", None, values.some_text, "commit, tag or branch of the repository", "NAME"),
    Option("--offline", False, values.flag, "never download", ""),
    Option("--backend", "auto", values.choice(*BACKENDS), " or ".join(BACKENDS), "NAME"),
    Option("--device", "auto", values.device, "auto, cpu, cuda or cuda:N", "NAME"),
    Option("--dtype", "auto", values.choice(*DTYPES), " or ".join(DTYPES), "NAME"),
    Option(
        "--sampling",
        "original",
        values.choice(*SAMPLINGS),
        "how codes are drawn where a client chooses nothing: original (temperature 0.3, top-k 15) or "
        "checkpoint (its generation_config.json; the released ones say 0.9 and 50)",
        "NAME",
    ),
    Option(
        "--text-cleaning", "on", values.choice("on", "off"), "leave out what cannot be spoken", "NAME"
    ),
    Option(
        "--num-slots",
        None,
        values.count,
        "turns that may speak at a time; default: as many as fit into --memory, on a CPU 16",
        "N",
    ),
    Option(
        "--memory",
        None,
        values.size,
        "for keys, values and the codec's state of all turns; default: 5.8GB",
        "SIZE",
    ),
    Option(
        "--sms",
        None,
        values.count,
        "streaming multiprocessors that a frame takes, where others share the GPU; default: all",
        "N",
    ),
    Option(
        "--keep-warm",
        False,
        values.flag,
        "decode a frame twice a second while nobody speaks, so that the GPU keeps its clocks up",
        "",
    ),
    Option(
        "--unload-after",
        None,
        values.seconds_from(0.1),
        "seconds without a turn after which the model leaves the GPU; the next turn loads it again; "
        "default: never",
        "SECONDS",
    ),
)
VOICE_OPTIONS = (
    Option(
        "--speaker-ref", None, values.readable_file, "recording to clone as the voice 'default'", "PATH"
    ),
    Option(
        "--speaker-ref-text",
        None,
        values.some_text,
        "what is said in it (closer clone, in-context)",
        "TEXT",
    ),
    Option("--voices", None, values.folder, "folder of saved voices; clients may add some", "DIR"),
    Option(
        "--openai-voice",
        (),
        values.openai_voice,
        "voice that speaks for a voice of OpenAI, such as alloy=anna; the default voice speaks for "
        "the others",
        "NAME=VOICE",
        repeatable=True,
    ),
)
SERVER_OPTIONS = (
    Option(
        "--host",
        "127.0.0.1",
        values.some_text,
        "address to listen on; a public one needs --token",
        "ADDRESS",
    ),
    Option("--port", 8765, values.port, "port to listen on; 0 takes a free one", "N"),
    Option(
        "--token", None, values.token, "secret that clients must send; better in its variable", "SECRET"
    ),
    Option("--tokens-file", {}, values.tokens_file, "more of them, one a line: NAME SECRET", "PATH"),
    Option(
        "--allow-origin",
        (),
        values.origin,
        "origin of web pages that may connect",
        "URL",
        repeatable=True,
    ),
    Option(
        "--max-connections",
        None,
        values.count,
        "connections at the same time; default: twice the slots, at least 64",
        "N",
    ),
    Option(
        "--spare-sockets", 256, values.count, "sockets beyond that, for HTTP and open handshakes", "N"
    ),
    Option(
        "--request-timeout-s",
        10.0,
        values.seconds_from(0.1),
        "seconds until a request is complete",
        "SECONDS",
    ),
    Option("--max-connections-per-address", 32, values.count, "of them from one address", "N"),
    Option("--max-turns-per-address", 32, values.count, "turns of one address that wait or speak", "N"),
    Option("--max-connections-per-token", 0, values.limit, "of them with one token; 0 is no limit", "N"),
    Option("--max-turns-per-token", 0, values.limit, "turns of one token; 0 is no limit", "N"),
    Option(
        "--trusted-proxy",
        (),
        values.network,
        "proxy whose X-Forwarded-For names the client",
        "ADDRESS",
        repeatable=True,
    ),
    Option("--max-queue-s", 10.0, values.seconds, "seconds that a turn may wait for a slot", "SECONDS"),
    Option(
        "--max-lead-s",
        30.0,
        values.seconds_from(0.5),
        "seconds by which audio on a socket may be ahead of its playback; most dialects allow up to 10",
        "SECONDS",
    ),
    Option(
        "--max-messages-per-s", 500, values.count, "messages of a connection; twice as many at once", "N"
    ),
    Option(
        "--idle-s", 600.0, values.seconds, "silence that closes a connection; 0 is no limit", "SECONDS"
    ),
    Option("--max-text-chars", 4096, values.count, "characters of one turn's text", "N"),
    Option(
        "--trim-leading-silence",
        False,
        values.flag,
        "leave out silence before the first sound of a reply, up to 1 s, where a client does not say",
        "",
    ),
    Option(
        "--markup",
        False,
        values.flag,
        "follow <spell> and <break> in texts, where a client does not say",
        "",
    ),
    Option("--lexicon", {}, values.lexicons, "words and their respellings: see docs/agent.md", "PATH"),
    Option("--drain-s", 10.0, values.seconds, "seconds that running turns get on SIGTERM", "SECONDS"),
    Option("--log-format", "text", values.choice("text", "json"), "text or json", "NAME"),
)
OPTIONS = (*MODEL_OPTIONS, *VOICE_OPTIONS, *SERVER_OPTIONS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all of `OPTIONS`. An option that the command line does not have stays None: see `resolve`."""
    parser.allow_abbrev = False
    parser.usage = "%(prog)s [options]"
    parser.epilog = EXAMPLE
    parser.set_defaults(parser=parser)
    titles = {"model": MODEL_OPTIONS, "voices": VOICE_OPTIONS, "server": SERVER_OPTIONS}
    for title, options in titles.items():
        group = parser.add_argument_group(title)
        for option in options:
            default = "none" if option.default in (None, (), {}) else option.default
            says_itself = option.default is False or "default:" in option.help
            shown = "" if says_itself else f" (default: {default})"
            text = f"{option.help}{shown} [{option.variable}]"
            if option.convert is values.flag:
                group.add_argument(option.flag, help=text, action="store_const", const="1")
            else:
                action = "append" if option.repeatable else "store"
                group.add_argument(option.flag, help=text, action=action, metavar=option.metavar)


def resolve(given: argparse.Namespace, environ: Mapping[str, str]) -> argparse.Namespace:
    """The checked options: from the command line, else the environment, else the default. Exits with 2
    if one is wrong."""
    options = argparse.Namespace()
    for option in OPTIONS:
        source, texts = option.flag, getattr(given, option.name)
        if texts is None and option.variable in environ:
            source, texts = option.variable, environ[option.variable]
            texts = [t.strip() for t in texts.split(",") if t.strip()] if option.repeatable else texts
        try:
            setattr(options, option.name, _convert(option, texts))
        except ValueError as error:
            given.parser.error(f"{source}: {error}")
    _check_together(given.parser, options)
    return options


def _convert(option: Option, texts: str | list[str] | None) -> Any:
    if texts is None:
        return option.default
    if isinstance(texts, list):
        return tuple(option.convert(text) for text in texts)
    return option.convert(texts)


def _check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.speaker_ref_text and not options.speaker_ref:
        parser.error("--speaker-ref-text: says what is spoken in --speaker-ref, which is missing")
    if not is_loopback(options.host) and not _all_tokens(options):
        parser.error(
            f"--host {options.host}: others could reach the server, and it has no --token. "
            f"Set {PREFIX}TOKEN, or keep the default host and tunnel: "
            f"ssh -L {options.port}:127.0.0.1:{options.port} user@host"
        )


def _all_tokens(options: argparse.Namespace) -> dict[str, str]:
    """Secrets by the names of their accounts."""
    own = {} if options.token is None else {values.TOKEN_NAME: options.token}
    return own | options.tokens_file


def warn_unknown_variables(environ: Mapping[str, str]) -> None:
    """Warn of unknown variables: a misspelt one would do nothing, silently."""
    known = {option.variable for option in OPTIONS} | OTHER_VARIABLES
    for name in sorted(n for n in environ if n.startswith(PREFIX) and n not in known):
        log.warning("%s is set, but no option has that name", name)


def load_decoder(options: argparse.Namespace, report: Report) -> TTSDecoder:
    """Load model and voices, and warm up. Runs in the loader's thread."""
    steps, started = [("starting", _STARTED)], False

    def tell(phase: Phase, text: str) -> None:
        if started:  # a model that was unloaded comes back: turns are taken all the time
            log.info("%s", text)
            return
        steps.append((text, time.monotonic()))
        report(phase, text)

    def progress(text: str) -> None:
        tell("loading", text)

    progress("importing torch")
    # These take seconds; the port answers meanwhile.
    from qwen_megakernel.engine.standby import StandbyPlan
    from qwen_megakernel.tts_model import TTSDecoder

    decoder = TTSDecoder.load(
        options.model,
        backend=options.backend,
        device=options.device,
        dtype=options.dtype,
        num_slots=options.num_slots,
        memory=options.memory,
        sms=options.sms,
        standby=StandbyPlan(options.keep_warm, options.unload_after),
        sampling=options.sampling,
        text_cleaning=options.text_cleaning == "on",
        revision=options.revision,
        offline=options.offline,
        progress=progress,
    )
    if options.voices is not None or options.speaker_ref is not None:
        progress("loading voices")
    if options.voices is not None:
        decoder.load_voices(options.voices)
    if options.speaker_ref is not None:
        voice = decoder.clone_voice(options.speaker_ref.read_bytes(), options.speaker_ref_text)
        decoder.add_voice("default", voice)
        decoder.default_voice = "default"
    for name, voice in options.openai_voice:
        if voice not in decoder.voices:
            known = ", ".join(sorted(decoder.voices)) or "none"
            raise ValueError(f"--openai-voice {name}={voice}: the voice is unknown; known: {known}")
    decoder.warm_up(lambda text: tell("warming_up", text))
    started = True
    log.info("%s", time_spent(steps, time.monotonic()))
    # The garbage collector stops all turns. It need not look again at what stays loaded.
    gc.collect()
    gc.freeze()
    return decoder


def server_settings(options: argparse.Namespace, port: int) -> ServerSettings:
    """What resolved options decide about serving on a port."""
    return ServerSettings(
        host=options.host,
        port=port,
        tokens=_all_tokens(options),
        allow_origins=frozenset(options.allow_origin),
        max_connections=options.max_connections,
        spare_sockets=options.spare_sockets,
        request_timeout_s=options.request_timeout_s,
        trusted_proxies=options.trusted_proxy,
        max_connections_per_address=options.max_connections_per_address,
        max_turns_per_address=options.max_turns_per_address,
        max_connections_per_token=options.max_connections_per_token,
        max_turns_per_token=options.max_turns_per_token,
        max_queue_s=options.max_queue_s,
        max_lead_s=options.max_lead_s,
        max_messages_per_s=options.max_messages_per_s,
        idle_s=options.idle_s,
        max_text_chars=options.max_text_chars,
        drain_s=options.drain_s,
        openai_voices=dict(options.openai_voice),
        voices_folder=options.voices,
        trim_leading_silence=options.trim_leading_silence,
        markup=options.markup,
        lexicons=options.lexicon,
    )


def run(args: argparse.Namespace) -> int:
    """Run the server; the exit code."""
    options = resolve(args, os.environ)
    configure_logging(options.log_format)
    warn_unknown_variables(os.environ)
    try:
        listener = bind(options.host, options.port)
    except OSError as error:
        reason = error.strerror or error
        address = f"{options.host} port {options.port}"
        print(f"{args.parser.prog}: cannot listen on {address}: {reason}", file=sys.stderr)
        return 1
    port = listener.getsockname()[1]
    log.info("listening on %s port %d", options.host, port, extra={"fields": {"port": port}})
    settings = server_settings(options, port)

    def announce(decoder: TTSDecoder) -> None:
        if options.log_format == "text":
            show(banner(decoder, options.host, port, bool(settings.tokens)))

    return serve(settings, listener, lambda report: load_decoder(options, report), announce)
