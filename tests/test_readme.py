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


def test_make_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for command in re.findall(r"^    make ([\w-]+)", document.read_text(), re.M):
            assert re.search(rf"^{command}:", makefile, re.M), command


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
