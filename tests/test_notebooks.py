"""Every notebook runs from its first cell to its last, and is stored without outputs."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])


def read(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_notebook
def test_a_notebook_is_stored_without_outputs(path):
    _, code = read(path)
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    # tqdm says in a kernel without ipywidgets that it draws its bars as text.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    # As a reader runs it, who lets XLA optimize.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    notebook, code = read(path)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    shown = [o.text for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    assert not shown, "a reader would see these warnings"
