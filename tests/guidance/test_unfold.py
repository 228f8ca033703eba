"""Guidance as rows of a tableau: `unfold` and `select`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DETERMINISTIC, gaussian_moments
from guidance.exact import build, gaussians, labels

import diffsamp as ds
from diffsamp import guidance, schedules

PROCESS = ds.processes.vp_linear()
NETWORK = gaussians([0.3, -0.7, 1.1], [0.3, 0.5, 0.2], PROCESS)
NULL = {"label": 0}


def start(size=3, dim=2):
    return PROCESS.prior_sample(jax.random.key(0), (size, dim), dtype=jnp.float64)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_it_equals_cfg(case, x64):
    """Every registered deterministic solver, with guided, plain and unconditional rows."""
    steps = max(case.solver.least, 3) + 2
    tableau = case.solver(PROCESS, schedules.logsnr(PROCESS, steps))
    scale = np.resize([1.0, 2.5, 0.0, 3.0, 1.0, -0.5], tableau.rows)
    at = {float(t): w for t, w in zip(tableau.times, scale, strict=False)}
    scale = np.array([at[float(t)] for t in tableau.times[:-1]])  # a function of the level
    unfolded, which = guidance.unfold(tableau, scale)
    cond = {"label": labels(3, 1)}
    guided = guidance.combine([(NETWORK, {}), (NETWORK, NULL)], np.stack([scale, 1 - scale], -1))
    want = ds.sample(guided, tableau, start(), cond=cond)
    got = ds.sample(guidance.select(NETWORK, NULL, which), unfolded, start(), cond=cond)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    calls = np.where(tableau.evaluates, np.where((scale == 1) | (scale == 0), 1, 2), 0)
    assert unfolded.nfe == calls.sum()
    assert which.shape == (unfolded.rows,)


def test_a_wrong_scale_is_seen(x64):
    tableau = build("unipc3", PROCESS)
    cond = {"label": labels(3, 1)}

    def run(scale):
        unfolded, which = guidance.unfold(tableau, scale)
        return ds.sample(guidance.select(NETWORK, NULL, which), unfolded, start(), cond=cond)

    want = ds.sample(guidance.cfg(NETWORK, 2.0, NULL), tableau, start(), cond=cond)
    np.testing.assert_allclose(run(2.0), want, rtol=1e-12, atol=1e-12)
    assert np.abs(run(2.04) - want).max() > 1e-3
    scale = lambda level: np.where(level.sigma < 0.9, 2.0, 1.0)  # noqa: E731
    want = ds.sample(guidance.cfg(NETWORK, scale, NULL), tableau, start(), cond=cond)
    np.testing.assert_allclose(run(scale), want, rtol=1e-12, atol=1e-12)


def test_scale_one_is_the_tableau_itself():
    for name in ("ddim", "unipc3", "bdia", "heun"):
        tableau = build(name, PROCESS)
        unfolded, which = guidance.unfold(tableau, 1.0)
        assert unfolded.nfe == tableau.nfe
        assert not which.any()
        for field in ("times", "target", "a", "b", "c", "evaluates"):
            np.testing.assert_array_equal(getattr(unfolded, field), getattr(tableau, field))


def test_calls_are_counted():
    """Real calls of the network, on the batch as it is, equal `tableau.nfe`."""
    calls = []

    def counting(params, x, t, label):
        jax.debug.callback(lambda: calls.append(x.shape[0]))
        return NETWORK.apply(params, x, t, label)

    counted = ds.ScoreFn(counting, NETWORK.params, PROCESS, prediction="data")
    tableau = build("dpmpp_2m", PROCESS)
    unfolded, which = guidance.unfold(tableau, [1, 1, 3, 3, 3, 3, 1, 1])
    assert unfolded.nfe == 12
    chosen = guidance.select(counted, NULL, which)
    x_T, cond = start(4).astype(jnp.float32), {"label": labels(4, 2)}
    jax.block_until_ready(ds.sample(chosen, unfolded, x_T, cond=cond))
    jax.effects_barrier()
    assert calls == [4] * 12
    assert chosen.nfe(unfolded) == 12
    # cfg with a scale that is a function makes the same number, in fewer calls
    calls.clear()
    inside = lambda level: np.where(np.abs(np.arange(8) - 3.5) < 2, 3.0, 1.0)  # noqa: E731
    guided = guidance.cfg(counted, inside, NULL)
    jax.block_until_ready(ds.sample(guided, tableau, x_T, cond=cond))
    jax.effects_barrier()
    assert sum(calls) == 4 * guided.nfe(tableau) == 4 * 12


def test_one_scale_per_sample(x64):
    tableau = build("unipc2", PROCESS, 5)
    scale = np.array([[1, 2, 0], [3, 1, 2], [3, 1, 2], [1, 4, 2], [1, 1, 2.0]])
    unfolded, which = guidance.unfold(tableau, scale)
    cond = {"label": jnp.array([1, 2, 1], jnp.int32)}
    together = ds.sample(guidance.select(NETWORK, NULL, which), unfolded, start(), cond=cond)
    for i in range(3):
        own, rows = guidance.unfold(tableau, scale[:, i])
        one = {"label": cond["label"][i : i + 1]}
        chosen = guidance.select(NETWORK, NULL, rows)
        alone = ds.sample(chosen, own, start()[i : i + 1], cond=one)
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-12, atol=1e-12)


def test_padding_noise_and_restart_rows():
    """Rows without evaluation stay one row; a padded unfolded tableau gives the same sample."""
    restart = ds.solvers.restart(
        PROCESS, schedules.logsnr(PROCESS, 8), intervals=[(3, 1, 0.3, 2.0)], solver=ds.solvers.ddim
    )
    unfolded, which = guidance.unfold(restart, 2.0)
    assert unfolded.nfe == 2 * restart.nfe
    assert unfolded.rows == 2 * restart.nfe + 1
    chosen, cond = guidance.select(NETWORK, NULL, which), {"label": labels(3, 1)}
    x_T, key = start().astype(jnp.float32), jax.random.key(1)
    want = ds.sample(chosen, unfolded, x_T, key=key, cond=cond)
    got = ds.sample(chosen, unfolded.pad(rows=40, p=3, q=4), x_T, key=key, cond=cond)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_stochastic_rows_have_the_same_law():
    """With equal classes guidance changes nothing, so the unfolded rows' moments are the plain."""
    tableau = build("ddpm", PROCESS, 12)
    unfolded, which = guidance.unfold(tableau, 3.0)
    assert which.sum() == 12
    want, got = (gaussian_moments(t, 0.4, 0.3) for t in (tableau, unfolded))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_guidance_is_a_coefficient():
    """Gradients reach the scale through the unfolded tableau's weights."""
    tableau = build("ddim", PROCESS, 6)
    unfolded, which = guidance.unfold(tableau, 2.0)
    chosen, cond = guidance.select(NETWORK, NULL, which), {"label": labels(3, 1)}
    loss = lambda t: jnp.sum(ds.sample(chosen, t, start().astype(jnp.float32), cond=cond))  # noqa: E731
    gradient = jax.grad(loss, allow_int=True)(jax.tree.map(jnp.asarray, unfolded))
    assert np.isfinite(gradient.b).all()
    assert np.abs(gradient.b).max() > 1e-3


def test_shared_conditions_stay_shared():
    def apply(params, x, t, text):  # one prompt for the whole batch
        assert text.shape == (5,)
        return 0.5 * x + params * jnp.sum(text)

    network = ds.ScoreFn(apply, jnp.float32(0.1), PROCESS, prediction="data")
    tableau = build("ddim", PROCESS, 4)
    unfolded, which = guidance.unfold(tableau, 2.0)
    chosen = guidance.select(network, {"text": np.zeros(5)}, which)
    x_T = start().astype(jnp.float32)
    got = ds.sample(chosen, unfolded, x_T, cond={"text": jnp.ones(5)})
    doubled = ds.ScoreFn(apply, jnp.float32(0.1), PROCESS, prediction="data")
    want = ds.sample(doubled, tableau, x_T, cond={"text": 2 * jnp.ones(5)})
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_it_says_what_is_wrong():
    tableau = build("ddim", PROCESS, 4)
    unfolded, which = guidance.unfold(tableau, 2.0)
    chosen = guidance.select(NETWORK, NULL, which)
    with pytest.raises(ValueError, match="made for 8 rows; the tableau has 4"):
        ds.sample(chosen, tableau, start(), cond={"label": labels(3, 1)})
    with pytest.raises(ValueError, match="guidance needs the condition it strengthens"):
        ds.sample(chosen, unfolded, start())
    with pytest.raises(ValueError, match="`null` must say what no condition is"):
        guidance.select(NETWORK, {}, which)
    with pytest.raises(ValueError, match=r"`scale` must be finite: .* got shape \(3,\)"):
        guidance.unfold(tableau, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="unfold the tableaux before stacking"):
        guidance.unfold(ds.Tableau.stack([tableau, tableau]), 2.0)
    with pytest.raises(TypeError, match="unfold is a host function"):
        jax.jit(lambda w: guidance.unfold(tableau, w)[0])(2.0)
    with pytest.raises(TypeError, match=r"cond\['style'\] must be an array or a number; got str"):
        ds.sample(NETWORK, tableau, start(), cond={"label": labels(3, 1), "style": "oil"})


def test_momentum_is_apgs_running_difference(x64):
    """d_n = given - free - .6 d_{n-1} on DDIM rows, replayed; 2 % of the momentum shows."""
    process = ds.processes.vp_linear()
    network = gaussians([0.0, 1.0], [1.0, 0.25], process)
    tableau, w = build("ddim", process, 6), 3.0
    x_T, cond = jnp.array([[0.3], [-1.0]]), {"label": labels(2, 1)}

    def loop(momentum):
        x, running = np.asarray(x_T), 0.0
        for n in range(6):
            said = [
                np.asarray(network(x, tableau.times[n], prediction="data", cond={"label": y}))
                for y in (labels(2, 1), labels(2, 0))
            ]
            running = said[0] - said[1] + momentum * running
            x = tableau.a[n, 0] * x + tableau.b[n, 0] * (said[0] + (w - 1) * running)
        return x

    rows, which = guidance.unfold(tableau, w, momentum=-0.6)
    assert rows.nfe == 12
    chosen = guidance.select(network, {"label": 0}, which)
    want = loop(-0.6)
    np.testing.assert_allclose(ds.sample(chosen, rows, x_T, cond=cond), want, rtol=1e-9)
    assert np.abs(loop(-0.612) - want).max() > 1e-3
    plain, _ = guidance.unfold(tableau, w)
    zero, _ = guidance.unfold(tableau, w, momentum=0.0)
    np.testing.assert_array_equal(plain.b, zero.b)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_free_answers_from_earlier_ones(name):
    """With equal variances D_given - D_free is one number a level, so LinearAG is exact."""
    process = ds.processes.vp_linear()
    network = gaussians([0.0, 1.0], [0.3, 0.3], process)
    tableau, w = build(name, process, 8), 2.5
    x_T, cond = process.prior_sample(jax.random.key(0), (6, 1)), {"label": labels(6, 1)}
    fitted = ds.search.fit_null(network, tableau, w, {"label": 0}, x_T, skip=[2, 4, 5], cond=cond)
    rows, which = guidance.unfold(tableau, w, estimates=fitted)
    assert rows.nfe == 16 - 3
    other = process.prior_sample(jax.random.key(1), (6, 1))
    got = ds.sample(guidance.select(network, {"label": 0}, which), rows, other, cond=cond)
    want = ds.sample(guidance.cfg(network, w, {"label": 0}), tableau, other, cond=cond)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    wrong = {n: e * np.array([[1.02], [1.0]]) for n, e in fitted.items()}
    rows, _ = guidance.unfold(tableau, w, estimates=wrong)
    off = ds.sample(guidance.select(network, {"label": 0}, which), rows, other, cond=cond)
    assert np.abs(off - want).max() > 3e-3


def test_estimates_say_what_is_wrong():
    process = ds.processes.vp_linear()
    network, tableau = gaussians([0.0, 1.0], [0.3, 0.3], process), build("ddim", process, 4)
    with pytest.raises(ValueError, match=r"arrays of shape \(2, lags\)"):
        guidance.unfold(tableau, 2.0, estimates={1: np.ones(2)})
    with pytest.raises(ValueError, match="0 evaluations before it"):
        guidance.unfold(tableau, 2.0, estimates={0: np.array([[1.0, 1.0], [0.0, 1.0]])})
    e = np.array([[1.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="row 1 never asks"):
        guidance.unfold(tableau, [2.0, 1.0, 2.0, 2.0], estimates={2: e})
    x_T, cond = process.prior_sample(jax.random.key(0), (2, 1)), {"label": labels(2, 1)}
    with pytest.raises(ValueError, match="row 0 cannot be skipped"):
        ds.search.fit_null(network, tableau, 2.0, {"label": 0}, x_T, skip=[0], cond=cond)
