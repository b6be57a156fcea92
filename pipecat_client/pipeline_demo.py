#!/usr/bin/env python3
"""A voice agent that speaks through this project's server: listen, think, speak, be interrupted.

python server.py --speaker-ref me.wav
python pipecat_client/pipeline_demo.py --scripted      # then open http://localhost:7860/talk
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A checkout then works without an installation. After `pip install -e .` this line has no effect.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from pipecat.audio.vad.silero import SileroVADAnalyzer
    from pipecat.frames.frames import LLMRunFrame
    from pipecat.observers.base_observer import BaseObserver
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.pipeline.worker import PipelineParams, PipelineWorker
    from pipecat.processors.aggregators.llm_context import LLMContext
    from pipecat.processors.aggregators.llm_response_universal import (
        LLMContextAggregatorPair,
        LLMUserAggregatorParams,
    )
    from pipecat.processors.frame_processor import FrameProcessor
    from pipecat.runner.run import app
    from pipecat.runner.run import main as run_server
    from pipecat.runner.types import RunnerArguments
    from pipecat.runner.utils import create_transport
    from pipecat.serializers.protobuf import ProtobufFrameSerializer
    from pipecat.services.tts_service import TextAggregationMode
    from pipecat.transports.base_transport import BaseTransport, TransportParams
    from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams
    from pipecat.turns.user_mute import AlwaysUserMuteStrategy, BaseUserMuteStrategy
    from pipecat.workers.runner import WorkerRunner
except ImportError as error:
    sys.exit(f"{Path(__file__).name}: {error}: pip install -r pipecat_client/requirements.txt")

from pipecat_client.megakernel_tts import MegakernelTTSService
from pipecat_client.scripted import ScriptedLLM, ScriptedSTT
from pipecat_client.voice_to_voice import RecordedCall, read_question, speak_question, table
from pipecat_client.web_page import PATH, talk_page

PROGRAM = Path(__file__).name
OLLAMA = "http://localhost:11434/v1"
PROMPT = (
    "You are a friendly voice assistant. What you write is spoken aloud: answer in one to three short "
    "sentences, without lists, markdown, emoji or abbreviations."
)
STT = {
    "deepgram": ("DeepgramSTTService", "deepgram", "requirements-deepgram.txt"),
    "openai": ("OpenAISTTService", "openai", "requirements.txt"),
    "moonshine": ("MoonshineSTTService", "moonshine_voice", "requirements-moonshine.txt"),
    "whisper": ("WhisperSTTService", "faster_whisper", "requirements-whisper.txt"),
}
"""Pipecat's class, the package that it needs, and the requirements file that installs the package."""
KEYED_STT = ("deepgram", "openai")
EPILOG = f"""\
who listens and thinks:
  --scripted        nobody: a script answers; nothing to download, no key
  OPENAI_API_KEY    OpenAI does both; DEEPGRAM_API_KEY: Deepgram listens
  neither           Moonshine listens on this CPU, Ollama thinks ({OLLAMA}); any other
                    OpenAI-compatible server by --llm-url and --llm-model

where you hear it:
  http://localhost:7860{PATH}   the browser, over one TCP port, so also through a tunnel
                          (ssh -L 7860:localhost:7860 user@host, and keep --host localhost);
                          it cancels echo, so you can interrupt by voice, and needs no network
  http://localhost:7860   Pipecat's page, over WebRTC; it loads a part from another host
  --local                 microphone and loudspeaker of this machine; no echo cancellation, so
                          wear headphones or add --half-duplex

example, without any key:
  ollama pull llama3.2
  python pipecat_client/pipeline_demo.py --stt moonshine --llm-model llama3.2
"""

TRANSPORTS = {
    "webrtc": lambda: TransportParams(audio_in_enabled=True, audio_out_enabled=True),
    "websocket": lambda: FastAPIWebsocketParams(
        audio_in_enabled=True,
        audio_out_enabled=True,
        add_wav_header=False,
        serializer=ProtobufFrameSerializer(),
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """The demo's options. Pipecat's runner adds its own (`-t`, `--host`, `--port`, ...)."""
    parser = argparse.ArgumentParser(
        usage="python pipecat_client/pipeline_demo.py [options]",
        description="A voice agent that speaks through server.py.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    voice = parser.add_argument_group("voice")
    voice.add_argument("--tts-url", default="ws://127.0.0.1:8765", help="server (default: %(default)s)")
    voice.add_argument(
        "--tts-token",
        default=os.environ.get("QWEN_MEGAKERNEL_TOKEN"),
        help="the server's secret (default: the variable QWEN_MEGAKERNEL_TOKEN)",
    )
    voice.add_argument("--voice", help="name of a voice on the server (default: the server's)")
    voice.add_argument("--language", help="en, german, ... (default: told from the text)")
    voice.add_argument(
        "--tokens", action="store_true", help="speak tokens as they come, not whole sentences"
    )
    agent = parser.add_argument_group("agent")
    agent.add_argument(
        "--scripted", action="store_true", help="no language model; no recognition, but for --stt"
    )
    agent.add_argument(
        "--stt",
        choices=["deepgram", "openai", "moonshine", "whisper"],
        help="who listens (default: by the keys that are set)",
    )
    agent.add_argument(
        "--local-models", action="store_true", help="whatever keys are set, nothing leaves this machine"
    )
    agent.add_argument("--stt-model", help="of Whisper: a name or a folder (default: Pipecat's)")
    agent.add_argument("--llm-url", help="an OpenAI-compatible server (default: OpenAI or Ollama)")
    agent.add_argument("--llm-model", help="its model (default: gpt-4.1-mini, or llama3.2 at Ollama)")
    agent.add_argument("--local", action="store_true", help="use this machine's microphone")
    agent.add_argument("--half-duplex", action="store_true", help="do not listen while speaking")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--measure",
        nargs="?",
        const="",
        metavar="WAV",
        help="ask a recorded question, and print how long its answer takes, by part; without a file the "
        "server speaks the question",
    )
    measuring.add_argument("--questions", type=int, default=5, help="how often (default: %(default)s)")
    return parser


def make_stt(options: argparse.Namespace) -> FrameProcessor:
    """The speech recogniser."""
    if options.scripted and options.stt is None:
        return ScriptedSTT()
    name = options.stt or _default_stt(options)
    service: Any = getattr(importlib.import_module(f"pipecat.services.{name}.stt"), STT[name][0])
    stt: FrameProcessor
    if name in KEYED_STT:
        stt = service(api_key=os.environ[_key_of(name)])
    elif name == "whisper" and options.stt_model:
        stt = service(settings=service.Settings(model=options.stt_model))
    else:
        stt = service()
    return stt


def _default_stt(options: argparse.Namespace) -> str:
    keyed = () if options.local_models else KEYED_STT
    return next((name for name in keyed if os.environ.get(_key_of(name))), "moonshine")


def _key_of(name: str) -> str:
    return f"{name.upper()}_API_KEY"


def make_llm(options: argparse.Namespace) -> FrameProcessor:
    """The language model."""
    if options.scripted:
        return ScriptedLLM()
    from pipecat.services.openai.llm import OpenAILLMService

    key = os.environ.get("OPENAI_API_KEY")
    at_openai = bool(key) and options.llm_url is None and not options.local_models
    model = options.llm_model or ("gpt-4.1-mini" if at_openai else "llama3.2")
    return OpenAILLMService(
        base_url=None if at_openai else options.llm_url or OLLAMA,
        api_key=key or "none",
        settings=OpenAILLMService.Settings(model=model, system_instruction=PROMPT),
    )


def make_tts(options: argparse.Namespace) -> MegakernelTTSService:
    """The text-to-speech service."""
    return MegakernelTTSService(
        url=options.tts_url,
        token=options.tts_token,
        settings=MegakernelTTSService.Settings(voice=options.voice, language=options.language),
        text_aggregation_mode=TextAggregationMode.TOKEN if options.tokens else None,
    )


def make_worker(
    transport: BaseTransport, options: argparse.Namespace, observers: Sequence[BaseObserver] = ()
) -> PipelineWorker:
    """The agent at a transport."""
    mute: list[BaseUserMuteStrategy] = [AlwaysUserMuteStrategy()] if options.half_duplex else []
    user, assistant = LLMContextAggregatorPair(
        LLMContext(),
        user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer(), user_mute_strategies=mute),
    )
    return PipelineWorker(
        Pipeline(
            [
                transport.input(),
                make_stt(options),
                user,
                make_llm(options),
                make_tts(options),
                transport.output(),
                assistant,
            ]
        ),
        params=PipelineParams(enable_metrics=True, enable_usage_metrics=True),
        observers=list(observers),
        idle_timeout_secs=None,
    )


async def run_agent(
    transport: BaseTransport, options: argparse.Namespace, **runner_options: Any
) -> None:
    """One conversation, until the client leaves."""
    worker = make_worker(transport, options)
    runner = WorkerRunner(**runner_options)
    await runner.add_workers(worker)

    async def greet(*_: Any) -> None:
        await worker.queue_frames([LLMRunFrame()])

    async def leave(*_: Any) -> None:
        await runner.cancel()

    if options.local:
        worker.add_event_handler("on_pipeline_started", greet)
    else:
        worker.rtvi.add_event_handler("on_client_ready", greet)
        transport.add_event_handler("on_client_disconnected", leave)
    await runner.run()


async def bot(arguments: RunnerArguments) -> None:
    """Pipecat's runner calls this for each client."""
    transport = await create_transport(arguments, TRANSPORTS)
    assert arguments.cli_args is not None  # the demo's command line has parsed them
    await run_agent(transport, arguments.cli_args, handle_sigint=arguments.handle_sigint)


async def run_local(options: argparse.Namespace) -> None:
    """Run a conversation at this machine's microphone."""
    from pipecat.transports.local.audio import LocalAudioTransport, LocalAudioTransportParams

    params = LocalAudioTransportParams(audio_in_enabled=True, audio_out_enabled=True)
    await run_agent(LocalAudioTransport(params), options)


async def run_measure(options: argparse.Namespace) -> None:
    """Ask the recorded question, and print how long the answers took."""
    question = (
        read_question(Path(options.measure))
        if options.measure
        else await asyncio.to_thread(speak_question, options.tts_url, options.tts_token, options.voice)
    )
    call = RecordedCall()
    worker = make_worker(call, options, [call.stopwatch])
    runner = WorkerRunner()
    await runner.add_workers(worker)
    answers = []

    async def ask_all(*_: Any) -> None:
        try:
            for _number in range(options.questions + 1):
                answers.append(await call.ask(question))
                print(f"heard: {call.stopwatch.transcript}", file=sys.stderr)
        except TimeoutError:
            print(f"{PROGRAM}: a question was not answered", file=sys.stderr)
        finally:
            await runner.cancel()

    worker.add_event_handler("on_pipeline_started", ask_all)
    await runner.run()
    if len(answers) <= options.questions:
        sys.exit(1)
    print(table(answers[1:]))  # the first one finds everything cold


def check_needs(options: argparse.Namespace) -> None:
    """Exit with one line if a key or a package is missing, before anything slow begins."""
    packages = [("pyaudio", "requirements-microphone.txt")] if options.local else []
    if not options.scripted or options.stt is not None:
        name = options.stt or _default_stt(options)
        if name in KEYED_STT and not os.environ.get(_key_of(name)):
            sys.exit(f"{PROGRAM}: --stt {name} needs the variable {_key_of(name)}")
        packages.append(STT[name][1:])
    for package, requirements in packages:
        if importlib.util.find_spec(package) is None:
            sys.exit(f"{PROGRAM}: {package} is missing: pip install -r pipecat_client/{requirements}")


def reach_loopback_directly() -> None:
    """Connect to servers on this machine, such as Ollama, without the environment's proxies."""
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    if listed != "*":  # the star counts only alone
        names = ",".join(filter(None, [listed, "localhost", "127.0.0.1", "::1"]))
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = names


def print_help() -> None:
    """Print the demo's options, and the three of the runner's that matter here."""
    parser = make_parser()
    page = parser.add_argument_group("page")
    page.add_argument("-t", choices=list(TRANSPORTS), help="offer only this transport")
    page.add_argument("--host", default="localhost", help="address (default: %(default)s)")
    page.add_argument("--port", default=7860, help="port (default: %(default)s)")
    parser.print_help()


def main() -> None:
    """Serve the page, or talk on this machine."""
    if {"-h", "--help"} & set(sys.argv):
        print_help()
        return
    parser = make_parser()
    options, _ = parser.parse_known_args()
    check_needs(options)
    reach_loopback_directly()
    if options.measure is not None:
        try:
            asyncio.run(run_measure(options))
        except ValueError as error:
            sys.exit(f"{PROGRAM}: {error}")
    elif options.local:
        asyncio.run(run_local(options))
    else:
        app.mount(PATH, talk_page())
        run_server(parser)


if __name__ == "__main__":
    main()
