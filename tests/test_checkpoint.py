"""Finding, downloading (from a hub on loopback), loading and refusing checkpoints."""

import json
import logging
import math
import shutil
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen_megakernel import checkpoint as module_under_test
from qwen_megakernel.checkpoint import (
    KNOWN_REVISIONS,
    Checkpoint,
    CheckpointError,
    resolve,
)
from qwen_megakernel.config import ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def module_like(tensors: dict[str, tuple[int, ...]], dtype=torch.float32) -> torch.nn.Module:
    """A module on the meta device whose state_dict has these names and shapes."""
    root = torch.nn.Module()
    for name, shape in tensors.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, torch.nn.Module())
            node = node._modules[part]
        node.register_parameter(leaf, torch.nn.Parameter(torch.empty(shape, device="meta", dtype=dtype)))
    return root


def part_of(checkpoint: Checkpoint, prefix: str) -> torch.nn.Module:
    return module_like(
        {n.removeprefix(prefix): t.shape for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
    )


@pytest.fixture
def copy(tiny_base, tmp_path) -> Path:
    """A copy of a checkpoint that the test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def edit(path: Path, change) -> None:
    """Rewrite a weight file with its dict of tensors changed."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def split(folder: Path) -> None:
    """Turn the single weight file into two shards and an index, as large models are released."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n].clone() for n in part}, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


# --- loading ---


@pytest.mark.parametrize("prefix", ["talker.", "talker.code_predictor.", "speaker_encoder.", "decoder."])
def test_load_fills_every_tensor_and_casts(tiny_base, prefix):
    opened = Checkpoint(tiny_base)
    part = part_of(opened, prefix)
    opened.load(prefix, part, dtype=torch.float64)
    folder = tiny_base / "speech_tokenizer" if prefix == "decoder." else tiny_base
    stored = {n: t for n, t in load_file(folder / WEIGHTS).items() if n.startswith(prefix)}
    loaded = {prefix + n: t for n, t in part.state_dict().items()}
    assert loaded.keys() == stored.keys()
    assert all(t.dtype == torch.float64 and t.device.type == "cpu" for t in loaded.values())
    assert [n for n, t in stored.items() if not torch.equal(loaded[n], t.double())] == []
    assert not part.training
    assert not any(p.requires_grad for p in part.parameters())


def test_the_files_own_dtype_is_the_default(tiny_base):
    opened = Checkpoint(tiny_base)
    talker, encoder = part_of(opened, "talker."), part_of(opened, "encoder.")
    opened.load("talker.", talker)
    opened.load("encoder.", encoder)
    assert {p.dtype for p in talker.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_loaded_weights_do_not_hang_on_the_file(copy):
    opened = Checkpoint(copy)
    part = part_of(opened, "speaker_encoder.")
    opened.load("speaker_encoder.", part)
    before = {n: t.clone() for n, t in part.state_dict().items()}
    path = copy / WEIGHTS
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place: a new file would leave the old one mapped
        start = 8 + struct.unpack("<Q", file.read(8))[0]
        file.seek(start)
        file.write(b"\0" * (size - start))
    assert all(torch.equal(before[n], t) for n, t in part.state_dict().items())


def test_integer_tensors_keep_their_type(copy):
    edit(copy / WEIGHTS, lambda t: t.update({"talker.steps": torch.tensor([7])}))
    opened = Checkpoint(copy)
    part = module_like(
        {
            n.removeprefix("talker."): t.shape
            for n, t in opened.tensors.items()
            if n.startswith("talker.")
        }
    )
    del part.steps
    part.register_buffer("steps", torch.empty(1, dtype=torch.int64, device="meta"))
    opened.load("talker.", part, dtype=torch.bfloat16)
    assert part.steps.dtype == torch.int64
    assert part.steps.item() == 7


def test_note_tells_synthetic_from_real(copy):
    assert "noise" in Checkpoint(copy).note
    edit(copy / WEIGHTS, lambda tensors: None)
    assert Checkpoint(copy).note is None


def test_shards_load_as_one_file_does(copy, tiny_base):
    split(copy)
    whole, shards = Checkpoint(tiny_base), Checkpoint(copy)
    shards.verify()
    a, b = part_of(whole, "talker."), part_of(shards, "talker.")
    whole.load("talker.", a)
    shards.load("talker.", b)
    assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("talker.model.norm.weight"), r"tensor talker\.model\.norm\.weight is missing"),
        (
            lambda t: t.update({"talker.extra": torch.ones(1)}),
            r"tensor talker\.extra is not part of this model",
        ),
        (
            lambda t: t.update({"talker.model.norm.weight": torch.ones(129)}),
            r"talker\.model\.norm\.weight is \[129\], expected \[128\]",
        ),
        (
            lambda t: t.update({"talker.model.norm.weight": torch.ones(128, dtype=torch.int8)}),
            r"talker\.model\.norm\.weight is I8, .*quantized",
        ),
    ],
    ids=["missing", "extra", "shape", "quantized"],
)
def test_load_names_the_tensor_that_is_wrong(copy, tiny_base, change, message):
    part = part_of(Checkpoint(tiny_base), "talker.")
    edit(copy / WEIGHTS, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(copy).load("talker.", part)
    assert all(p.is_meta for p in part.parameters())  # nothing half loaded


def test_verify_reports_what_no_part_owns_and_what_is_not_there(copy):
    Checkpoint(copy).verify()
    edit(copy / WEIGHTS, lambda t: t.update({"thinker.w": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"tensor thinker\.w belongs to no part"):
        Checkpoint(copy).verify()
    edit(
        copy / WEIGHTS,
        lambda t: [t.pop(n) for n in list(t) if n.startswith(("thinker.", "speaker_encoder."))],
    )
    with pytest.raises(CheckpointError, match=r"has no tensor speaker_encoder\.\*"):
        Checkpoint(copy).verify()


def test_verify_accepts_all_modes(tiny_custom_voice, tiny_voice_design, tiny_base_1_7b):
    for folder in (tiny_custom_voice, tiny_voice_design, tiny_base_1_7b):
        Checkpoint(folder).verify()


# --- damaged files ---


def test_truncated_and_grown_files_are_refused(copy):
    path = copy / "speech_tokenizer" / WEIGHTS
    data = path.read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="download it again"):
            Checkpoint(copy)
    path.write_bytes(data + b"\0")
    with pytest.raises(
        CheckpointError, match=rf"has {len(data) + 1} bytes, its header says {len(data)}"
    ):
        Checkpoint(copy)


def header(entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@given(st.binary(max_size=200))
@example(b"\x80\x04\x95 a pickle, by its first bytes")
@example(b"<!DOCTYPE html><html>an error page saved as weights</html>")
@example(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
@example(struct.pack("<Q", 2) + b"[]")
@example(struct.pack("<Q", 1 << 60) + b"{}")
@example(header({"a": {**ONE, "shape": [2]}}) + b"1234")
@example(header({"a": {**ONE, "shape": [-1]}}) + b"1234")
@example(header({"a": {**ONE, "dtype": "F4"}}) + b"1234")
@example(header({"a": {**ONE, "data_offsets": [-4, 0]}}) + b"1234")
@example(header({"a": {"dtype": "F32"}}) + b"1234")
@example(header({"a": 1}) + b"1234")
@example(header({"a": ONE, "__metadata__": [1]}) + b"1234")
@example(header({"a": {**ONE, "shape": [math.inf]}}).replace(b"Infinity", b"1e999   ") + b"1234")
@example(struct.pack("<Q", 100_000) + b"[" * 100_000)
@example(header({"a": {**ONE, "data_offsets": [0]}}) + b"1234")
@example(header({"a": {**ONE, "data_offsets": ["0", "4"]}}) + b"1234")
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes_are_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("junk") / WEIGHTS
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="download it again") as raised:
        module_under_test._read_header(path)
    assert "\n" not in str(raised.value)


def test_a_well_formed_header_is_read(tmp_path):
    path = tmp_path / WEIGHTS
    path.write_bytes(header({"a": ONE, "__metadata__": {"x": "y"}}) + b"1234")
    tensors, metadata = module_under_test._read_header(path)
    assert (tensors["a"].dtype, tensors["a"].shape, metadata) == ("F32", (1,), {"x": "y"})


def test_missing_shard_and_bad_index(copy):
    split(copy)
    index = json.loads((copy / INDEX).read_text())
    shard = copy / "model-00002-of-00002.safetensors"
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"its shard model-00002-of-00002\.safetensors is missing"):
        Checkpoint(copy)
    shard.write_bytes(kept)
    for weight_map, message in (
        ({**index["weight_map"], "talker.ghost": shard.name}, r"talker\.ghost is missing"),
        ({"talker.x": "../../etc/model.safetensors"}, "expected a safetensors file beside it"),
        ({"talker.x": "pytorch_model.bin"}, "expected a safetensors file beside it"),
        ([1, 2], "is not a safetensors index"),
    ):
        (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(copy)
    (copy / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        Checkpoint(copy)


def test_a_tensor_in_two_shards_is_refused(copy):
    split(copy)
    first = copy / "model-00001-of-00002.safetensors"
    name = next(iter(load_file(copy / "model-00002-of-00002.safetensors")))
    edit(first, lambda t: t.update({name: torch.ones(1)}))
    with pytest.raises(CheckpointError, match="is also in model-00001-of-00002"):
        Checkpoint(copy)


def test_pickled_weights_are_refused_and_not_opened(copy):
    (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin but no model\.safetensors.*can run code"
    ):
        Checkpoint(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        Checkpoint(copy)


@pytest.mark.parametrize(
    "name", ["config.json", "speech_tokenizer/config.json", "vocab.json", "merges.txt"]
)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        resolve(copy)


def test_a_configuration_of_another_model_is_refused(copy):
    (copy / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="model_type is 'llama'"):
        Checkpoint(copy)


# --- finding ---


def test_a_local_folder_is_taken_as_it_is(tiny_base, monkeypatch):
    assert resolve(tiny_base) == tiny_base
    assert resolve(str(tiny_base), offline=True) == tiny_base
    monkeypatch.chdir(tiny_base.parent)
    assert resolve(tiny_base.name) == Path(tiny_base.name)
    with pytest.raises(CheckpointError, match="local folder, which has no revision"):
        resolve(tiny_base, revision="main")


@pytest.mark.parametrize(
    "model", ["no-such-folder", "./a/b", "/no/such/folder", "a/b/c", "a b/c", Path("a/b")]
)
def test_neither_folder_nor_id(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder, and no Hugging Face id such as Qwen/"):
        resolve(model)


def test_official_ids_are_pinned_to_commits():
    assert len(KNOWN_REVISIONS) == 5
    assert all(len(c) == 40 and int(c, 16) for c in KNOWN_REVISIONS.values())
    assert len(set(KNOWN_REVISIONS.values())) == 5


# --- the hub ---

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """The part of the Hugging Face hub that a download needs. It serves one folder as `acme/voice`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.gated = False
        self.down = False
        self.broken = ""
        """A file that breaks off halfway."""
        self.requests: list[str] = []

    def files(self) -> list[str]:
        return sorted(
            p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()
        )


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.server.down:  # connections kept alive outlive the listening socket
            self.close_connection = True
            return
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[2:4] == ["acme", "voice"]:
            if parts[4] == "revision" and parts[5] in ("main", COMMIT):
                self.answer_json({"id": "acme/voice", "sha": COMMIT, "siblings": []})
            elif parts[4] == "tree":
                self.answer_json(
                    [
                        {"type": "file", "path": n, "oid": f"{i:040x}", "size": self.size(n)}
                        for i, n in enumerate(self.server.files())
                    ]
                )
            else:
                self.refuse(404, "RevisionNotFound")
        elif parts[:3] == ["acme", "voice", "resolve"] and "/".join(parts[4:]) in self.server.files():
            self.answer_file("/".join(parts[4:]))
        else:
            self.refuse(404, "RepoNotFound")

    def size(self, name: str) -> int:
        return (self.server.folder / name).stat().st_size

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer_json(self, value) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_file(self, name: str) -> None:
        if self.server.gated:
            self.refuse(403, "GatedRepo")
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = (self.server.folder / name).read_bytes()[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{self.server.files().index(name):040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{start + len(body) - 1}/{start + len(body)}"
            )
        self.end_headers()
        if self.command == "GET" and name == self.server.broken:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tiny_base, tmp_path, monkeypatch):
    """The only hub that the tested code can reach. Its cache is empty and belongs to the test."""
    from huggingface_hub import constants

    server = Hub(Path(shutil.copytree(tiny_base, tmp_path / "hub")))
    (server.folder / "README.md").write_text("not needed")
    (server.folder / "pytorch_model.bin").write_bytes(b"not wanted")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def stop(server: Hub) -> None:
    server.down = True
    server.shutdown()
    server.server_close()


def test_download_brings_what_is_needed_and_logs_the_commit(hub, tiny_base, caplog):
    with caplog.at_level(logging.INFO, logger="qwen_megakernel"):
        folder = resolve("acme/voice")
    assert folder.name == COMMIT
    assert f"acme/voice at commit {COMMIT}" in caplog.text
    fetched = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert fetched == sorted(
        p.relative_to(tiny_base).as_posix() for p in tiny_base.rglob("*") if p.is_file()
    )
    assert all((folder / n).read_bytes() == (tiny_base / n).read_bytes() for n in fetched)
    Checkpoint(folder).verify()


def test_a_pinned_commit_needs_the_hub_once(hub, capfd):
    folder = resolve("acme/voice", revision=COMMIT)
    assert "Fetching" in capfd.readouterr().err  # the hub's progress bar
    hub.requests.clear()
    assert resolve("acme/voice", revision=COMMIT) == folder
    assert hub.requests == []
    assert capfd.readouterr().err == ""


def test_an_official_id_asks_for_its_commit(hub, monkeypatch):
    monkeypatch.setitem(KNOWN_REVISIONS, "acme/voice", COMMIT)
    resolve("acme/voice")
    assert not any("/main" in r for r in hub.requests)
    assert resolve("acme/voice", revision="main").name == COMMIT
    assert any("/revision/main" in r for r in hub.requests)


def test_a_branch_is_looked_up_and_survives_without_the_hub(hub, caplog):
    folder = resolve("acme/voice")
    hub.requests.clear()
    assert resolve("acme/voice") == folder
    assert any("/revision/main" in r for r in hub.requests)
    stop(hub)
    assert resolve("acme/voice") == folder
    assert "using the copy in the cache" in caplog.text


def test_offline_asks_nobody(hub, monkeypatch):
    with pytest.raises(
        CheckpointError, match=r"is not complete in .*run once with a network connection"
    ):
        resolve("acme/voice", offline=True)
    assert hub.requests == []
    folder = resolve("acme/voice")
    hub.requests.clear()
    assert resolve("acme/voice", offline=True) == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("acme/voice") == folder
    assert hub.requests == []
    (folder / "speech_tokenizer" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="is not complete in"):
        resolve("acme/voice", offline=True)


def test_no_network_and_no_copy(hub):
    stop(hub)
    with pytest.raises(
        CheckpointError, match=r"cannot be fetched from http://127.* check the network"
    ) as raised:
        resolve("acme/voice")
    assert "\n" not in str(raised.value)


def test_an_interrupted_download_is_finished_by_the_next(hub, tiny_base, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's pauses between tries
    hub.broken = WEIGHTS
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        resolve("acme/voice")
    hub.broken = ""
    folder = resolve("acme/voice")
    assert (folder / WEIGHTS).read_bytes() == (tiny_base / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("acme/typo", None, "acme/typo: not on http.*check the spelling"),
        ("acme/voice", "v9", "acme/voice: has no revision 'v9'"),
    ],
)
def test_unknown_model_or_revision(hub, model, revision, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        resolve(model, revision=revision)
    assert "\n" not in str(raised.value)


def test_a_gated_model_says_where_to_ask(hub):
    hub.gated = True
    with pytest.raises(
        CheckpointError, match=r"access must be granted.*/acme/voice, then run: hf auth login"
    ):
        resolve("acme/voice")


def test_pickles_alone_are_not_downloaded(hub):
    (hub.folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        resolve("acme/voice")
    assert not [r for r in hub.requests if r.startswith("GET /acme")]


def test_space_is_checked_before_the_download(hub, monkeypatch, tmp_path):
    need = sum(
        (hub.folder / n).stat().st_size for n in hub.files() if not n.startswith(("README", "pytorch"))
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GB in .*cache, 0\.0 GB free; make room"):
        resolve("acme/voice")
    assert not [r for r in hub.requests if r.startswith("GET /acme")]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    folder = resolve("acme/voice")
    # what is there already needs no space again
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert resolve("acme/voice") == folder


# --- the true shape ---


@pytest.mark.slow
def test_true_shape_opens_and_the_decoder_loads(base_0_6b):
    opened = Checkpoint(base_0_6b)
    opened.verify()
    part = part_of(opened, "decoder.")
    opened.load("decoder.", part, dtype=torch.bfloat16)
    assert sum(p.numel() for p in part.parameters()) > 114e6
