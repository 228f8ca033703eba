"""All 36 conversions, exact, also at the ends of a process."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes

import diffsamp as ds
from diffsamp import predictions
from diffsamp.predictions import NAMES, Level, conversion, convert, level_at, weights

PROCESSES = all_processes()
SIGMA_DATA = 0.6


def truth(name, process, t, x_0, eps):
    """A prediction by its definition in the papers, not through `weights`."""
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    x = alpha * x_0 + sigma * eps
    if name == "edm_f":
        # EDM: D = c_skip x + c_out F on x / alpha at the noise level sigma / alpha
        level = sigma / alpha
        c_skip = SIGMA_DATA**2 / (level**2 + SIGMA_DATA**2)
        c_out = level * SIGMA_DATA / np.sqrt(level**2 + SIGMA_DATA**2)
        return (x_0 - c_skip * x / alpha) / c_out
    return {
        "data": lambda: x_0,
        "noise": lambda: eps,
        "v": lambda: alpha * eps - sigma * x_0,
        "score": lambda: -eps / sigma,
        "velocity": lambda: process.alpha_dot(t) * x_0 + process.sigma_dot(t) * eps,
    }[name]()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(NAMES, NAMES)))
def test_conversion_between_any_two(process, source, target):
    rng = np.random.default_rng(1)
    x_0, eps = rng.normal(size=(2, 7))
    for u in (0.02, 0.3, 0.8, 0.97):
        t = process.t_clean + u * (process.t_max - process.t_clean)
        x = process.alpha(t) * x_0 + process.sigma(t) * eps
        options = {"process": process, "t": t, "sigma_data": SIGMA_DATA}
        value = truth(source, process, t, x_0, eps)
        got = convert(value, x, source=source, target=target, **options)
        want = truth(target, process, t, x_0, eps)
        # conditioning of the 2 x 2 system, in roundings
        own = weights(source, process, level_at(process, t), SIGMA_DATA)
        r, s = conversion(
            own,
            weights(target, process, level_at(process, t), SIGMA_DATA),
            process.alpha(t),
            process.sigma(t),
        )
        size = abs(r) * np.abs(x).max() + abs(s) * np.abs(value).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * max(size, 1e-3))
        back = convert(got, x, source=target, target=source, **options)
        np.testing.assert_allclose(back, value, rtol=1e-7, atol=1e-9 * np.abs(value).max())
        if source == target:
            assert (r, s) == (pytest.approx(0, abs=1e-15), pytest.approx(1, rel=1e-14))


def numbers(source, target, alpha, sigma, process=None):
    process = ds.processes.flow() if process is None else process
    level = Level(np.asarray(sigma), np.asarray(alpha), np.asarray(sigma))
    return conversion(
        weights(source, process, level, SIGMA_DATA),
        weights(target, process, level, SIGMA_DATA),
        level.alpha,
        level.sigma,
    )


@pytest.mark.parametrize(
    ("source", "clean", "noisy"),
    [
        # what each network determines at sigma = 0 and at alpha = 0
        ("data", {"data"}, {"data", "noise", "v", "score", "velocity", "edm_f"}),
        ("noise", {"data", "noise", "v", "velocity", "edm_f"}, {"noise", "score"}),
        ("v", {"data", "noise", "v", "velocity", "edm_f"}, set(NAMES)),
        ("velocity", {"data", "noise", "v", "velocity", "edm_f"}, set(NAMES)),
        ("edm_f", {"data", "noise", "v", "velocity", "edm_f"}, set(NAMES)),
    ],
)
def test_what_is_determined_at_the_ends(source, clean, noisy):
    with np.errstate(all="ignore"):
        for alpha, sigma, determined in ((1.0, 0.0, clean), (0.0, 1.0, noisy)):
            for target in NAMES:
                finite = all(np.isfinite(n) for n in numbers(source, target, alpha, sigma))
                assert finite == (target in determined), (source, target, alpha)


@pytest.mark.parametrize("name", ["data", "noise", "v", "velocity", "edm_f"])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_networks_own_prediction_is_itself_at_the_ends(name, alpha, sigma):
    r, s = numbers(name, name, alpha, sigma)
    assert r == 0
    assert s == pytest.approx(1, rel=1e-15)


def test_small_sigma_loses_nothing_in_float32():
    """The noise from EDM's network at sigma = 0.002: no difference of x and D is taken."""
    process = ds.processes.edm()
    rng = np.random.default_rng(0)
    x_0, eps = rng.normal(size=(2, 1000))
    t = 0.002
    x, f = x_0 + t * eps, truth("edm_f", process, t, x_0, eps)
    options = {"process": process, "t": jnp.float32(t), "sigma_data": SIGMA_DATA}
    got = convert(
        jnp.asarray(f, jnp.float32), jnp.asarray(x, jnp.float32),
        source="edm_f", target="noise", **options,
    )  # fmt: skip
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, eps, atol=2e-6)
    # the detour through x_0 loses three digits
    detour = (np.float32(x) - np.float32(x_0)) / np.float32(t)
    assert np.abs(detour - eps).max() > 1e-5


def test_names():
    assert predictions.canonical_name("epsilon") == "noise"
    assert predictions.canonical_name("v_prediction") == "v"
    for bad in ("eps2", None, 3):
        with pytest.raises(ValueError, match="`prediction` must be one of 'data', 'noise'"):
            predictions.canonical_name(bad)
