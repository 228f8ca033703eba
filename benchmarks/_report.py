"""What every result says about where it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import jax

import diffsamp

RESULTS = Path(__file__).resolve().parent / "results"


def heading(title: str, *packages: str) -> str:
    """A Markdown heading with the command, machine, date and versions, of `packages` too."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib", "numpy", *packages)
    )
    device = jax.devices()[0]
    kind = platform.processor() or platform.machine()
    where = f"{os.cpu_count()} cores of a CPU ({kind})" if device.platform == "cpu" else str(device)
    return (
        f"# {title}\n\n`{command}`, {datetime.date.today()}, {where}, "
        f"Python {platform.python_version()}, diffsamp {diffsamp.__version__}, {versions}.\n"
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"
