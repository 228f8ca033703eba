"""Functions of the data or the noise prediction, and the two conventions of what the row keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.exact import build, law

import diffsamp as ds
from diffsamp import guidance, schedules

PROCESS = ds.processes.vp_linear()
PAIR = ds.targets.gaussian([0.0, 0.0], [[1.0, 0.8], [0.8, 1.0]])


def conditioned(rows, keep):
    """Mean and variance of x_2 when x_1 = 1 is put into D, DDPM rows on log-SNR."""
    network = PAIR.score_fn(PROCESS, "data")
    tableau = ds.solvers.ddpm(PROCESS, schedules.logsnr(PROCESS, rows))
    known, mask = jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0])
    transform = guidance.inpaint(network, known, mask, tableau if keep else None)
    mean, cov = law(transform, tableau, 2)
    return mean[1], cov[1, 1]


@pytest.mark.long
def test_keep_converges_to_the_conditional_and_derive_does_not(x64):
    """Exact: .8 and .36. Kept noise .796 at 2000 rows; noise derived again .499 and .536."""
    mean, variance = conditioned(2000, keep=True)
    assert mean == pytest.approx(0.796, abs=3e-3)
    assert variance == pytest.approx(0.36, abs=8e-3)
    mean, variance = conditioned(2000, keep=False)
    assert mean == pytest.approx(0.499, abs=3e-3)
    assert variance == pytest.approx(0.536, abs=5e-3)
    errors = [0.8 - conditioned(n, keep=True)[0] for n in (50, 200, 800)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_the_gain_is_alpha_over_the_weight_of_the_data(x64):
    for process in (PROCESS, ds.processes.flow(), ds.processes.edm()):
        times = schedules.uniform(process, 7)
        for solver, factor in ((ds.solvers.ddim, 1), (ds.solvers.ddpm, 2)):
            gain = guidance.keep_noise(solver(process, times))
            with np.errstate(divide="ignore"):
                step = np.diff(process.log_snr(times))
            np.testing.assert_allclose(gain, 1 / -np.expm1(-factor * step), rtol=1e-9)
            assert gain[-1] == 1
    # the same for rows in noise form, with numbers of their own
    noise_form = ds.solvers.deis(PROCESS, schedules.logsnr(PROCESS, 7), order=0)
    np.testing.assert_allclose(
        guidance.keep_noise(noise_form),
        guidance.keep_noise(build("ddim", PROCESS, 7)),
        rtol=1e-9,
    )
    with pytest.raises(ValueError, match="rows of one state and one output"):
        guidance.keep_noise(build("unipc2", PROCESS, 5))


def test_a_kept_row_moves_by_alpha(x64):
    """x' changes by alpha' (f(D) - D) with the gain, by b (f(D) - D) without."""
    network = PAIR.score_fn(PROCESS, "noise")
    tableau = build("ddim", PROCESS, 6)
    x_T = jnp.ones((3, 2))
    shift = jnp.array([0.3, -0.2])
    plain = ds.trajectory(network, tableau, x_T)

    def f(data, level, cond):
        del level, cond
        return data + shift[None]

    for gain, weight in ((None, tableau.b[0, 0]), (guidance.keep_noise(tableau), tableau.alpha[1])):
        run = ds.trajectory(guidance.on_data(network, f, gain), tableau, x_T)
        np.testing.assert_allclose(
            run.points[1] - plain.points[1], np.tile(weight * shift, (3, 1)), rtol=1e-8
        )


def test_thresholding_is_a_case():
    network = PAIR.score_fn(PROCESS, "data")
    tableau, x_T = build("dpmpp_2m", PROCESS, 6), jnp.ones((3, 2), jnp.float32)

    def clip(data, level, cond):
        del level, cond
        return jnp.clip(data, -0.4, 0.4)

    want = ds.sample(guidance.static_thresholding(network, low=-0.4, high=0.4), tableau, x_T)
    got = ds.sample(guidance.on_data(network, clip), tableau, x_T)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(want, 0.4, rtol=1e-6)


def test_ddnm_with_an_operator_and_measurements_in_cond(x64):
    """A coordinate known through a map of full rank: the same as putting it in."""

    class First:
        def __call__(self, x):
            return 2.0 * x[:, :1]

        def pinv(self, y):
            return jnp.concatenate([y / 2.0, 0 * y], axis=1)

    jax.tree_util.register_static(First)
    network = PAIR.score_fn(PROCESS, "data")
    tableau = ds.solvers.ddpm(PROCESS, schedules.logsnr(PROCESS, 10))
    x_T, key = jnp.ones((2, 2)), jax.random.key(0)
    y = jnp.array([[1.0], [0.5]])
    fixed = guidance.ddnm(network, First(), 2 * y, tableau)
    want = ds.sample(fixed, tableau, x_T, key=key)
    named = guidance.ddnm(network, First(), "y", tableau)
    got = ds.sample(named, tableau, x_T, key=key, cond={"y": 2 * y})
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(got[:, :1], y, rtol=1e-12)  # the last row is the projection
    inpainted = guidance.inpaint(network, "known", jnp.array([1.0, 0.0]), tableau)
    known = jnp.concatenate([y, 0 * y], axis=1)
    again = ds.sample(inpainted, tableau, x_T, key=key, cond={"known": known})
    np.testing.assert_allclose(again, want, rtol=1e-10)
    with pytest.raises(ValueError, match=r"`cond` lacks \['y'\]"):
        ds.sample(named, tableau, x_T, key=key)


def test_mpgd_is_descent_on_the_data(x64):
    network = PAIR.score_fn(PROCESS, "data")
    tableau = ds.solvers.ddpm(PROCESS, schedules.logsnr(PROCESS, 400))

    def misfit(data, level, cond):
        del level, cond
        return 0.5 * (data[:, 0] - 1.0) ** 2

    # a whole step is the projection: x_1 = 1 exactly, and the law of DDNM
    whole = guidance.mpgd(network, misfit, 1.0, tableau)
    inpainted = guidance.inpaint(network, jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]), tableau)
    for got, want in zip(law(whole, tableau, 2), law(inpainted, tableau, 2), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    # k steps of length s leave (1 - s)^k of the distance
    many = guidance.mpgd(network, misfit, 0.3, tableau, repeats=4)
    x = jnp.array([[0.2, -0.5]])
    data, moved = (
        net(x, 0.5, prediction="data")
        for net in (network, guidance.mpgd(network, misfit, 0.3, repeats=4))
    )
    np.testing.assert_allclose(1 - moved[0, 0], 0.7**4 * (1 - data[0, 0]), rtol=1e-12)
    assert many.nfe_factor == 1
    assert many.gradients_per_call == 0


def test_a_scaled_noise_prediction(x64):
    network = PAIR.score_fn(PROCESS, "data")
    x, t = jnp.ones((2, 2)), 0.4
    noise = network(x, t, prediction="noise")
    for omega in (0.97, lambda level: 0.97 * jnp.ones_like(level.t), jnp.full((2,), 0.97)):
        own = omega if callable(omega) or np.ndim(omega) == 0 else omega[None]
        got = guidance.omegance(network, own)(x, t, prediction="noise")
        np.testing.assert_allclose(got, 0.97 * noise, rtol=1e-12)
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    data = guidance.omegance(network, 0.97)(x, t, prediction="data")
    np.testing.assert_allclose(data, (x - sigma * 0.97 * noise) / alpha, rtol=1e-10)


def test_calibration_finds_a_bias(x64):
    """A perfect network plus 0.2 in the noise; the table is the bias to 1 / sqrt(n)."""
    exact = PAIR.score_fn(PROCESS, "noise")
    biased = ds.ScoreFn(
        lambda p, x, t: exact.apply(p, x, t) + 0.2, exact.params, PROCESS, prediction="noise"
    )
    x_0 = (
        jax.random.normal(jax.random.key(1), (4000, 2))
        @ jnp.linalg.cholesky(jnp.array([[1.0, 0.8], [0.8, 1.0]])).T
    )
    times = schedules.logsnr(PROCESS, 6, final="t_min")
    table = guidance.bias_table(biased, x_0, times, jax.random.key(2))
    np.testing.assert_allclose(table[1], 0.2 * np.ones((7, 2)), atol=0.06)
    x_T = PROCESS.prior_sample(jax.random.key(3), (64, 2), dtype=jnp.float64)
    tableau = build("dpmpp_2m", PROCESS, 12)
    want = ds.sample(exact, tableau, x_T)
    wrong = float(jnp.mean((ds.sample(biased, tableau, x_T) - want) ** 2))
    right = float(
        jnp.mean((ds.sample(guidance.calibrate(biased, table), tableau, x_T) - want) ** 2)
    )
    assert right < 0.05 * wrong
    # a time per sample
    t = jnp.linspace(0.2, 0.8, 64)
    calibrated = guidance.calibrate(biased, table)
    many = calibrated(x_T, t, prediction="noise")
    one = calibrated(x_T[5:6], t[5], prediction="noise")
    np.testing.assert_allclose(many[5], one[0], rtol=1e-9)


def test_no_signal_and_pytree_states():
    """On flow rows from alpha = 0; a rule on the noise says in words where it is undetermined."""
    process = ds.processes.flow()
    network = ds.targets.gaussian([0.3], 0.2).score_fn(process, "velocity")
    tableau = ds.solvers.ddim(process, schedules.uniform(process, 4))
    x_T = jnp.ones((3, 1), jnp.float32)
    kept = guidance.inpaint(network, jnp.ones(1), jnp.ones(1), tableau)
    np.testing.assert_allclose(ds.sample(kept, tableau, x_T), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="a rule on the 'noise' prediction does not determine"):
        ds.sample(guidance.omegance(network, 0.9), tableau, x_T)

    def both(params, x, t):
        del params, t
        return jax.tree.map(lambda v: 0.5 * v, x)

    pair = ds.ScoreFn(both, None, PROCESS, prediction="data")
    state = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones((2, 1), jnp.float32)}
    known = {"a": jnp.zeros(3), "b": jnp.full(1, 7.0)}
    mask = {"a": jnp.array([1.0, 0, 0]), "b": jnp.ones(1)}
    out = ds.sample(guidance.inpaint(pair, known, mask), build("ddim", PROCESS, 3), state)
    assert out["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(out["b"], 7.0, rtol=1e-5)
    np.testing.assert_allclose(out["a"][:, 0].astype(jnp.float32), 0.0, atol=1e-2)
