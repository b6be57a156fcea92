"""The table and the plot of the load part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 720, 360, 56
LINES = {"p50": "#2a7f62", "p95": "#3366aa", "p99": "#aa3355"}
HEADER = (
    "load", "turns", "TTFB p50 / p95 / p99 / max, ms", "TTFA p50 / p95 / p99 / max, ms",
    "audio a second", "turns with an underrun", "underruns (s)", "refused (p99, ms)",
    "engine / process, cores", "GPU", "clients' lag p99, ms",
)  # fmt: skip


def rows(load: dict[str, Any]) -> list[list[str]]:
    """The cells of the table, one row for each run."""
    return [
        *(_row(f"{run['voices']} voices", run) for run in load["closed"]),
        *(_row(f"{run['rate']:.1f} turns a second", run) for run in load["open"]),
    ]


def notes(load: dict[str, Any]) -> list[str]:
    """Notes that a reader of the table needs."""
    said = [f"Each run takes {load['seconds']:g} s."]
    if load["largest"] is not None:
        said.append(f"The most voices without an underrun: {load['largest']}.")
    if network := load["network"]:
        said.append(
            f"Between clients and server: {1000 * network['delay_s']:g} ms of delay, up to "
            f"{1000 * network['jitter_s']:g} ms of jitter, {100 * network['loss']:g} % loss; "
            f"jitter buffer {1000 * load['jitter_buffer_s']:g} ms."
        )
    runs = [*load["closed"], *load["open"]]
    if any(run["clients"]["are_the_bottleneck"] for run in runs):
        said.append("Runs marked with * had clients that were too slow: take more --processes or cores.")
    if failures := sorted({line for run in runs for line in run["failures"]}):
        said.append(f"Connections failed: {'; '.join(failures[:3])}.")
    return said


def _row(load: str, run: dict[str, Any]) -> list[str]:
    clients, server, underruns = run["clients"], run["server"], run["underruns"]
    refused = str(run["refused"])
    if run["refusal_ms"]:
        refused += f" ({run['refusal_ms']['p99']:.1f})"
    return [
        load,
        str(run["turns"]),
        spread_cell(run["ttfb_ms"]),
        spread_cell(run["ttfa_ms"]),
        f"{run['audio_per_s']:.1f}",
        str(underruns["turns"]),
        f"{underruns['events']} ({underruns['seconds']:.2f})",
        refused,
        f"{_number(server['engine_cores'])} / {_number(server['process_cores'])}",
        "-" if server["gpu_share"] is None else f"{100 * server['gpu_share']:.0f} %",
        f"{clients['lag_p99_ms']:.1f}{' *' if clients['are_the_bottleneck'] else ''}",
    ]


def spread_cell(values: dict[str, float] | None) -> str:
    """A cell of percentiles and the largest value."""
    return (
        "-" if values is None else " / ".join(f"{values[p]:.1f}" for p in ("p50", "p95", "p99", "max"))
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# --- plot --------------------------------------------------------------------------------------


def plot(load: dict[str, Any]) -> str:
    """An SVG: time to first audio by load, and the share of turns that had an underrun."""
    kind, unit = ("voices", "voices") if load["closed"] else ("rate", "turns a second")
    runs = sorted(load["closed"] or load["open"], key=lambda run: run[kind])
    runs = [run for run in runs if run["ttfa_ms"]]
    highest = max((run["ttfa_ms"]["p99"] for run in runs), default=1.0) * 1.1
    furthest = max((run[kind] for run in runs), default=1.0)

    def x(run: dict[str, Any]) -> float:
        return MARGIN + run[kind] / furthest * (WIDTH - 2 * MARGIN)

    def y(part: float) -> float:
        return HEIGHT - MARGIN - part * (HEIGHT - 2 * MARGIN)

    shapes = [*_axes(unit, highest, y)]
    for run in runs:
        part = run["underruns"]["turns"] / max(1, run["turns"])
        shapes.append(
            f'<rect x="{x(run) - 6:.1f}" y="{y(part):.1f}" width="12" '
            f'height="{y(0) - y(part):.1f}" fill="#d9822b" fill-opacity="0.5"/>'
        )
        shapes.append(_text(x(run), HEIGHT - MARGIN + 16, f"{run[kind]:g}"))
    for number, (name, colour) in enumerate(LINES.items()):
        points = [(x(run), y(run["ttfa_ms"][name] / highest)) for run in runs]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points]
        shapes.append(_text(MARGIN + 60 + 70 * number, 24, f"TTFA {name}", colour))
    shapes.append(_text(MARGIN + 370, 24, "turns with an underrun (right)", "#d9822b"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def _axes(unit: str, highest: float, y: Any) -> Sequence[str]:
    lines = []
    for quarter in range(5):
        part = quarter / 4
        lines.append(
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y(part):.1f}" y2="{y(part):.1f}" '
            f'stroke="#dddddd"/>'
        )
        lines.append(_text(MARGIN - 26, y(part) + 4, f"{part * highest:.0f}"))
        lines.append(_text(WIDTH - MARGIN + 26, y(part) + 4, f"{100 * part:.0f} %"))
    lines.append(_text(MARGIN - 26, 24, "ms"))
    lines.append(_text(WIDTH / 2, HEIGHT - 14, unit))
    return lines


def _text(x: float, y: float, text: str, colour: str = "#333333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" fill="{colour}">{escape(text)}</text>'
