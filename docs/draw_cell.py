"""Draws docs/cell.svg, the picture of docs/maths.md: python docs/draw_cell.py [FILE]."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

FORWARD, BACKWARD = "black", "tab:red"
GATES = {"i": (3.0, "σ"), "f": (1.5, "σ"), "g": (4.5, "tanh"), "o": (6.6, "σ")}


def box(axis: Axes, x: float, y: float, text: str, color: str = "#dbe9f6") -> None:
    axis.add_patch(
        FancyBboxPatch((x - 0.42, y - 0.24), 0.84, 0.48, boxstyle="round,pad=0.05", fc=color)
    )
    axis.text(x, y, text, ha="center", va="center", fontsize=11)


def node(axis: Axes, x: float, y: float, text: str) -> None:
    axis.add_patch(Circle((x, y), 0.24, fc="#fff2cc", ec="black", zorder=3))
    axis.text(x, y, text, ha="center", va="center", fontsize=12, zorder=4)


def arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "",
    where: tuple[float, float] | None = None, color: str = FORWARD,
) -> None:  # fmt: skip
    axis.annotate(
        "", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": color, "lw": 1.3}
    )
    if label:
        x, y = where or ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.14)
        axis.text(x, y, label, ha="center", va="center", color=color, fontsize=10)


def draw() -> Figure:
    """Draw the cell: forward in black, in red the gradients that flow against it."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.6, 9.9), ylim=(-0.75, 5.1), aspect="equal")
    axis.axis("off")
    top = 4.2
    # The line of c.
    arrow(axis, (-0.3, top), (1.26, top), "c", (0.3, top + 0.2))
    node(axis, 1.5, top, "×")
    arrow(axis, (1.74, top), (3.51, top))
    node(axis, 3.75, top, "+")
    arrow(axis, (3.99, top), (9.2, top), "c'", (9.0, top + 0.2))
    # i and g meet, and are added.
    node(axis, 3.75, 3.1, "×")
    arrow(axis, (3.75, 3.34), (3.75, 3.96))
    # What is shown of it.
    box(axis, 7.8, 3.3, "tanh", "#e2f0d9")
    axis.plot([7.8, 7.8], [top, 3.6], color=FORWARD, lw=1.3)
    arrow(axis, (7.8, 3.01), (7.8, 2.14), "t", (7.95, 2.6))
    node(axis, 7.8, 1.9, "×")
    arrow(axis, (8.04, 1.9), (9.2, 1.9), "h'", (9.0, 2.1))
    # The gates, and what they stand on.
    for name, (x, activation) in GATES.items():
        box(axis, x, 1.2, f"{name} = {activation}")
        arrow(axis, (x, 0.35), (x, 0.91))
    arrow(axis, (1.5, 1.49), (1.5, top - 0.24))
    arrow(axis, (3.0, 1.49), (3.55, 2.96))
    arrow(axis, (4.5, 1.49), (3.95, 2.96))
    axis.plot([6.6, 6.6], [1.49, 1.9], color=FORWARD, lw=1.3)
    arrow(axis, (6.6, 1.9), (7.56, 1.9))
    axis.add_patch(FancyBboxPatch((0.9, -0.1), 6.3, 0.4, boxstyle="round,pad=0.05", fc="#eeeeee"))
    axis.text(
        4.05, 0.1, "ifgo = x W_ihᵀ + b_ih + h W_hhᵀ + b_hh", ha="center", va="center",
        fontsize=11, family="monospace",
    )  # fmt: skip
    arrow(axis, (-0.3, 0.22), (0.83, 0.22), "x", (0.1, 0.4))
    arrow(axis, (-0.3, -0.02), (0.83, -0.02), "h", (0.1, -0.22))
    # Backward.
    back = {"color": BACKWARD}
    arrow(axis, (9.2, top - 0.16), (8.5, top - 0.16), "dc'", (8.95, top - 0.36), **back)
    arrow(axis, (9.2, 1.74), (8.3, 1.74), "dh'", (8.85, 1.54), **back)
    arrow(axis, (7.62, 2.2), (7.62, 3.0), "dh'·o", (7.2, 2.62), **back)
    joined = "s = dc' + dh'·o·(1 − t²)"
    arrow(axis, (7.0, top - 0.16), (4.05, top - 0.16), joined, (5.55, top - 0.38), **back)
    arrow(axis, (3.45, top - 0.16), (1.8, top - 0.16), "s", (2.6, top - 0.36), **back)
    arrow(axis, (1.2, top - 0.16), (0.1, top - 0.16), "dc = s·f", (0.45, top - 0.38), **back)
    arrow(axis, (1.36, 3.8), (1.36, 1.55), "df = s·c", (0.8, 2.6), **back)
    arrow(axis, (3.4, 2.95), (2.84, 1.55), "di = s·g", (2.55, 2.3), **back)
    arrow(axis, (4.1, 2.95), (4.66, 1.55), "dg = s·i", (4.98, 2.3), **back)
    arrow(axis, (7.5, 1.74), (6.78, 1.5), "do = dh'·t", (7.62, 1.3), **back)
    axis.text(
        4.05, -0.5, "d_ifgo = [ di·i(1−i),  df·f(1−f),  dg·(1−g²),  do·o(1−o) ]", ha="center",
        color=BACKWARD, fontsize=10, family="monospace",
    )  # fmt: skip
    axis.text(-0.3, 4.85, "forward", color=FORWARD, fontsize=10)
    axis.text(0.75, 4.85, "backward", color=BACKWARD, fontsize=10)
    return figure


if __name__ == "__main__":
    rcParams["svg.hashsalt"] = "lstm_ext"  # the same file at every run
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("cell.svg")
    metadata = {"Date": None} if target.suffix == ".svg" else None
    draw().savefig(target, metadata=metadata)
