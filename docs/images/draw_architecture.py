"""Draw architecture.svg, beside this file: ``python docs/images/draw_architecture.py``.

Boxes are filled and arrows are grey, so that the picture reads on light and on dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 960, 470
INK, ARROW = "#1c2733", "#7d8894"
DATA, ROOM, FRAME = "#fdf3d7", "#dcebf9", "#b9c6d2"

# Frames of the layers: name, what it owns, left, top, width, height.
LAYERS = (
    ("indexer", "owns the model and the files", 170, 110, 250, 250),
    ("retriever", "owns the question", 560, 110, 180, 250),
    ("evaluation", "owns the experiments", 760, 110, 180, 250),
    ("cli and Python", "the screen, and the public names", 170, 20, 770, 66),
)
# Boxes: lines of text, left, top, width, height, fill.
BOXES = (
    (("training rows",), 15, 150, 125, 46, DATA),
    (("model,", "checkpoints"), 15, 225, 125, 56, DATA),
    (("rows, labels, word pieces",), 185, 155, 220, 34, ROOM),
    (("one forward, one backward",), 185, 197, 220, 34, ROOM),
    (("features, gradients, sketches,", "words, spans"), 185, 239, 220, 52, ROOM),
    (("curvature, search structures",), 185, 299, 220, 34, ROOM),
    (("index folder", "Arrow, FAISS,", "manifest"), 440, 185, 100, 90, DATA),
    (("query vector",), 575, 155, 150, 34, ROOM),
    (("candidates",), 575, 197, 150, 34, ROOM),
    (("exact scores",), 575, 239, 150, 34, ROOM),
    (("ranked rows,", "words, spans"), 575, 281, 150, 52, DATA),
    (("explanations",), 775, 155, 150, 34, ROOM),
    (("measures, retraining",), 775, 197, 150, 34, ROOM),
    (("audits",), 775, 239, 150, 34, ROOM),
    (("reports",), 775, 281, 150, 52, DATA),
    (("test rows",), 585, 395, 130, 46, DATA),
)
# Arrows: from, by way of, to.
ARROWS = (
    ((140, 173), (183, 173)),
    ((140, 253), (183, 214)),
    ((405, 265), (438, 240)),
    ((540, 215), (573, 214)),
    ((650, 395), (650, 362)),
    ((725, 307), (773, 216)),
)


def drawing() -> str:
    """The picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, sans-serif">',
        "<title>From training rows to an index, and from test rows to ranked rows and reports</title>",
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{ARROW}"/></marker></defs>',
    ]
    for name, owns, x, y, width, height in LAYERS:
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="#f4f7fa" stroke="{FRAME}"/>'
        )
        parts += [text(name, x + 15, y + 22, "bold 15px", "start"), text(owns, x + 15, y + 39, "12px", "start")]
    for lines, x, y, width, height, fill in BOXES:
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{FRAME}"/>')
        top = y + height / 2 + 5 - 9 * (len(lines) - 1)
        parts += [text(line, x + width / 2, top + 18 * i, "13px", "middle") for i, line in enumerate(lines)]
    for points in ARROWS:
        path = " L".join(f"{x} {y}" for x, y in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{ARROW}" stroke-width="2" marker-end="url(#end)"/>')
    return "\n".join([*parts, "</svg>", ""])


def text(line: str, x: float, y: float, font: str, anchor: str) -> str:
    """One line of text."""
    *weight, size = font.split()
    bold = ' font-weight="bold"' if weight else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}"{bold} fill="{INK}" text-anchor="{anchor}">{escape(line)}</text>'
    )


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(drawing(), encoding="utf-8")
