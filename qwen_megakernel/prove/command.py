"""`qwen-megakernel prove`: the parts of a run one after another, the verdict, the report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import qwen_megakernel
from qwen_megakernel.checkpoint import CheckpointError, resolve
from qwen_megakernel.engine.backends import BACKENDS
from qwen_megakernel.prove import golden, running
from qwen_megakernel.prove.gates import Found, Section, shown, verdict_line
from qwen_megakernel.prove.official import OfficialError
from qwen_megakernel.prove.plan import SIZES, Plan, device_name
from qwen_megakernel.prove.privacy import scrubbed, secrets, without_sound
from qwen_megakernel.prove.report import html
from qwen_megakernel.prove.resume import write_atomically
from qwen_megakernel.prove.session import Session
from qwen_megakernel.prove.utterances import read_list
from qwen_megakernel.tools.demo import DemoError
from qwen_megakernel.tools.doctor import DEFAULT_MODEL, Check, examine
from qwen_megakernel.tts_model import choose_device

DOCTOR_PORT = 8765
GOLDEN_FILE = "golden.json"
GOLDEN_TEXTS = 4


def tell(line: str) -> None:
    """Print progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in running.PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}, allowed: {', '.join(running.PARTS)}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m qwen_megakernel prove`."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="MODEL",
        help=f"a checkpoint's folder or Hugging Face id (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="a few minutes: the least of everything")
    sizes.add_argument("--full", action="store_true", help=f"{SIZES['full'].pairs} spoken pairs")
    parser.add_argument("--out", type=Path, default=Path("prove-report"), help="folder of the report")
    parser.add_argument("--parts", type=_parts, default=tuple(running.PARTS), help="comma-separated")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--offline", action="store_true", help="download no weights")
    parser.add_argument(
        "--official-python", type=Path, metavar="PATH",
        help="interpreter that has the official package (default: an environment made for it)",
    )  # fmt: skip
    parser.add_argument("--recogniser", metavar="NAME", help="a faster-whisper model, by name or folder")
    parser.add_argument(
        "--similarity-model", type=Path, metavar="FILE",
        help="an independent speaker encoder, ONNX, for the recordings of --list",
    )  # fmt: skip
    parser.add_argument("--voices", type=Path, metavar="DIR", help="voices to speak with")
    parser.add_argument(
        "--list", type=Path, metavar="FILE",
        help="texts and recordings to clone, in Seed-TTS-eval's format: id|prompt text|prompt wav|text",
    )  # fmt: skip
    parser.add_argument("--language", default="english", help="of the texts (default: english)")
    record = parser.add_mutually_exclusive_group()
    record.add_argument(
        "--record", type=Path, metavar="DIR", help="write a golden record, and no report"
    )
    record.add_argument("--compare", type=Path, metavar="DIR", help="hold this machine against a record")


def make_plan(args: argparse.Namespace) -> Plan:
    """Make the plan that the arguments ask for. Missing weights are downloaded.

    Raises:
        CheckpointError, ValueError: one line that says what is wrong.
    """
    size = "quick" if args.quick else "full" if args.full else "standard"
    folder = resolve(args.model, offline=args.offline)
    local = Path(args.model).expanduser().is_dir()
    return Plan(
        folder=folder.resolve(),
        model=folder.resolve().name if local else args.model,
        out=args.out,
        size=SIZES[size],
        backend=args.backend,
        device=choose_device(args.device),
        recogniser=args.recogniser,
        similarity=args.similarity_model,
        voices=args.voices,
        texts=tuple(read_list(args.list)) if args.list else (),
        language=args.language,
    )


def run(args: argparse.Namespace) -> int:
    """Measure, judge and report. Returns 1 if a gate failed or something could not run."""
    try:
        plan = make_plan(args)
        plan.out.mkdir(parents=True, exist_ok=True)
        with Session(plan, args.official_python, tell) as session:
            if args.record:
                return _record(session, args.record)
            if args.compare:
                return _compare(session, args.compare)
            return _prove(session, args.parts)
    except (CheckpointError, OfficialError, DemoError, OSError, ValueError) as error:
        print(f"prove: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _record(session: Session, folder: Path) -> int:
    found = golden.record(session.subject, session.cloner, session.varied(GOLDEN_TEXTS))
    write_atomically(folder / GOLDEN_FILE, json.dumps(found) + "\n")
    print(f"recorded {len(found['utterances'])} utterances")
    return 0


def _compare(session: Session, folder: Path) -> int:
    kept = json.loads((folder / GOLDEN_FILE).read_text(encoding="utf-8"))
    section = golden.compare(kept, session.subject, session.cloner)
    for table in section["tables"]:
        for row in table["rows"]:
            print("  ".join(map(str, row)))
    print(verdict_line(section))
    return 0 if _passed([section]) else 1


def _prove(session: Session, parts: Sequence[str]) -> int:
    began, plan = time.monotonic(), session.plan
    tell("doctor: looking at this machine")
    sections = [_doctor(examine(str(plan.folder), DOCTOR_PORT))]
    for name in parts:
        tell(f"{name}: begins after {time.monotonic() - began:.0f} s")
        sections.append(_section(session, name))
        print(verdict_line(sections[-1]), flush=True)
    passed = _passed(sections)
    about = _about(session, parts)
    hidden = secrets(plan.folder, plan.out, Path(qwen_megakernel.__file__).parents[1])
    found = {"passed": passed, "model": plan.model, "about": about, "sections": sections}
    found = scrubbed(found, hidden)
    write_atomically(plan.out / "report.json", json.dumps(without_sound(found), indent=1) + "\n")
    write_atomically(plan.out / "report.html", html(found))
    for gate in (gate for section in sections for gate in section["gates"] if gate["passed"] is False):
        print(f"  {gate['name']}: {shown(gate)} ({gate['detail']})")
    word = "passed" if passed else "FAILED"
    print(f"{word} in {time.monotonic() - began:.0f} s: {plan.out / 'report.html'}")
    return 0 if passed else 1


def _section(session: Session, name: str) -> Found:
    """A part's section. If the part could not run, the section says so."""
    try:
        return running.section(session, name)
    except (OfficialError, DemoError, RuntimeError, OSError, ValueError) as error:
        section = Section(name)
        section.judge("ran", 0, detail=" ".join(f"{type(error).__name__}: {error}".split())[:600])
        return section.found()


def _passed(sections: Sequence[Found]) -> bool:
    return all(gate["passed"] is not False for section in sections for gate in section["gates"])


def _doctor(checks: Sequence[Check]) -> Found:
    """The doctor's findings as a section without gates: failures show in the other parts."""
    section = Section("doctor")
    rows = [[check.name, check.status, check.detail] for check in checks]
    section.table("This machine", ["check", "", "finding"], rows)
    return section.found()


def _about(session: Session, parts: Sequence[str]) -> Mapping[str, Any]:
    plan = session.plan
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "version": qwen_megakernel.__version__,
        "device": device_name(plan.device),
        "torch": torch.__version__,
        "parts": ", ".join(parts),
        "size": ", ".join(f"{name} {value}" for name, value in asdict(plan.size).items()),
        "voices": ", ".join(sorted(session.voices)[:20]),
    }
    found |= {name: plan.base[name] for name in ("sources", "checkpoint")}
    return found
