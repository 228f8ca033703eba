"""What is checked before a release finds what is wrong; workflows and paper are current."""

import importlib.util
import re
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import diffsamp as ds

ROOT = Path(__file__).parent.parent
WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}

spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_this_version_agrees():
    assert release.version() == ds.__version__
    assert release.problems() == []


@pytest.fixture
def project(tmp_path):
    """A small project that is ready; `change` replaces words of one of its files."""
    (tmp_path / "diffsamp").mkdir()
    files = {
        "diffsamp/__init__.py": '__version__ = "1.2.0"\n',
        "CHANGELOG.md": "# C\n\n## [Unreleased]\n\n## [1.2.0] - 2026-12-01\n\n- this\n",
        "CITATION.cff": "version: 1.2.0\ndate-released: 2026-12-01\n",
    }

    def change(name, old="", new=""):
        text = files[name].replace(old, new)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    for name in files:
        change(name)
    return change


@pytest.mark.parametrize(
    ("name", "old", "new", "tag", "words"),
    [
        ("CHANGELOG.md", "", "", None, None),
        ("CHANGELOG.md", "", "", "v1.2.0", None),
        ("CHANGELOG.md", "", "", "v1.2.1", "the tag v1.2.1 is not v1.2.0"),
        ("CHANGELOG.md", "1.2.0] -", "1.1.0] -", None, "newest version of CHANGELOG.md is not"),
        ("CHANGELOG.md", " - 2026-12-01", "", None, r"no \[version\] - date"),
        ("CHANGELOG.md", "ed]\n", "ed]\n\n- more\n", "v1.2.0", "move them under"),
        ("CHANGELOG.md", "ed]\n", "ed]\n\n- more\n", None, None),
        ("CITATION.cff", "-01", "-02", None, "date-released is not 2026-12-01"),
        ("CITATION.cff", "1.2.0", "1.1.0", None, "version is not 1.2.0"),
    ],
)
def test_what_does_not_agree_is_found(project, name, old, new, tag, words):
    found = release.problems(tag, project(name, old, new))
    if words is None:
        assert found == []
    else:
        assert re.search(words, "\n".join(found))


def test_a_wheel_that_lacks_a_file_is_found(tmp_path):
    wheel = tmp_path / "diffsamp.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for path in (ROOT / "diffsamp").rglob("*"):
            if path.suffix != ".safetensors" and "__pycache__" not in path.parts:
                file.write(path, path.relative_to(ROOT))
    assert {line.rpartition("/")[2] for line in release.missing(wheel)} == {
        path.name for path in (ROOT / "diffsamp" / "models").glob("*.safetensors")
    }
    with zipfile.ZipFile(wheel, "a") as file:
        file.writestr("tests/test_a.py", "")
    assert "diffsamp.whl has tests/test_a.py" in release.missing(wheel)


def test_the_oldest_jax_is_the_floor():
    floors = dict(re.findall(r"^(jax\w*)==(.*)$", read(".github/oldest.txt"), re.MULTILINE))
    needed = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    for name in ("jax", "jaxlib"):
        assert f"{name}>={floors[name].removesuffix('.0')}" in needed


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_workflows_call_what_is_there(name):
    workflow = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([a-z0-9-]+):", read("Makefile"), re.MULTILINE))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()
            continue
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            for target in re.findall(r"\bmake ([a-z0-9-]+)", step.get("run", "")):
                assert target in targets


def test_what_the_workflows_promise():
    """Three Pythons, the oldest and the newest JAX; tests before the index, no password."""
    jobs = {
        name: yaml.safe_load(path.read_text("utf-8"))["jobs"] for name, path in WORKFLOWS.items()
    }
    matrix = jobs["test"]["test"]["strategy"]["matrix"]["include"]
    assert {"3.11", "3.12", "3.13"} <= {leg["python"] for leg in matrix}
    assert {leg["jax"] for leg in matrix} == {"oldest", "newest"}
    publish = jobs["release"]["publish"]
    assert set(publish["needs"]) == {"test", "build"}
    assert publish["permissions"] == {"id-token": "write"}
    assert "password" not in WORKFLOWS["release"].read_text("utf-8").replace("no password", "")


def test_issue_forms_are_read():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem != "config":
            assert {"name", "description", "body"} <= set(form)
            assert all(field["type"] in ("textarea", "input") for field in form["body"])


class TestPaper:
    """paper/, in the form of JOSS."""

    head, body = read("paper/paper.md").split("---\n", 2)[1:]

    def test_it_is_short_and_has_its_parts(self):
        assert len(self.body.split()) <= 1000
        assert {"title", "tags", "authors", "affiliations", "date", "bibliography"} <= set(
            yaml.safe_load(self.head)
        )
        for part in ("Summary", "Statement of need", "State of the field", "References"):
            assert f"\n# {part}\n" in self.body

    def test_it_cites_what_its_bibliography_has(self):
        cited = set(re.findall(r"@(\w+)", self.body))
        entries = re.findall(r"^@\w+\{(\w+),", read("paper/paper.bib"), re.MULTILINE)
        assert cited == set(entries)
        assert len(entries) == len(set(entries))

    def test_its_numbers_are_those_that_were_measured(self):
        readme = read("README.md")
        cells = re.findall(r"\d+\.\d dB, \d\.\d\d", self.body)
        assert len(cells) == 12
        assert all(cell in readme for cell in cells)
        performance = read("docs/performance.md")
        for number in ("3.89", "29.33", "752"):
            assert number in self.body
            assert number in performance
        assert f"any of {len(ds.solvers.names())} registered solvers" in self.body
        assert "81 configurations of 36 diffusers" in self.body
        assert "81 configurations" in read("docs/diffusers.md")
