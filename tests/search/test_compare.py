"""Compare and the objectives: what is measured, one program, populations, clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PROCESS, start

import diffsamp as ds
from diffsamp import search


def test_compare_measures_what_it_says(score_fn):
    x_T = start(48)
    seen = []
    result = search.compare(
        score_fn,
        x_T,
        nfe=(3, 4, 6),
        solver=("ddim", "heun", "dpmpp_2m", "unipc3"),
        schedule=("karras", "logsnr"),
        scores={"rmse": lambda x, ref: float(ds.metrics.rmse(x, ref))},
        batch=20,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    # heun makes 3 evaluations with 2 steps, and cannot make 4 or 6
    assert len(result.entries) == 3 * 3 * 2 + 2
    assert [e.nfe for e in result.entries if e.solver == "heun"] == [3, 3]
    for entry in result.entries:
        assert entry.tableau.nfe == entry.nfe
    one = next(e for e in result.entries if (e.solver, e.nfe) == ("unipc3", 6))
    x = ds.sample(score_fn, one.tableau, x_T)
    assert one.psnr == pytest.approx(float(ds.metrics.psnr(x, result.reference)), abs=0.01)
    assert one.scores["rmse"] == pytest.approx(
        float(ds.metrics.rmse(x, result.reference)), rel=1e-3
    )
    assert result.best(6).psnr == max(e.psnr for e in result.entries if e.nfe == 6)
    lowest = result.best(6, by="rmse")
    assert lowest.scores["rmse"] == min(e.scores["rmse"] for e in result.entries if e.nfe == 6)
    assert seen[-1] == ("comparing", 20, 20)
    assert ("reference", 48, 48) in seen

    table = result.table(score="rmse")
    lines = table.splitlines()
    assert lines[0].split() == ["solver", "schedule", "NFE", "3", "NFE", "4", "NFE", "6"]
    assert len(lines) == 2 + 8
    assert table.count("*") == 3
    assert sum(line.startswith("heun") and line.rstrip().endswith("-") for line in lines) == 2
    assert len(result.table(rows=3).splitlines()) == 5
    with pytest.raises(ValueError, match=r"nothing was measured at nfe = 5; there is \[3, 4, 6\]"):
        result.best(5)
    with pytest.raises(ValueError, match="`by` must be 'psnr' or one of"):
        result.best(6, by="fid")


def test_compare_compiles_the_network_once():
    traces = []

    def apply(params, x, t):
        traces.append(1)
        return params * x

    score_fn = ds.ScoreFn(apply, jnp.ones(()), PROCESS, prediction="noise")
    x_T = start(8)
    search.compare(score_fn, x_T, nfe=(3, 5), reference=jnp.zeros_like(x_T), key=jax.random.key(0))
    assert len(traces) == 1


def test_a_sampler_that_diverges_is_counted_last():
    """NaN from one candidate neither stops the comparison nor wins it."""

    def apply(params, x, t):
        # a network that breaks below sigma = 0.1
        return jnp.where(t[:, None] < 0.1, jnp.nan, params * x)

    score_fn = ds.ScoreFn(apply, jnp.asarray(0.1), PROCESS, prediction="data")
    result = search.compare(
        score_fn,
        start(8),
        nfe=(2, 6),
        solver=("ddim",),
        schedule=("uniform", "karras"),
        reference=start(8, 1),
        scores={"zero": lambda x, ref: 0.0},
    )
    broken = [e for e in result.entries if not np.isfinite(e.psnr)]
    assert {e.schedule for e in broken} == {"karras"}
    assert all(np.isnan(e.scores["zero"]) for e in broken)
    assert result.best(6).schedule == "uniform"
    assert result.best(6, by="zero").schedule == "uniform"


@pytest.mark.parametrize("together", [3, 7])
def test_a_population_gives_the_samples_of_each(score_fn, together):
    """Several tableaux in one batch, each sample with the noise it has alone."""
    x_T, key = start(10), jax.random.key(5)
    grid = ds.schedules.karras(PROCESS, 5)
    tableaux = [
        ds.solvers.ddim(PROCESS, grid),
        ds.solvers.heun(PROCESS, grid),
        ds.solvers.ddpm(PROCESS, grid),
        ds.solvers.unipc(PROCESS, ds.schedules.logsnr(PROCESS, 8)),
    ]
    many = list(search.run_many(score_fn, tableaux, x_T, key=key, batch=4, population=together))
    for tableau, x in zip(tableaux, many, strict=True):
        np.testing.assert_allclose(x, ds.sample(score_fn, tableau, x_T, key=key), atol=2e-4)


def test_compare_does_not_depend_on_the_population(score_fn):
    options = {"nfe": (3, 4), "solver": ("ddim", "heun", "unipc3"), "schedule": ("karras",)}
    alone = search.compare(score_fn, start(12), **options)
    together = search.compare(score_fn, start(12), population=4, batch=8, **options)
    for one, two in zip(alone.entries, together.entries, strict=True):
        assert (one.solver, one.nfe) == (two.solver, two.nfe)
        assert one.psnr == pytest.approx(two.psnr, abs=1e-2)


def test_compare_takes_schedules_of_ones_own(score_fn):
    mine = {"mine": lambda process, n: np.append(np.geomspace(20.0, 0.1, n), 0.0)}
    result = search.compare(score_fn, start(6), nfe=(4,), solver=("ddim",), schedule=mine)
    (entry,) = result.entries
    np.testing.assert_allclose(entry.tableau.times, [*np.geomspace(20.0, 0.1, 4), 0.0])
    assert entry.schedule == "mine"


def test_the_objectives_are_what_they_say(score_fn):
    x, y = jax.random.normal(jax.random.key(0), (2, 64, 3))
    objective = search.objective
    error = np.mean((np.asarray(x) - np.asarray(y)) ** 2, axis=1)
    assert objective.rmse()(x, y) == pytest.approx(np.sqrt(error.mean()), rel=1e-5)
    assert objective.log_mse()(x, y) == pytest.approx(np.log(error).mean(), rel=1e-5)
    psnr = 20 * np.log10(4.0) - 10 * np.log10(error)
    assert objective.psnr(4.0)(x, y) == pytest.approx(-psnr.mean(), rel=1e-5)
    half = objective.feature_error(lambda v: v[:, :2], log=False)
    want = np.mean((np.asarray(x - y)[:, :2] ** 2).mean(axis=1))
    assert half(x, y) == pytest.approx(want, rel=1e-5)
    assert objective.frechet(y)(x, None) == pytest.approx(ds.metrics.frechet_distance(x, y))
    assert objective.kernel(y, lambda v: 2 * v)(x, None) == pytest.approx(
        ds.metrics.kernel_distance(2 * x, 2 * y), rel=1e-4
    )
    key = jax.random.key(1)
    assert objective.sliced_wasserstein(y, key)(x, None) == pytest.approx(
        ds.metrics.sliced_wasserstein(x, y, key)
    )
    assert objective.rmse()(x * np.nan, y) == np.inf
    assert all(
        o.loss is None
        for o in (objective.frechet(y), objective.kernel(y), objective.sliced_wasserstein(y, key))
    )


def test_kernel_distance():
    """Zero in the mean for equal distributions, and what its definition says on two points."""
    rng = np.random.default_rng(0)
    x = np.array([[1.0, 2.0], [0.0, -1.0]])
    y = np.array([[2.0, 0.0], [1.0, 1.0], [0.5, 0.0]])

    def k(a, b):
        return (a @ b / 2 + 1) ** 3

    want = k(x[0], x[1]) + np.mean([k(y[i], y[j]) for i in range(3) for j in range(3) if i != j])
    want -= 2 * np.mean([k(a, b) for a in x for b in y])
    assert ds.metrics.kernel_distance(x, y) == pytest.approx(want)
    same = [ds.metrics.kernel_distance(*rng.normal(size=(2, 100, 4))) for _ in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(60)
    assert ds.metrics.kernel_distance(rng.normal(size=(100, 4)), rng.normal(1, 1, (100, 4))) > 1


def test_a_network_that_returns_nan_is_an_error():
    broken = ds.ScoreFn(lambda p, x, t: x * jnp.nan, 1.0, PROCESS, prediction="data")
    with pytest.raises(ValueError, match="network returned NaN or inf"):
        search.compare(broken, start(4), nfe=(3,), solver=("ddim",))
    result = search.compare(broken, start(4), nfe=(3,), solver=("ddim",), reference=start(4))
    assert result.discarded == len(result.entries)
    with pytest.raises(ValueError, match="samplers of 3 evaluations gave samples that are not fin"):
        result.best(3)
