"""The README's promises: its commands exist, its snippets run, its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def names(documents):
    return [str(d.relative_to(ROOT)) for d in documents]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert target.startswith("http") or (document.parent / target).exists(), target


def heading_names(document):
    """Return the anchors of a document's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)", document.read_text(), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_anchors_exist(document):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", document.read_text()):
        page = document.parent / target if target else document
        assert anchor in heading_names(page), f"{target}#{anchor}"


def test_make_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for command in re.findall(r"^    make ([\w-]+)", document.read_text(), re.M):
            assert re.search(rf"^{command}:", makefile, re.M), command


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_lines_are_short(document):
    """A hundred columns, but for tables, which Markdown cannot wrap."""
    for line in document.read_text().splitlines():
        assert len(line) <= 100 or line.startswith("|"), line


def test_every_document_is_linked():
    """From the README or from the index of the site, by name or by `(others)`."""
    index = (ROOT / "docs" / "index.md").read_text()
    assert re.search(r"^\(others\)$", index, re.M)
    for name in re.findall(r"^([a-z_]+)$", index.split("```{toctree}", 1)[1], re.M):
        assert (ROOT / "docs" / f"{name}.md").exists(), name


def snippets(document):
    return re.findall(r"```python\n(.*?)```", document.read_text(), re.S)


WITH_SNIPPETS = [document for document in DOCUMENTS if snippets(document)]


def test_there_are_snippets():
    assert len(snippets(ROOT / "README.md")) >= 2
    assert len(WITH_SNIPPETS) >= 2


@pytest.mark.parametrize("document", WITH_SNIPPETS, ids=names(WITH_SNIPPETS))
def test_snippets_run(document):
    for snippet in snippets(document):
        if "onnx" in snippet:
            pytest.importorskip("onnxscript")
        exec(compile(snippet, document.name, "exec"), {})
