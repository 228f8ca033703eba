"""Notebooks run from top to bottom, and are stored without outputs."""

import notebook_runs as notebooks
import pytest

WITHOUT_TORCH = [path for path in notebooks.ALL if not notebooks.needs_torch(path)]


def test_there_are_notebooks():
    assert WITHOUT_TORCH
    assert len(WITHOUT_TORCH) == len(notebooks.ALL) - 1, "and one of tests/networks"


@pytest.mark.parametrize("path", notebooks.ALL, ids=lambda p: p.name)
def test_notebook_is_stored_without_outputs(path):
    assert not any(cell.get("outputs") for cell in notebooks.cells(path))


@pytest.mark.long
@pytest.mark.parametrize("path", WITHOUT_TORCH, ids=lambda p: p.name)
def test_notebook_runs(path, tmp_path):
    notebooks.run(path, tmp_path)
