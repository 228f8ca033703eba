"""Versions agree, public names are documented, tables are current, no stray paths."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import diffsamp as ds

ROOT = Path(__file__).parent.parent


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == ds.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    headings = re.findall(r"^## \[([^\]]+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", ds.__version__]
    project = tomllib.loads(read("pyproject.toml"))
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "diffsamp.__version__"}
    assert project["project"]["license"] == citation["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in read("LICENSE")


def modules():
    skip = {"diffsamp.cli"}
    for info in pkgutil.walk_packages(ds.__path__, "diffsamp."):
        if info.name not in skip:
            yield info.name


@pytest.mark.parametrize("name", list(modules()))
def test_public_names_are_documented(name):
    """Every name in __all__ exists; functions and classes say what they are and their arguments."""
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for public in getattr(module, "__all__", ()):
        thing = getattr(module, public)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        assert thing.__doc__, f"{name}.{public} has no docstring"
        # private modules serve the package; the rest is read by users
        if "._" in name or not inspect.isfunction(thing):
            continue
        arguments = [p for p in inspect.signature(thing).parameters if p not in ("self", "cls")]
        if len(arguments) > 2:
            documented = "Args:" in thing.__doc__ or "rguments" in thing.__doc__
            assert documented, f"{name}.{public} does not describe its arguments"


def test_top_level_names():
    assert set(ds.__all__) <= set(dir(ds))
    assert len(ds.__all__) == len(set(ds.__all__))


def solver_table():
    lines = [
        "| name | order | evaluations a step | noise | source |",
        "|---|---|---|---|---|",
    ]
    for s in ds.solvers.SOLVERS.values():
        noise = "yes" if s.stochastic else "no"
        evaluations = f"{s.stages}, start +{s.extra}" if s.extra else s.stages
        lines.append(f"| `{s.name}` | {s.order} | {evaluations} | {noise} | {s.source} |")
    return "\n".join(lines)


def test_the_table_of_solvers_is_the_registry():
    between = re.search(
        r"<!-- solvers:.*?-->\n(.*?)\n<!-- end of solvers -->", read("docs/solvers.md"), re.DOTALL
    )
    assert between, "docs/solvers.md has no solver table"
    assert between[1] == solver_table(), "copy the registry's table into docs/solvers.md"


def test_package_data_is_there():
    project = tomllib.loads(read("pyproject.toml"))
    for pattern in project["tool"]["setuptools"]["package-data"]["diffsamp"]:
        assert list((ROOT / "diffsamp").glob(pattern)), pattern


def test_no_paths_of_one_machine():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = ["/" + word + "/" for word in ("work", "farm", "root")] + [".." + "/shared"]
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".safetensors", ".png", ".npz") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        for word in forbidden:
            assert word not in text, f"{name} names {word}"
