"""Voices: what a prompt needs to know about a speaker, and how a recording becomes a voice.

A `Voice` is a preset of the checkpoint, a vector, a vector with the recording's codes and transcript, or
a description. `VoiceCloner` makes the second and the third from WAV or FLAC bytes. A client sends only
bytes, a name or a description. Names are looked up in a dict. A name that becomes a file's name has
passed `voice_name_ok`.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Literal, Self

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_megakernel.codec.encoder import CODEBOOK_SIZE, CodecEncoder
from qwen_megakernel.config import FRAME_S, NUM_CODEBOOKS
from qwen_megakernel.prompt.reference_audio import (
    MAX_REFERENCE_S,
    VoiceError,
    decode_reference,
    read_reference,
)
from qwen_megakernel.prompt.speaker_encoder import SpeakerEncoder

MAX_REF_TEXT = 2_000
"""Characters of a reference transcript. 30 s of fast speech have about 700."""
MAX_REF_FRAMES = ceil(MAX_REFERENCE_S / FRAME_S) + 1
"""Resampling may add a sample to the longest reference, and this sample may add a frame."""
MAX_VOICE_FILE_BYTES = 1024 * 1024
"""Limit for a file. A saved voice is below 100 kB."""
MAX_DESCRIPTION = 1000
"""Characters that describe a designed voice."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FILE_FORMAT = {"format": "qwen-megakernel-voice", "version": "1"}
_NOTE = "note."
"""Prefix of the names of notes in a file's metadata."""

_TENSORS: dict[str, set[str]] = {
    "x_vector": {"speaker_embedding"},
    "icl": {"speaker_embedding", "ref_codes"},
    "designed": set(),
}
"""What a voice file has, for each mode."""

VoiceKind = Literal["preset", "x_vector", "icl", "designed"]


@dataclass(frozen=True, eq=False)
class Voice:
    """A speaker, in the form that the prompt needs. The constructors below make it, on the CPU.

    Voices are compared by identity. Raises `VoiceError` for parts that do not fit together.
    """

    speaker: str | None = None
    """Lower-case name of a preset of the checkpoint."""
    speaker_embedding: Tensor | None = None
    """`[hidden_size]` float32. It is one row of the talker's prompt."""
    ref_codes: Tensor | None = None
    """`[frames, 16]` int64, the codes of the reference recording."""
    ref_text: str | None = None
    """What is said in the reference recording."""
    description: str | None = None
    """How a designed voice sounds if a turn has no instruction of its own."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Where the voice comes from, for people to read. A saved voice keeps them."""

    @classmethod
    def preset(cls, name: str) -> Self:
        """A speaker of a CustomVoice checkpoint. The prompt checks whether the checkpoint has it."""
        return cls(speaker=name.lower())

    @classmethod
    def x_vector(cls, embedding: Tensor) -> Self:
        """The voice of a recording, from its speaker embedding alone."""
        return cls(speaker_embedding=_detached(embedding, torch.float32))

    @classmethod
    def icl(cls, embedding: Tensor, ref_codes: Tensor, ref_text: str) -> Self:
        """The voice of a recording that the model continues (in-context learning). The closest and the
        slowest."""
        return cls(
            speaker_embedding=_detached(embedding, torch.float32),
            ref_codes=_detached(ref_codes, torch.int64),
            ref_text=ref_text.strip(),
        )

    @classmethod
    def designed(cls, description: str | None = None) -> Self:
        """No speaker. A VoiceDesign checkpoint invents one from the description or the turn's
        instruction."""
        return cls(description=None if description is None else description.strip())

    def with_notes(self, **notes: str) -> Self:
        """The same voice with these notes."""
        return replace(self, notes=notes)

    def __post_init__(self) -> None:
        if self.speaker is not None and self.speaker_embedding is not None:
            raise VoiceError("a voice is a preset or has a speaker embedding, both are given")
        if self.speaker is not None and not voice_name_ok(self.speaker):
            raise VoiceError(f"preset {self.speaker[:80]!r}, allowed: {_NAME.pattern}")
        if (self.ref_codes is None) != (self.ref_text is None):
            raise VoiceError("reference codes and reference text go together, one of them is missing")
        if self.speaker_embedding is not None:
            _check_embedding(self.speaker_embedding)
        elif self.ref_codes is not None:
            raise VoiceError("reference codes need a speaker embedding, it is missing")
        if self.ref_codes is not None:
            _check_codes(self.ref_codes)
        if self.ref_text is not None:
            _check_ref_text(self.ref_text)
        if self.description is not None:
            _check_description(self)

    @property
    def mode(self) -> VoiceKind:
        """The constructor that made this voice."""
        if self.speaker is not None:
            return "preset"
        if self.speaker_embedding is None:
            return "designed"
        return "x_vector" if self.ref_codes is None else "icl"

    def save(self, path: Path) -> None:
        """Write a cloned or described voice as safetensors, in full precision.

        The file is written whole or not at all, even after a crash.

        Raises:
            VoiceError: the voice has nothing to write: it is a preset, or designed without a
                description.
            OSError: the file cannot be written.
        """
        if self.speaker_embedding is None and self.description is None:
            raise VoiceError(f"a {self.mode} voice is not saved, allowed: x_vector, icl or described")
        metadata = _FILE_FORMAT | {"mode": self.mode, "hidden_size": str(self.hidden_size)}
        texts = {"ref_text": self.ref_text, "description": self.description}
        metadata |= {name: text for name, text in texts.items() if text is not None}
        metadata |= {_NOTE + name: text for name, text in self.notes.items()}
        _write_whole(path, safetensors.torch.save(self._tensors, metadata))

    @property
    def hidden_size(self) -> int:
        """Width of the talker that the voice is for, or 0 if it fits any."""
        return 0 if self.speaker_embedding is None else len(self.speaker_embedding)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"speaker_embedding": self.speaker_embedding, "ref_codes": self.ref_codes}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote. For files of the operator.

        Raises:
            VoiceError: the file is not such a file, or its parts do not fit together. The message names
                the file.
        """
        try:
            if not path.is_file() or path.stat().st_size > MAX_VOICE_FILE_BYTES:
                raise VoiceError(f"not a file of up to {MAX_VOICE_FILE_BYTES} bytes")
            return cls._from_file(path)
        except (OSError, SafetensorError) as error:
            raise VoiceError(f"{path}: not a readable voice file ({_one_line(error)})") from None
        except VoiceError as error:
            raise VoiceError(f"{path}: {error}") from None

    @classmethod
    def _from_file(cls, path: Path) -> Self:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key, expected in _FILE_FORMAT.items():
                if metadata.get(key) != expected:
                    raise VoiceError(f"{key} is {metadata.get(key)!r:.80}, expected {expected!r}")
            expected_names = _TENSORS.get(metadata.get("mode", ""), {"speaker_embedding"})
            if set(file.keys()) != expected_names:
                raise VoiceError(f"its tensors are not {sorted(expected_names)}")
            tensors = {name: file.get_tensor(name) for name in expected_names}
        notes = {k.removeprefix(_NOTE): text for k, text in metadata.items() if k.startswith(_NOTE)}
        texts = {name: metadata.get(name) for name in ("ref_text", "description")}
        voice = cls(**tensors, **texts, notes=notes)
        stated = (metadata.get("mode"), metadata.get("hidden_size"))
        actual = (voice.mode, str(voice.hidden_size))
        if stated != actual:
            raise VoiceError(f"its mode and hidden_size are stated as {stated!r:.80} but are {actual}")
        return voice


def _detached(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _check_embedding(embedding: Tensor) -> None:
    if embedding.dtype != torch.float32 or embedding.dim() != 1 or not len(embedding):
        raise VoiceError(
            f"speaker embedding is {_describe(embedding)}, expected float32 of one dimension"
        )
    if not embedding.isfinite().all():
        raise VoiceError("speaker embedding has values that are not finite numbers")


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.int64 or codes.dim() != 2 or codes.shape[1] != NUM_CODEBOOKS:
        raise VoiceError(
            f"reference codes are {_describe(codes)}, expected int64 of [frames, {NUM_CODEBOOKS}]"
        )
    if not 1 <= len(codes) <= MAX_REF_FRAMES:
        raise VoiceError(f"reference codes have {len(codes)} frames, allowed: 1 to {MAX_REF_FRAMES}")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= CODEBOOK_SIZE:
        raise VoiceError(f"reference codes are {low} to {high}, allowed: 0 to {CODEBOOK_SIZE - 1}")


def _check_ref_text(text: str) -> None:
    if not text.strip() or len(text) > MAX_REF_TEXT:
        raise VoiceError(
            f"reference text has {len(text)} characters, allowed: 1 to {MAX_REF_TEXT}, not blank"
        )
    if any("\ud800" <= char <= "\udfff" for char in text):  # JSON can hold this, UTF-8 cannot
        raise VoiceError("reference text has half of a surrogate pair")


def _check_description(voice: Voice) -> None:
    text = voice.description or ""
    if voice.mode != "designed":
        raise VoiceError(f"a description is for designed voices, this one is {voice.mode}")
    if not text.strip() or len(text) > MAX_DESCRIPTION:
        raise VoiceError(
            f"description has {len(text)} characters, allowed: 1 to {MAX_DESCRIPTION}, not blank"
        )
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise VoiceError("description has half of a surrogate pair")


def _write_whole(path: Path, content: bytes) -> None:
    """Write a hidden file in the same folder, and move it to its name."""
    aside = path.with_name(f".{path.stem}-{secrets.token_hex(4)}")
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of {list(tensor.shape)}"


class VoiceCloner:
    """Recordings to voices, with the two encoders of a Base checkpoint.

    It has no state, so threads may share it. The embedding and the codes are on the CPU.
    """

    def __init__(self, speaker_encoder: SpeakerEncoder, codec_encoder: CodecEncoder | None) -> None:
        """A checkpoint may lack a codec encoder. Then there are only x-vector voices."""
        self.speaker_encoder = speaker_encoder.eval()
        self.codec_encoder = codec_encoder.eval() if codec_encoder is not None else None

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings that it makes, and of the talker that they are for."""
        return self.speaker_encoder.config.enc_dim

    def clone(self, data: bytes, ref_text: str | None = None, *, refuse_clipped: bool = False) -> Voice:
        """Make a voice from a WAV or FLAC file (see `decode_reference`).

        Args:
            data: the file's bytes.
            ref_text: what is said in it, for an ICL voice. None makes an x-vector voice.
            refuse_clipped: whether a recording that was too loud is an error.

        Raises:
            VoiceError: the recording or the transcript cannot be used.
        """
        if ref_text is not None:
            if self.codec_encoder is None:
                raise VoiceError(
                    "this checkpoint has no codec encoder, so it cannot clone in context: "
                    "leave the transcript away"
                )
            _check_ref_text(ref_text)  # comes before the expensive part
        audio = torch.from_numpy(decode_reference(data, refuse_clipped=refuse_clipped))
        embedding = self.speaker_encoder.embed(audio)
        if ref_text is None or self.codec_encoder is None:
            return Voice.x_vector(embedding)
        return Voice.icl(embedding, self.codec_encoder.encode(audio), ref_text)


# --- the operator's folder ---------------------------------------------------------------------


def voice_name_ok(name: str) -> bool:
    """Whether `name` can name a voice: 1 to 64 letters, digits, `-` and `_`, the first a letter or
    digit."""
    return _NAME.fullmatch(name) is not None


def load_voices(folder: Path, cloner: VoiceCloner | None) -> dict[str, Voice]:
    """Load all voices of a folder of the operator, by name. They are read once, so a lookup reads no
    file.

    `NAME.safetensors` is a saved voice. `NAME.wav` or `NAME.flac` is a recording: an ICL voice if its
    transcript is beside it in `NAME.txt`, otherwise an x-vector voice. Other files and hidden files are
    ignored.

    Args:
        folder: of the operator.
        cloner: None for a VoiceDesign checkpoint, whose voices are described.

    Raises:
        VoiceError: the first file, by name, that cannot be used: a name that is not allowed or repeats,
            a link that leads out of the folder, a voice for a model of another width, bad content.
    """
    if not folder.is_dir():
        raise VoiceError(f"{folder}: not a folder")
    voices: dict[str, Voice] = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or suffix not in (".safetensors", ".wav", ".flac"):
            continue
        if not voice_name_ok(path.stem):
            raise VoiceError(f"{folder}: voice file {path.name!r}, allowed names: {_NAME.pattern}")
        if path.stem in voices:
            raise VoiceError(f"{path}: a second file for the voice {path.stem!r}")
        if suffix == ".safetensors":
            voice = Voice.load(_resolve_inside(path, folder))
        else:
            voice = _clone_file(path, folder, cloner)
        _check_fits(path, voice, cloner)
        voices[path.stem] = voice
    return voices


def _check_fits(path: Path, voice: Voice, cloner: VoiceCloner | None) -> None:
    if cloner is None:
        if voice.mode != "designed":
            raise VoiceError(f"{path}: a cloned voice, and a VoiceDesign checkpoint has described ones")
    elif voice.mode == "designed":
        raise VoiceError(f"{path}: a described voice, which only a VoiceDesign checkpoint can speak")
    elif voice.hidden_size != cloner.hidden_size:
        raise VoiceError(
            f"{path}: a voice for a model of width {voice.hidden_size}, this one has "
            f"{cloner.hidden_size}"
        )


def _clone_file(path: Path, folder: Path, cloner: VoiceCloner | None) -> Voice:
    if cloner is None:
        raise VoiceError(f"{path}: a recording, and a VoiceDesign checkpoint cannot clone voices")
    data = read_reference(_resolve_inside(path, folder))
    transcript = path.with_suffix(".txt")
    ref_text = None
    if transcript.exists() or transcript.is_symlink():
        ref_text = _read_transcript(_resolve_inside(transcript, folder))
    try:
        return cloner.clone(data, ref_text)
    except VoiceError as error:
        raise VoiceError(f"{path}: {error}") from None


def _read_transcript(path: Path) -> str:
    try:
        if path.stat().st_size > 4 * MAX_REF_TEXT + 4:  # the longest UTF-8, and a byte order mark
            raise VoiceError(f"{path}: too long, allowed: {MAX_REF_TEXT} characters")
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise VoiceError(f"{path}: not readable as UTF-8 ({_one_line(error)})") from None


def _resolve_inside(path: Path, folder: Path) -> Path:
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a dangling link; a loop of links
        raise VoiceError(f"{path}: {_one_line(error)}") from None
    if not resolved.is_relative_to(folder.resolve()) or not resolved.is_file():
        raise VoiceError(f"{path}: leads out of the folder, or is not a file")
    return resolved


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
