"""The parts of a run, by name: each gives its section from what the run shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from qwen_megakernel.prompt.reference_audio import decode_reference
from qwen_megakernel.prove import draws, fidelity, paths, sound, speech, speed
from qwen_megakernel.prove.gates import Found
from qwen_megakernel.prove.independent_encoder import IndependentEncoder
from qwen_megakernel.prove.session import Session
from qwen_megakernel.prove.transcripts import Recogniser, RecogniserMissing

REVISION = 1
"""Revision of the measurements. A change makes earlier findings invalid."""


def run_fidelity(session: Session) -> Found:
    """See `fidelity`."""
    said, drawn = session.spoken
    size = session.plan.size
    codes = [d.codes for d in drawn[: size.texts]]
    found = fidelity.measure(session.subjects, session.official, said[: size.texts], codes, size.frames)
    versions = session.official_loaded["versions"].items()
    found["notes"] += [
        "official package: " + ", ".join(f"{name} {version}" for name, version in versions),
        "ours: " + ", ".join(f"{name} {value}" for name, value in session.subject.runs.items()),
    ]
    return found


def run_draws(session: Session) -> Found:
    """See `draws`."""
    said, drawn = session.spoken
    theirs = session.official_loaded["sampling"]
    return draws.measure(
        session.subject, session.official, said, drawn, session.params, theirs, session.plan.size.draws
    )


def run_sound(session: Session) -> Found:
    """See `sound`."""
    said, drawn = session.spoken
    eos = session.checkpoint.config.talker.codec_eos_id
    codes = [[frame for frame in d.codes if frame[0] != eos] for d in drawn]
    return sound.measure(session.subject, session.official, session.cloner, said, codes)


def run_speech(session: Session) -> Found:
    """See `speech`."""
    recogniser, missing = None, ""
    try:
        recogniser = Recogniser(session.plan.recogniser)
    except RecogniserMissing as error:
        missing = str(error)
        session.report(f"no word error rates: {missing}")
    cloner = session.cloner
    plan = session.plan
    judge = speech.Judge(
        recogniser,
        None if cloner is None else cloner.speaker_encoder,
        IndependentEncoder(plan.similarity) if plan.similarity else None,
        {text.name: decode_reference(text.recording.read_bytes()) for text in plan.texts},
    )
    speakers = speech.Speakers(
        session.tts, session.official, session.voices, session.plan.dtype, session.count_tokens
    )
    utterances = session.utterances(session.plan.size.pairs)
    rows = speech.pairs(session.findings, speakers, judge, utterances, session.report)
    return speech.measure(rows, missing)


def run_paths(session: Session) -> Found:
    """See `paths`."""
    return paths.measure(
        session.tts, session.server_options, session.voices, session.varied(1)[0], session.report
    )


def run_speed(session: Session) -> Found:
    """See `speed`."""
    return speed.measure(session, session.report)


PARTS: Mapping[str, Callable[[Session], Found]] = {
    "fidelity": run_fidelity,
    "draws": run_draws,
    "sound": run_sound,
    "speech": run_speech,
    "paths": run_paths,
    "speed": run_speed,
}
"""The parts, in the order in which they run."""


def section(session: Session, name: str) -> Found:
    """A part's section, from an earlier run if nothing that it depends on has changed."""
    plan = session.plan
    depends: dict[str, Any] = {
        "revision": REVISION, "size": asdict(plan.size), "voices": sorted(session.voices),
        "language": plan.language, "recogniser": plan.recogniser if name == "speech" else None,
    }  # fmt: skip
    return session.findings.get(name, depends, lambda: PARTS[name](session))
