"""Guidance that is not affine: each rule against its formula in NumPy, in the right prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes
from guidance.exact import build, labels

import diffsamp as ds
from diffsamp import guidance, schedules

PROCESS = ds.processes.vp_linear()
NULL = {"label": 0}


def apply(params, x, t, label):
    del params
    shift = label.astype(x.dtype).reshape(-1, 1, 1)
    return jnp.tanh(x) * (1 + 0.3 * shift) + shift * jnp.cos(3 * x) - 0.2


def network(prediction, process=PROCESS):
    return ds.ScoreFn(apply, None, process, prediction=prediction)


X = np.random.default_rng(0).normal(size=(3, 4, 2))
COND = {"label": jnp.array([1, 2, 3], jnp.int32)}


def parts(net, t, prediction):
    """Both predictions as (batch, elements), float64."""
    return [
        np.asarray(net(jnp.asarray(X), t, prediction=prediction, cond=cond)).reshape(3, -1)
        for cond in (COND, {"label": labels(3, 0)})
    ]


def check(transform, want, t, prediction, rtol=1e-10):
    got = transform(jnp.asarray(X), t, prediction=prediction, cond=COND)
    np.testing.assert_allclose(np.asarray(got).reshape(3, -1), want, rtol=rtol, atol=1e-10)
    # one sample alone is the sample in the batch: no statistic is the batch's
    one = {"label": COND["label"][1:2]}
    alone = transform(jnp.asarray(X[1:2]), t, prediction=prediction, cond=one)
    np.testing.assert_allclose(alone[0], got[1], rtol=1e-10, atol=1e-12)
    assert transform.nfe_factor == 2


@pytest.mark.parametrize("emits", ["data", "noise", "v"])
def test_apg_projects_the_data(emits, x64):
    net, w, eta, radius = network(emits), 3.0, 0.4, 1.5
    given, free = parts(net, 0.5, "data")
    delta = given - free
    size = np.linalg.norm(delta, axis=1, keepdims=True)
    assert np.any(size > radius)
    delta = delta * np.minimum(1, radius / size)
    along = np.sum(delta * given, 1, keepdims=True) / np.sum(given**2, 1, keepdims=True) * given
    want = given + (w - 1) * (delta - along + eta * along)
    check(guidance.apg(net, w, NULL, parallel=eta, radius=radius), want, 0.5, "data")


def test_apg_ends(x64):
    """Scale 1 is the conditional network whatever eta; eta = 1 without radius is cfg."""
    net, tableau = network("noise"), build("dpmpp_2m", PROCESS, 5)
    x = jnp.asarray(X)
    want = ds.sample(net, tableau, x, cond=COND)
    np.testing.assert_allclose(
        ds.sample(guidance.apg(net, 1.0, NULL), tableau, x, cond=COND), want, rtol=1e-8, atol=1e-9
    )
    same = ds.sample(guidance.apg(net, 3.0, NULL, parallel=1.0), tableau, x, cond=COND)
    want = ds.sample(guidance.cfg(net, 3.0, NULL), tableau, x, cond=COND)
    np.testing.assert_allclose(same, want, rtol=1e-8, atol=1e-9)
    free = guidance.apg(net, 3.0, NULL)  # orthogonal only: another sample
    assert np.abs(ds.sample(free, tableau, x, cond=COND) - want).max() > 0.1


@pytest.mark.parametrize("emits", ["v", "noise"])
def test_rescale_is_meant_in_the_networks_own_prediction(emits, x64):
    net, w, phi = network(emits), 4.0, 0.7
    given, free = parts(net, 0.6, emits)
    guided = free + w * (given - free)
    ratio = given.std(axis=1, keepdims=True) / guided.std(axis=1, keepdims=True)
    want = guided * (phi * ratio + 1 - phi)
    check(guidance.rescale(net, w, NULL, share=phi), want, 0.6, emits)
    other = guidance.rescale(net, w, NULL, share=phi, prediction="data")
    got = other(jnp.asarray(X), 0.6, prediction=emits, cond=COND)
    assert np.abs(np.asarray(got).reshape(3, -1) - want).max() > 0.05
    flat = ds.ScoreFn(lambda p, x, t, label: 0 * x, None, PROCESS)  # std 0 makes no NaN
    assert np.isfinite(guidance.rescale(flat, w, NULL)(jnp.asarray(X), 0.6, cond=COND)).all()


def test_cfg_zero_star(x64):
    process = ds.processes.flow()
    net, w = network("velocity", process), 3.0
    given, free = parts(net, 0.7, "velocity")
    s = np.sum(given * free, 1, keepdims=True) / (np.sum(free**2, 1, keepdims=True) + 1e-8)
    want = s * free + w * (given - s * free)
    check(guidance.cfg_zero_star(net, w, NULL), want, 0.7, "velocity")
    tableau = ds.solvers.euler(process, schedules.uniform(process, 50))
    zero = guidance.zero_first(tableau)
    assert zero.nfe == 48
    run = ds.trajectory(guidance.cfg_zero_star(net, w, NULL), zero, jnp.asarray(X), cond=COND)
    np.testing.assert_array_equal(run.points[2], run.points[0])
    assert np.abs(run.points[3] - run.points[0]).max() > 1e-3
    with pytest.raises(ValueError, match="zero_first needs rows of one state"):
        guidance.zero_first(build("dpmpp_2m", PROCESS, 5))


def test_tcfg_is_the_singular_value_decomposition(x64):
    net, w = network("noise"), 3.0
    given, free = parts(net, 0.5, "noise")
    want = []
    for g, f in zip(given, free, strict=True):
        v = np.linalg.svd(np.stack([g, f]))[2][0]
        along = (f @ v) * v
        want.append(along + w * (g - along))
    check(guidance.tcfg(net, w, NULL), np.array(want), 0.5, "noise", rtol=1e-8)


def test_a_rule_of_ones_own_with_a_scale_by_row_and_by_sample(x64):
    """Scales are numbers of the row or the sample, and a new one compiles nothing."""
    net, traces = network("noise"), []

    def clip_guided(m, level, scale):
        traces.append(level.alpha)
        column = jnp.asarray(scale).reshape(-1, 1, 1)
        return m[1] + jnp.clip(column * (m[0] - m[1]), -0.3, 0.3)

    tableau = build("ddim", PROCESS, 4)
    terms = [(net, {}), (net, NULL)]
    for w in (2.0, 3.0):
        rule = guidance.rule(terms, clip_guided, prediction="noise", scale=w)
        got = ds.sample(rule, tableau, jnp.asarray(X), cond=COND)
    assert len(traces) == 1
    by_row = guidance.rule(
        terms, clip_guided, prediction="noise", scale=lambda level: 3.0 * np.ones_like(level.t)
    )
    same = ds.sample(by_row, tableau, jnp.asarray(X), cond=COND)
    np.testing.assert_allclose(same, got, rtol=1e-12)
    by_name = guidance.rule(terms, clip_guided, prediction="noise", scale="w")
    cond = {**COND, "w": jnp.full(3, 3.0)}
    named = ds.sample(by_name, tableau, jnp.asarray(X), cond=cond)
    np.testing.assert_allclose(named, got, rtol=1e-12)
    with pytest.raises(ValueError, match="a rule must return a prediction shaped like the state"):
        guidance.rule(terms, lambda m, level: m[0][0], prediction="noise")(
            jnp.asarray(X), 0.5, cond=COND
        )


@pytest.mark.parametrize(
    "process",
    [
        pytest.param(p, id=n, marks=() if n in ("vp_linear", "edm", "flow") else pytest.mark.long)
        for n, p in all_processes().items()
    ],
)
def test_an_identity_rule_changes_nothing(process, x64):
    """In any prediction, for a tableau in any form."""
    target = ds.targets.gaussian([0.3], 0.4)
    net = target.score_fn(process, "noise")
    x_T = process.prior_sample(jax.random.key(0), (3, 1), dtype=jnp.float64)
    for solver in ("dpmpp_2m", "deis_tab1"):
        tableau = build(solver, process, 5)
        want = ds.sample(net, tableau, x_T)
        for prediction in ("data", "noise", "v", "velocity"):
            rule = guidance.rule([(net, {})], lambda m, level: m[0], prediction=prediction)
            got = ds.sample(rule, tableau, x_T)
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
