"""The direction of imports, where extras may be imported, and the sizes of modules."""

import ast
from pathlib import Path

import pytest

import diffsamp

ROOT = Path(diffsamp.__file__).parent

# a module may import those on lower levels only
LEVELS = [
    ["_core"],
    ["processes"],
    ["predictions", "schedules", "tableau"],
    ["score", "solvers"],
    ["sampling", "guidance", "evaluation", "discrete"],
    ["search", "interop", "kinds", "loops", "steering"],
    ["inverse", "students"],
    ["jobs"],
    ["plot", "models"],
    ["_api"],
    ["cli"],
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
ALLOWED = {"jax", "numpy", "scipy"}
EXTRAS = {
    "flax": {"models", "search"},
    "safetensors": {"models", "jobs"},
    "sklearn": {"models"},
    "optax": {"search"},
    "diffrax": {"loops"},
    "flatbuffers": {"jobs"},
    "matplotlib": {"plot"},
    "tqdm": {"_core"},
    "torch": {"interop"},
    "torchax": {"interop"},
    "diffusers": {"interop"},
    "transformers": {"interop"},
    "huggingface_hub": {"interop"},
}
# modules that may exceed the budget, and why
LARGE = {
    "sampling.py": "the executor, whole, with its docstrings",
    "processes.py": "the processes with their formulas",
    "_steps.py": "the steps of diffusers' classes that are no solver of ours",
    "tableau.py": "arrays, checks, shapes and files of one class",
}


def imports(source, name=""):
    """(top-level package or diffsamp module) of every import in a source, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            if node.module == "diffsamp":
                for alias in node.names:
                    yield f"diffsamp.{alias.name}", node.lineno
            else:
                yield node.module, node.lineno


def violations(name, source):
    """Everything in the source of module `name` (such as "search") that breaks the layers."""
    found = []
    for target, line in imports(source, name):
        top, *rest = target.split(".")
        if top == "diffsamp":
            lower = rest[0] if rest else None
            if name == "cli" and lower is None:
                continue  # the command line is a user of the package
            if lower == name:
                continue
            if lower not in LEVEL:
                found.append(f"{name}:{line} imports unknown module {target}")
            elif LEVEL[lower] >= LEVEL[name]:
                found.append(f"{name}:{line} imports {lower}, which is not below it")
        elif top in EXTRAS and name not in EXTRAS[top]:
            found.append(f"{name}:{line} imports {top}, which belongs to {EXTRAS[top]}")
    return found


def sources():
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.name == "__init__.py" and len(relative.parts) == 1:
            continue
        yield relative, relative.parts[0].removesuffix(".py"), path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("path", "name", "source"), list(sources()), ids=lambda v: str(v)[:30])
def test_imports_point_down(path, name, source):
    assert name in LEVEL, f"{path}: give {name} a level"
    assert violations(name, source) == []


def test_solvers_and_the_executor_do_not_know_each_other():
    for path, name, source in sources():
        targets = {target for target, _ in imports(source)}
        if name == "solvers":
            assert not targets & {"diffsamp.score", "diffsamp.sampling"}, path
        if name in ("sampling", "score"):
            assert not any(t.startswith("diffsamp.solvers") for t in targets), path


def test_third_party_imports_are_the_declared_ones():
    import sys

    known = ALLOWED | set(EXTRAS) | {"diffsamp"} | set(sys.stdlib_module_names)
    for path, _, source in sources():
        tops = {target.split(".")[0] for target, _ in imports(source)}
        assert tops <= known, (path, tops - known)


def test_the_checker_finds_violations():
    assert violations("processes", "from diffsamp.sampling import sample")
    assert violations("solvers", "from diffsamp.score import ScoreFn")
    assert violations("sampling", "import optax")
    assert violations("search", "import diffsamp.nowhere")
    assert not violations("search", "import optax\nfrom diffsamp import solvers")


def test_module_sizes():
    for path, name, source in sources():
        lines = source.count("\n")
        family = name == "solvers" and not path.name.startswith("_")
        budget = 250 if family else 420
        if path.name not in LARGE:
            assert lines <= budget, f"{path} has {lines} lines, more than {budget}"


def test_init_only_re_exports():
    tree = ast.parse((ROOT / "_api.py").read_text(encoding="utf-8"))
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, ast.ImportFrom | ast.Assign), ast.dump(node)
