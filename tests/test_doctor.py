"""`diffsamp doctor`: it says what is there, and fails on what is wrong, also where JAX is unfit."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from diffsamp import cli
from diffsamp.cli import _doctor

ROOT = Path(__file__).parent.parent
DECLARED = [
    "jax>=0.10",
    "numpy>=2.0",
    'flax>=0.12; extra == "models"',
    'optax>=0.2.4; extra == "search"',
    "torch<2.14,>=2.13; extra == 'torch'",
    'diffsamp[models,search]; extra == "demo"',
    'scikit-learn>=1.4; extra == "demo"',
    'pytest>=8; extra == "test"',
]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these versions are installed, and these requirements declared."""

    def pretend(**versions):
        real = _doctor._version
        monkeypatch.setattr(metadata, "requires", lambda name: DECLARED)
        monkeypatch.setattr(
            _doctor, "_version", lambda p: versions[p] if p in versions else real(p)
        )

    return pretend


@pytest.mark.parametrize(
    ("version", "wanted", "good"),
    [
        ("0.10.2", ">=0.10", True),
        ("0.9.2", ">=0.10", False),
        ("0.10", ">=0.10.0", True),
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("2.14.1", ">=2.13,<2.14", False),
        ("0.0.13", "==0.0.13", True),
        ("0.0.12", "==0.0.13", False),
        ("of unknown version", "!=1", True),
        ("1", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version, wanted, good):
    assert _doctor.fits(version, wanted) is good


def test_requirements_follow_the_extras_that_they_include():
    assert _doctor.requirements(DECLARED) == {"jax": ">=0.10", "numpy": ">=2.0"}
    demo = _doctor.requirements(DECLARED, "demo")
    assert demo == {"flax": ">=0.12", "optax": ">=0.2.4", "scikit-learn": ">=1.4"}
    assert _doctor.requirements(DECLARED, "torch") == {"torch": "<2.14,>=2.13"}
    assert _doctor.extras(DECLARED) == ["models", "search", "torch", "demo"]


def test_the_fallback_is_what_the_package_declares():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dependencies"] == _doctor._REQUIRED
    assert project["requires-python"] == ">=" + ".".join(map(str, _doctor._PYTHON))


def test_all_is_well_here(capsys, installed, monkeypatch):
    monkeypatch.setattr(_doctor, "_torch", lambda report: None)  # which takes long where it is
    installed(diffsamp=None)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for what in ("Python", "jax ", "devices", "64-bit arrays", "compilation cache", "XLA_FLAGS"):
        assert f"\n{what}" in text
    assert "2 x cpu" in text
    assert "Nothing is wrong." in text


def test_a_missing_extra_is_no_fault_and_says_how_to_install_it(installed):
    installed(diffsamp=None, torch=None, optax=None)
    report = _doctor.Report()
    assert _doctor._packages(report, DECLARED)
    lines = dict(report.lines)
    assert lines["extra torch"] == 'not installed (torch): pip install "diffsamp[torch]"'
    assert lines["extra demo"].startswith("not installed (optax)")
    assert not report.wrong


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"jax": "0.9.0"}, 'jax is 0.9.0, needed >=0.10: pip install -U "jax>=0.10"'),
        ({"numpy": None}, 'numpy is missing: pip install -U "numpy>=2.0"'),
        ({"flax": "0.11"}, 'flax is 0.11, and extra "models" needs >=0.12'),
        ({"diffsamp": "0.0.1"}, "two copies"),
        ({"torch": "2.14.0"}, 'torch is 2.14.0, and extra "torch" needs <2.14,>=2.13'),
    ],
)
def test_what_is_wrong_is_said_once(versions, words, installed, capsys, monkeypatch):
    monkeypatch.setattr(_doctor, "_torch", lambda report: None)
    installed(**{"diffsamp": None, "torch": None, **versions})
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert text.count(words) == 1
    assert "One thing is wrong:" in text


def test_a_pair_of_torch_and_torchax_that_fails(installed, monkeypatch):
    from diffsamp.interop import _torchax

    def fail():
        raise ImportError("torchax 0.0.1 does not work with torch 9")

    installed(torch="9", torchax="0.0.1")
    monkeypatch.setattr(_torchax, "torchax_of_torch", fail)
    report = _doctor.Report()
    _doctor._torch(report)
    assert report.wrong == ["torchax 0.0.1 does not work with torch 9"]


class FakeJax:
    """What `_settings` and `_devices` ask of JAX."""

    __version__ = "0.10.9"

    class config:
        jax_enable_x64 = True
        jax_compilation_cache_dir = None
        jax_disable_jit = True
        jax_debug_nans = False
        jax_platforms = None

    def __init__(self, folder=None, error=None):
        self.config.jax_compilation_cache_dir, self.error = folder, error

    def devices(self):
        raise RuntimeError(self.error)


def test_switches(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    monkeypatch.setenv("DIFFSAMP_FAST_CONVOLUTIONS", "0")
    (tmp_path / "file").write_text("")
    report = _doctor.Report()
    _doctor._settings(report, FakeJax(folder=tmp_path / "file" / "cache"))
    lines = dict(report.lines)
    assert lines["64-bit arrays"].startswith("on")
    assert lines["threads"].startswith("one")
    assert lines["jax_disable_jit"] == "on: nothing is compiled"
    assert lines["fast convolutions"] == "off, by DIFFSAMP_FAST_CONVOLUTIONS"
    assert len(report.wrong) == 1
    assert "cannot be written" in report.wrong[0]
    _doctor._settings(report, FakeJax(folder=tmp_path / "new"))
    assert len(report.wrong) == 1
    _doctor._devices(report, FakeJax(error="no backend"))
    assert "JAX finds no device: no backend" in report.wrong[1]


def test_a_wrong_sampler_is_found(monkeypatch):
    """The sample is compared with what is known: 2 % too much is seen."""
    import jax

    import diffsamp as ds

    report = _doctor.Report()
    _doctor._sample(report, jax)
    assert not report.wrong
    real = ds.sample
    monkeypatch.setattr(ds, "sample", lambda *args: real(*args) * 1.02)
    _doctor._sample(report, jax)
    assert "is off by" in report.wrong[0]


def test_it_speaks_where_jax_cannot_be_imported(tmp_path):
    (tmp_path / "jax.py").write_text("raise RuntimeError('jaxlib is version 0.1, too old')\n")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "diffsamp.cli", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
        )

    done = run("doctor")
    assert done.returncode == 1
    assert "- the package cannot be imported: jaxlib is version 0.1, too old" in done.stdout
    assert not done.stderr
    done = run("list")
    assert done.returncode == 1
    assert done.stderr.startswith("diffsamp cannot start: jaxlib is version 0.1")
    assert "`diffsamp doctor` says more" in done.stderr
    assert "Traceback" not in done.stderr
