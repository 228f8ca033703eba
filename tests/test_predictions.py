"""All 36 conversions, exact, also at the ends of a process."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes

import diffsamp as ds
from diffsamp import predictions, processes
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


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_conversion_test_can_fail(process):
    """One weight 1 % off moves the result by far more than the 1e-13 above."""
    t = process.t_clean + 0.3 * (process.t_max - process.t_clean)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x_0, eps = np.random.default_rng(1).normal(size=(2, 7))
    x = alpha * x_0 + sigma * eps
    noise = weights("noise", process, level_at(process, t))
    for source in ("data", "v", "score", "velocity", "edm_f"):
        own = weights(source, process, level_at(process, t), SIGMA_DATA)
        value = truth(source, process, t, x_0, eps)
        for i in range(3):
            if own[i] == 0:
                continue
            wrong = [1.01 * w if i == j else w for j, w in enumerate(own)]
            if source == "data" and i == 0:
                continue  # the same as a wrong scale, i = 2
            r, s = conversion(tuple(wrong), noise, alpha, sigma)
            assert np.abs(r * x + s * value - eps).max() > 1e-7, (source, i)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_float32_program_gives_the_same_numbers(process):
    """All 36 in one jitted float32 program, against the float64 host path."""
    t = process.t_clean + np.array([0.3, 0.9]) * (process.t_max - process.t_clean)
    pairs = list(itertools.product(NAMES, NAMES))

    def numbers_at(process, t):
        level = level_at(process, t)
        row = {name: weights(name, process, level, SIGMA_DATA) for name in NAMES}
        return [conversion(row[a], row[b], level.alpha, level.sigma) for a, b in pairs]

    t = np.float32(t)
    host = numbers_at(process, t.astype(np.float64))
    traced = jax.jit(numbers_at)(process, jnp.asarray(t))
    level = level_at(process, t.astype(np.float64))
    # roundings of alpha and sigma; a table's exponent carries one of its index, 1000
    rounding = 1e-4 if isinstance(process, processes.VPDiscrete) else 1e-6
    for (a, b), number, number32 in zip(pairs, host, traced, strict=True):
        # .. magnified by the condition of the 2 x 2 system
        f0, f1, _ = weights(a, process, level, SIGMA_DATA)
        size = np.hypot(f0, f1) * np.hypot(level.alpha, level.sigma)
        condition = size / abs(level.alpha * f1 - level.sigma * f0)
        for wide, narrow in zip(number, number32, strict=True):
            assert narrow.dtype == jnp.float32, (a, b)
            error = np.abs(np.asarray(narrow) - wide)
            largest = np.maximum(np.abs(number[0]), np.abs(number[1]))
            assert np.all(error <= rounding * condition * largest), (a, b)


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
        # a finite score at sigma = 0 means that the expected noise is 0 there, and x the data
        ("score", set(NAMES), {"noise", "score"}),
    ],
)
def test_what_is_determined_at_the_ends(source, clean, noisy):
    with np.errstate(all="ignore"):
        for alpha, sigma, determined in ((1.0, 0.0, clean), (0.0, 1.0, noisy)):
            for target in NAMES:
                finite = all(np.isfinite(n) for n in numbers(source, target, alpha, sigma))
                assert finite == (target in determined), (source, target, alpha)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("name", NAMES)
def test_a_networks_own_prediction_is_itself_everywhere(name, process):
    """Also where a weight is infinite (velocity at the clean end) or the scale is 0 (score)."""
    for t in (process.t_clean, process.t_min, process.t_max):
        own = weights(name, process, level_at(process, t), SIGMA_DATA)
        level = level_at(process, t)
        r, s = conversion(own, own, level.alpha, level.sigma)
        assert (r, s) == (0, 1)
        value, x = np.array([0.3, -2.0]), np.array([1.0, 5.0])
        options = {"process": process, "t": t, "sigma_data": SIGMA_DATA}
        np.testing.assert_array_equal(convert(value, x, source=name, target=name, **options), value)


@pytest.mark.parametrize("source", ["v", "velocity", "edm_f"])
def test_values_at_the_ends(source):
    """Not only finite but right: x = x_0 and F at sigma = 0, x = eps and F at alpha = 0."""
    process = ds.processes.flow()
    x_0, eps = np.array([0.7, -1.2]), np.array([0.4, 2.0])
    for t, x in ((0.0, x_0), (1.0, eps)):
        alpha, sigma = 1 - t, t
        f = {
            "v": alpha * eps - sigma * x_0,
            "velocity": eps - x_0,
            # limits of (x_0 - c_skip x / alpha) / c_out for sigma / alpha -> 0 and -> inf
            "edm_f": -eps if t == 0 else x_0 / SIGMA_DATA,
        }
        want = {"data": x_0, "noise": eps, **f}
        for target, value in want.items():
            options = {"process": process, "t": t, "sigma_data": SIGMA_DATA}
            got = convert(f[source], x, source=source, target=target, **options)
            np.testing.assert_allclose(got, value, rtol=1e-15, atol=1e-15)  # a rounding or two


def test_small_sigma_loses_nothing_in_float32():
    """The noise from EDM's network at sigma = 0.002: no difference of x and D is taken."""
    process = ds.processes.edm()
    rng = np.random.default_rng(0)
    x_0, eps = rng.normal(size=(2, 1000))
    t = 0.002
    x, f = x_0 + t * eps, truth("edm_f", process, t, x_0, eps)
    options = {"process": process, "t": jnp.float32(t), "sigma_data": SIGMA_DATA}
    got = convert(
        jnp.asarray(f, jnp.float32),
        jnp.asarray(x, jnp.float32),
        source="edm_f",
        target="noise",
        **options,
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, eps, atol=2e-6)
    # the detour through x_0 loses three digits
    detour = (np.float32(x) - np.float32(x_0)) / np.float32(t)
    assert np.abs(detour - eps).max() > 1e-5


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        *((name, name) for name in NAMES),
        ("x0", "data"),
        ("x_0", "data"),
        ("sample", "data"),
        ("denoised", "data"),
        ("eps", "noise"),
        ("epsilon", "noise"),
        ("v_prediction", "v"),
        ("flow", "velocity"),
        ("flow_prediction", "velocity"),
    ],
)
def test_names(alias, name):
    assert predictions.canonical_name(alias) == name
    process, x, value = ds.processes.vp_linear(), np.array([0.3]), np.array([1.1])
    options = {"process": process, "t": 0.4}
    assert convert(value, x, source=alias, target="noise", **options) == convert(
        value, x, source=name, target="noise", **options
    )


@pytest.mark.parametrize("bad", ["eps2", "", "Data", None, 3, ["data"]])
def test_unknown_names(bad):
    with pytest.raises(ValueError, match="`prediction` must be one of 'data', 'noise'"):
        predictions.canonical_name(bad)
    with pytest.raises(ValueError, match="`prediction` must be one of 'data', 'noise'"):
        convert(1.0, 1.0, source="data", target=bad, process=ds.processes.flow(), t=0.5)
