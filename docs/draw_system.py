"""Draw the system's picture: `python docs/draw_system.py` writes docs/system-light.svg and -dark.svg."""

from __future__ import annotations

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 960, 330
THEMES = {
    "light": {
        "paper": "#ffffff", "ink": "#1f2328", "faint": "#59636e",
        "box": "#f6f8fa", "edge": "#8c959f", "gpu": "#ddf4ff",
    },
    "dark": {
        "paper": "#0d1117", "ink": "#f0f6fc", "faint": "#9198a1",
        "box": "#151b23", "edge": "#656c76", "gpu": "#12304f",
    },
}  # fmt: skip

# left, top, width, title, lines below it, colour
BOXES = (
    (20, 40, 170, "Client", ("text, word by word", "Pipecat, CLI, browser"), "box"),
    (20, 200, 170, "Client", ("24 kHz PCM, 80 ms", "at a time"), "box"),
    (240, 40, 170, "serving/", ("WebSocket dialects,", "one session core"), "box"),
    (460, 40, 170, "prompt/", ("text and voice", "to rows"), "box"),
    (240, 200, 170, "engine/", ("schedules frames,", "hands out sound"), "box"),
    (680, 40, 250, "decoding/, csrc/", ("talker and code predictor:", "one launch a frame"), "gpu"),
    (680, 200, 250, "codec/, csrc/", ("16 codes to 1920 samples,", "exact in any split"), "gpu"),
)  # fmt: skip
BOX_HEIGHT = 84

# from x, y to x, y, label
ARROWS = (
    (190, 82, 240, 82, "text"),
    (410, 82, 460, 82, ""),
    (630, 82, 680, 82, "rows"),
    (805, 124, 805, 200, "16 codes a frame"),
    (680, 242, 410, 242, "samples"),
    (240, 242, 190, 242, "PCM"),
)  # fmt: skip


def draw(theme: dict[str, str]) -> str:
    """The picture as SVG text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" role="img">',
        "<title>From text to sound: client, serving, prompt, decoding, codec, engine, client</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" '
        f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{theme["edge"]}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="{theme["paper"]}"/>',
    ]
    for x, y, width, title, lines, colour in BOXES:
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="8" '
            f'fill="{theme[colour]}" stroke="{theme["edge"]}"/>'
        )
        parts.append(_text(x + width / 2, y + 27, title, theme["ink"], 17, "600"))
        parts += [
            _text(x + width / 2, y + 50 + 19 * i, line, theme["faint"], 14)
            for i, line in enumerate(lines)
        ]
    for x1, y1, x2, y2, label in ARROWS:
        parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{theme["edge"]}" stroke-width="2" '
            'marker-end="url(#tip)"/>'
        )
        aside = 66 if x1 == x2 else 0
        parts.append(
            _text(
                (x1 + x2) / 2 + aside, (y1 + y2) / 2 - (8 if y1 == y2 else -5), label, theme["faint"], 13
            )
        )
    parts.append(
        _text(
            805,
            310,
            "on the GPU, up to 8 voices a frame",
            theme["faint"],
            13,
        )
    )
    return "\n".join([*(part for part in parts if part), "</svg>", ""])


def _text(x: float, y: float, text: str, fill: str, size: int, weight: str = "400") -> str:
    if not text:
        return ""
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="middle">{escape(text)}</text>'
    )


def main() -> None:
    """Write the pictures."""
    for name, theme in THEMES.items():
        (FOLDER / f"system-{name}.svg").write_text(draw(theme))


if __name__ == "__main__":
    main()
