"""Adaptive ODE solutions and log-likelihoods, against exact solutions and counted evaluations."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes, skewed_mixture

import diffsamp as ds
from diffsamp import adaptive

diffrax = pytest.importorskip("diffrax")

PROCESSES = all_processes()


def gaussian_3d():
    turn = np.linalg.qr(np.array([[1.0, 2.0, 0.5], [0.3, -1.0, 1.0], [0.7, 0.2, 2.0]]))[0]
    return ds.targets.gaussian([0.4, -0.8, 0.1], turn @ np.diag([0.05, 0.3, 0.9]) @ turn.T)


def starts(process, n=5):
    """Spread states at t_max, (n, 1)."""
    return np.linspace(-2, 2, n)[:, None] * float(process.prior_std)


def size(process, t):
    """What states at t are divided by before the tolerance applies."""
    return float(process.alpha(t) + process.sigma(t))


# -- the ODE ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [
        "vp_zero_snr",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("vp_linear", "ve", "flow")),
    ],
)
def test_exact_solution_both_ways(name):
    process, target = PROCESSES[name], skewed_mixture()
    score_fn = target.score_fn(process)
    t_max, t_min = process.t_max, process.t_min
    middle = float(process.time(np.float64(0.3)))
    save_at = [middle, t_min, t_max]  # not in the order of the solve
    x_T = starts(process)
    exact = [target.ode_solution(x_T, process, t_max, t) for t in save_at]
    errors, calls = [], []
    for tolerance in (1e-4, 1e-7, 1e-10):
        options = {"rtol": tolerance, "atol": tolerance, "save_at": save_at}
        down = adaptive.ode_solution(score_fn, jnp.asarray(x_T), t_max, t_min, **options)
        up = adaptive.ode_solution(score_fn, down.x, t_min, t_max, **options)
        errors.append(
            [
                np.abs(down.x - exact[1]).max() / size(process, t_min),
                np.abs(up.x - x_T).max() / size(process, t_max),  # the round trip
                np.abs(down.points[0] - exact[0]).max() / size(process, middle),
                np.abs(up.points[0] - exact[0]).max() / size(process, middle),
            ]
        )
        calls.append(int(jnp.sum(down.nfe)))
        for run, first, last in ((down, 2, 1), (up, 1, 2)):
            assert run.points.shape == (3, 5, 1)
            start = x_T if run is down else down.x
            rounding = 1e-12 * size(process, t_max)
            np.testing.assert_allclose(run.points[last], run.x, atol=rounding)
            np.testing.assert_allclose(run.points[first], start, atol=rounding)
    errors = np.array(errors)
    # the error of one step is controlled; the ODE spreads neighbours between the modes apart, by up
    # to about 1e3, and interpolation is of one order less than the steps
    assert np.all(errors[-1] < [1e-9, 1e-9, 1e-8, 1e-8])
    assert np.all(errors[:-1].max(axis=1) > 30 * errors[1:].max(axis=1))
    assert calls == sorted(calls)
    assert calls[0] < calls[-1] / 5


@pytest.mark.usefixtures("x64")
def test_one_sample_does_not_depend_on_its_batch():
    process = PROCESSES["flow"]
    score_fn = skewed_mixture().score_fn(process, "velocity")
    x_T = jnp.asarray(starts(process))
    together = adaptive.ode_solution(score_fn, x_T, 1.0, 1e-3)
    assert together.nfe.shape == (5,)
    assert len(set(together.nfe.tolist())) > 1  # each takes its own steps
    alone = adaptive.ode_solution(score_fn, x_T[1:2], 1.0, 1e-3)
    # common steps would move the result by something like the tolerance, 1e-5
    np.testing.assert_allclose(alone.x[0], together.x[1], rtol=1e-12)
    assert alone.nfe[0] == together.nfe[1]


@pytest.mark.usefixtures("optimised")
def test_float32_and_the_clean_end():
    """At t_clean: the data prediction at t_min, one evaluation more."""
    process, target = PROCESSES["vp_linear"], skewed_mixture()
    score_fn = target.score_fn(process, "noise")
    x_T = jnp.asarray(starts(process), jnp.float32)
    stop = adaptive.ode_solution(score_fn, x_T, 1.0, process.t_min)
    exact = target.ode_solution(np.asarray(x_T), process, 1.0, process.t_min)
    assert stop.x.dtype == jnp.float32
    assert stop.points is None
    assert 1e-7 < np.abs(stop.x - exact).max() < 3e-3  # 1e-5, times the spread of neighbours
    clean = adaptive.ode_solution(score_fn, x_T, 1.0, 0.0, save_at=process.t_min)
    data = jax.jit(lambda x: score_fn(x, process.t_min, prediction="data"))(stop.x)
    np.testing.assert_allclose(clean.x, data, atol=2e-6)
    assert np.abs(clean.x - stop.x).max() > 1e-4
    np.testing.assert_allclose(clean.points[0], stop.x, atol=1e-6)
    np.testing.assert_array_equal(clean.nfe, stop.nfe + 1)


# -- what is counted ----------------------------------------------------------------------------


def counting(calls, slope):
    def apply(params, x, t):
        jax.debug.callback(lambda: calls.append(1))
        return params * slope(x)

    return apply


@pytest.mark.parametrize("solver", ["Tsit5", "Heun", "Dopri8"])
def test_counted_evaluations(solver):
    """Also where the first step is rejected, which no statistic of diffrax tells."""
    calls = []
    score_fn = ds.ScoreFn(
        counting(calls, lambda x: jnp.sin(30 * x)),
        np.float32(2.0),
        ds.processes.flow(),
        prediction="velocity",
    )
    for rtol in (1e-2, 1e-4):
        calls.clear()
        run = adaptive.ode_solution(
            score_fn,
            jnp.full((1, 2), 0.3),
            1e-3,
            1.0,
            rtol=rtol,
            atol=rtol,
            solver=getattr(diffrax, solver)(),
        )
        jax.block_until_ready(run)
        jax.effects_barrier()
        assert len(calls) == run.nfe[0]


def test_counted_evaluations_of_a_likelihood():
    calls = []
    score_fn = ds.ScoreFn(
        counting(calls, jnp.sin),
        np.float32(0.7),
        ds.processes.flow(),
        prediction="velocity",
        batched=False,
    )
    run = adaptive.log_likelihood(score_fn, jnp.full(3, 0.3))
    jax.block_until_ready(run)
    jax.effects_barrier()
    assert run.nfe.shape == run.log_prob.shape == ()
    assert len(calls) == run.nfe


@pytest.mark.long
def test_one_compilation():
    process = ds.processes.edm()
    target = skewed_mixture()
    score_fn = target.score_fn(process)
    x = jnp.asarray(starts(process), jnp.float32)
    adaptive.ode_solution(score_fn, x, 80.0, 0.1)
    before = adaptive._solve._cache_size()
    other = dataclasses.replace(target, means=1.1 * target.means).score_fn(process)
    adaptive.ode_solution(score_fn, x, 0.2, 70.0, rtol=1e-3, solver=diffrax.Tsit5())
    adaptive.ode_solution(other, x, 60.0, 0.1, atol=1e-4)
    assert adaptive._solve._cache_size() == before
    adaptive.ode_solution(score_fn, x[:2], 80.0, 0.1)
    assert adaptive._solve._cache_size() == before + 1  # the count can rise


# -- what surrounds the network -----------------------------------------------------------------


def conditional_apply(params, x, t, mean, spread):
    """The exact data prediction for N(mean, spread^2) data under the flow process."""
    mean, t = mean[:, None], t[:, None]
    assert mean.shape[0] == x.shape[0]
    gain = (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2)
    return mean + gain * (x - (1 - t) * mean)


@pytest.mark.usefixtures("x64")
def test_guidance_and_conditions():
    """The prediction is affine in the mean, so guidance moves the mean, and nothing else."""
    process = ds.processes.flow()
    score_fn = ds.ScoreFn(conditional_apply, {}, process, prediction="data")
    guided = ds.guidance.cfg(score_fn, 1.5, {"mean": -0.2})
    means, spread = np.array([0.3, -0.5, 1.0]), 0.4
    x_T = np.array([[0.2, 1.0], [-1.0, 0.4], [0.1, -2.0]])
    cond = {"mean": jnp.asarray(means), "spread": jnp.full((1, 1), spread)}
    run = adaptive.ode_solution(score_fn, x_T, 1.0, 1e-3, cond=cond, rtol=1e-9, atol=1e-9)
    # guidance doubles every condition, so a shared one has the network's batch axis as well
    both = {"mean": jnp.asarray(means), "spread": jnp.full((3, 1), spread)}
    strong = adaptive.ode_solution(guided, x_T, 1.0, 1e-3, cond=both, rtol=1e-9, atol=1e-9)
    for got, centres in ((run, means), (strong, -0.2 + 1.5 * (means + 0.2))):
        for i, mean in enumerate(centres):
            target = ds.targets.gaussian([mean, mean], spread**2)
            exact = target.ode_solution(x_T[i : i + 1], process, 1.0, 1e-3)
            np.testing.assert_allclose(got.x[i : i + 1], exact, atol=1e-7)
    assert np.abs(strong.x - run.x).max() > 0.1


def tree_apply(params, x, t):
    """The exact data prediction for N(0, 0.25) data under the flow process, in any structure."""
    gain = (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)
    return jax.tree.map(lambda leaf: gain.astype(leaf.dtype) * leaf, x)


def test_structures_without_a_batch_axis_and_under_jit():
    process = ds.processes.flow()
    score_fn = ds.ScoreFn(tree_apply, {}, process, prediction="data", batched=False)
    x = {"a": jnp.asarray([[0.3, -1.0]]), "b": jnp.asarray([0.5], jnp.bfloat16)}
    run = adaptive.ode_solution(score_fn, x, 0.9, 0.1, save_at=[0.5])
    again = jax.jit(lambda x: adaptive.ode_solution(score_fn, x, 0.9, 0.1, save_at=[0.5]))(x)
    assert run.nfe.shape == ()

    def std(t):
        return np.sqrt(0.25 * (1 - t) ** 2 + t**2)

    for got, t in ((run.x, 0.1), (jax.tree.map(lambda p: p[0], run.points), 0.5)):
        ratio = std(t) / std(0.9)
        for name, tolerance in (("a", 1e-4), ("b", 4e-3)):  # of the solve, and of bfloat16
            assert got[name].dtype == x[name].dtype
            want = ratio * np.asarray(x[name], np.float32)
            np.testing.assert_allclose(np.asarray(got[name], np.float32), want, rtol=tolerance)
    np.testing.assert_allclose(again.x["a"], run.x["a"], rtol=1e-6)

    density = adaptive.log_likelihood(score_fn, x, t_start=0.1)
    values = np.array([0.3, -1.0, 0.5])
    want = np.sum(-((values / std(0.1)) ** 2) / 2 - np.log(std(0.1) * np.sqrt(2 * np.pi)))
    np.testing.assert_allclose(density.log_prob, want, atol=2e-4)
    assert density.x_T["b"].dtype == jnp.bfloat16


# -- likelihoods --------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param("vp_linear", gaussian_3d, marks=pytest.mark.long),
        ("vp_linear", skewed_mixture),
        # compiled without most passes, as here, a written-out softmax had a NaN derivative in it
        ("edm", skewed_mixture),
        ("flow", gaussian_3d),
    ],
)
def test_log_likelihood(name, make):
    """The flow keeps probability: the density at x_0 is the prior's at x_T, times p(x_0) / p(x_T).

    So the oracle is exact also where the prior is not the process's own density at t_max.
    """
    process, target = PROCESSES[name], make()
    t = 0.05
    rng = np.random.default_rng(0)
    x_0 = 0.2 + 0.7 * rng.normal(size=(4, target.means.shape[1]))
    got = adaptive.log_likelihood(target.score_fn(process), x_0, t_start=t, rtol=1e-9, atol=1e-9)
    x_T = target.ode_solution(x_0, process, t, process.t_max)
    np.testing.assert_allclose(got.x_T / process.prior_std, x_T / process.prior_std, atol=1e-7)
    own = target.log_prob(x_0, process.alpha(t), process.sigma(t))
    t_max, std = process.t_max, float(process.prior_std)
    z = x_T / std
    prior = -np.sum(z**2 / 2 + np.log(std * np.sqrt(2 * np.pi)), axis=1)
    kept = prior - target.log_prob(x_T, process.alpha(t_max), process.sigma(t_max))
    np.testing.assert_allclose(got.log_prob, own + kept, atol=1e-6)
    # and so of the data, but for what the prior neglects: with the signal-to-noise ratio r at
    # t_max, and |x_0| < 3, at most about r |z| |x_0| + r^2 |x_0|^2
    r = float(process.alpha(t_max)) / std
    bound = 1e-6 + 3 * r * np.linalg.norm(z, axis=1) + 9 * r**2
    assert np.all(np.abs(got.log_prob - own) < bound)
    assert r < 0.02


@pytest.mark.long
@pytest.mark.usefixtures("x64")
def test_hutchinson():
    process, target = ds.processes.flow(), gaussian_3d()
    score_fn = target.score_fn(process)
    one = np.array([[0.5, -0.3, 0.2]])
    options = {"t_start": 0.05, "rtol": 1e-6, "atol": 1e-6, "trace": "hutchinson"}
    exact = target.log_prob(one, 0.95, 0.05)[0]  # the flow's prior is exact
    key, n = jax.random.key(3), 400
    many = np.repeat(one, n, axis=0)
    spread = []
    for probes in (1, 4):
        got = adaptive.log_likelihood(score_fn, many, key=key, probes=probes, **options)
        error = np.asarray(got.log_prob) - exact
        spread.append(float(error.std()))
        assert abs(error.mean()) < 4 * error.std() / np.sqrt(n)
    assert spread[0] > 0.1  # there is something to average
    assert spread[1] == pytest.approx(spread[0] / 2, rel=0.2)  # 1 / sqrt(probes); 400 draws
    # one key per sample: here the samples' own, the other way round
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))[::-1]
    back = adaptive.log_likelihood(score_fn, many, key=keys, probes=4, **options)
    np.testing.assert_allclose(back.log_prob[::-1], got.log_prob, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_one_probe_is_exact_where_the_jacobian_is_diagonal():
    process, target = ds.processes.flow(), ds.targets.gaussian([0.3, -1.0], 0.2)
    x_0 = np.array([[0.1, 0.5], [1.0, -1.0]])
    got = adaptive.log_likelihood(
        target.score_fn(process),
        x_0,
        key=jax.random.key(0),
        trace="hutchinson",
        rtol=1e-9,
        atol=1e-9,
    )
    want = target.log_prob(x_0, 0.999, 0.001)  # the default t_start, process.t_min
    np.testing.assert_allclose(got.log_prob, want, atol=1e-6)


# -- what goes wrong ----------------------------------------------------------------------------


def test_a_failing_sample_is_nan_and_no_other():
    process = ds.processes.flow()
    score_fn = skewed_mixture().score_fn(process)
    x_T = jnp.asarray(starts(process), jnp.float32)
    run = adaptive.ode_solution(score_fn, x_T, 1.0, 1e-3, save_at=[0.5])
    steps = (run.nfe - 1) // 6
    few = int(jnp.min(steps))
    short = adaptive.ode_solution(score_fn, x_T, 1.0, 1e-3, save_at=[0.5], max_steps=few)
    done = np.asarray(steps == few)
    assert 0 < done.sum() < 5
    for got, full in ((short.x, run.x), (short.points[0], run.points[0])):
        np.testing.assert_array_equal(np.isfinite(got[:, 0]), done)
        np.testing.assert_allclose(got[done], full[done], rtol=1e-6)
    np.testing.assert_array_equal(short.nfe, 1 + 6 * few)

    spoiled = x_T.at[2].set(jnp.nan)  # gives up soon instead of taking all of max_steps
    run = adaptive.ode_solution(score_fn, spoiled, 1.0, 1e-3, save_at=[0.5])
    np.testing.assert_array_equal(np.isnan(run.x[:, 0]), np.arange(5) == 2)
    assert run.nfe[2] < 150


def test_errors():
    process = ds.processes.vp_linear()
    score_fn = skewed_mixture().score_fn(process)
    x = jnp.zeros((2, 1))

    def fails(error, match, *args, f=adaptive.ode_solution, score_fn=score_fn, x=x, **options):
        with pytest.raises(error, match=match):
            f(score_fn, x, *args, **options)

    fails(ValueError, r"`t_start` must lie in \[0, 1\]; got 1.5", 1.5, 0.1)
    fails(ValueError, r"`t_end` must lie in \[0, 1\]; got nan", 1.0, np.nan)
    fails(ValueError, r"clean end, 0.* take process.t_min, 0.001", 0.0, 1.0)
    fails(ValueError, "there is nothing to solve", 0.3, 0.3)
    fails(ValueError, "there is nothing to solve", 1e-3, 0.0)
    fails(ValueError, r"`save_at` must lie in \[0.3, 0.9\]; got 0.2", 0.9, 0.3, save_at=[0.5, 0.2])
    fails(ValueError, "`rtol` must lie in", 0.9, 0.3, rtol=0.0)
    fails(ValueError, "`max_steps` must be at least 1", 0.9, 0.3, max_steps=0)
    fails(TypeError, "explicit Runge-Kutta", 0.9, 0.3, solver=diffrax.Euler())
    fails(TypeError, "explicit Runge-Kutta", 0.9, 0.3, solver=diffrax.Kvaerno5)
    fails(TypeError, "floating dtype", 0.9, 0.3, x=jnp.zeros((2, 1), jnp.int32))
    noise = skewed_mixture().score_fn(PROCESSES["vp_zero_snr"], "noise")
    fails(ValueError, "does not determine the wanted prediction", 999.0, 0.0, score_fn=noise)
    with pytest.raises(TypeError, match="`t_end` must be known outside `jit`"):
        jax.jit(lambda t: adaptive.ode_solution(score_fn, x, 1.0, t))(0.1)
    with pytest.raises(TypeError, match=r"`score_fn.process` must be known outside `jit`"):
        jax.jit(lambda s: adaptive.ode_solution(s, x, 1.0, 0.1))(score_fn)

    likelihood = adaptive.log_likelihood
    fails(ValueError, "pass `key`", f=likelihood, trace="hutchinson")
    fails(ValueError, "`trace` must be one of", f=likelihood, trace="full")
    fails(ValueError, "`probes` must be at least 1", f=likelihood, probes=0)
    fails(ValueError, "clean end", f=likelihood, t_start=0.0)
    fails(ValueError, "nothing to solve", f=likelihood, t_start=1.0)


def test_without_diffrax(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    score_fn = skewed_mixture().score_fn(ds.processes.flow())
    for call in (
        lambda: adaptive.ode_solution(score_fn, jnp.zeros((1, 1)), 1.0, 0.1),
        lambda: adaptive.log_likelihood(score_fn, jnp.zeros((1, 1))),
    ):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "diffsamp\[adaptive\]"'):
            call()
