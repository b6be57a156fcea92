"""Pages name only existing links, commands, options and files, and are short.

Each rule is a function from a source tree to a list of complaints. `test_rules_can_fail` shows that
each rule can complain.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from live_server import ROOT
from test_layout import PACKAGE, SOURCES, write_tree

from qwen_megakernel.__main__ import COMMANDS, SCRIPT
from qwen_megakernel.tools.banner import banner

README_WORDS = 1000
SENTENCE_WORDS = 40
DECLARED_IN = {"server.py": f"{PACKAGE}/tools/serve.py"}
"""Scripts whose options another file declares."""


def pages(root: Path) -> list[Path]:
    folders = ("docs", "demo_voice", *SOURCES)
    return [
        *sorted(root.glob("*.md")),
        *(page for name in folders for page in sorted((root / name).rglob("*.md"))),
    ]


def links_lead_somewhere(root: Path) -> Iterator[str]:
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            if not path.exists():
                yield f"{page.name}: link to {target}"
            elif anchor and path.suffix == ".md" and anchor not in anchors(path):
                yield f"{page.name}: link to {target}, which has no such heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_exist(root: Path) -> Iterator[str]:
    """Scripts, subcommands, make targets and files in commands and in `code` exist."""
    targets = set(
        re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    for page in pages(root):
        for code in code_of(page.read_text(encoding="utf-8")):
            for script in re.findall(r"\bpython3? ([\w./-]+\.py)\b", code):
                if not (root / script).is_file():
                    yield f"{page.name}: python {script}"
            for module in re.findall(r"-m training\.(\w+)", code):
                if not (root / "training" / f"{module}.py").is_file():
                    yield f"{page.name}: -m training.{module}"
            ours = rf"(-m {PACKAGE}|(?<![\w/-]){SCRIPT}) ([a-z][a-z-]*)"
            for program, command in re.findall(ours, code):
                if command not in COMMANDS:
                    yield f"{page.name}: {program} {command}"
            for target in re.findall(r"(?:^|[`$&;] *)make ([a-z-]*[a-z])", code, re.MULTILINE):
                if target not in targets:
                    yield f"{page.name}: make {target}"
            folders = "|".join(re.escape(name) for name in (*SOURCES, "docs", ".ci"))
            for path in re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)", code):
                if not (root / path).exists():
                    yield f"{page.name}: {path}"


def options_exist(root: Path) -> Iterator[str]:
    """Options exist in commands that run one of the project's scripts."""
    for page in pages(root):
        for code in code_of(page.read_text(encoding="utf-8")):
            for command in code.replace("\\\n", " ").splitlines():
                match = re.search(r"python3? (?:-m (training\.\w+)|([\w./-]*\.py)\b)(.*)", command)
                if match is None:
                    continue
                script = match[2] or match[1].replace(".", "/") + ".py"
                if not (root / script).is_file():
                    continue
                source = (root / DECLARED_IN.get(script, script)).read_text(encoding="utf-8")
                known = {"--help", *re.findall(r'"(--[a-z-]+)"', source)}
                for option in re.findall(r"(?<!\S)(--[a-z][a-z-]*)", match[3].split("`")[0]):
                    if option not in known:
                        yield f"{page.name}: {script} {option}"


def readme_is_short(root: Path) -> Iterator[str]:
    words = len((root / "README.md").read_text(encoding="utf-8").split())
    if words > README_WORDS:
        yield f"README.md has {words} words, allowed: {README_WORDS}"


def sentences_are_short(root: Path) -> Iterator[str]:
    """Sentences outside tables and code are short."""
    for page in pages(root):
        for sentence in sentences_of(page.read_text(encoding="utf-8")):
            if (words := len(sentence.split())) > SENTENCE_WORDS:
                yield f"{page.relative_to(root)}: {words} words: {sentence[:60]}"


def sentences_of(text: str) -> Iterator[str]:
    """Sentences of paragraphs and list items. A link counts by its text, `code` as one word."""
    text = re.sub(r"^ *```.*?^ *```", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(?: {4}|\||#|<).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for block in re.split(r"\n\s*\n|^ *(?:[-*]|\d+\.) ", text, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.!?])[\"')*\]]*\s+", block)


def code_of(text: str) -> list[str]:
    """Fenced blocks, then indented lines and inline code of the rest."""
    fenced = re.compile(r"^ *```.*?$(.*?)^ *```", re.MULTILINE | re.DOTALL)
    rest = fenced.sub("", text)
    return [
        *fenced.findall(text),
        *re.findall(r"^ {4}(.*)$", rest, re.MULTILINE),
        *re.findall(r"`[^`\n]+`", rest),
    ]


RULES = [links_lead_somewhere, commands_exist, options_exist, readme_is_short, sentences_are_short]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    assert list(rule(ROOT)) == []


GOOD_TREE = {
    "Makefile": "test: stamp\n",
    "server.py": "",
    "qwen_megakernel/tools/serve.py": "import argparse\n",
    "training/tokens.py": "import argparse\n",
    "README.md": "[this](#here), `make test`\n# Here\n",
}
FAULTS = [
    (links_lead_somewhere, "README.md", "[there](docs/there.md)"),
    (links_lead_somewhere, "README.md", "[there](#there)\n# Here"),
    (commands_exist, "README.md", "```\npython serve.py --port 1\n```"),
    (commands_exist, "README.md", "run `python -m qwen_megakernel dance`"),
    (commands_exist, "README.md", "run `qwen-megakernel dance`"),
    (commands_exist, "training/README.md", "run `python -m training.nothing`"),
    (commands_exist, "README.md", "run `make money`"),
    (commands_exist, "README.md", "so:\n\n    make money  # now\n"),
    (commands_exist, "README.md", "see `qwen_megakernel/kernel.py`"),
    (options_exist, "training/README.md", "```\npython -m training.tokens build --loud\n```"),
    (options_exist, "README.md", "```bash\npython server.py \\\n  --loud\n```"),
    (readme_is_short, "README.md", "So be it.\n" * 334),
    (sentences_are_short, "SETUP.md", "One. " + "two " * 41 + "three. Four."),
    (sentences_are_short, "docs/there.md", "# Here\n\n- " + "two\n  " * 41 + "\n- three"),
]


@pytest.mark.parametrize(("rule", "name", "text"), FAULTS)
def test_rules_can_fail(rule, name, text, tmp_path):
    write_tree(tmp_path, GOOD_TREE)
    assert list(rule(tmp_path)) == []
    write_tree(tmp_path, {name: text})
    assert len(list(rule(tmp_path))) == 1


def test_setup_shows_the_true_banner():
    decoder = SimpleNamespace(
        description=dict.fromkeys(
            ("model", "mode", "device", "dtype", "backend", "codec", "expect"), "-"
        ),
        voices={"default": None},
    )
    true = banner(decoder, "127.0.0.1", 8765, has_token=False).splitlines()
    page = (ROOT / "SETUP.md").read_text(encoding="utf-8")
    shown = next(code for code in code_of(page) if "Ready on ws://" in code).strip("\n").splitlines()
    shown = shown[shown.index("Ready on ws://127.0.0.1:8765") :]
    labels = re.compile(r"^  \w+: +")
    assert [labels.match(line)[0] for line in shown[1:]] == [labels.match(line)[0] for line in true[1:]]
    assert [shown[0], *shown[-3:]] == [true[0], *true[-3:]]
