"""Draws docs/images/step.svg: one step of the engine, for three rows.

python docs/make_step_picture.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).parent / "images" / "step.svg"
SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', monospace"
WIDTH, HEIGHT = 1120, 560
LEFT, COLUMN = 128, 196
TOP, LANE = 118, 122
CELL, GAP = 28, 4
STYLES = {  # fill, stroke, text
    "committed": ("#e5e7eb", "#9ca3af", "#1f2937"),
    "draft": ("#fef3c7", "#d97706", "#78350f"),
    "accepted": ("#bbf7d0", "#15803d", "#14532d"),
    "rejected": ("#ffffff", "#d1d5db", "#9ca3af"),
    "bonus": ("#bfdbfe", "#1d4ed8", "#1e3a8a"),
}
LEGEND = {
    "committed": "committed, or prompt",
    "draft": "draft",
    "accepted": "accepted draft",
    "rejected": "rejected",
    "bonus": "the target's own token",
}
STAGES = [
    ("1  schedule", "core", "who runs, and with what draft"),
    ("2  target", "core", "one forward, ragged batch"),
    ("3  verify", "core", "hook verify: lossless in core"),
    ("4  commit", "core", "append, free the rest, finish"),
    ("5  propose", "plugin", "hook propose: your code"),
]
TREE = [("x", -1), ("not", -1), ("==", 0), (">", 0), ("0", 2)]
Corner = tuple[float, float]
PLACES = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]  # (depth, lane) of the tree's nodes


class Picture:
    """Shapes, in the order in which they are drawn."""

    def __init__(self) -> None:
        self.shapes: list[str] = []

    def text(self, x: float, y: float, text: str, size: float = 12.5, **style: str) -> None:
        """Writes text with its baseline at y."""
        options = {"fill": "#374151", "font-family": SANS, **{key.replace("_", "-"): v for key, v in style.items()}}
        listed = " ".join(f'{name}="{value}"' for name, value in options.items())
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" {listed}>{escape(text)}</text>')

    def line(self, points: list[tuple[float, float]], colour: str = "#9ca3af", arrow: bool = False) -> None:
        """Draws a line through points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{end}/>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str, radius: int = 8) -> None:
        """Draws a rectangle with round corners."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="1.3"/>'
        )

    def cell(self, x: float, y: float, token: str, kind: str) -> None:
        """Draws a token."""
        fill, stroke, colour = STYLES[kind]
        self.box(x, y, CELL, CELL, fill, stroke, radius=4)
        size = 12.5 if len(token) < 3 else 10.5
        self.text(x + CELL / 2, y + CELL / 2 + 4.5, token, size, font_family=MONO, text_anchor="middle", fill=colour)

    def cells(self, x: float, y: float, tokens: list[tuple[str, str]]) -> None:
        """Draws tokens side by side."""
        for place, (token, kind) in enumerate(tokens):
            self.cell(x + place * (CELL + GAP), y, token, kind)

    def branch(self, parent: Corner, child: Corner, colour: str) -> None:
        """Joins a cell to one on its right."""
        (left, top), (right, bottom) = parent, child
        middle, half = left + CELL + 6, CELL / 2
        turns = [(left + CELL, top + half), (middle, top + half), (middle, bottom + half), (right, bottom + half)]
        self.line(turns, colour)

    def tree(self, x: float, y: float, kinds: str, root: str = "committed") -> None:
        """Draws row B's tree behind its root; a letter for each node's kind."""
        names = {"d": "draft", "a": "accepted", "r": "rejected"}
        step, drop = CELL + 12, CELL + 6

        def corner(node: int) -> Corner:
            depth, lane = PLACES[node]
            return x + (depth + 1) * step, y + lane * drop

        order = sorted(range(len(TREE)), key=lambda node: kinds[node] == "a")  # what was accepted, over the rest
        for node in order:
            parent = TREE[node][1]
            colour = STYLES["accepted"][1] if kinds[node] == "a" else "#c4c8ce"
            self.branch((x, y) if parent < 0 else corner(parent), corner(node), colour)
        self.cell(x, y, "if", root)
        for node, (token, _) in enumerate(TREE):
            self.cell(*corner(node), token, names[kinds[node]])

    def svg(self) -> str:
        """The file."""
        arrow = (
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M 0 1 L 9 5 L 0 9 z" fill="#6b7280"/></marker></defs>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        title = "<title>One step of the engine: schedule, target forward, verify, commit, propose</title>"
        return "\n".join([head, title, arrow, *self.shapes, "</svg>", ""])


def draw() -> Picture:
    """The whole picture."""
    picture = Picture()
    picture.box(0.7, 0.7, WIDTH - 1.4, HEIGHT - 1.4, "#ffffff", "#d1d5db", radius=10)
    _stages(picture)
    _lanes(picture)
    for column, content in enumerate((_scheduled, _forward, _verified, _committed, _proposed)):
        content(picture, *(list(_corners(column))))
    _legend(picture)
    return picture


def _corners(column: int) -> Iterator[Corner]:
    for lane in range(3):
        yield LEFT + column * COLUMN + 10, TOP + lane * LANE + 30


def _stages(picture: Picture) -> None:
    for column, (name, owner, hint) in enumerate(STAGES):
        x = LEFT + column * COLUMN
        fill, stroke = ("#eef2ff", "#4338ca") if owner == "plugin" else ("#f3f4f6", "#6b7280")
        picture.box(x, 48, COLUMN - 22, 40, fill, stroke)
        picture.text(x + 12, 65, name, 14, font_weight="600", fill="#111827")
        picture.text(x + COLUMN - 34, 65, owner, 11.5, text_anchor="end", fill=stroke)
        picture.text(x + 12, 81, hint, 9.8, fill="#4b5563")
        if column:
            picture.line([(x - 21, 68), (x - 3, 68)], "#6b7280", arrow=True)
    first, last = LEFT + (COLUMN - 22) / 2, LEFT + 4 * COLUMN + (COLUMN - 22) / 2
    picture.line([(last, 48), (last, 26), (first, 26), (first, 45)], "#6b7280", arrow=True)
    picture.box((first + last) / 2 - 74, 15, 148, 22, "#ffffff", "#ffffff", radius=4)
    picture.text((first + last) / 2, 30.5, "drafts for the next step", 12, text_anchor="middle")


def _lanes(picture: Picture) -> None:
    for lane, (name, first, second) in enumerate(
        [("row A", "decoding,", "a chain"), ("row B", "decoding,", "a tree"), ("row C", "its prompt", "is computed")]
    ):
        y = TOP + lane * LANE
        if lane:
            picture.line([(16, y), (WIDTH - 16, y)], "#e5e7eb")
        picture.text(20, y + 42, name, 14, font_weight="600", fill="#111827")
        picture.text(20, y + 60, first)
        picture.text(20, y + 77, second)


def _scheduled(picture: Picture, a: Corner, b: Corner, c: Corner) -> None:
    picture.cells(*a, [(",", "committed"), ("0", "draft"), (",", "draft"), ("0", "draft")])
    picture.text(a[0], a[1] + 48, "last token + 3 drafts", 11.5)
    picture.tree(*b, "ddddd")
    picture.cells(*c, [(token, "committed") for token in ("def", "f", "(", "a", ",")])
    picture.text(c[0], c[1] + 48, "the next chunk", 11.5)


def _forward(picture: Picture, a: Corner, b: Corner, c: Corner) -> None:
    x, y = a[0], a[1] - 14
    picture.box(x, y, COLUMN - 42, c[1] + 62 - y, "#f9fafb", "#9ca3af")
    middle = x + (COLUMN - 42) / 2
    for corner, lines in (
        (a, ["4 tokens in,", "4 distributions out"]),
        (b, ["6 tokens in, 6 out;", "each node sees its", "ancestors only"]),
        (c, ["5 tokens in,", "none out"]),
    ):
        for number, line in enumerate(lines):
            picture.text(middle, corner[1] + 12 + 17 * number, line, 12, text_anchor="middle")


def _verified(picture: Picture, a: Corner, b: Corner, c: Corner) -> None:
    picture.cells(*a, [(",", "committed"), ("0", "accepted"), (",", "accepted"), ("0", "rejected"), ("1", "bonus")])
    picture.text(a[0], a[1] + 48, "2 accepted + the target's 1", 11.5)
    picture.tree(*b, "ararr")
    step, drop = CELL + 12, CELL + 6
    picture.branch((b[0] + 2 * step, b[1]), (b[0] + 3 * step, b[1] + drop), STYLES["bonus"][1])
    picture.cell(b[0] + 3 * step, b[1] + drop, "1", "bonus")
    picture.text(c[0], c[1] + 19, "nothing to verify", 11.5)


def _committed(picture: Picture, a: Corner, b: Corner, c: Corner) -> None:
    picture.cells(*a, [(",", "committed"), ("0", "accepted"), (",", "accepted"), ("1", "bonus")])
    picture.text(a[0], a[1] + 48, "+ 3 tokens", 11.5)
    picture.cells(*b, [("if", "committed"), ("x", "accepted"), ("==", "accepted"), ("1", "bonus")])
    picture.text(b[0], b[1] + 48, "+ 3 tokens; the path's KV", 11.5)
    picture.text(b[0], b[1] + 64, "moves to be contiguous", 11.5)
    picture.text(c[0], c[1] + 12, "5 positions computed,", 11.5)
    picture.text(c[0], c[1] + 28, "no token yet", 11.5)


def _proposed(picture: Picture, a: Corner, b: Corner, c: Corner) -> None:
    picture.cells(*a, [("1", "committed"), (",", "draft"), ("0", "draft"), (",", "draft")])
    picture.text(a[0], a[1] + 48, "states of 3 new positions in,", 11.5)
    picture.text(a[0], a[1] + 64, "the next drafts out", 11.5)
    picture.cells(*b, [("1", "committed"), (":", "draft")])
    picture.text(b[0], b[1] + 48, "at most row.budget; none", 11.5)
    picture.text(b[0], b[1] + 64, "is always legal", 11.5)
    picture.text(c[0], c[1] + 12, "budget 0: take in the states", 11.5)
    picture.text(c[0], c[1] + 28, "of 5 positions, draft nothing", 11.5)


def _legend(picture: Picture) -> None:
    y = HEIGHT - 58
    picture.line([(16, y - 18), (WIDTH - 16, y - 18)], "#e5e7eb")
    for place, (kind, meaning) in enumerate(LEGEND.items()):
        x = 20 + place * 216
        picture.cell(x, y, "", kind)
        picture.text(x + CELL + 9, y + 19, meaning)


if __name__ == "__main__":
    FILE.write_text(draw().svg(), encoding="utf-8")
