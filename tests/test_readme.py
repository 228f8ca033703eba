"""The snippets of README.md and CONTRIBUTING.md run, and the commands they name exist."""

import argparse
import re
import warnings
from pathlib import Path

import jax
import pytest

from diffsamp import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [PAGES[0], *(pytest.param(page, marks=pytest.mark.long) for page in PAGES[1:])],
    ids=lambda p: p.name,
)
def test_python_snippets_run(page, tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would paste them; in a user's default settings."""
    monkeypatch.chdir(tmp_path)
    snippets = blocks(page, "python")
    assert snippets, page
    namespace = {}
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        for i, snippet in enumerate(snippets):
            exec(compile(snippet, f"{page.name}, snippet {i}", "exec"), namespace)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    actions = [a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    commands = set(actions[0].choices)
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z][a-z0-9-]*)`", text):
        assert target in targets, target
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        if words[:1] == ["diffsamp"]:
            assert words[1] in commands, line


def test_it_is_read_in_two_minutes():
    """Long tables are on pages of docs/; one picture."""
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1


def test_the_two_commands_come_first():
    first = blocks(ROOT / "README.md", "bash")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]
    runner = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -e" in runner
    assert re.findall(r"^make (\S+)$", runner, re.MULTILINE) == [
        "test",
        "test-pages",
        "test-x64",
        "docs",
    ]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^test-all: test test-interop  ", makefile, re.MULTILINE)
