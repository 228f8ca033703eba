"""The command line and the bundled model, end to end in a reduced size."""

import importlib.resources
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import cli, plot
from diffsamp.models import digits


def test_demo_writes_what_it_says(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["demo", "--out", str(out), "--samples", "96", "--steps", "20", "--nfe", "4"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "PSNR (dB) to the ODE's solution at equal noise" in text
    assert "unipc3" in text
    assert "Held-out noise:" in text
    tableau = ds.Tableau.load(out / "digits-4.json")
    assert tableau.nfe == 4
    tableau.check()
    for name in ("samples.png", "quality_against_nfe.png"):
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(content) > 5000


def test_list_names_every_solver(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(ds.solvers.SOLVERS)


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


def test_image_grid_has_one_row_per_label():
    figure = plot.image_grid([("a", np.zeros((3, 8, 8, 1))), ("b", np.ones((3, 8, 8, 1)))])
    assert len(figure.axes) == 6
