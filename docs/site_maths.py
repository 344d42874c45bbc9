"""Formulas of the site as pictures, made when it is built: a browser needs no script, no font."""

from html import escape
from typing import Any, NoReturn

import ziamath
from docutils.nodes import SkipNode

ziamath.config.svg2 = False  # plain paths: names of glyphs would repeat on a page
SIZE = 17.0


def picture(latex: str, inline: bool) -> str:
    """Return an SVG that has the colour of the text around it, and its LaTeX as a label."""
    if not inline and "&" in latex and r"\begin" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    found = ziamath.Latex(latex, size=SIZE, inline=inline, color="currentColor")
    style = f"vertical-align: {found.getyofst():.2f}px"
    label = escape(" ".join(latex.split()), quote=True)
    head = f'<svg role="img" aria-label="{label}" style="{style}" '
    return found.svg().replace("<svg ", head, 1)


def _inline(writer: Any, node: Any) -> NoReturn:
    writer.body.append(picture(node.astext(), inline=True))
    raise SkipNode


def _display(writer: Any, node: Any) -> NoReturn:
    writer.body.append(f'<div class="maths">{picture(node.astext(), inline=False)}</div>')
    raise SkipNode


def add_maths(app: Any) -> None:
    """Register the renderer that ``html_math_renderer = "pictures"`` names."""
    app.add_html_math_renderer("pictures", (_inline, None), (_display, None))
