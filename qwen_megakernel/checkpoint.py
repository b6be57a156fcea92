"""Find or download checkpoints in the official layout, check them, and load them strictly.

    folder/    config.json  model.safetensors (or shards and their index)  vocab.json  merges.txt ...
    folder/speech_tokenizer/    config.json  model.safetensors

Weights are read from safetensors only, and no file is ever executed: no pickle, no remote code. Each
error of a checkpoint is one line that names the file or tensor, and what to do.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwen_megakernel.config import ModelConfig
from qwen_megakernel.installation.build_environment import user_cache_folder

log = logging.getLogger(__name__)

KNOWN_REVISIONS = {
    "Qwen/Qwen3-TTS-12Hz-0.6B-Base": "5d83992436eae1d760afd27aff78a71d676296fc",
    "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice": "85e237c12c027371202489a0ec509ded67b5e4b5",
    "Qwen/Qwen3-TTS-12Hz-1.7B-Base": "fd4b254389122332181a7c3db7f27e918eec64e3",
    "Qwen/Qwen3-TTS-12Hz-1.7B-CustomVoice": "0c0e3051f131929182e2c023b9537f8b1c68adfe",
    "Qwen/Qwen3-TTS-12Hz-1.7B-VoiceDesign": "5ecdb67327fd37bb2e042aab12ff7391903235d3",
}
"""The commit that each official id gives unless a revision is named: the same bytes for everyone."""

SPEECH_FOLDER = "speech_tokenizer"
"""The codec's folder inside a checkpoint."""
PREFIXES = ("talker.", "speaker_encoder.", "encoder.", "decoder.")
"""Prefixes of all tensors' names. The last two are the codec's."""

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
_FOLDER_FILES = ("config.json", "preprocessor_config.json", _WEIGHTS, _INDEX, "model-*.safetensors")
_PATTERNS = [
    *_FOLDER_FILES,
    *TOKENIZER_FILES,
    "generation_config.json",
    *(f"{SPEECH_FOLDER}/{name}" for name in _FOLDER_FILES),
]


class CheckpointError(ValueError):
    """A checkpoint cannot be found, fetched or used. One line says what to do."""


# ---------------------------------------------------------------------------- finding


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    progress: type | None = None,
) -> Path:
    """The local folder of a checkpoint, downloaded first if `model` is a Hugging Face id.

    Args:
        model: a folder, or an id such as `Qwen/Qwen3-TTS-12Hz-0.6B-Base`.
        revision: commit, tag or branch; None is the commit in `KNOWN_REVISIONS`, else `main`.
        offline: use what the cache holds and open no connection (as `HF_HUB_OFFLINE=1` does).
        progress: a class with tqdm's interface, instead of the hub's own progress bars.

    Raises:
        CheckpointError: there is no checkpoint, no access, no space, or neither network nor copy.
    """
    try:
        local = Path(model).expanduser()
    except RuntimeError:
        raise CheckpointError(f"{model}: no home folder is known; write the path without ~") from None
    if local.is_dir():
        if revision is not None:
            raise CheckpointError(f"{model}: is a local folder, which has no revision {revision!r}")
        _check_layout(local)
        return local
    if isinstance(model, Path) or local.exists() or not _is_hub_id(model):
        raise CheckpointError(
            f"{model}: no such folder, and no Hugging Face id such as {next(iter(KNOWN_REVISIONS))}"
        )
    folder = _fetch(model, revision or KNOWN_REVISIONS.get(model, "main"), offline, progress)
    _check_layout(folder)
    # The hub names the folder after the commit. With that as `revision`, one gets the same again.
    log.info("checkpoint %s at commit %s", model, folder.name)
    return folder


def hub_cache_folder() -> Path:
    """The folder of downloads: huggingface_hub's, or this project's if huggingface_hub finds no home."""
    from huggingface_hub import constants

    if constants.HF_HUB_CACHE.startswith("~"):  # huggingface_hub could not expand it
        return user_cache_folder() / "huggingface" / "hub"
    return Path(constants.HF_HUB_CACHE)


def _is_hub_id(model: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if model.count("/") != 1:  # the hub also allows bare names; here they are mistyped folders
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _fetch(model: str, revision: str, offline: bool, progress: type | None) -> Path:
    """The complete snapshot folder in the hub's cache. An interrupted download is resumed."""
    from huggingface_hub import constants, snapshot_download

    cache = hub_cache_folder()

    def download(**options: Any) -> Any:
        return snapshot_download(
            model, revision=revision, allow_patterns=_PATTERNS, cache_dir=cache, **options
        )

    if offline or constants.HF_HUB_OFFLINE:
        cached = _cached(download)
        if cached is None:
            raise CheckpointError(
                f"{model}: revision {revision} is not complete in {cache}; "
                "run once with a network connection, or pass a local folder"
            )
        return cached
    try:
        with _hub_errors(model, revision):
            silent = _silent_progress()
            plan = download(dry_run=True, tqdm_class=silent)
            _check_plan(model, plan, cache)
            fetching = any(file.will_download for file in plan)
            return Path(download(tqdm_class=progress if fetching else silent))
    except _Unreachable as error:
        cached = _cached(download)
        if cached is None:
            raise CheckpointError(str(error)) from error
        log.warning("%s; using the copy in the cache", error)
        return cached


def _silent_progress() -> type:
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def _cached(download: Callable[..., Any]) -> Path | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(download(local_files_only=True))
        _check_layout(folder)  # older hub versions also return partly downloaded folders
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    return folder


class _Unreachable(CheckpointError):
    """The hub did not answer. A copy in the cache is good enough."""


@contextmanager
def _hub_errors(model: str, revision: str) -> Iterator[None]:
    """Turn the errors of the hub's client into one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # A dry run wraps the error of the first request.
        cause = error.__cause__ if isinstance(error, errors.DryRunError) and error.__cause__ else error
        if isinstance(cause, errors.GatedRepoError):
            raise CheckpointError(
                f"{model}: access must be granted first; accept the terms on "
                f"{constants.ENDPOINT}/{model}, then run: hf auth login"
            ) from error
        if isinstance(cause, errors.RepositoryNotFoundError):
            raise CheckpointError(
                f"{model}: not on {constants.ENDPOINT}, or private; "
                "check the spelling, or run: hf auth login"
            ) from error
        if isinstance(cause, errors.RevisionNotFoundError):
            raise CheckpointError(
                f"{model}: has no revision {revision!r}; --revision main takes the newest"
            ) from error
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            raise CheckpointError(
                f"no space left in {hub_cache_folder()}; set HF_HOME elsewhere"
            ) from error
        if isinstance(cause, PermissionError):
            raise CheckpointError(
                f"{cause.filename}: {cause.strerror}; set HF_HOME elsewhere"
            ) from error
        if isinstance(cause, (OSError, errors.HfHubHTTPError)) or _is_transport_error(cause):
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise _Unreachable(
                f"{model}: cannot be fetched from {constants.ENDPOINT} ({reason}); "
                "check the network, or pass a local folder"
            ) from error
        raise


def _is_transport_error(error: BaseException) -> bool:
    # Versions of the hub's client use different HTTP libraries. This project depends on none of them.
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")


def _check_plan(model: str, files: list[Any], cache: Path) -> None:
    """Check before the download that the hub has the weights, and the disk has space for them."""
    names = {file.filename for file in files}
    for folder in ("", f"{SPEECH_FOLDER}/"):
        if not names & {folder + _WEIGHTS, folder + _INDEX}:
            raise CheckpointError(
                f"{model}: has no {folder}{_WEIGHTS}, so it is not a Qwen3-TTS checkpoint "
                "(weights in other formats are not loaded)"
            )
    _check_space(sum(file.file_size or 0 for file in files if file.will_download), cache)


def _check_space(need: int, folder: Path) -> None:
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise CheckpointError(
            f"needs {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB free; "
            "make room, or set HF_HOME to another disk"
        )


def _check_layout(folder: Path) -> None:
    """Check that all files are there. Raises `CheckpointError` for the first missing one."""
    for name in ("config.json", f"{SPEECH_FOLDER}/config.json", *TOKENIZER_FILES):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing, so this is no complete checkpoint")
    for part in (folder, folder / SPEECH_FOLDER):
        _weight_files(part)


# ---------------------------------------------------------------------------- safetensors


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor, as a file's header describes it."""

    path: Path
    dtype: str
    """The name of its dtype in safetensors: BF16, F32, ..."""
    shape: tuple[int, ...]


_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_FLOATING = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100_000_000  # the format's own limit


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; if there is an index, it names them."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        shards = sorted(set(_read_index(folder / _INDEX).values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder / _INDEX}: its shard {shard} is missing; download it")
        return [folder / shard for shard in shards]
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(pattern))]
    if pickles:
        raise CheckpointError(
            f"{folder}: has {pickles[0]} but no {_WEIGHTS}; pickled weights can run code and are not "
            "loaded, convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: {_WEIGHTS} is missing")


def _read_index(path: Path) -> dict[str, str]:
    """Read an index: tensor name -> file name."""
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(shard) for name, shard in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: is not a safetensors index; download it again") from None
    for shard in names.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: names {shard!r}, expected a safetensors file beside it")
    return names


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file, checked against the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, max(size - 8, 0)):
            raise CheckpointError(f"{path}: is truncated or no safetensors file; download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        tensors, end = {}, 0
        for name, entry in header.items():
            tensors[name], last = _read_entry(path, entry)
            end = max(end, last)
        if not isinstance(metadata, dict):
            raise ValueError("metadata")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: has a corrupt header; download it again") from None
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path}: has {size} bytes, its header says {8 + length + end}; download it again"
        )
    return tensors, metadata


def _read_entry(path: Path, entry: dict[str, Any]) -> tuple[TensorInfo, int]:
    """One tensor of a header and the offset of its end. Raises `ValueError` if they disagree."""
    shape = tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if any(type(number) is not int for number in (*shape, start, end)):
        raise ValueError("numbers")
    if (
        min((*shape, start), default=0) < 0
        or end - start != math.prod(shape) * _ITEM_BYTES[entry["dtype"]]
    ):
        raise ValueError("offsets")
    return TensorInfo(path, entry["dtype"], shape), end


def _read_headers(folder: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors of all files of a folder, and the first file's metadata."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for path in _weight_files(folder):
        found, notes = _read_header(path)
        double = next((name for name in found if name in tensors), None)
        if double is not None:
            raise CheckpointError(f"{path}: {double} is also in {tensors[double].path.name}")
        tensors.update(found)
        metadata = metadata or notes
    if not (folder / _WEIGHTS).is_file():
        for name, shard in _read_index(folder / _INDEX).items():
            if name not in tensors or tensors[name].path.name != shard:
                raise CheckpointError(f"{folder / shard}: {name} is missing; download it again")
    return tensors, metadata


# ---------------------------------------------------------------------------- loading


class Checkpoint:
    """An opened checkpoint. It reads headers at once, and weights only in `load`.

    Raises `CheckpointError` or `ConfigError` if a file is missing, malformed or cut short.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, TensorInfo]
    """Every tensor of both weight files by its full name."""
    note: str | None
    """A synthetic checkpoint's note about itself; None for a real one."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        _check_layout(self.folder)
        self.config = ModelConfig.from_folder(self.folder)
        model, metadata = _read_headers(self.folder)
        speech, _ = _read_headers(self.folder / SPEECH_FOLDER)
        self.tensors = {**model, **speech}
        self.note = metadata.get("synthetic")

    def verify(self) -> None:
        """Check the set of tensors as a whole.

        Raises:
            CheckpointError: no part of the model owns a tensor, or a part has no tensors.
        """
        for name, info in self.tensors.items():
            if not name.startswith(PREFIXES):
                raise CheckpointError(f"{info.path}: tensor {name} belongs to no part of the model")
            if info.dtype not in _FLOATING:
                raise CheckpointError(f"{info.path}: {name} is {info.dtype}, expected {_or(_FLOATING)}")
        for prefix in PREFIXES:
            if prefix == "speaker_encoder." and self.config.mode != "base":
                continue
            if prefix == "encoder." and self.config.codec_encoder is None:
                continue
            if not any(name.startswith(prefix) for name in self.tensors):
                raise CheckpointError(f"{self.folder}: has no tensor {prefix}*")

    def load(
        self,
        prefix: str,
        module: torch.nn.Module,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Fill a module, made on the meta device, with the tensors under a prefix.

        Afterwards the module is in eval mode, without gradients. Tensors are read, moved and cast one
        by one, so there is never a second copy of the weights. The caller fills buffers that are not in
        the module's `state_dict` (RoPE tables).

        Args:
            prefix: one of `PREFIXES`, or a longer one such as `talker.code_predictor.`.
            module: its `state_dict` must have exactly the names and shapes under the prefix.
            dtype: of the loaded floating-point tensors; None keeps the file's dtype.
            device: of the loaded tensors.

        Raises:
            CheckpointError: a tensor is missing, unexpected or has another shape. It names the first.
        """
        expected = {prefix + name: tensor for name, tensor in module.state_dict().items()}
        self._check(prefix, expected)
        state = {
            name.removeprefix(prefix): _place(tensor, dtype, torch.device(device))
            for name, tensor in self._read(expected)
        }
        module.requires_grad_(False)
        module.load_state_dict(state, strict=True, assign=True)
        module.eval()

    def _check(self, prefix: str, expected: dict[str, torch.Tensor]) -> None:
        where = self.folder / SPEECH_FOLDER if prefix in ("encoder.", "decoder.") else self.folder
        for name, tensor in expected.items():
            info = self.tensors.get(name)
            if info is None:
                raise CheckpointError(f"{where}: tensor {name} is missing")
            if info.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{info.path}: {name} is {list(info.shape)}, expected {list(tensor.shape)} "
                    "(does config.json belong to these weights?)"
                )
            if tensor.is_floating_point() and info.dtype not in _FLOATING:
                raise CheckpointError(
                    f"{info.path}: {name} is {info.dtype}, expected {_or(_FLOATING)}; "
                    "quantized checkpoints are not supported"
                )
        for name, info in self.tensors.items():
            if name.startswith(prefix) and name not in expected:
                raise CheckpointError(f"{info.path}: tensor {name} is not part of this model")

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor as stored, on the CPU, file by file."""
        by_path: dict[Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self.tensors[name].path, []).append(name)
        for path, group in by_path.items():
            try:
                with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
                    for name in group:
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); download it again") from error


def _place(tensor: torch.Tensor, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """A copy on the device: safetensors returns a view of the file, and not memory of its own."""
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    if device.type == "cpu":
        return tensor.to(dtype, copy=True)
    return tensor.to(device).to(dtype)  # cast on the device: the file's dtype is smaller to move


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)
