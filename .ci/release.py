"""Whether what is to be released says one thing: version, changelog, citation, files of the wheel.

python .ci/release.py [--tag v0.1.0] [dist/*.whl]

Without a tag the unreleased changes may wait; with one they must be under the heading of its
version, with the date that CITATION.cff has.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what an installed package cannot do without
NEEDED = ("py.typed", "models/digits.safetensors", "evaluation/references.bib")


def version(root: Path = ROOT) -> str:
    """The one place: `__version__` of the package, read and not imported."""
    for node in ast.parse((root / "diffsamp" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return str(ast.literal_eval(node.value))
    raise ValueError("diffsamp/__init__.py has no __version__.")


def problems(tag: str | None = None, root: Path = ROOT) -> list[str]:
    """What does not agree."""
    own = version(root)
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    found = []
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    heads = [section.splitlines()[0] for section in sections]
    dated = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", head) for head in heads[1:]]
    if not heads or heads[0] != "[Unreleased]":
        found.append("CHANGELOG.md does not begin with [Unreleased].")
    if not all(dated):
        found.append("a heading of CHANGELOG.md is no [version] - date.")
    first = dated[0] if dated else None
    if first is None or first[1] != own:
        found.append(f"the newest version of CHANGELOG.md is not {own}.")
    for name, value in (("version", own), ("date-released", first[2] if first else "")):
        if not re.search(rf"^{name}: ['\"]?{re.escape(value)}['\"]?$", citation, re.MULTILINE):
            found.append(f"CITATION.cff's {name} is not {value}.")
    if tag is not None:
        if tag != f"v{own}":
            found.append(f"the tag {tag} is not v{own}.")
        if sections and re.search(r"^- ", sections[0], re.MULTILINE):
            found.append("changes are under [Unreleased]: move them under the version's heading.")
    return found


def missing(wheel: Path) -> list[str]:
    """What a wheel lacks, or should not have."""
    names = zipfile.ZipFile(wheel).namelist()
    found = [f"{wheel.name} lacks {name}" for name in NEEDED if f"diffsamp/{name}" not in names]
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "diffsamp").rglob("*")
        if path.suffix in (".py", ".json", ".bib", ".safetensors")
    }
    found += [f"{wheel.name} lacks {name}" for name in sorted(here - set(names))]
    strange = [
        n for n in names if not n.startswith(("diffsamp/", f"diffsamp-{version()}.dist-info"))
    ]
    return found + [f"{wheel.name} has {name}" for name in strange]


def main() -> int:
    """Prints what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tag", help="the release's tag")
    parser.add_argument("wheels", nargs="*", type=Path)
    arguments = parser.parse_args()
    found = problems(arguments.tag) + [line for w in arguments.wheels for line in missing(w)]
    print("\n".join(found or [f"diffsamp {version()}: version, changelog and citation agree"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
