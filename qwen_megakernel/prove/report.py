"""The report as one static HTML file: tables, plots as SVG, players; nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from qwen_megakernel.prove.gates import GATES, shown, verdict_line

Found = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --aside: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left;
  vertical-align: top; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.aside { color: var(--aside); } .scroll { overflow-x: auto; }
audio { height: 2rem; width: 15rem; } svg { max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
"""
_COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 260, 60, 36, 24
WORST = 10
_WORDS = {True: ("good", "passed"), False: ("bad", "FAILED"), None: ("aside", "not measured")}


def html(found: Found) -> str:
    """The file's text. `found` has the content of report.json and the sound of the clips."""
    return "".join(_page(found))


def _page(found: Found) -> Iterator[str]:
    passed = found["passed"]
    word, style = ("passed", "good") if passed else ("FAILED", "bad")
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield '<link rel="icon" href="data:,">\n'
    yield f"<title>{escape(found['model'])}: {word}</title><style>{_STYLE}</style></head><body>\n"
    yield f"<h1>{escape(found['model'])} beside the official package: "
    yield f'<span class="{style}">{word}</span></h1>'
    yield _table(["", ""], [[k, v] for k, v in found["about"].items()])
    yield "<h2>Verdict</h2><ul>"
    for section in found["sections"]:
        line = verdict_line(section)
        yield f'<li class="{"bad" if "FAILED" in line else "good"}">{escape(line)}</li>\n'
    yield "</ul>"
    for section in found["sections"]:
        yield from _section(section)
    yield "</body></html>\n"


def _section(section: Found) -> Iterator[str]:
    yield f'<h2 id="{escape(section["part"])}">{escape(section["part"].capitalize())}</h2>\n'
    yield _gates(section["gates"])
    for note in section["notes"]:
        yield f"<p>{escape(note)}</p>"
    for table in section["tables"]:
        yield f"<h3>{escape(table['title'])}</h3>"
        yield _table(table["head"], table["rows"])
    for plot in section["plots"]:
        yield f"<h3>{escape(plot['title'])}</h3>"
        yield _plot(plot)
    if section["clips"]:
        yield from _pairs(section["clips"])


def _gates(gates: Sequence[Found]) -> str:
    if not gates:
        return ""
    rows = []
    for gate in gates:
        known = GATES[gate["name"]]
        style, word = {
            True: ("good", "passed"),
            False: ("bad", "FAILED"),
            None: ("aside", "not measured"),
        }[gate["passed"]]
        suspects = f"<br>Look at: {escape(known.suspects)}" if gate["passed"] is False else ""
        meaning = (
            f'{escape(known.meaning)}<br><span class="aside">{escape(gate["detail"])}</span>{suspects}'
        )
        value = "" if gate["value"] is None else escape(shown(gate))
        rows.append(
            f'<tr><td>{escape(gate["name"])}</td><td class="{style}">{word}</td>'
            f"<td>{value}</td><td>{meaning}</td></tr>"
        )
    head = "<tr><th>gate</th><th></th><th>value</th><th>what it is</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>\n'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(str(name))}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_cell(v)}</td>" for v in row) + "</tr>\n" for row in rows)
    top = f"<tr>{cells}</tr>\n" if any(head) else ""
    return f'<div class="scroll"><table>{top}{body}</table></div>\n'


def _cell(value: Any) -> str:
    return escape(f"{value:.5g}" if isinstance(value, float) else str(value))


def _plot(plot: Found) -> str:
    series = {name: values for name, values in plot["series"].items() if values}
    if not series:
        return ""
    every = [v for values in series.values() for v in values]
    low, high = min(every), max(every)
    high = high if high > low else low + 1
    most = max(2, max(map(len, series.values())))
    width, height = _WIDTH - _LEFT - 20, _HEIGHT - _BOTTOM - _TOP

    def x(index: float) -> float:
        return _LEFT + width * index / (most - 1)

    def y(value: float) -> float:
        return _TOP + height * (1 - (value - low) / (high - low))

    marks = []
    for step in range(5):
        value = low + (high - low) * step / 4
        marks.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            f'stroke="#8884"/><text x="4" y="{y(value) + 4:.1f}">{value:.3g}</text>'
        )
        index = (most - 1) * step / 4
        marks.append(
            f'<text x="{x(index):.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{index:.0f}</text>'
        )
    for number, (name, values) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
        marks.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        marks.append(
            f'<text x="{_LEFT + 150 * number}" y="14" style="fill:{colour}">{escape(name)}</text>'
        )
    marks.append(f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 4}">{escape(plot["x"])}</text>')
    title = escape(f"{plot['title']}: {plot['y']}")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{title}">'
        f"{''.join(marks)}</svg>\n"
    )


def _pairs(clips: Sequence[Found]) -> Iterator[str]:
    """Players: the worst cases first, then all."""

    def badness(clip: Found) -> float:
        ours, theirs = clip["ours"], clip["official"]
        lost = (not ours["stopped"]) * 100
        errors = (ours.get("errors", 0) - theirs.get("errors", 0)) / max(1, ours.get("words", 1))
        return lost + errors + abs(ours["s_per_char"] / max(theirs["s_per_char"], 1e-3) - 1) / 10

    worst = sorted(clips, key=badness, reverse=True)[:WORST]
    yield f"<h3>The {len(worst)} worst cases</h3>"
    yield _players(worst)
    yield f"<details><summary>All {len(clips)} pairs</summary>"
    yield _players(clips)
    yield "</details>"


def _players(clips: Sequence[Found]) -> str:
    rows = []
    for clip in clips:
        cells = [escape(clip["text"]), f"{escape(clip['voice'])}, seed {clip['seed']}"]
        for side in ("ours", "official"):
            one = clip[side]
            errors = f"{one['errors']} of {one['words']} words wrong" if "errors" in one else ""
            heard = escape(one.get("heard", ""))
            cells.append(
                f'<audio controls preload="none" src="data:audio/mpeg;base64,{one["mp3"]}"></audio>'
                f'<br><span class="aside">{one["duration_s"]:.2f} s, {errors}<br>{heard}</span>'
            )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n")
    head = "<tr><th>text</th><th>voice</th><th>ours</th><th>official</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>\n'
