"""Codec samples, speaker embeddings and clones in context beside the official package's."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F

from qwen_megakernel.config import HOP, SAMPLE_RATE
from qwen_megakernel.prompt.reference_audio import decode_reference
from qwen_megakernel.prompt.voice import Voice, VoiceCloner
from qwen_megakernel.prove.fidelity import GREEDY, PENALTY
from qwen_megakernel.prove.gates import Found, Section
from qwen_megakernel.prove.official import OfficialProcess
from qwen_megakernel.prove.subject import Subject
from qwen_megakernel.prove.utterances import Utterance, item

RATES = (16_000, 24_000, 44_100)
BF16_SAMPLES = 2.0
"""Largest difference allowed in bf16, as a multiple of that of the official decoder in bf16."""
CLONE_FRAMES = 24
MIN_RECORDING_S = 1.5
OFFICIAL_CHUNK = 300
"""Frames that the official package decodes at a time."""


def samples(
    section: Section, subject: Subject, official: OfficialProcess, codes: Sequence[list[list[int]]]
) -> list[np.ndarray]:
    """Our samples of each list of frames, judged; the longest shows the reach of the codec's history."""
    wanted = [frames for frames in codes if frames]
    reply, arrays = official.ask_arrays("decode", codes=wanted, dtype="fp32")
    made = [subject.decode(frames) for frames in wanted]
    worst = 0.0
    odd = abs(reply["rate"] - SAMPLE_RATE)
    for index, (frames, ours) in enumerate(zip(wanted, made, strict=True)):
        odd += abs(len(ours) - len(frames) * HOP) + abs(len(arrays[str(index)]) - len(frames) * HOP)
        shared = min(len(ours), len(arrays[str(index)]))
        worst = max(worst, float(np.abs(ours[:shared] - arrays[str(index)][:shared]).max()))
    limit = None
    if subject.dtype == "bf16":
        _, rounded = official.ask_arrays("decode", codes=wanted, dtype="bf16")
        limit = BF16_SAMPLES * max(float(np.abs(rounded[name] - arrays[name]).max()) for name in arrays)
    longest = max(map(len, wanted))
    window = subject.config.codec.sliding_window
    section.figures["allowed sample error"] = limit
    section.judge(
        "codec samples", worst, limit=limit,
        detail=f"up to {longest} frames; the codec's window is {window}",
    )  # fmt: skip
    section.judge("samples a frame", odd, detail=f"{HOP} at {SAMPLE_RATE} Hz")
    return made


def speakers(
    section: Section, cloner: VoiceCloner | None, official: OfficialProcess, recording: np.ndarray
) -> None:
    """Speaker embedding, and codes where there is an encoder, of a recording at several rates.

    Args:
        section: is added to.
        cloner: None where the checkpoint cannot clone.
        official: the other side.
        recording: float32 [n] at 24 kHz.
    """
    if cloner is None:
        for gate in ("speaker embedding", "codes of a recording"):
            section.skip(gate, "this checkpoint does not clone")
        return
    encode = cloner.codec_encoder is not None
    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        paths = [Path(folder) / f"{rate}.wav" for rate in RATES]
        for rate, path in zip(RATES, paths, strict=True):
            soundfile.write(path, soxr.resample(recording, SAMPLE_RATE, rate), rate, subtype="PCM_16")
        _, arrays = official.ask_arrays("clone", recordings=list(map(str, paths)), encode=encode)
        data = [path.read_bytes() for path in paths]
    cosines, equal, total = [], 0, 0
    for index, file in enumerate(data):
        audio = torch.from_numpy(decode_reference(file))
        expected = torch.from_numpy(arrays[f"embedding.{index}"]).float()
        embedding = cloner.speaker_encoder.embed(audio).float().cpu()
        cosines.append(float(F.cosine_similarity(embedding, expected, dim=0)))
        if cloner.codec_encoder is not None:
            codes, theirs = cloner.codec_encoder.encode(audio).cpu().numpy(), arrays[f"codes.{index}"]
            shared = min(len(codes), len(theirs))
            equal += int((codes[:shared] == theirs[:shared]).sum())
            total += max(codes.size, theirs.size)
    shown = ", ".join(f"{rate} Hz: {c:.6f}" for rate, c in zip(RATES, cosines, strict=True))
    section.judge("speaker embedding", min(cosines), detail=shown)
    if encode:
        section.judge("codes of a recording", equal / total, detail=f"{equal} of {total}")
    else:
        section.skip("codes of a recording", "this checkpoint has no codec encoder")


def in_context(
    section: Section,
    subject: Subject,
    official: OfficialProcess,
    utterance: Utterance,
    reference: tuple[str, list[list[int]]],
) -> None:
    """A clone in context: the reference is earlier speech, its text and its codes.

    Its samples are compared for the codes that the official package speaks greedily.
    """
    base = subject.voices[utterance.voice]
    if base.speaker_embedding is None:
        section.skip("clone in context", "this checkpoint does not clone")
        return
    text, codes = reference
    voice = Voice.icl(base.speaker_embedding, torch.tensor(codes), text)
    items = [item(utterance, {utterance.voice: voice})]
    reply = official.ask(
        "greedy", items=items, dtype="fp32", frames=CLONE_FRAMES, repetition_penalty=PENALTY
    )
    _, arrays = official.ask_arrays(
        "speak_greedily", items=items, frames=CLONE_FRAMES, repetition_penalty=PENALTY
    )
    spoken, theirs = reply["codes"][0], arrays["0"]
    ours = subject.decode(spoken, voice)
    off = len(theirs) - len(ours)
    # The official cut of the reference rounds to a sample.
    same = 0 <= off <= 1
    difference = float(np.abs(theirs[-len(ours) :] - ours).max()) if same else float("inf")
    section.judge(
        "clone in context", difference, limit=section.figures["allowed sample error"],
        detail=f"{len(spoken)} frames after a reference of {len(codes)}",
    )  # fmt: skip
    subject.voices = {**subject.voices, "clone in context": voice}
    mine = subject.draw(
        [Utterance(utterance.text, "clone in context", 0, utterance.language)], [GREEDY], CLONE_FRAMES
    )[0].codes
    equal = sum(a == b for a, b in zip(mine, spoken, strict=False))
    section.notes.append(f"clone in context: {equal} of {len(spoken)} greedy frames equal")


def long_recording(spoken: Sequence[np.ndarray]) -> np.ndarray:
    """Speech to clone from: utterances joined until there is enough."""
    made: list[np.ndarray] = []
    while sum(map(len, made)) < MIN_RECORDING_S * SAMPLE_RATE:
        made.append(spoken[len(made) % len(spoken)])
    return np.concatenate(made)


def measure(
    subject: Subject,
    official: OfficialProcess,
    cloner: VoiceCloner | None,
    said: Sequence[Utterance],
    codes: Sequence[list[list[int]]],
) -> Found:
    """Run the whole part. `codes` are those of the utterances, without EOS."""
    section = Section("sound")
    made = samples(section, subject, official, [codes[0], _joined(codes, subject)])
    speakers(section, cloner, official, long_recording(made))
    in_context(section, subject, official, said[-1], (said[0].text, codes[0]))
    return section.found()


def _joined(codes: Sequence[list[list[int]]], subject: Subject) -> list[list[int]]:
    """Frames of several utterances as one that is longer than the codec looks back.

    The official decoder cuts at 300 frames, and hears the cut.
    """
    count = min(OFFICIAL_CHUNK - 1, 3 * subject.config.codec.sliding_window + 32)
    return [frame for frames in codes for frame in frames][:count]
