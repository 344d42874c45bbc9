"""How Sphinx makes the site of the documentation: `make docs`."""

import re
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

from site_maths import add_maths  # noqa: E402

import lstm_ext  # noqa: E402

# Pages that live outside of this folder, where Sphinx does not read. The copies are not in git.
PROJECT = DOCS / "project"
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
PROJECT.mkdir(exist_ok=True)
shutil.copyfile(ROOT / "examples" / "lecture.ipynb", PROJECT / "lecture.ipynb")
for page in ROOT_PAGES:
    text = (ROOT / page).read_text()
    text = re.sub(r"\]\((?!https?:|#)", "](../../", text)
    text = re.sub(r"\]\(\.\./\.\./docs/", "](../", text)
    (PROJECT / page).write_text(re.sub(rf"\]\(\.\./\.\./({'|'.join(ROOT_PAGES)})", r"](\1", text))

project = "lstm_ext"
version = release = lstm_ext.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

# A reference that leads nowhere is a warning, and `make docs` allows none. Other packages' pages
# are not looked up: a build needs no network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:exc", ".*"),
    ("py:.*", r"(torch|nn|collections|matplotlib|os|numpy)(\..*)?"),
    ("py:.*", r"(Tensor|Any|Figure|States|Model|Module|Trace|Quarters|PackedSequence)"),
    ("py:.*", r"lstm_ext\.(_.*|.*\.(Model|Module))"),
]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True

smartquotes_action = "D"  # dashes alone: names of options stand between plain quotes
html_theme = "furo"
html_title = f"lstm_ext {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_math_renderer = "pictures"


def _complete(app, name, content):
    """Put pages that no toctree of the index names where it says (others); link to copies."""
    text = content[0]
    if name == "index":
        named = re.findall(r"^(\w+)$", text, re.M)
        others = [p.stem for p in sorted(DOCS.glob("*.md")) if p.stem not in (*named, "index")]
        text = text.replace("(others)", "\n".join(others))
    if not name.startswith("project/"):
        text = text.replace("](../examples/lecture.ipynb", "](project/lecture.ipynb")
        text = re.sub(r"\[\w+\.md\]\((\w+\.md)", r"[](\1", text)  # the page's title as the text
        text = re.sub(rf"\]\(\.\./({'|'.join(ROOT_PAGES)})", r"](project/\1", text)
    content[0] = text


def setup(app):
    add_maths(app)
    app.connect("source-read", _complete)
