"""Formulas of the site as MathML, made when it is built: a browser needs no script for them."""

from typing import Any, NoReturn

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def _inline(writer: Any, node: Any) -> NoReturn:
    writer.body.append(convert(node.astext()))
    raise SkipNode


def _display(writer: Any, node: Any) -> NoReturn:
    writer.body.append(f'<div class="maths">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def add_mathml(app: Any) -> None:
    """Register the renderer that ``html_math_renderer = "mathml"`` names."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
