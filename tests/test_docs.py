"""The pages of docs/: one per family, complete against the registry, with links and plots."""

import ast
import re
from pathlib import Path

import pytest

import diffsamp as ds

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
GUIDES = (
    "README.md",
    "choosing.md",
    "diffusers.md",
    "discrete.md",
    "extend.md",
    "get_going.md",
    "guidance.md",
    "guidance_data.md",
    "guidance_losses.md",
    "inverse.md",
    "langevin.md",
    "mathematics.md",
    "migration.md",
    "performance.md",
    "pictures.md",
    "plan-format.md",
    "plans_elsewhere.md",
    "policies.md",
    "scaling.md",
    "schedules.md",
    "search.md",
    "solvers.md",
    "steering.md",
    "students.md",
    "targets.md",
    "wrapping.md",
)  # pages of no family of samplers
FAMILIES = [page for page in PAGES if page.name not in GUIDES]


def text(page):
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ds.solvers.names())
def test_every_solver_is_on_a_page(name):
    assert any(f"`{name}`" in text(page) or f"{name}`" in text(page) for page in FAMILIES)


@pytest.mark.parametrize("name", [*ds.solvers.COMPOSED, *ds.solvers.FITTED, *ds.solvers.FEW_STEP])
def test_so_is_what_is_made_otherwise(name):
    assert any(f"ds.solvers.{name}" in text(page) for page in FAMILIES)


@pytest.mark.parametrize("page", FAMILIES, ids=lambda p: p.stem)
def test_a_page_has_its_parts(page):
    content = text(page)
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", content), "a source"
    assert (
        "**Which.**" in content
        or "**When.**" in content
        or page.stem in ("ddim", "inversion", "around_the_network", "few_step")
    ), "when to use it"
    assert "## Measured" in content
    assert f"({page.name})" in text(ROOT / "docs" / "README.md"), "in the index"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", text(page)):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_the_plots_cover_the_registry():
    """Read, not imported: the script needs the demo's packages and finds its helper by path."""
    tree = ast.parse(text(ROOT / "benchmarks" / "families.py"))
    families = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FAMILIES"
    )
    assert {name for members in families.values() for name in members} == set(ds.solvers.names())
    made = {path.stem for path in (ROOT / "docs" / "plots").glob("*.png")}
    drawn = {plot for page in PAGES for plot in re.findall(r"plots/(\w+)\.png", text(page))}
    assert drawn == made
