"""The commands that run samplers, on a network of one's own and on a folder's."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import cli
from diffsamp.interop import numpy as reader

MODEL = """
import jax.numpy as jnp
import diffsamp as ds

process = ds.processes.vp_discrete()


def apply(params, x, t, scale=None):
    return params * x / (1 + 1e-3 * t[:, None])


score_fn = ds.ScoreFn(apply, 1.0, process, prediction="noise")


def condition(n):
    return {"scale": jnp.linspace(0.5, 1.0, n)}
"""
NETWORK = ["--model", "mine_for_jobs:score_fn", "--shape", "2"]
# from another process than that of NETWORK
FLOW = ds.processes.flow()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine_for_jobs.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def network(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    import mine_for_jobs

    return mine_for_jobs.score_fn


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_sample_by_name_and_by_plan(folder, network, capsys):
    made = ds.sampler(network, "unipc2", nfe=5)
    want = np.asarray(made(jax.random.key(3), (4, 2)))
    by_name = ["--solver", "unipc2", "--nfe", 5, "--n", 4, "--seed", 3]
    assert run("sample", *NETWORK, *by_name, "--out", "x.npy") == 0
    assert "4 samples of 5 evaluations" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load("x.npy"), want)
    ds.search.Plan.of(made.tableau, network).save("plan.json")
    made.tableau.save("tableau.json")
    for file in ("plan.json", "tableau.json"):
        by_plan = ["--plan", file, "--n", 4, "--seed", 3, "--cond", "mine_for_jobs:condition"]
        assert run("sample", *NETWORK, *by_plan, "--out", "y.npz") == 0
        np.testing.assert_array_equal(np.load("y.npz")["samples"], want)
    assert capsys.readouterr().err == ""
    other = network.__class__(network.apply, 2.0, network.process, prediction="noise")
    ds.search.Plan.of(made.tableau, other).save("plan.json")
    assert run("sample", *NETWORK, "--plan", "plan.json", "--n", 2, "--out", "z.npy") == 0
    assert "was made for other weights" in capsys.readouterr().err


def test_generate_goes_on(folder, network, capsys):
    arguments = ["--solver", "ddim", "--nfe", 3, "--batch", 4, "--out", "many"]
    arguments += ["--cond", "mine_for_jobs:condition"]
    assert run("generate", *NETWORK, *arguments, "--n", 6) == 0
    assert "6 samples in 2 files" in capsys.readouterr().out
    assert ds.Generated.open("many").complete


def test_export_and_load(folder, network):
    arguments = ["--solver", "ddim", "--nfe", 3, "--platforms", "cpu", "--out", "x.sampler"]
    assert run("export", *NETWORK, *arguments) == 0
    x_T = jnp.ones((3, 2))
    got = ds.load_exported("x.sampler")(jax.random.key(0), x_T)
    want = ds.sample(network, ds.sampler(network, "ddim", nfe=3).tableau, x_T)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_convert_writes_what_the_scheduler_reads(folder, network, capsys):
    table = ds.sampler(network, "unipc3", nfe=4).tableau
    ds.search.Plan.of(table, network).save("plan.json")
    table.save("tableau.json")
    assert run("convert", "plan.json", "--out", "scheduler") == 0
    assert "4 steps" in capsys.readouterr().out
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "TableauScheduler"
    assert config["prediction_type"] == "epsilon"
    np.testing.assert_allclose(config["timesteps"], table.times[:-1])
    assert config["calls"] == reader.calls(*reader.read("plan.json"))
    assert run("convert", "tableau.json") == 1
    assert "does not say what its network predicts" in capsys.readouterr().err
    assert run("convert", "tableau.json", "--prediction", "epsilon", "--out", "other") == 0
    again = json.loads((folder / "other" / "scheduler_config.json").read_text())
    for key, column in config["calls"].items():
        np.testing.assert_allclose(again["calls"][key], column, rtol=1e-12)


def test_show_says_what_it_was_made_for(folder, network, capsys):
    ds.search.Plan.of(ds.sampler(network, "unipc3", nfe=4).tableau, network).save("plan.json")
    assert run("show", "plan.json", "--cite") == 0
    text = capsys.readouterr().out
    assert "for a network of noise on VPDiscrete, time t (sha256:" in text
    assert "@misc{zhao2023unipc" in text


class Folder:
    """Stands for `ds.from_pretrained(folder)`."""

    has_guidance_inside = False

    shape = (2, 4, 4)

    def __init__(self, folder):
        self.asked, self.schedule = folder, None

        def apply(params, x, t, text):
            return x * text[:, None, None, None]

        process = ds.processes.vp_discrete()
        self.score_fn = ds.ScoreFn(apply, None, process, prediction="noise")

    def conditions(self, prompts):
        return {"text": jnp.asarray([0.1 * len(p) for p in map(str, prompts)])}

    def null(self, negative=""):
        return {"text": jnp.asarray(0.1 * len(negative))}

    def sampler(self, n):
        return ds.sampler(self.score_fn, "ddim", nfe=n)

    def decode(self, x):
        return jnp.concatenate([x, x[:, :1]], axis=1)


def test_a_folder_with_prompts(folder, monkeypatch, capsys):
    monkeypatch.setattr(ds, "from_pretrained", Folder, raising=False)
    arguments = ["sample", "--pretrained", "there", "--prompt", "a", "bcd", "--n", 3, "--nfe", 4]
    arguments += ["--guidance", 2.0, "--negative", "xy"]
    assert run(*arguments, "--out", "x.npy") == 0
    model = Folder("there")
    guided = ds.guidance.cfg(model.score_fn, 2.0, null={"text": jnp.asarray(0.2)})
    cond = {"text": jnp.asarray([0.1, 0.3, 0.1])}
    sampler = ds.Sampler(guided, model.sampler(4).tableau)
    want = model.decode(sampler(jax.random.key(0), (3, 2, 4, 4), cond=cond))
    np.testing.assert_allclose(np.load("x.npy"), want, rtol=1e-5)
    assert run(*arguments, "--out", "x.png") == 0
    assert (folder / "x.png").read_bytes().startswith(b"\x89PNG")
    few = ["search", "--pretrained", "there", "--prompt", "a", "--guidance", 2.0, "--nfe", 3]
    few += ["--starts", 12, "--batch", 12, "--stages", "compare", "--solver", "ddim"]
    assert run(*few, "--schedule", "logsnr") == 0
    plan = ds.search.Plan.load("plans/plan-3.json")
    assert plan.network["checkpoint"]["name"] == "there"
    assert plan.network["guidance"] == [{"name": "Combined", "scale": 2.0}]
    capsys.readouterr()
    for extra, message in (
        (["--negative", "x", "--prompt", "a"], "--negative needs --guidance"),
        (["--guidance", 2], "--guidance needs a --prompt or a --label"),
        (["--cond", "a:b"], "--cond belongs to --model"),
    ):
        assert run("sample", "--pretrained", "there", *extra) == 1
        assert message in capsys.readouterr().err


def test_check_reads_data_and_says_the_verdict(folder, monkeypatch, capsys):
    seen = []

    def check(score_fn, x_0, cond=None):
        seen.append((score_fn, x_0, cond))
        return len(seen) == 1

    monkeypatch.setattr(ds, "check", check, raising=False)
    np.save("data.npy", np.ones((5, 2)))
    arguments = ["check", *NETWORK, "--data", "data.npy", "--cond", "mine_for_jobs:condition"]
    assert run(*arguments) == 0
    assert seen[0][1].shape == (5, 2)
    assert seen[0][2]["scale"].shape == (5,)
    assert run(*arguments) == 1
    np.save("wrong.npy", np.ones((5, 3)))
    assert run("check", *NETWORK, "--data", "wrong.npy") == 1
    assert "--data must be (n, 2); got (5, 3)" in capsys.readouterr().err


def test_errors_are_one_line(folder, network, capsys, monkeypatch):
    ds.solvers.ddim(FLOW, ds.schedules.logsnr(FLOW, 3)).save("flow.json")
    (folder / "text.json").write_text("no")
    (folder / "pickled.npy").write_bytes(b"\x80\x04no")
    sample = ["sample", *NETWORK]
    for arguments, message in (
        ([*sample, "--plan", "none.json"], "there is no plan none.json"),
        ([*sample, "--plan", "text.json"], "is neither a plan nor a tableau"),
        ([*sample, "--plan", "flow.json"], "built for another process"),
        ([*sample, "--plan", "flow.json", "--solver", "ddim"], "give --plan, or --solver"),
        ([*sample, "--solver", "nosuch"], "nosuch"),
        ([*sample, "--solver", "heun", "--nfe", 6], "cannot make exactly 6 evaluations"),
        ([*sample, "--out", "x.jpg"], "must end in .npy, .npz or .png"),
        ([*sample, "--out", "x.png"], "pictures must be (n, height, width"),
        ([*sample, "--prompt", "a"], "--prompt belongs to --pretrained"),
        (["sample", "--model", "mine_for_jobs:score_fn"], "--model needs --shape"),
        (["check", *NETWORK, "--data", "none.npy"], "there is no file none.npy"),
        (["check", *NETWORK, "--data", "pickled.npy"], "is no .npy or .npz of numbers"),
        (["convert", "none.json"], "there is no plan none.json"),
        (["convert", "text.json"], "is neither a plan nor a tableau"),
        (["show", "none.json"], "there is no plan none.json"),
    ):
        assert run(*arguments) == 1, arguments
        error = capsys.readouterr().err
        assert error.startswith(f"diffsamp {arguments[0]}: ")
        assert message in error, (message, error)

    def missing(folder):
        raise ModuleNotFoundError('diffusers is missing: pip install "diffsamp[diffusers]"')

    monkeypatch.setattr(ds, "from_pretrained", missing, raising=False)
    assert run("sample", "--pretrained", "there") == 1
    assert 'pip install "diffsamp[diffusers]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["sample", "generate", "suggest", "compare", "search", "show", "check", "export", "convert"],
)
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    examples = text.partition("examples:")[2].replace("\\\n", " ").strip().splitlines()
    assert examples
    import shlex

    for line in examples:
        words = shlex.split(line)
        assert words[:2] == ["diffsamp", command]
        cli.build_parser().parse_args(words[1:])


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "diffsamp.cli", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"diffsamp {ds.__version__}\n", done.stderr
