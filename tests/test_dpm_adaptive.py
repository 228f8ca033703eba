"""DPM-Solver-12 and -23: the authors' adaptive loop in NumPy, and the exact solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import skewed_mixture

import diffsamp as ds

VP, EDM = ds.processes.vp_linear(), ds.processes.edm()


def as_published(process, x, start, end, order, form, atol=0.0078, rtol=0.05, h=0.05, theta=0.9):
    """dpm_solver_adaptive on a batch of one: (x, evaluations)."""
    sign, kind = (1, 1) if form == "noise" else (-1, 0)

    def scales(lam):
        t = process.time(lam)
        pair = float(process.alpha(t)), float(process.sigma(t))
        return pair if form == "noise" else pair[::-1]

    def said(x, lam):
        t = process.time(lam)
        return skewed_mixture().posterior(x, float(process.alpha(t)), float(process.sigma(t)))[kind]

    lam, last = (float(process.log_snr(t)) for t in (start, end))
    before, calls = x, 0
    while last - lam > 1e-5:
        first = said(x, lam)
        kept = scales(lam)[0]

        def one(to, x=x, lam=lam, first=first, kept=kept):
            own, other = scales(to)
            return own / kept * x - other * np.expm1(sign * (to - lam)) * first

        def two(r, to, x=x, lam=lam, first=first, one=one):
            second = said(one(lam + r * (to - lam)), lam + r * (to - lam))
            other = scales(to)[1]
            return one(to) - other / (2 * r) * np.expm1(sign * (to - lam)) * (
                second - first
            ), second

        to = lam + h
        if order == 2:
            lower, higher = one(to), two(0.5, to)[0]
        else:
            lower, second = two(1 / 3, to)
            middle = lam + 2 * h / 3
            bend = {  # phi_22 and phi_2, with their signs
                "noise": lambda part: -(np.expm1(part) / part - 1),
                "data": lambda part: np.expm1(-part) / part + 1,
            }[form]
            stage = one(middle) + 2 * scales(middle)[1] * bend(2 * h / 3) * (second - first)
            third = said(stage, middle)
            higher = one(to) + 1.5 * scales(to)[1] * bend(h) * (third - first)
        delta = np.maximum(atol, rtol * np.maximum(np.abs(lower), np.abs(before)))
        error = np.sqrt(np.mean(((higher - lower) / delta) ** 2))
        if error <= 1:
            x, before, lam = higher, lower, to
        h = min(theta * h * error ** (-1 / order), last - lam)
        calls += order
    return x, calls


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["noise", "data"])
@pytest.mark.parametrize("order", [2, 3])
def test_the_authors_loop(order, form):
    for process in (VP, EDM):
        network = skewed_mixture().score_fn(process)
        x = np.random.default_rng(0).normal(size=(3, 4, 1)) * float(process.prior_std)
        for rtol, atol in ((0.05, 0.0078), (1e-3, 1e-3)):
            got = ds.adaptive.dpm_solver(
                network,
                jnp.asarray(x).reshape(12, 1),
                process.t_max,
                process.t_min,
                order=order,
                prediction=form,
                rtol=rtol,
                atol=atol,
            )
            assert got.points is None
            for i in (0, 5, 11):
                want, calls = as_published(
                    process,
                    x.reshape(12, 1)[i : i + 1],
                    process.t_max,
                    process.t_min,
                    order,
                    form,
                    atol,
                    rtol,
                )
                np.testing.assert_allclose(got.x[i : i + 1], want, rtol=0, atol=1e-9)
                assert got.nfe[i] == calls


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", [2, 3])
def test_smaller_tolerances_come_closer(order):
    x = jnp.linspace(-2, 2, 7)[:, None]
    truth = skewed_mixture().ode_solution(np.asarray(x), VP, 1.0, 1e-3)
    errors, calls = [], []
    for tolerance in (1e-2, 1e-3, 1e-5):
        got = ds.adaptive.dpm_solver(
            skewed_mixture().score_fn(VP), x, 1.0, 1e-3, order=order, rtol=tolerance, atol=tolerance
        )
        errors.append(np.abs(got.x - truth).max())
        calls.append(int(got.nfe.max()))
    assert errors[2] < 0.3 * errors[1] < 0.15 * errors[0], (errors, calls)
    assert calls[0] < calls[1] < calls[2] < 12000


def test_float32_batches_and_the_clean_end():
    network = skewed_mixture().score_fn(VP)
    x = jnp.linspace(-2, 2, 6)[:, None]
    whole = ds.adaptive.dpm_solver(network, x, VP.t_max, VP.t_clean)
    alone = ds.adaptive.dpm_solver(network, x[2:3], VP.t_max, VP.t_clean)
    np.testing.assert_allclose(alone.x[0], whole.x[2], atol=1e-4)
    assert (alone.nfe[0], int(alone.nfe[0]) % 3) == (whole.nfe[2], 1)
    truth = skewed_mixture().ode_solution(np.asarray(x, np.float64), VP, 1.0, VP.t_min)
    assert np.abs(whole.x - truth).max() < 0.1  # twice the relative tolerance
    few = ds.adaptive.dpm_solver(network, x, VP.t_max, VP.t_min, max_steps=3)
    assert np.all(np.isnan(few.x))
    assert np.all(few.nfe == 9)

    def nested(params, x, t):
        return {"a": 0.5 * x["a"], "b": 0.1 * x["b"]}

    tree = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2, 2))}
    out = ds.adaptive.dpm_solver(ds.ScoreFn(nested, None, VP, prediction="data"), tree, 1.0, 0.0)
    assert jax.tree.map(jnp.shape, out.x) == jax.tree.map(jnp.shape, tree)


def test_what_it_refuses():
    network, x = skewed_mixture().score_fn(VP), jnp.ones((2, 1))
    flow = skewed_mixture().score_fn(ds.processes.flow())
    for call, message in (
        (lambda: ds.adaptive.dpm_solver(network, x, 0.1, 0.5), "must be above `t_end`"),
        (lambda: ds.adaptive.dpm_solver(flow, x, 1.0, 0.0), "log-SNR is infinite; start below"),
        (lambda: ds.adaptive.dpm_solver(network, x, 1.0, 0.0, order=4), "`order` must be"),
        (lambda: ds.adaptive.dpm_solver(network, x, 1.0, 2.0), r"`t_end` must lie in \[0, 1\]"),
        (
            lambda: ds.adaptive.dpm_solver(network, x, 1.0, 0.0, prediction="v"),
            "`prediction` must be one of",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
