"""The command line and the bundled model, end to end in a reduced size."""

import importlib.resources
import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import cli, plot
from diffsamp.models import digits


@pytest.mark.long
def test_demo_writes_what_it_says(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["demo", "--out", str(out), "--samples", "96", "--steps", "2", "--nfe", "4"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "PSNR (dB) to the ODE's solution at equal noise" in text
    assert "unipc3" in text
    first, found = map(float, re.search(r"noise: ([\d.]+) dB, then ([\d.]+) dB", text).groups())
    assert found >= first > 20
    tableau = ds.Tableau.load(out / "digits-4.json")
    assert tableau.nfe == 4
    for name in ("samples.png", "quality_against_nfe.png"):
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) > 5000


def test_a_bar_is_a_line_every_ten_percent_where_there_is_no_terminal(capsys):
    bar = ds.ProgressBar()
    for what, total in (("many", 300), ("few", 3)):
        for done in range(1, total + 1):
            bar(what, done, total)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0].split() for line in lines] == [
        *(["many:", str(percent)] for percent in range(0, 101, 10)),
        *(["few:", str(percent)] for percent in (33, 67, 100)),
    ]


def test_list_names_every_solver(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [*ds.solvers.SOLVERS, *ds.discrete.SAMPLERS]
    found = [line.split()[0] for line in lines]
    assert found[: len(names)] == names
    # and every other kind of model and process that there is
    folder = Path(ds.__file__).parent / "kinds"
    kinds = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    values = (getattr(ds.processes, name) for name in ds.processes.__all__)
    made = {v.__name__ for v in values if inspect.isfunction(v) and "process" in (v.__doc__ or "")}
    others = {"expect_process", "reversed_flow_apply", "time_by_bisection", "beta_table"}
    assert kinds <= set(found)
    assert made - others <= set(found)
    assert {"consistency_distillation", "dmd2", "mean_flow", "policy_loss"} <= set(found)
    assert not {"loss", "Target", "squared_error"} & set(found)
    assert all(len(line.split()) > 3 for line in lines)


def test_errors_are_one_line(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["demo", "--out", str(blocked / "out")]) == 1
    assert capsys.readouterr().err.startswith("diffsamp demo: ")
    with pytest.raises(SystemExit):
        cli.main(["demo", "--nfe", "7"])


def test_bundled_weights_are_small_and_safe():
    path = importlib.resources.files("diffsamp.models") / "digits.safetensors"
    assert path.stat().st_size < 1_000_000
    # safetensors: eight bytes of header length, then JSON; no pickle
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert all(entry["dtype"] == "F32" for name, entry in header.items() if name != "__metadata__")


def test_bundled_model_denoises_held_in_data():
    """A real network: from sigma = 0.5 it removes most of the noise, and it uses the label."""
    score_fn = digits.load_digits_model()
    images, labels = digits.load_data()
    x_0 = jnp.asarray(images[:200])
    noise = jax.random.normal(jax.random.key(0), x_0.shape)
    x = x_0 + 0.5 * noise

    def error(label):
        denoised = score_fn(x, 0.5, prediction="data", cond={"label": label})
        return float(jnp.mean(jnp.square(denoised - x_0)))

    right = jnp.asarray(labels[:200])
    assert error(right) < 0.4 * 0.5**2
    assert error(right) < error((right + 5) % 10)


def test_bundled_model_samples_have_the_data_statistics():
    """Class-conditional samples are nearer to data of their class than to any other class."""
    score_fn = digits.load_digits_model()
    process = score_fn.process
    images, labels = digits.load_data()
    wanted = np.arange(100, dtype=np.int32) % 10
    tableau = ds.solvers.unipc(process, ds.schedules.logsnr(process, 20))
    x = ds.sample(
        score_fn,
        tableau,
        process.prior_sample(jax.random.key(1), (100, *digits.IMAGE_SHAPE)),
        cond={"label": jnp.asarray(wanted)},
    )
    # nearest neighbour in the data: a classifier of these digits with 98 % accuracy
    distances = ((np.asarray(x)[:, None] - images[None]) ** 2).sum(axis=(2, 3, 4))
    nearest = labels[distances.argmin(axis=1)]
    assert np.mean(nearest == wanted) > 0.9


# -- on a network of one's own --------------------------------------------------------------------

MODEL = """
import jax.numpy as jnp
import diffsamp as ds

process = ds.processes.edm(0.02, 20.0)
target = ds.targets.gaussian_mixture([0.4, 0.6], [[-1.0, 0.4], [0.8, 0.1]], [0.02, 0.1])
score_fn = target.score_fn(process)


def make():
    return score_fn


def apply(params, x, t, scale):
    return x * (scale / (1 + t**2))[:, None]


conditional = ds.ScoreFn(apply, 1.0, process, prediction="data")


def condition(n):
    return {"scale": jnp.linspace(0.5, 1.0, n)}


number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine_for_cli.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = [
    "--shape",
    "2",
    "--solver",
    "ddim,ipndm3",
    "--schedule",
    "karras,logsnr",
    "--starts",
    "24",
    "--batch",
    "16",
]


def test_compare_prints_the_table(folder, capsys):
    arguments = ["compare", "--model", "mine_for_cli:score_fn", "--nfe", "3,4", *QUICK]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["solver", "schedule", "NFE", "3", "NFE", "4"]
    assert sorted(line.split()[0] for line in lines[3:]) == ["ddim"] * 2 + ["ipndm3"] * 2
    arguments = [
        "compare",
        "--model",
        "mine_for_cli:conditional",
        "--cond",
        "mine_for_cli:condition",
        "--nfe",
        "3",
        "--rows",
        "1",
        *QUICK,
    ]
    assert cli.main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_search_then_show(folder, capsys):
    arguments = [
        "search",
        "--model",
        "mine_for_cli:make",
        "--nfe",
        "2,3",
        *QUICK,
        "--steps",
        "8",
        "--rounds",
        "0",
    ]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    plan = ds.search.Plan.load(folder / "plans" / "plan-3.json")
    assert plan.nfe == 3
    assert f"-> {plan.psnr['held_out']['found']:.1f}" in first
    # the same command again repeats nothing and says the same
    before = {path: path.read_bytes() for path in (folder / "plans" / "state").glob("*.json")}
    assert len(before) >= 5
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert before == {path: path.read_bytes() for path in before}

    assert cli.main(["show", "plans/plan-3.json", "--plot", "plan.png"]) == 0
    text = capsys.readouterr().out
    assert "psnr on held out noise" in text
    assert text.count("evaluates D_") == 3
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    ds.solvers.heun(ds.processes.edm(), ds.schedules.karras(ds.processes.edm(), 2)).save("t.json")
    assert cli.main(["show", "t.json"]) == 0
    assert "heun: 3 evaluations in 3 rows, deterministic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mine_for_cli"], "--model must look like module:name"),
        (["--model", "no_such_module:f"], "--model: there is no module 'no_such_module'"),
        (["--model", "mine_for_cli:f"], "module 'mine_for_cli' has no 'f'"),
        (["--model", "mine_for_cli:number"], "must be a ScoreFn, or a function without arguments"),
        (["--model", "mine_for_cli:score_fn", "--cond", "x"], "--cond must look like module:name"),
        (["--model", "mine_for_cli:score_fn", "--nfe", "0"], "`nfe` must be at least 1"),
    ],
)
def test_what_the_options_get_wrong(folder, capsys, arguments, message):
    assert cli.main(["compare", *QUICK, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_show_refuses_other_files(tmp_path, capsys):
    for content in ("{", "[]", '{"format": "x"}'):
        (tmp_path / "f.json").write_text(content)
        assert cli.main(["show", str(tmp_path / "f.json")]) == 1
        assert capsys.readouterr().err.startswith("diffsamp show: ")


def test_descriptions():
    """The weights that are told are those of the tableau, and sum to one."""
    process = ds.processes.edm()
    facts = ds.describe(ds.solvers.dpmpp(process, ds.schedules.karras(process, 6), order=2))
    np.testing.assert_allclose(facts.shares.sum(axis=1), 1)
    assert np.all(np.triu(facts.shares, 1) == 0)
    np.testing.assert_allclose(facts.extrapolation[[0, 5]], 1)  # first order at both ends
    assert np.all(facts.extrapolation[1:5] > 1)
    h = np.log(facts.rho[:3]) - np.log(facts.rho[1:4])
    # 2M: D + h_n / (2 h_{n-1}) (D_n - D_{n-1})
    assert facts.shares[2, 1] == pytest.approx(-h[2] / (2 * h[1]))
    figure = plot.tableau(facts.tableau)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array().data, facts.shares)
    noisy = ds.describe(ds.solvers.ddpm(process, ds.schedules.karras(process, 3)))
    assert str(noisy).count("adds noise of") == 2
    assert "in 3 rows, adds noise" in str(noisy)
