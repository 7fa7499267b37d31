"""The notebooks run from top to bottom without a network, and show tables and figures rather than dictionaries."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"
NEEDED = ("nbclient", "nbformat", "ipykernel")


def needs(*modules):
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"needs the extra `notebooks`: no {', '.join(lacking)}")


def notebooks():
    return sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


def test_there_are_two():
    assert notebooks() == ["first_stream.ipynb", "new_classes.ipynb"]


@needs("nbformat")
@pytest.mark.parametrize("name", notebooks())
def test_notebooks_are_kept_without_outputs(name):
    import nbformat

    book = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs(*NEEDED)
@pytest.mark.parametrize("name", notebooks())
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # the kernel is another process, which must find the package as this one does
    root = str(NOTEBOOKS.parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    book, began = nbformat.read(NOTEBOOKS / name, as_version=4), time.perf_counter()
    NotebookClient(book, timeout=1000, resources={"metadata": {"path": str(tmp_path)}}).execute()
    spent = time.perf_counter() - began
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert re.search(r"^Task 1 of \d: \d+ images of ", printed, re.MULTILINE) and "{'" not in printed
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    pages = [data["text/html"] for data in shown if "text/html" in data]
    bars = [page for page in pages if "Training loss" in page and "<progress" in page]
    assert len(bars) >= 3  # one with losses for each task
    assert sum("average accuracy" in page and "rgb(" in page for page in pages) == 2  # results
    assert any("PromptClassifier(" in page and "<table" in page for page in pages)
    assert any("image/png" in data for data in shown)
    assert list(tmp_path.rglob("results.json"))
    print(f"{name}: {spent:.0f} s")
