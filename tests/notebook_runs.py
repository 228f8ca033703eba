"""The notebooks, and how one is run. Those with PyTorch are run by `make test-interop`."""

import asyncio
import warnings
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ALL = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path):
    return nbformat.read(path, as_version=4).cells


def needs_torch(path):
    return any("import torch\n" in cell.source for cell in cells(path))


def run(path, folder):
    """Run a notebook from top to bottom in a folder; it is returned with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    with warnings.catch_warnings():
        # jupyter_client and asyncio warn about their own event loop policies
        warnings.simplefilter("ignore")
        client = NotebookClient(
            notebook,
            timeout=3600,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        )
        return asyncio.run(client.async_execute())
