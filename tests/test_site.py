"""The site: every public name has an entry, every page a place, and the link checker finds faults.

mkdocs is not needed here; `make docs` builds the site and checks its links.
"""

import ast
import functools
import importlib
import importlib.util
import json
import pkgutil
import re
import types
from pathlib import Path

import yaml

import diffsamp as ds

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def tool(name):
    """A module of docs/site."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks, check = tool("hooks"), tool("check")


def entries():
    """Paths that the API pages document, (page, path)."""
    for page in sorted((DOCS / "api").glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            yield page.name, path


@functools.cache
def names_of(path):
    """What the module of a file binds at its top level."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def source_of(module):
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public():
    """(module, name, thing) of every name in `__all__` of the modules that users import."""
    found = ["diffsamp", *(info.name for info in pkgutil.walk_packages(ds.__path__, "diffsamp."))]
    for module in found:
        if any(part.startswith("_") or part == "cli" for part in module.split(".")):
            continue
        loaded = importlib.import_module(module)
        for name in getattr(loaded, "__all__", ()):
            thing = getattr(loaded, name)
            if not isinstance(thing, types.ModuleType):
                yield module, name, thing


def missing(documented):
    """Public names without an entry: nothing that is documented is that thing."""
    things = {}
    for path in documented:
        module, _, name = path.rpartition(".")
        if hasattr(importlib.import_module(module), name):  # all but what needs PyTorch
            things[path] = getattr(importlib.import_module(module), name)
    known = {id(thing) for thing in things.values()}
    return [f"{m}.{n}" for m, n, t in public() if f"{m}.{n}" not in things and id(t) not in known]


def test_every_public_name_has_an_entry():
    documented = [path for _, path in entries()]
    assert len(documented) == len(set(documented)), "an entry is there twice"
    assert missing(documented) == [], "add them to a page of docs/api"
    gone = [path for path in documented if path != "diffsamp.sampling.sample"]
    assert missing(gone) == ["diffsamp.sample", "diffsamp.sampling.sample"]


def test_an_entry_is_where_it_says():
    """Where mkdocstrings, which reads and does not import, looks for it."""
    for page, path in entries():
        module, _, name = path.rpartition(".")
        assert name in names_of(source_of(module)), f"docs/api/{page}: {path}"


def test_modules_of_the_top_have_a_page():
    titles = {hooks.heading(p.read_text(encoding="utf-8")) for p in (DOCS / "api").glob("*.md")}
    modules = [n for n in ds.__all__ if isinstance(getattr(ds, n), types.ModuleType)]
    assert {f"ds.{name}" for name in modules} <= titles


class Loader(yaml.SafeLoader):
    """Reads `!ENV [NAME, value]` as mkdocs does where NAME is not set."""


Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[-1])


def test_every_page_has_a_place():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def leaves(part):
        if isinstance(part, str):
            yield part
        for inner in part.values() if isinstance(part, dict) else part:
            if not isinstance(part, str):
                yield from leaves(inner)

    placed = list(leaves(config["nav"]))
    assert len(placed) == len(set(placed))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert pages <= set(placed)
    assert set(placed) - pages == {*hooks.PROJECT, "gallery.md"}


def test_links_to_the_repository_become_pages():
    text = (
        "[a](../benchmarks/README.md#x) [b](ddim.md) [c](../benchmarks/draw.py) ![d](plots/edm.png)"
    )
    assert hooks.with_links(text, "search.md") == (
        "[a](benchmarks/README.md#x) [b](ddim.md) [c](benchmarks/draw.py.md) ![d](plots/edm.png)"
    )
    result = "[up](../../docs/search.md) [same](peers.md)"
    assert hooks.with_links(result, "benchmarks/results/accuracy.md") == (
        "[up](../../search.md) [same](peers.md)"
    )
    pages = [f"docs/{page.name}" for page in DOCS.glob("*.md")]
    found = hooks.outside(pages)
    assert "benchmarks/results/families.md" in found
    assert "benchmarks/families.py" in found
    assert all((ROOT / name).is_file() for name in found)


def test_names_and_papers_become_links():
    known = hooks.entries()
    text = "# `ds.sample`\n`ds.sample(..)`, `ds.nothing`, [`ds.sample`](x.md)\n"
    text += "```python\nds.sample  # `ds.sample`\n```\n"
    linked = hooks.with_references(text, "search.md", known)
    assert linked.startswith("# `ds.sample`\n[`ds.sample(..)`](api/ds.md#diffsamp.sampling.sample)")
    assert "`ds.nothing`, [`ds.sample`](x.md)" in linked
    assert linked.endswith("```python\nds.sample  # `ds.sample`\n```\n")
    html = "<p>arXiv:2302.04867, 2302.04868, 1234.56789 <code>arXiv:2302.04867</code></p>"
    assert hooks.with_papers(html) == (
        '<p><a href="https://arxiv.org/abs/2302.04867">arXiv:2302.04867</a>, '
        '<a href="https://arxiv.org/abs/2302.04868">2302.04868</a>, 1234.56789 '
        "<code>arXiv:2302.04867</code></p>"
    )
    assert known["search.best"] == "api/search.md#diffsamp.search.best.best"


def test_an_entry_is_called_as_users_call_it():
    page = "# `ds.search`\n\n::: diffsamp.search.best.best\n"
    assert hooks.with_headings(page).endswith('options:\n      heading: "ds.search.best"\n')


def test_notebooks_and_pictures_have_pages():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        text, pictures = hooks.notebook(f"notebooks/{path.name}")
        assert text.startswith("# ")
        assert "```python" in text
        assert all(picture.endswith(".png") for picture in pictures)
    gallery = hooks.gallery()
    for picture in (DOCS / "plots").glob("*.png"):
        assert picture.name == "front.png" or f"(plots/{picture.name})" in gallery


def test_what_a_notebook_printed_and_drew_is_on_its_page(tmp_path, monkeypatch):
    """The executed copy is taken, what it wrote to standard error is not."""
    printed = {"output_type": "stream", "name": "stdout", "text": ["1 dB\n"]}
    warned = {"output_type": "stream", "name": "stderr", "text": ["a warning"]}
    drawn = {"output_type": "display_data", "data": {"image/png": "YWJj", "text/plain": "<Fig>"}}
    code = {"cell_type": "code", "source": ["print(1)\n", "2"], "outputs": [warned, printed, drawn]}
    title = {"cell_type": "markdown", "source": ["# A title\n", "\n", "Words."]}
    for folder, cells in (("notebooks", [title]), (hooks.EXECUTED, [title, code])):
        (tmp_path / folder).mkdir(parents=True)
        path = tmp_path / folder / "a.ipynb"
        path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    text, pictures = hooks.notebook("notebooks/a.ipynb")
    assert pictures == {"notebooks/a-0.png": b"abc"}
    assert text.startswith("# A title\n")
    assert "```python\nprint(1)\n2\n```\n\n```text { .output }\n1 dB\n```\n\n![" in text
    assert "](a-0.png)" in text
    assert "warning" not in text
    assert "<Fig>" not in text
    assert hooks.with_links(text, "notebooks/a.ipynb.md") == text
    assert "(notebooks/a-0.png)](notebooks/a.ipynb.md)" in hooks.gallery()


def test_the_checker_finds_what_is_broken(tmp_path):
    (tmp_path / "a").mkdir()
    index, page = tmp_path / "index.html", tmp_path / "a" / "index.html"
    index.write_text('<a href="a/#here">x</a><img src="a/p.png"><a href="https://b.c/d">y</a>')
    page.write_text('<p id="here"><a href="..">up</a><a href="../#none">x</a>')
    (tmp_path / "a" / "p.png").touch()
    assert check.broken(tmp_path) == ["a/index.html links to ../#none, which has no such anchor"]
    (tmp_path / "a" / "p.png").unlink()
    page.write_text('<p id="there"><script src="https://cdn.d/e.js"></script><a href="../f/">x</a>')
    assert sorted(check.broken(tmp_path)) == [
        "a/index.html links to ../f/, which is not there",
        "a/index.html loads https://cdn.d/e.js",
        "index.html links to a/#here, which has no such anchor",
        "index.html links to a/p.png, which is not there",
    ]
