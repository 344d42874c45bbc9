"""The site of the documentation, as `make docs` has built it: every public name has an entry."""

import os
import re
import zlib
from pathlib import Path

import pytest
from test_docstrings import PUBLIC

import lstm_ext

ROOT = Path(__file__).parent.parent
SITE = os.environ.get("LSTM_EXT_SITE")  # the folder, which `make docs` names

built = pytest.mark.skipif(SITE is None, reason="for `make docs`, which names the site it built")


def entries(inventory):
    """Names of an objects.inv: four lines, then a line for each object, compressed."""
    *head, packed = inventory.split(b"\n", 4)
    assert head[0] == b"# Sphinx inventory version 2"
    lines = zlib.decompress(packed).decode().splitlines()
    return {line.split(" py:")[0] for line in lines if " py:" in line}


def names_of(value):
    """Return all names of a public object: it needs an entry under one of them."""
    names = {name for name, other in PUBLIC.items() if other is value}
    return names | {name.replace(".inspect.plot.", ".plot.") for name in names}


def missing(found):
    return sorted(name for name, value in PUBLIC.items() if not found & names_of(value))


def test_every_public_name_is_named_by_a_page():
    """Without a site too: the directives that make the entries."""
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst"))
    directives = set(re.findall(r"^\.\. auto(?:class|function):: (\S+)", pages, re.M))
    whole = re.findall(r"^\.\. automodule:: (\S+)\n   :members:", pages, re.M)
    directives |= {n for n in PUBLIC for module in whole if n.rpartition(".")[0] == module}
    assert missing(directives) == []


@built
def test_every_public_name_has_an_entry():
    found = entries((Path(SITE) / "objects.inv").read_bytes())
    assert missing(found) == []
    assert {"lstm_ext.__version__", "lstm_ext.LSTM.forward", "lstm_ext.GateTrace.save"} <= found


@built
def test_a_name_without_an_entry_is_seen():
    found = entries((Path(SITE) / "objects.inv").read_bytes())
    assert "lstm_ext.frozen.freeze" in missing(found - {"lstm_ext.freeze"})
    assert "lstm_ext.freeze" in missing(found - {"lstm_ext.freeze"})


@built
def test_pages_need_no_network():
    """No page loads a script, a style, a font or a picture from elsewhere."""
    pages = list(Path(SITE).rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        tags = re.findall(r"<(?:script|img|iframe|link rel=.stylesheet.)[^>]*>", text)
        for tag in tags:
            assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", tag), (page.name, tag)


@built
def test_formulas_are_made():
    page = (Path(SITE) / "maths.html").read_text()
    formulas = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert len(formulas) > 20
    assert any("sigma" in formula for formula in formulas)
    assert "$$" not in page
    text = re.sub(r'aria-label="[^"]*"', "", page)
    assert "\\begin" not in text


@built
def test_examples_are_on_the_pages():
    text = (Path(SITE) / "api" / "modules.html").read_text()
    assert lstm_ext.LSTM.__doc__.splitlines()[0].split(":")[0] in text
    assert "&gt;&gt;&gt; " in text
