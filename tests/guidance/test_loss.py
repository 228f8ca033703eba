"""Guidance by gradients: exact laws on Gaussians, shapes of the step, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.exact import build, gaussians, labels, law

import diffsamp as ds
from diffsamp import guidance, schedules

PROCESS = ds.processes.vp_linear()
COV = np.array([[1.0, 0.8], [0.8, 1.0]])
PAIR = ds.targets.gaussian([0.0, 0.0], COV)
NOISE = 0.3  # of the measurement y = x_1 + NOISE z = 1


def misfit(data, level, cond):
    del level, cond
    return 0.5 * (data[:, 0] - 1.0) ** 2 / NOISE**2


def jacobian(target, process, t):
    """(sigma^2 / alpha) dD/dx of a Gaussian: its posterior covariance, by its own formula."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    total = alpha**2 * COV + sigma**2 * np.eye(2)
    return COV - alpha**2 * COV @ np.linalg.inv(total) @ COV


@pytest.mark.parametrize(
    ("emits", "wanted"), [("data", "noise"), ("noise", "data"), ("v", "velocity")]
)
def test_the_change_is_the_covariance_times_the_gradient(emits, wanted, x64):
    """D' = D - scale Cov(x_0 | x) grad_D f, and the same in every prediction."""
    network, t = PAIR.score_fn(PROCESS, emits), 0.4
    x = jnp.array([[0.3, -0.5], [1.0, 2.0]])
    guided = guidance.loss(network, misfit, 0.7)
    data = np.asarray(network(x, t, prediction="data"))
    slope = np.stack([(data[:, 0] - 1.0) / NOISE**2, 0 * data[:, 0]], axis=1)
    want = data - 0.7 * slope @ jacobian(PAIR, PROCESS, t)
    alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    noise = (np.asarray(x) - alpha * want) / sigma
    w0, w1, _ = ds.predictions.weights(wanted, PROCESS, ds.predictions.level_at(PROCESS, t))
    got = guided(x, t, prediction=wanted)
    np.testing.assert_allclose(got, w0 * want + w1 * noise, rtol=1e-9)
    assert guided.nfe_factor == 1
    assert guided.gradients_per_call == 1


def test_the_law_of_the_overconfident_likelihood(x64):
    """Mean (1.000, .970), variance (.044, .313); the posterior has (.917, .734), (.083, .413)."""
    network = PAIR.score_fn(PROCESS, "data")
    tableau = ds.solvers.ddpm(PROCESS, schedules.logsnr(PROCESS, 1000))
    mean, cov = law(guidance.loss(network, misfit), tableau, 2)
    np.testing.assert_allclose(mean, (1.000, 0.970), atol=4e-3)
    np.testing.assert_allclose(np.diag(cov), (0.044, 0.313), atol=4e-3)
    _, other = law(guidance.loss(network, misfit, 1.3), tableau, 2)
    assert abs(other[0, 0] - cov[0, 0]) > 8e-3


@pytest.mark.long
def test_draws_with_a_gaussian_likelihood_tend_to_its_spread_form(x64):
    """-log mean exp of a Gaussian likelihood over D + r z is that with variance s^2 + r^2."""
    network, t = PAIR.score_fn(PROCESS, "data"), 0.4
    sigma, alpha = PROCESS.sigma(t), PROCESS.alpha(t)
    r = sigma / np.hypot(sigma, alpha)
    x = jnp.tile(jnp.array([[0.3, -0.5]]), (64, 1))
    level = ds.predictions.level_at(PROCESS, np.array([t]))
    drawn = guidance.loss(network, misfit, samples=150, spread=1.0, key=jax.random.key(0))
    bound = drawn.bind(level, (np.ones(1), np.zeros(1)))
    got = drawn.predict(x, jax.tree.map(lambda v: jnp.asarray(v)[0], bound))
    data = np.asarray(network(x, t, prediction="data"))
    slope = np.array([(data[0, 0] - 1.0) / (NOISE**2 + r**2), 0.0])
    want = data[0] - slope @ jacobian(PAIR, PROCESS, t)
    spread = np.std(np.asarray(got), axis=0) / 8
    np.testing.assert_allclose(np.mean(got, axis=0), want, atol=5 * spread.max() + 5e-3)
    # not divided by the number of draws again, as in one port
    assert np.abs(want - data[0]).max() > 20 * spread.max()
    assert drawn.gradients_per_call == 1


def test_draws_do_not_depend_on_the_batch():
    network = PAIR.score_fn(PROCESS, "data")
    tableau, keys = build("ddim", PROCESS, 4), jax.random.split(jax.random.key(5), 4)
    x_T = PROCESS.prior_sample(jax.random.key(0), (4, 2))
    make = lambda key: guidance.loss(network, misfit, samples=3, key=key)  # noqa: E731
    whole = ds.sample(make(keys), tableau, x_T)
    alone = ds.sample(make(keys[2:3]), tableau, x_T[2:3])
    np.testing.assert_allclose(whole[2], alone[0], rtol=1e-4, atol=1e-5)
    key = jax.random.key(7)
    part = ds.sample(make(key).for_samples(jnp.array([2])), tableau, x_T[2:3])
    both = ds.sample(make(key), tableau, x_T)
    np.testing.assert_allclose(both[2], part[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="follows the rows of a tableau"):
        make(key)(x_T, 0.5)


def test_through_the_data_is_r_squared(x64):
    network, t = PAIR.score_fn(PROCESS, "noise"), 0.4
    x = jnp.array([[0.3, -0.5]])
    level = ds.predictions.level_at(PROCESS, t)
    data = network(x, t, prediction="data")
    slope = jax.grad(lambda d: misfit(d, level, None).sum())(data)
    for spread in (2.0, lambda level: 2 * level.sigma / np.hypot(level.sigma, 2 * level.alpha)):
        got = guidance.loss(network, misfit, 0.5, through="data", spread=spread)
        r = 2 * level.sigma / np.hypot(level.sigma, 2 * level.alpha)
        np.testing.assert_allclose(
            got(x, t, prediction="data"), data - 0.5 * r**2 * slope, rtol=1e-10
        )
        assert got.gradients_per_call == 0


def test_classifier_guidance_is_the_conditional_network(x64):
    """A Gaussian class model's own log-probability: scale 1 is that class, in any process."""
    for process in (PROCESS, ds.processes.edm(), ds.processes.flow()):
        both = ds.targets.gaussian_mixture([0.5, 0.5], [[-1.0], [1.0]], np.array([0.3, 0.3]))
        tableau = build("unipc2", process, 8)

        def surprise(x, level, cond):
            del cond
            column = [-1.0, 1.0]
            spread = 0.3 * level.alpha**2 + level.sigma**2
            logits = [-0.5 * (x[:, 0] - level.alpha * m) ** 2 / spread for m in column]
            return jnp.logaddexp(*logits) - logits[1]

        network = both.score_fn(process, "noise")
        guided = guidance.loss(network, surprise, through="state")
        x_T = process.prior_sample(jax.random.key(0), (3, 1), dtype=jnp.float64)
        want = ds.sample(
            gaussians([-1.0, 1.0], [0.3, 0.3], process), tableau, x_T, cond={"label": labels(3, 1)}
        )
        np.testing.assert_allclose(ds.sample(guided, tableau, x_T), want, rtol=1e-7, atol=1e-7)
        wrong = ds.sample(guidance.loss(network, surprise, 1.02, through="state"), tableau, x_T)
        assert np.abs(wrong - want).max() > 1e-4
        assert guided.gradients_per_call == 0


def test_dps_moves_by_the_gradient_of_the_norm(x64):
    """x' = the ancestral row - zeta grad_x ||y - A D(x)||, per sample."""
    network = PAIR.score_fn(PROCESS, "noise")
    tableau = ds.solvers.ddpm(PROCESS, schedules.logsnr(PROCESS, 8))
    x_T, keys = jnp.array([[0.3, -0.5], [2.0, 1.0]]), jax.random.split(jax.random.key(0), 2)

    def square(data, level, cond):
        del level, cond
        return (data[:, 0] - 1.0) ** 2 + (data[:, 1] + 0.5) ** 2

    guided = guidance.dps(network, tableau, square, 0.4)
    run = ds.trajectory(guided, tableau, x_T, key=keys)
    for n in (0, 3, 7):
        x, t = run.points[n], tableau.times[n]

        def norm(x, t=t):
            data = network(x, t, prediction="data")
            return jnp.sum(jnp.linalg.norm(data - jnp.array([[1.0, -0.5]]), axis=1))

        plain = tableau.a[n, 0] * x + tableau.b[n, 0] * network(x, t, prediction="data")
        plain = plain + tableau.c[n] * ds.random.normal_like(keys, n, x)
        np.testing.assert_allclose(
            run.points[n + 1], plain - 0.4 * jax.grad(norm)(x), rtol=1e-8, atol=1e-9
        )
    alone = ds.sample(guided, tableau, x_T[1:], key=keys[1:])
    np.testing.assert_allclose(alone[0], run.points[-1][1], rtol=1e-10)


def test_freedom_steps_are_as_large_as_the_noise(x64):
    network, t = PAIR.score_fn(PROCESS, "noise"), 0.4
    x = jnp.array([[0.3, -0.5], [2.0, 1.0]])
    noise = network(x, t, prediction="noise")
    change = guidance.freedom(network, misfit, 0.05)(x, t, prediction="noise") - noise
    np.testing.assert_allclose(
        jnp.linalg.norm(change, axis=1), 0.05 * jnp.linalg.norm(noise, axis=1), rtol=1e-9
    )


def test_no_signal_multistep_gradients_and_states(x64):
    """From alpha = 0 the first row is the network's own; gradients reach through; pytrees work."""
    process = ds.processes.flow()
    network = PAIR.score_fn(process, "velocity")
    tableau = ds.solvers.unipc(process, schedules.uniform(process, 8), order=2)
    x_T = jnp.array([[0.3, -0.5]])
    guided = guidance.loss(network, misfit, 0.5)
    run, plain = (ds.trajectory(net, tableau, x_T) for net in (guided, network))
    np.testing.assert_allclose(run.outputs[0], plain.outputs[0], rtol=1e-12)
    assert np.abs(run.outputs[1] - plain.outputs[1]).max() > 1e-2
    slope = jax.grad(lambda s: ds.sample(guidance.loss(network, misfit, s), tableau, x_T).sum())(
        0.5
    )
    moved = [
        float(ds.sample(guidance.loss(network, misfit, s), tableau, x_T).sum())
        for s in (0.501, 0.499)
    ]
    assert float(slope) == pytest.approx((moved[0] - moved[1]) / 0.002, rel=1e-4)

    def apply(params, x, t):
        del params, t
        return jax.tree.map(lambda v: 0.5 * v, x)

    pair = ds.ScoreFn(apply, None, PROCESS, prediction="data")
    state = {"image": jnp.ones((2, 3)), "kernel": jnp.ones((2, 2))}

    def joint(data, level, cond):  # one loss of both parts, as blind deconvolution has
        del level, cond
        return (data["image"].sum(1) * data["kernel"].sum(1) - 1.0) ** 2

    out = guidance.loss(pair, joint)(state, 0.5, prediction="data")
    assert np.isfinite(out["image"]).all()
    assert np.abs(out["kernel"] - 0.5).max() > 1e-3


def test_it_says_what_is_wrong():
    network = PAIR.score_fn(PROCESS, "data")
    with pytest.raises(ValueError, match="pass `key`"):
        guidance.loss(network, misfit, samples=4)
    with pytest.raises(ValueError, match="`through` must be one of"):
        guidance.loss(network, misfit, through="noise")
    with pytest.raises(ValueError, match="`spread` is for"):
        guidance.loss(network, misfit, spread=1.0)
    with pytest.raises(ValueError, match="a loss must return one number per sample"):
        guidance.loss(network, lambda d, level, cond: jnp.sum(d))(jnp.ones((2, 2)), 0.5)
