"""Processes against independent formulas, their inverses, derivatives, ends and priors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from cases import all_processes
from scipy.integrate import quad

import diffsamp as ds
from diffsamp import processes

LEVELS = np.linspace(0, 1, 65)
PROCESSES = {
    **all_processes(),
    "ouve": processes.ouve(),
    "table": processes.table(LEVELS, 1 - LEVELS**2, LEVELS * (1.5 - LEVELS)),
    "table_ends_noisy": processes.table(LEVELS, 1 - 0.9 * LEVELS, np.sqrt(2 * LEVELS)),
}
EVERY = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def inner_times(process, n=41):
    """Times spread over the whole range, denser near both ends."""
    clean, last = process.t_clean, process.t_max
    u = 0.5 - 0.5 * np.cos(np.linspace(0.02, np.pi - 0.02, n))
    return clean + (last - clean) * u


def test_vp_linear_integrates_its_beta():
    process = ds.processes.vp_linear(0.1, 20.0)
    for t in (0.01, 0.3, 1.0):
        integral = quad(lambda s: 0.1 + s * 19.9, 0, t, epsabs=1e-13)[0]
        assert process.alpha(t) == pytest.approx(np.exp(-integral / 2), rel=1e-12)


def test_vp_cosine_is_the_improved_ddpm_formula():
    process = ds.processes.vp_cosine()

    def f(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2)

    t = np.linspace(0, 1, 11)
    np.testing.assert_allclose(process.alpha(t), f(t) / f(0), rtol=1e-12, atol=1e-15)
    assert process.alpha(1.0) == 0
    assert process.log_snr(process.t_max) == pytest.approx(-4.76, abs=0.4)


def test_a_table_is_printed_in_one_line():
    table = ds.processes.vp_discrete("linear")
    assert repr(table) == "VPDiscrete(1000 levels, log-SNR 4.605 to -5.059)"
    assert jax.eval_shape(lambda p: jnp.zeros(len(repr(p))), table).shape == (23,)  # traced


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_vp_discrete_is_its_table_at_integers(name):
    betas = processes.beta_table(name)
    process = ds.processes.vp_discrete(name)
    alpha_bar = np.cumprod(1 - betas)
    t = np.arange(1000)
    np.testing.assert_allclose(process.alpha(t) ** 2, alpha_bar, rtol=1e-10)
    np.testing.assert_allclose(process.sigma(t) ** 2, 1 - alpha_bar, rtol=1e-10)
    # between two levels the log-SNR is their mean
    middle = 0.5 * (process.log_snr(t[:-1]) + process.log_snr(t[1:]))
    np.testing.assert_allclose(process.log_snr(t[:-1] + 0.5), middle, rtol=1e-12, atol=1e-12)


def test_beta_tables_have_their_published_ends():
    linear, scaled, cosine = (
        processes.beta_table(name, **options)
        for name, options in (
            ("linear", {}),
            ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
            ("squaredcos_cap_v2", {}),
        )
    )
    assert (linear[0], linear[-1]) == (1e-4, 0.02)
    assert scaled[0] == pytest.approx(0.00085)
    assert scaled[-1] == pytest.approx(0.012)
    assert cosine[-1] == 0.999
    assert np.all(np.diff(cosine) >= 0)


def test_published_noise_levels_of_the_tables():
    """Lin et al. 2023 (arXiv:2305.08891), table 1, and k-diffusion's levels for latent models."""
    latent = ds.processes.vp_discrete("scaled_linear", beta_start=0.00085, beta_end=0.012)
    published = [
        (latent.alpha(999), 0.068265, 5e-7),  # half of the last printed digit
        (ds.processes.vp_discrete("linear").alpha(999), 0.006353, 5e-7),
        (ds.processes.vp_discrete("squaredcos_cap_v2").alpha(999), 4.928e-5, 5e-9),
        # k-diffusion's levels come from alpha-bar in float32: 6e-8 of 1 - alpha-bar = 8.5e-4
        (np.exp(-latent.log_snr(0)), 0.0291675, 0.0291675 * 6e-8 / 8.5e-4 / 2),
        (np.exp(-latent.log_snr(999)), 14.6146, 5e-5),
    ]
    for got, want, digit in published:
        assert got == pytest.approx(want, abs=digit)
    # the test can fail: one end of the table 1 % higher
    other = ds.processes.vp_discrete("scaled_linear", beta_start=0.00085, beta_end=0.01212)
    assert abs(other.alpha(999) - 0.068265) > 100 * 5e-7


def test_zero_terminal_snr():
    """The last level has no signal, the first is unchanged; alpha is mapped affinely."""
    plain = ds.processes.vp_discrete("scaled_linear")
    rescaled = ds.processes.vp_discrete("scaled_linear", zero_terminal_snr=True)
    assert rescaled.alpha(999.0) == 0
    assert rescaled.sigma(999.0) == 1
    assert rescaled.alpha(0.0) == pytest.approx(plain.alpha(0.0), rel=1e-12)
    t = np.arange(1000.0)
    a, b = plain.alpha(t), rescaled.alpha(t)
    slope = np.diff(b) / np.diff(a)  # an affine map of alpha
    np.testing.assert_allclose(slope, slope[0], rtol=1e-6)


def test_ve_edm_flow():
    ve, edm, flow = ds.processes.ve(0.01, 50.0), ds.processes.edm(), ds.processes.flow(shift=3.0)
    assert ve.sigma(1.0) == pytest.approx(50.0)
    assert ve.sigma(0.5) == pytest.approx(np.sqrt(0.5))
    assert ve.sigma(0.0) == 0
    assert edm.sigma(3.25) == 3.25
    assert edm.alpha(3.25) == 1
    assert (flow.alpha(0.25), flow.sigma(0.25)) == (0.75, 0.25)
    # Esser et al.: t' = 3 t / (1 + 2 t)
    assert flow.uniform_time(0.5) == pytest.approx(0.75)


def near_both_ends(process):
    """Times at distances 1e-14 .. 1 of the range from either end."""
    span = process.t_max - process.t_clean
    distance = np.logspace(-14, -0.01, 43) * span
    t = np.concatenate([process.t_clean + distance, process.t_max - distance])
    # VE jumps to its clean end below t_min
    return t[t >= process.t_min] if isinstance(process, processes.VE) else t


def inverse_error(process, t, back):
    """Error of times relative to what float64 can hold; below 1 is right.

    The distance from the clean end keeps 13 digits where it is representable. A table's clean end
    is at -1, and VE's log-SNR is about 4.6 there: both add a few roundings of the range.
    """
    absolute = isinstance(process, processes.VPDiscrete | processes.VE)
    floor = 4 * np.finfo(float).eps * (process.t_max - process.t_clean) if absolute else 0.0
    return np.max(np.abs(back - t) / (1e-13 * np.abs(t - process.t_clean) + floor))


@EVERY
def test_the_inverse_of_log_snr(process):
    t = near_both_ends(process)
    log_snr = process.log_snr(t)
    assert inverse_error(process, t, process.time(log_snr)) < 1
    assert inverse_error(process, t, process.time(1.01 * log_snr)) > 1e6  # it can fail
    rising = np.sort(inner_times(process))
    rising = rising[rising >= process.t_min]
    assert np.all(np.diff(process.log_snr(rising)) < 0)
    again = process.log_snr(process.time(process.log_snr(rising)))
    # a time of 1000 holds its last steps to 1e-13, and log-SNR moves by up to 1 per step
    np.testing.assert_allclose(again, process.log_snr(rising), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["vp_cosine", "vp_zero_snr", "flow", "flow_shift"])
def test_the_end_without_signal(name):
    """Up to the time where alpha is 0 and log-SNR -inf; for the cosine that lies beyond t_max."""
    process = PROCESSES[name]
    last = 1.0 if name == "vp_cosine" else process.t_max
    assert process.alpha(last) == 0
    assert process.sigma(last) == 1
    assert process.log_snr(last) == -np.inf
    assert process.time(-np.inf) == last
    t = last - np.logspace(-12, -2.5, 20) * last
    assert np.all(np.diff(process.log_snr(t)) > 0)
    # a few roundings of t, which holds its distance from the end to 1e-16 of the range
    np.testing.assert_allclose(process.time(process.log_snr(t)), t, rtol=2e-15)


@EVERY
def test_the_ends(process):
    clean = process.t_clean
    assert process.sigma(clean) == 0
    assert process.alpha(clean) == 1
    assert np.isposinf(process.log_snr(clean))
    assert process.time(np.inf) == pytest.approx(clean, abs=1e-15)
    assert clean < process.t_min + 1 < process.t_max + 1
    assert process.sigma(process.t_min) > 0
    assert np.isfinite(process.alpha(process.t_max))


@EVERY
def test_derivatives_against_differences(process):
    t = inner_times(process)
    t = t[(t > process.t_min) & (t < process.t_max)]
    if isinstance(process, processes.VPDiscrete):
        t = np.floor(t) + 0.5  # inside a piece
        t = t[(t > 0) & (t < process.t_max)]
    h = 1e-3 * np.minimum(t - process.t_clean, process.t_max - t)
    h = np.minimum(h, 0.05)
    for value, derivative in (
        (process.alpha, process.alpha_dot),
        (process.sigma, process.sigma_dot),
    ):
        # five-point formula, error of order h^4
        estimate = (value(t - 2 * h) - 8 * value(t - h) + 8 * value(t + h) - value(t + 2 * h)) / (
            12 * h
        )
        scale = np.abs(derivative(t)).max()
        np.testing.assert_allclose(derivative(t), estimate, rtol=1e-6, atol=1e-9 * scale)


@EVERY
@pytest.mark.usefixtures("x64")
def test_derivatives_against_automatic_differentiation(process):
    """In float64, near both ends and in every piece of a table; nowhere NaN."""
    t = np.concatenate([near_both_ends(process), inner_times(process)])
    span = process.t_max - process.t_clean
    t = t[(t - process.t_clean > 1e-9 * span) & (process.t_max - t > 1e-9 * span)]
    if isinstance(process, processes.VPDiscrete):
        t = t[np.abs(t - np.round(t)) > 1e-9]  # no kink
        assert t.min() < 0 < process.t_max - 1 < t.max()
    for value, derivative in (
        (process.alpha, process.alpha_dot),
        (process.sigma, process.sigma_dot),
    ):
        slope = np.asarray(jax.vmap(jax.grad(value))(jnp.asarray(t)))
        # both take a difference of nearly equal numbers where the slope vanishes
        scale = 1e-12 * np.abs(slope).max()
        np.testing.assert_allclose(derivative(t), slope, rtol=1e-9, atol=scale)
        if np.any(slope):
            with pytest.raises(AssertionError, match="Not equal to tolerance"):
                np.testing.assert_allclose(1.01 * derivative(t), slope, rtol=1e-9, atol=scale)


@EVERY
def test_finite_in_float32_up_to_the_ends(process):
    t = jnp.asarray([process.t_clean, process.t_min, process.t_max], jnp.float32)
    alpha, sigma = jax.jit(lambda p, t: (p.alpha(t), p.sigma(t)))(process, t)
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)
    assert np.all(np.isfinite(alpha))
    assert np.all(np.isfinite(sigma))
    assert np.isposinf(process.log_snr(t)[0])
    slopes = jax.vmap(jax.grad(lambda t: process.sigma(t) + process.alpha(t)))(t[1:])
    assert np.all(np.isfinite(slopes))


@EVERY
def test_the_jax_path_agrees_with_the_host_path(process):
    t = inner_times(process)
    if isinstance(process, processes.VE):
        t = t[t > process.t_min]
    t32 = jnp.asarray(t, jnp.float32)
    host = np.asarray(t32, np.float64)  # the same rounded times
    leaves = jax.jit(lambda p, t: (p.alpha(t), p.sigma(t), p.log_snr(t), p.time(p.log_snr(t))))
    alpha, sigma, log_snr, back = leaves(process, t32)
    assert alpha.dtype == sigma.dtype == log_snr.dtype == back.dtype == jnp.float32
    # table times carry a float32 rounding of 1000 into the exponent
    np.testing.assert_allclose(alpha, process.alpha(host), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(sigma, process.sigma(host), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(log_snr, process.log_snr(host), rtol=1e-3, atol=1e-3)
    span = process.t_max - process.t_clean
    np.testing.assert_allclose(back, t, rtol=2e-3, atol=1e-4 * span)
    slope = jax.vmap(jax.grad(lambda t: process.sigma(t)))(t32[5:-5])
    np.testing.assert_allclose(slope, process.sigma_dot(host[5:-5]), rtol=5e-2)


@EVERY
def test_a_process_is_a_pytree_of_its_numbers(process):
    traces = []

    @jax.jit
    def f(process, t):
        traces.append(1)
        return process.alpha(t) + 2 * process.sigma(t)

    t = process.t_clean + 0.3 * (process.t_max - process.t_clean)
    values = [getattr(process, field.name) for field in dataclasses.fields(process)]
    leaves, treedef = jax.tree.flatten(process)
    assert len(leaves) == len(values)
    assert all(leaf is value for leaf, value in zip(leaves, values, strict=True))
    answers = set()
    for factor in (1.0, 1.01, 1.02):
        other = jax.tree.unflatten(treedef, [leaf * factor for leaf in leaves])
        answers.add(float(f(other, t)))
        assert float(f(other, t)) == pytest.approx(
            float(other.alpha(t) + 2 * other.sigma(t)), rel=1e-5
        )
    assert len(traces) == 1
    parameter_free = isinstance(process, processes.EDM | processes.Flow)
    assert len(answers) == (1 if parameter_free else 3)


@EVERY
def test_the_prior(process):
    key = jax.random.key(0)
    x = process.prior_sample(key, (4000, 3))
    assert x.dtype == jnp.float32
    std = float(process.prior_std)
    # standard error of a standard deviation: 1 / sqrt(2 n), five of them
    assert float(x.std()) == pytest.approx(std, rel=5 / np.sqrt(2 * x.size))
    np.testing.assert_array_equal(x[:5], process.prior_sample(key, (5, 3)))
    keys = ds.random.sample_keys(key, 5)
    np.testing.assert_array_equal(x[3:5], process.prior_sample(keys[3:5], (2, 3)))
    assert process.prior_sample(key, (2, 3), jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="leading batch axis"):
        process.prior_sample(key, ())


def test_the_prior_takes_every_kind_of_key():
    process = ds.processes.edm()
    typed, raw = jax.random.key(3), jax.random.PRNGKey(3)
    want = process.prior_sample(typed, (4, 2))
    np.testing.assert_array_equal(process.prior_sample(raw, (4, 2)), want)
    own = jnp.stack([jax.random.fold_in(typed, i) for i in range(4)])  # as documented
    np.testing.assert_array_equal(process.prior_sample(own, (4, 2)), want)
    np.testing.assert_array_equal(process.prior_sample(jax.random.key_data(own), (4, 2)), want)
    # samples differ from one another, and from those of another key
    assert len(np.unique(want[:, 0])) == 4
    assert np.all(process.prior_sample(jax.random.key(4), (4, 2)) != want)
    for bad in (0, None, jnp.ones(2), np.zeros((), np.uint32)):
        with pytest.raises(TypeError, match="`key` must be a JAX random key, such as"):
            process.prior_sample(bad, (4, 2))
    with pytest.raises(ValueError, match=r"one per sample, shape \(4,\); got shape \(3,\)"):
        process.prior_sample(own[:3], (4, 2))
    with pytest.raises(ValueError, match="leading batch axis; got 4"):
        process.prior_sample(typed, 4)


def test_reversed_flow_models():
    """A model trained with t = 1 data and velocity x_0 - eps gives the samples of its mirror."""
    target = ds.targets.gaussian([0.4], 0.2)
    ours = target.score_fn(ds.processes.flow(), "velocity")

    def theirs(params, x, t):
        return -ours.apply(params, x, 1 - t)

    adapted = ds.ScoreFn(
        ds.reversed_flow_apply(theirs), ours.params, ours.process, prediction="velocity", time="t"
    )
    tableau = ds.solvers.heun(ours.process, ds.schedules.uniform(ours.process, 6))
    x_T = ours.process.prior_sample(jax.random.key(0), (5, 1))
    np.testing.assert_allclose(
        ds.sample(adapted, tableau, x_T), ds.sample(ours, tableau, x_T), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ds.processes.vp_linear(0.0), "`beta_min` must be a positive, finite number"),
        (lambda: ds.processes.vp_linear(2.0, 1.0), "`beta_max` must be at least `beta_min`"),
        (lambda: ds.processes.vp_cosine(-1.0), "`s` must be a positive"),
        (lambda: ds.processes.ve(1.0, 0.5), "`sigma_max` must exceed `sigma_min`"),
        (lambda: ds.processes.edm(0.0), "`sigma_min` must be a positive"),
        (lambda: ds.processes.edm(1.0, 1.0), "`sigma_max` must exceed"),
        (lambda: ds.processes.flow(np.inf), "`shift` must be a positive, finite"),
        (lambda: ds.processes.vp_discrete("cosine"), '`betas` must be "linear"'),
        (lambda: ds.processes.vp_discrete([0.1]), r"shape \(T,\) with T >= 2"),
        (lambda: ds.processes.vp_discrete([0.1, 1.5]), r"betas\[1\] = 1.5"),
        (lambda: ds.processes.vp_discrete([0.1, np.nan, 0.2]), r"betas\[1\] = nan"),
        (lambda: ds.processes.vp_discrete(None), r"shape \(T,\)"),
        (lambda: ds.processes.vp_discrete(num_levels=1), "`num_levels` must be at least 2"),
        (lambda: ds.processes.vp_discrete("scaled_linear", beta_start=-1), "`beta_start` must be"),
        (lambda: ds.processes.vp_linear("0.1"), "`beta_min` must be a positive, finite number"),
        (lambda: ds.processes.vp_linear(np.nan), "`beta_min` must be a positive, finite number"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ds.processes.vp_linear(None), "`beta_min` must be a number; got None"),
        (lambda: ds.processes.edm([1.0, 2.0]), "`sigma_min` must be a number; got"),
        (lambda: jax.jit(ds.processes.flow)(2.0), "`shift` must be a number; got"),
        (lambda: ds.processes.vp_discrete(num_levels=2.5), "`num_levels` must be an integer"),
    ],
)
def test_arguments_of_the_wrong_kind(call, message):
    with pytest.raises(TypeError, match=message):
        call()


# -- PFGM++ ---------------------------------------------------------------------------------------


def test_pfgmpp_prior_has_its_second_moment_and_radius():
    """E |x|^2 / N = sigma_max^2 D / (D - 2); the radius is a ratio of chi variables (exact CDF)."""
    size, dimension = 48, 64
    process = processes.pfgmpp(dimension, sigma_max=2.0)
    x = np.asarray(process.prior_sample(jax.random.key(0), (40_000, size)), np.float64)
    squares = np.sum(x**2, axis=1)
    assert squares.mean() / size / 4 == pytest.approx(dimension / (dimension - 2), rel=0.01)
    # R^2 / (r_max^2) (D / N) has the F distribution with (N, D) degrees of freedom
    statistic = squares / (4 * size)
    distance = scipy.stats.kstest(statistic, scipy.stats.f(size, dimension).cdf)
    assert distance.pvalue > 1e-3
    assert scipy.stats.kstest(1.05 * statistic, scipy.stats.f(size, dimension).cdf).pvalue < 1e-6
    direction = x / np.sqrt(squares)[:, None]
    np.testing.assert_allclose(direction.mean(axis=0), 0, atol=4 / np.sqrt(size * 40_000))


def test_pfgmpp_becomes_gaussian():
    process = processes.pfgmpp(1e7)
    x = np.asarray(process.prior_sample(jax.random.key(0), (20_000, 2))) / 80.0
    assert scipy.stats.kstest(x.reshape(-1), "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(x.T), np.eye(2), atol=0.03)


def test_pfgmpp_is_edm_but_for_the_prior():
    process, edm = processes.pfgmpp(128), processes.edm()
    t = np.linspace(0.01, 80, 5)
    np.testing.assert_array_equal(process.sigma(t), edm.sigma(t))
    keys = jax.random.split(jax.random.key(0), 3)
    all_ = process.prior_sample(keys, (3, 8, 8))
    np.testing.assert_allclose(all_[1:2], process.prior_sample(keys[1:2], (1, 8, 8)), rtol=1e-6)
    target = ds.targets.gaussian([0.5], 0.04)
    tableau = ds.solvers.heun(process, ds.schedules.karras(process, 18))
    x = ds.sample(target.score_fn(process), tableau, process.prior_sample(keys, (3, 1)))
    np.testing.assert_allclose(x, 0.5, atol=0.8)
    with pytest.raises(ValueError, match="`dimension` must be above 2; got 2"):
        processes.pfgmpp(2)
    with pytest.raises(ValueError, match="must have a leading batch axis"):
        process.prior_sample(jax.random.key(0), ())


def test_a_table_is_taken_for_what_it_is():
    """The same process from betas, alpha-bar and log-SNR; one taken for another is refused."""
    betas = processes.beta_table("scaled_linear", beta_start=0.00085, beta_end=0.012)
    alpha_bar = np.cumprod(1 - betas)
    log_snr = np.log(alpha_bar / (1 - alpha_bar)) / 2
    want = processes.vp_discrete(betas)
    for given in ({"alphas_cumprod": alpha_bar}, {"log_snr": log_snr}):
        np.testing.assert_allclose(
            processes.vp_discrete(**given).log_snrs, want.log_snrs, rtol=1e-9
        )
    zero = alpha_bar.copy()
    zero[-1] = 0.0
    assert processes.vp_discrete(alphas_cumprod=zero).alpha(999.0) == 0
    wrong = {
        r"starts at 0.9991 .*`alphas_cumprod=`": {"betas": alpha_bar},
        r"Pass it as `alphas_cumprod=`": {"betas": 1 - betas},
        r"one step would leave nothing": {"betas": np.linspace(0.9, 0.99, 10)},
        r"betas rise. Reverse": {"betas": betas[::-1]},
        r"`alphas_cumprod` must fall .* reverse it": {"alphas_cumprod": alpha_bar[::-1]},
        r"or pass it as `betas=`": {"alphas_cumprod": betas},
        r"`log_snr` must fall": {"log_snr": log_snr[::-1]},
        r"must be numbers in \(0, 1\)": {"alphas_cumprod": log_snr},
        r"give one table; got `betas` and `log_snr`": {"betas": betas, "log_snr": log_snr},
        r"`betas` must lie in \(0, 1\)": {"betas": log_snr[::-1]},
    }
    for words, given in wrong.items():
        with pytest.raises(ValueError, match=words):
            processes.vp_discrete(**given)


class Own(processes.Process):
    """A user's process, alpha = cos(pi t / 2), with what may be wrong in one."""

    def __init__(self, last=0.0, inverse=1.0, clean=1.0):
        self.last, self.inverse, self.clean = last, inverse, clean

    def alpha(self, t):
        xp = np if isinstance(t, float | np.ndarray) else jnp
        return self.clean * xp.where(t >= 1, self.last, xp.cos(t * (np.pi / 2)))

    def sigma(self, t):
        xp = np if isinstance(t, float | np.ndarray) else jnp
        return xp.sin(t * (np.pi / 2))

    def alpha_dot(self, t):
        return -np.pi / 2 * self.sigma(t)

    def sigma_dot(self, t):
        return np.pi / 2 * self.alpha(t)

    def time(self, log_snr):
        xp = np if isinstance(log_snr, float | np.ndarray) else jnp
        return self.inverse * 2 / np.pi * xp.arctan(xp.exp(-log_snr))

    t_max, t_min = 1.0, 1e-3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, None),
        ({"last": 6e-17}, "alpha\\(t_max\\) = 6e-17: rounding, neither 0 nor a signal"),
        ({"inverse": 1.01}, "time must be the inverse of log_snr"),
        ({"clean": 0.999}, "at t_clean = 0 Own must have alpha = 1"),
        ({"last": 0.5}, "log-SNR must fall with t"),
    ],
)
def test_a_process_of_ones_own_is_tried_before_use(wrong, words):
    process = Own(**wrong)

    def use():
        ds.solvers.unipc(process, ds.schedules.uniform(process, 4))
        ds.ScoreFn(lambda p, x, t: x, {}, process)

    if words is None:
        use()
        return
    with pytest.raises(ValueError, match=words):
        use()
    with pytest.raises(ValueError, match=words):
        ds.ScoreFn(lambda p, x, t: x, {}, process)


def test_a_process_is_tried_once_and_never_taken_for_another():
    """Not by its address, which Python gives to the next object; nor by its leaves alone."""
    from diffsamp.processes import expect_process

    class Counted(Own):
        calls = 0

        def time(self, log_snr):
            Counted.calls += 1
            return super().time(log_snr)

    process = Counted()
    for _ in range(3):
        expect_process(process)
    assert Counted.calls == 1
    for _ in range(50):
        expect_process(Own())  # freed at once: the next one may lie where it lay
        with pytest.raises(ValueError, match="inverse of log_snr"):
            expect_process(Own(inverse=1.01))

    @jax.tree_util.register_static
    class Static(Own):
        def __hash__(self):
            return hash(self.inverse)

        def __eq__(self, other):
            return self.inverse == other.inverse

    expect_process(Static())
    with pytest.raises(ValueError, match="inverse of log_snr"):
        expect_process(Static(inverse=1.01))

    class Slots(Own):  # unhashable: tried every time, and no error of its own
        __hash__ = None

    expect_process(Slots())


# -- a process from a table -----------------------------------------------------------------------


def test_a_table_goes_through_its_levels_and_is_the_process_it_was_taken_from():
    for process, error in ((processes.vp_linear(), 2e-3), (processes.flow(), 2e-6)):
        t = np.linspace(0, 1, 61) ** 2
        table = processes.table(t, process.alpha(t), process.sigma(t))
        np.testing.assert_allclose(table.alpha(t), process.alpha(t), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(table.sigma(t), process.sigma(t), rtol=1e-12, atol=1e-15)
        between = np.linspace(0.001, 0.999, 777)
        for name in ("alpha", "sigma", "log_snr"):
            found, right = (getattr(p, name)(between) for p in (table, process))
            assert np.max(np.abs(found - right)) < error, name
        shifted = processes.table(t, process.alpha(t), 1.02 * process.sigma(t))
        assert np.max(np.abs(shifted.sigma(between) - process.sigma(between))) > 4 * error


def test_every_solver_builds_on_a_table():
    """Those of one Gaussian are then exact in the limit: the spread of samples is the law's."""
    table, variance = PROCESSES["table"], 0.3
    times = np.linspace(1, 0.05, 6)
    for solver in ds.solvers.SOLVERS.values():
        solver(table, times)  # the tableau checks itself
        if not solver.stochastic:
            solver(table, np.append(times[1:], 0.0))

    def spread(t):
        return np.sqrt(table.alpha(t) ** 2 * variance + table.sigma(t) ** 2)

    for name, order in (("dpmpp_2m", 2), ("unipc2", 2), ("heun", 2)):
        errors = []
        for n in (24, 48):
            grid = np.linspace(0.95, 0.1, n + 1)
            made = ds.evaluation.describe.gaussian_spread(
                ds.solvers.get(name)(table, grid), [variance**0.5]
            )
            # of the exact start, relative to the exact end
            errors.append(abs(float(made[0]) - 1))
        assert errors[1] < 2e-3, name
        assert np.log2(errors[0] / errors[1]) > order - 0.5, (name, errors)


def test_a_path_of_least_kinetic_energy_is_a_table():
    """For data N(0, s^2) it is the straight change of the deviation; a table of it stays so."""
    t, s = np.linspace(0, 1, 41), 0.5
    width = s + (1 - s) * t  # of x_t
    alpha = np.cos(np.pi / 2 * t) * width / s
    table = processes.table(t, np.where(t == 1, 0, alpha), np.sin(np.pi / 2 * t) * width)
    between = np.linspace(0.01, 0.99, 200)
    found = np.sqrt((s * table.alpha(between)) ** 2 + table.sigma(between) ** 2)
    np.testing.assert_allclose(found, s + (1 - s) * between, rtol=2e-5)


def test_bad_tables():
    t = np.linspace(0, 1, 6)
    for arguments, words in (
        ((t, 1 - t, t[:-1]), "as long as each other"),
        ((t[::-1], 1 - t, t), "`times` must rise"),
        ((t, 1 - t, t + 0.1), "must begin at the clean end"),
        ((t, 1 - 2 * t, t), "`alpha` must be positive before the last"),
        (
            (t, np.array([1, 1, 1, 1, 1, 1.0]), np.array([0, 1, 2, 2, 3, 4.0])),
            "does not from 2 to 3",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            processes.table(*arguments)
    with pytest.raises(ValueError, match="`t_min` must lie between"):
        processes.table(t, 1 - t, t, t_min=2.0)
