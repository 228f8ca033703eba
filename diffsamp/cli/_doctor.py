"""`diffsamp doctor`: what is installed, where it runs, and what is wrong with it.

Nothing but the standard library is imported before it is known to be there, so that it also speaks
where JAX is missing or too old for the rest of the package.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import diffsamp

__all__ = ["Report", "doctor", "examine", "extras", "fits", "requirements"]

# for a copy that was not installed, and so has no list of its own
_REQUIRED = ["jax>=0.10", "jaxlib>=0.10", "numpy>=2.0", "scipy>=1.14"]
_PYTHON = (3, 11)
# what pip calls a package, where it is imported under another name
_IMPORTED = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
_HIDDEN = ("test", "dev")  # extras of those who work on the package
_NAME = re.compile(r"([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?\s*\(?([^;)]*)\)?\s*(?:;\s*(.*))?")
_CONVOLUTIONS = "DIFFSAMP_FAST_CONVOLUTIONS"


@dataclasses.dataclass
class Report:
    """What was found; `str` gives it as text.

    Attributes:
      lines: (what, its state), in order.
      wrong: what should be mended, each with how.
    """

    lines: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def say(self, what: str, state: str) -> None:
        """Add a line."""
        self.lines.append((what, state))

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.lines)
        text = [f"{what.ljust(width)}  {state}".rstrip() for what, state in self.lines]
        if not self.wrong:
            return "\n".join([*text, "", "Nothing is wrong."])
        head = "One thing is wrong:" if len(self.wrong) == 1 else f"{len(self.wrong)} are wrong:"
        return "\n".join([*text, "", head, *(f"- {one}" for one in self.wrong)])


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without zeros at its end: "2.13.0+cpu" is (2, 13)."""
    found = re.match(r"\d+(?:\.\d+)*", version.strip())
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def fits(version: str, wanted: str) -> bool:
    """Whether a version is one of those that a requirement allows.

    Args:
      version: such as "0.10.2".
      wanted: such as ">=0.10,<0.12"; of its comparisons ">=", ">", "<=", "<", "==" and "!=" are
        judged, others let everything through.
    """
    have = _release(version)
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        sign, _, number = re.match(r"([<>=!~]*)(\s*)(.*)", part).groups()  # type: ignore[union-attr]
        limit = _release(number)
        allowed = {
            ">=": have >= limit,
            ">": have > limit,
            "<=": have <= limit,
            "<": have < limit,
            "==": have == limit,
            "!=": have != limit,
        }
        if not allowed.get(sign, True):
            return False
    return True


def requirements(declared: Iterable[str], extra: str | None = None) -> dict[str, str]:
    """{package: versions} of what is needed, or of an extra and those that it includes.

    Args:
      declared: as `importlib.metadata.requires` gives them.
      extra: its name; None: what is always needed.
    """
    declared = list(declared)
    found: dict[str, str] = {}
    for line in declared:
        name, inner, versions, marker = _NAME.match(line).groups()  # type: ignore[union-attr]
        of = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker or "")
        if (of[1] if of else None) != extra:
            continue
        if name == "diffsamp":
            for other in inner.split(","):
                found |= requirements(declared, other.strip())
        else:
            found[name] = versions.strip()
    return found


def extras(declared: Iterable[str]) -> list[str]:
    """Names of the extras that a user may want, in the order in which they are declared."""
    named = (re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line) for line in declared)
    return [one for one in dict.fromkeys(m[1] for m in named if m) if one not in _HIDDEN]


def _version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        name = _IMPORTED.get(package, package)
        try:
            return None if importlib.util.find_spec(name) is None else "of unknown version"
        except (ImportError, ValueError):  # hidden, or half of it is there
            return None


def _packages(report: Report, declared: list[str]) -> bool:
    """What is installed; whether all that is needed is there."""
    report.say("diffsamp", f"{diffsamp.__version__} in {Path(diffsamp.__file__).parent}")
    installed = _version("diffsamp")
    if installed not in (None, diffsamp.__version__):
        report.wrong.append(
            f"pip lists diffsamp {installed}, but {diffsamp.__version__} is imported: two copies. "
            "Uninstall one, or start Python in another folder."
        )
    report.say("Python", f"{platform.python_version()} ({sys.executable})")
    if sys.version_info[:2] < _PYTHON:
        report.wrong.append("Python is older than 3.11: make an environment with a newer one.")
    whole = True
    for package, wanted in requirements(declared).items():
        version = _version(package)
        report.say(package, version or "missing")
        if version is None or not fits(version, wanted):
            whole = False
            have = "missing" if version is None else f"{version}, needed {wanted}"
            report.wrong.append(f'{package} is {have}: pip install -U "{package}{wanted}".')
    for extra in extras(declared):
        needed = requirements(declared, extra)
        found = {package: _version(package) for package in needed}
        missing = [package for package, version in found.items() if version is None]
        if missing:
            install = f'pip install "diffsamp[{extra}]"'
            report.say(f"extra {extra}", f"not installed ({', '.join(missing)}): {install}")
            continue
        report.say(f"extra {extra}", ", ".join(f"{name} {v}" for name, v in found.items()))
        for package, version in found.items():
            text = f'{package} is {version}, and extra "{extra}" needs {needed[package]}'
            known = all(text.split(",")[0] not in one for one in report.wrong)
            if not fits(version or "", needed[package]) and known:
                report.wrong.append(f'{text}: pip install -U "diffsamp[{extra}]".')
    return whole


def _torch(report: Report) -> None:
    """Whether torch and torchax go together: what is listed may still fail to be imported."""
    if _version("torch") is None or _version("torchax") is None:
        return
    from diffsamp.interop._torchax import torchax_of_torch

    try:
        torchax_of_torch()
        report.say("torch and torchax", "work together")
    except ImportError as error:
        report.say("torch and torchax", "do not work together")
        report.wrong.append(str(error))


def _devices(report: Report, jax: ModuleType) -> None:
    """Where programs run, and whether a GPU is left out."""
    try:
        devices = jax.devices()
    except RuntimeError as error:
        report.say("devices", "none")
        report.wrong.append(f"JAX finds no device: {error}")
        return
    kinds = [f"{d.platform} ({d.device_kind})" for d in devices]
    counts = {kind: kinds.count(kind) for kind in kinds}
    report.say("devices", ", ".join(f"{n} x {kind}" for kind, n in counts.items()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report.say("processor", f"{cores} of {os.cpu_count()} cores usable, {platform.machine()}")
    asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms
    if asked:
        report.say("JAX_PLATFORMS", str(asked))
    there = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    if there and not asked and all(d.platform == "cpu" for d in devices):
        report.wrong.append(
            "There is an NVIDIA GPU, and JAX uses the CPU: "
            f'pip install -U "jax[cuda12]=={jax.__version__}".'
        )
    jaxlib = _version("jaxlib") or ""
    for name in sorted({d.metadata["Name"] or "" for d in importlib.metadata.distributions()}):
        if re.fullmatch(r"jax[-_]cuda\d+[-_](plugin|pjrt)", name):
            report.say(name, _version(name) or "")
            if _release(_version(name) or "")[:2] != _release(jaxlib)[:2]:
                report.wrong.append(
                    f"{name} is {_version(name)}, and jaxlib {jaxlib}: they must be of one "
                    f'version, pip install -U "jax[cuda12]=={jax.__version__}".'
                )


def _settings(report: Report, jax: ModuleType) -> None:
    """Switches that change what is computed, or how fast."""
    x64 = "on: states may be float64" if jax.config.jax_enable_x64 else "off (JAX_ENABLE_X64=1)"
    report.say("64-bit arrays", x64)
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        report.say("compilation cache", "off (JAX_COMPILATION_CACHE_DIR=folder keeps programs)")
    else:
        report.say("compilation cache", str(folder))
        if "://" not in str(folder) and not _writable(Path(folder)):
            report.wrong.append(f"the compilation cache {folder} cannot be written.")
    report.say("XLA_FLAGS", os.environ.get("XLA_FLAGS") or "none")
    if re.search(r"multi_thread_eigen=(false|0)|parallelism_threads=1\b", _flags()):
        report.say("threads", "one, by XLA_FLAGS: a CPU's other cores rest")
    for name, effect in (("jax_disable_jit", "nothing is compiled"), ("jax_debug_nans", "slow")):
        if getattr(jax.config, name):
            report.say(name, f"on: {effect}")
    switch = os.environ.get(_CONVOLUTIONS, "1").strip().lower()
    if switch in ("0", "false", "off", "no"):
        report.say("fast convolutions", f"off, by {_CONVOLUTIONS}")
    elif diffsamp.fast_convolutions(True):
        report.say("fast convolutions", "on (of CPUs, in loops)")
    else:
        report.say("fast convolutions", "not with this JAX")
        report.wrong.append(
            f"JAX {jax.__version__} has moved what fast convolutions on CPU rest on: samples are "
            "right, and networks of convolutions slow on a CPU. Take jax 0.10."
        )


def _flags() -> str:
    return os.environ.get("XLA_FLAGS", "")


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _sample(report: Report, jax: ModuleType) -> None:
    """Whether a sampler gives what is known: the ODE of a Gaussian is solved in closed form."""
    import numpy as np

    process = diffsamp.processes.vp_linear()
    score_fn = diffsamp.targets.gaussian([1.0, -1.0], 0.25).score_fn(process)
    tableau = diffsamp.solvers.unipc(process, diffsamp.schedules.logsnr(process, 20), order=3)
    x_T = process.prior_sample(jax.random.key(0), (64, 2))
    began = time.perf_counter()
    x = jax.block_until_ready(diffsamp.sample(score_fn, tableau, x_T))
    first = time.perf_counter() - began
    began = time.perf_counter()
    jax.block_until_ready(diffsamp.sample(score_fn, tableau, x_T))
    again = time.perf_counter() - began
    # along the ODE (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stays as it is
    t, mean, std = process.t_max, np.array([1.0, -1.0]), 0.5
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    scale = std / ((alpha * std) ** 2 + sigma**2) ** 0.5
    exact = mean + scale * (np.asarray(x_T) - alpha * mean)
    error = float(np.abs(np.asarray(x) - exact).max())
    report.say(
        "a sampler of 20 evaluations",
        f"error {error:.1e}; compiled and run in {first:.2g} s, then {1e3 * again:.2g} ms",
    )
    if not error < 1e-2:
        report.wrong.append(
            f"a sampler with a known result is off by {error:.1e}: this JAX, or this device, "
            "computes something else. Try JAX_PLATFORMS=cpu, and report it."
        )


def examine() -> Report:
    """Look at all of it."""
    report = Report()
    try:
        declared = importlib.metadata.requires("diffsamp") or _REQUIRED
    except importlib.metadata.PackageNotFoundError:
        declared = _REQUIRED
    whole = _packages(report, declared)
    try:
        jax = importlib.import_module("jax")
        importlib.import_module("diffsamp._api")
    except Exception as error:  # whatever the import of an unfit pair says
        if whole:
            report.wrong.append(f"the package cannot be imported: {error}")
        return report
    _devices(report, jax)
    _settings(report, jax)
    try:
        _sample(report, jax)
    except Exception as error:  # whatever fails in it is what is looked for
        report.wrong.append(f"a small sampler fails: {error}")
    _torch(report)
    return report


def doctor() -> int:
    """Print the report; 1 if something is wrong."""
    report = examine()
    print(report)
    return 1 if report.wrong else 0
