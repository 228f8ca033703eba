"""Every sampler can be cited, from one file of references."""

import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

import diffsamp as ds

PROCESS = ds.processes.vp_linear()
BIB = (files("diffsamp.evaluation") / "references.bib").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(ds.solvers.SOLVERS))
def test_every_registered_solver_has_its_paper(name):
    solver = ds.solvers.get(name)
    entries = ds.cite(name)
    assert "@software{diffsamp," in entries
    for number in re.findall(r"\d{4}\.\d{5}", solver.source):
        (entry,) = [part for part in entries.split("\n@") if f"eprint = {{{number}}}" in part]
        assert "author = {" in entry  # written down, not made up from the number
    assert entries.count("eprint") == len(set(re.findall(r"\d{4}\.\d{5}", solver.source)))


def test_the_references_are_well_formed():
    entries = re.split(r"\n(?=@)", BIB)[1:]
    keys = [re.match(r"@\w+\{(\w+),\n", entry).group(1) for entry in entries]
    numbers = re.findall(r"eprint = \{(.*?)\}", BIB)
    assert len(set(keys)) == len(keys)
    assert len(set(numbers)) == len(numbers) == len(entries) - 1
    for entry in entries:
        assert entry.count("{") == entry.count("}")
        assert re.search(r"  title = \{.*\},\n  year = \{20\d\d\},\n", entry)


def test_the_numbers_belong_to_the_names_that_the_docstrings_have_for_them():
    """GENIE stood under gDDIM's title: an entry's first author must be the one in the code."""
    code = " ".join(
        " ".join(path.read_text(encoding="utf-8").split())
        for path in Path(ds.__file__).parent.rglob("*.py")
    )
    compared = 0
    for entry in re.split(r"\n(?=@)", BIB)[1:]:
        number, author = (re.search(rf"{f} = \{{(.*?)[,}}]", entry) for f in ("eprint", "author"))
        # "Zhang & Chen 2023, arXiv:2308.02157", and what comes between
        said = number and re.findall(
            rf"([A-Z][\w-]+)(?:, [A-Z][\w-]+)*(?: & [A-Z][\w-]+| et al\.)? \d{{4}}"
            rf"(?: \([\w -]+\))?,(?: [\w+ -]+,)? arXiv:{number.group(1)}",
            code,
        )
        compared += bool(said)
        assert not said or set(said) == {author.group(1)}, entry
    assert compared >= 15


def test_tableaux_plans_and_what_is_not_known():
    times = ds.schedules.logsnr(PROCESS, 6)
    heun = ds.solvers.get("heun")(PROCESS, ds.schedules.logsnr(PROCESS, 3))
    assert "karras2022elucidating" in ds.cite(heun)
    learned = ds.Tableau.create(
        **{k: getattr(heun, k) for k in ("times", "alpha", "sigma", "target", "a", "b")},
        source="diffsamp.search.refine (after arXiv:2403.01329); start: arXiv:1234.56789",
    )
    plan = ds.search.Plan(learned, "refine", "unipc3 on logsnr", {})
    keys = re.findall(r"@\w+\{(\w[\w.]*),", ds.cite(plan))
    assert keys == ["shaul2024bespoke", "arxiv1234.56789", "zhao2023unipc", "diffsamp"]
    bare = ds.Tableau(**{**vars(learned), "source": ""})
    assert ds.cite(bare).startswith("@software{diffsamp")
    with pytest.raises(TypeError, match="takes a Tableau, a Plan or the name"):
        ds.cite(np.asarray(times))
    with pytest.raises(ValueError):
        ds.cite("unipc99")
