"""The notebooks run from top to bottom, and their outputs are committed.

`python -m tests.test_notebooks [name ...]` runs them and writes what they print and draw into them.
"""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
NOTEBOOKS = sorted((HERE.parent / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes, with the outputs


def executed(path: Path) -> NotebookNode:
    """The notebook with the outputs of a run of now; varify is that of this checkout."""
    notebook = nbformat.read(path, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE.parent))
        patch.setenv("PYTHONSTARTUP", str(HERE / "notebook_startup.py"))
        resources = {"metadata": {"path": path.parent}}
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    return notebook


def written(notebook: NotebookNode, path: Path) -> None:
    """Write it without what differs between two runs of the same: times, and what the kernel says of itself."""
    for cell in notebook.cells:
        cell.metadata.clear()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


@pytest.mark.filterwarnings("ignore")  # of the notebook's machinery, not of the notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = executed(path)
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # one run, from top to bottom
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]
    assert path.stat().st_size <= LARGEST


if __name__ == "__main__":
    for path in NOTEBOOKS:
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            written(executed(path), path)
            print(f"{path.stem}: {path.stat().st_size:,} bytes")
