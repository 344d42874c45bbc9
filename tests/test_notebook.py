"""examples/lecture.ipynb runs from top to bottom, and is examples/lecture.py cell by cell.

python tests/test_notebook.py        makes the notebook anew from the script, with its outputs
"""

import os
import sys
from pathlib import Path

import pytest
from limits import HUNG

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "lecture.ipynb"


def run(notebook):
    """Run all cells in this very Python, whatever kernels are installed elsewhere."""
    manager = jupyter_client.AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = sys.executable
    nbclient.NotebookClient(
        notebook,
        km=manager,
        timeout=HUNG,
        startup_timeout=HUNG,
        iopub_timeout=HUNG,  # for what a cell has printed or drawn: else it is left out
        resources={"metadata": {"path": str(EXAMPLES)}},
    ).execute()
    return notebook


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_notebook_is_the_script():
    # Not? python tests/test_notebook.py
    assert cells(nbformat.read(NOTEBOOK, 4)) == cells(jupytext.read(EXAMPLES / "lecture.py"))


@pytest.mark.slow
def test_notebook_runs():
    """Every cell without an error, and with as many pictures as are committed with it."""

    def pictures(notebook):
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output.output_type == "error"]
        return len([o for o in outputs if "image/png" in o.get("data", {})])

    committed = nbformat.read(NOTEBOOK, 4)
    count = pictures(committed)
    assert count == 3
    assert pictures(run(nbformat.read(NOTEBOOK, 4))) == count


def main():
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    notebook = run(jupytext.read(EXAMPLES / "lecture.py"))
    for k, cell in enumerate(notebook.cells):
        cell.id = f"cell-{k}"  # not drawn, so that a rerun changes what has changed alone
        cell.metadata.pop("execution", None)
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
