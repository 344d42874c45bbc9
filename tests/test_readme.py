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


def test_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(snippets) >= 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
