"""Targets of students against their closed-form minimisers on Gaussians, and identities."""

import functools
from math import erf, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import students

MEAN, STD = 0.4, 0.5
FLOW = ds.processes.flow()
EDM = ds.processes.edm(0.02, 20.0)
TRIG = ds.processes.trig(end=np.pi / 2)
TARGET = ds.targets.gaussian([MEAN], STD**2)
KEY = jax.random.key(0)


@functools.cache
def data(n, seed=1):
    return jax.jit(TARGET.sample, static_argnums=1)(jax.random.key(seed), n)


def targets_of(method, network, key, x_0, **options):
    """One program, where the method alone would have every operation compiled by itself."""
    return jax.jit(lambda key, x_0: method(network, key, x_0, **options))(key, x_0)


@jax.jit
def ask(network, made):
    """What the network says where it is trained, in the made prediction."""
    return network(made.x, made.t, prediction=made.prediction, cond=made.condition)


def spread(process, t):
    return np.sqrt((np.asarray(process.alpha(t)) * STD) ** 2 + np.asarray(process.sigma(t)) ** 2)


def flow_to(process, x, t, r):
    """The exact flow map of the Gaussian, float64."""
    x, t, r = (np.asarray(v, np.float64) for v in (x, t, r))
    alpha_t, alpha_r = (np.asarray(process.alpha(v), np.float64) for v in (t, r))
    ratio = spread(process, r) / spread(process, t)
    return alpha_r[:, None] * MEAN + ratio[:, None] * (x - alpha_t[:, None] * MEAN)


def posterior(process, x, t):
    """E[x_0 | x] of the Gaussian, float64."""
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    a, s = (np.asarray(f(t), np.float64)[:, None] for f in (process.alpha, process.sigma))
    return MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)


def ddim(process, d, x, t, r):
    a, s, b, q = (
        np.asarray(f(v), np.float64)[:, None]
        for v in (t, r)
        for f in (process.alpha, process.sigma)
    )
    return q / s * x + (b - a * q / s) * d


def close(one, two, **options):
    np.testing.assert_allclose(one, two, **{"rtol": 2e-4, "atol": 2e-4, **options})


# -- flow maps ------------------------------------------------------------------------------------


def mean_velocity(params, x, t, r):
    """u = (x - X(x; t -> r)) / (t - r), the velocity itself where they meet."""
    scale = jnp.sqrt(((1 - t) * STD) ** 2 + t**2)
    end = jnp.sqrt(((1 - r) * STD) ** 2 + r**2)
    gap = jnp.where(t - r > 1e-3, t - r, 1.0)
    moved = ((1 - r) * MEAN)[:, None] + (end / scale)[:, None] * (x - ((1 - t) * MEAN)[:, None])
    at = (t - (1 - t) * STD**2) / scale**2
    here = at[:, None] * (x - ((1 - t) * MEAN)[:, None]) - MEAN
    return params * jnp.where((t - r > 1e-3)[:, None], (x - moved) / gap[:, None], here)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_mean_flow_holds_for_the_exact_map(power):
    exact = TARGET.score_fn(FLOW, "velocity")
    network = ds.ScoreFn(mean_velocity, jnp.ones(()), FLOW, prediction="velocity")
    made = targets_of(
        students.mean_flow, network, KEY, data(64), same=0.3, power=power, teacher=exact
    )
    r = made.condition["r"]
    assert np.sum(np.asarray(r) == np.asarray(made.t)) in range(10, 30)
    assert np.all(np.asarray(r) <= np.asarray(made.t))
    said = ask(network, made)
    close(made.target, said, atol=2e-3)
    if power == 0:
        np.testing.assert_array_equal(made.weight, 1)
    else:
        close(made.weight, np.full(64, 100.0), rtol=0.02)
    assert float(jnp.max(jax.jit(students.loss)(network, made))) < 1e-3
    # 2 % wrong is seen
    wrong = ds.ScoreFn(mean_velocity, jnp.asarray(1.02), FLOW, prediction="velocity")
    other = targets_of(students.mean_flow, wrong, KEY, data(64), same=0.3, power=0.0, teacher=exact)
    said = ask(wrong, other)
    assert np.abs(said - other.target).max() > 0.01


def test_mean_flow_of_the_data_has_the_same_mean():
    """The conditional velocity is the marginal one on average: regression on x gives it."""
    network = ds.ScoreFn(mean_velocity, jnp.ones(()), FLOW, prediction="velocity")
    x_0 = data(40_000)
    made = targets_of(students.mean_flow, network, KEY, x_0, same=0.0, power=0.0)
    said = ask(network, made)
    residual = np.asarray(made.target - said)[:, 0]
    t = np.asarray(made.t)
    for low, high in ((0.2, 0.5), (0.5, 0.8)):
        part = residual[(t > low) & (t < high)]
        assert abs(part.mean()) < 4 * part.std() / np.sqrt(part.size)


def test_two_halves_are_one_step_of_the_euler_composition():
    largest = 3

    def apply(params, x, t, dt):
        """As many Euler steps of 1/8 as fill a step of 2^-dt, over its length."""
        count = jnp.round(2.0 ** (largest - dt)).astype(jnp.int32)
        h, y, s = 2.0**-largest, x, t
        for i in range(2**largest):
            scale = ((1 - s) * STD) ** 2 + s**2
            v = ((s - (1 - s) * STD**2) / scale)[:, None] * (y - ((1 - s) * MEAN)[:, None]) - MEAN
            live = (i < count)[:, None]
            y, s = jnp.where(live, y - h * v, y), jnp.where(i < count, s - h, s)
        return params * (x - y) / (count.astype(jnp.float32) * h)[:, None]

    network = ds.ScoreFn(apply, jnp.ones(()), FLOW, prediction="velocity")
    x_0 = data(48)
    made = targets_of(students.shortcut, network, KEY, x_0, largest=largest, bootstrap=0.5)
    k, t = np.asarray(made.condition["dt"]), np.asarray(made.t)
    assert sorted(set(k[:24])) == [0, 1, 2]
    assert set(k[24:]) == {3}
    assert all(np.sum(k[:24] == i) == 8 for i in range(3))
    close(t * 2.0**k, np.round(t * 2.0**k), atol=1e-6)
    assert t.min() > 0
    assert t.max() <= 1
    said = ask(network, made)
    close(made.target[:24], said[:24])
    noise = (made.x[24:] - (1 - made.t[24:, None]) * x_0[24:]) / made.t[24:, None]
    close(made.target[24:], noise - x_0[24:], atol=1e-3)
    # the plan's own step label
    condition = ds.few_step.shortcut(network)
    tableau = ds.few_step.uniform_tableau(FLOW, 4)
    assert (
        condition.bind(
            ds.predictions.Level(
                *(np.asarray(v)[:-1] for v in (tableau.times, tableau.alpha, tableau.sigma))
            ),
            (np.ones(4), np.zeros(4)),
        ).label[0]
        == 2
    )


# -- consistency ----------------------------------------------------------------------------------


def test_consistency_training_regresses_on_a_ddim_step():
    """f is affine and E[x_r | x_t] is Euler's: the minimiser is f of DDIM's step."""
    t, r = 3.0, 1.2
    network = TARGET.score_fn(EDM, "data")
    made = targets_of(students.ict, network, KEY, data(40_000), times=[t, r])
    np.testing.assert_allclose(made.t, t)
    close(made.weight, np.full(40_000, 1 / (t - r)))
    x, y = np.asarray(made.x, np.float64)[:, 0], np.asarray(made.target, np.float64)[:, 0]
    slope, offset = np.polyfit(x, y, 1)
    ends = np.array([[1.0], [-1.0]])
    at, to = np.full(2, t), np.full(2, r)
    expected = posterior(EDM, ddim(EDM, posterior(EDM, ends, at), ends, at, to), to)[:, 0]
    assert slope == pytest.approx((expected[0] - expected[1]) / 2, rel=0.02)
    assert offset == pytest.approx(expected.mean(), abs=0.01)


def test_levels_of_consistency_training_follow_their_law():
    times = np.append(ds.schedules.karras(EDM, 12)[:-1], 0.0)
    made = targets_of(students.ict, TARGET.score_fn(EDM, "data"), KEY, data(20_000), times=times)
    rho = np.asarray(made.t)
    share = np.mean((rho < 1.0) & (rho > 0.05))
    grid = times[:-1]
    inside = [v for v in grid if 0.05 < v < 1.0]
    edges = [(np.log(np.maximum(v, 1e-9)) + 1.1) / (2 * sqrt(2)) for v in times]
    law = np.array([erf(edges[i]) - erf(edges[i + 1]) for i in range(12)])
    law = law / law.sum()
    expected = sum(law[i] for i, v in enumerate(grid) if v in inside)
    assert share == pytest.approx(expected, abs=0.015)
    # the last level's lower one is the clean end: the data itself
    last = np.isclose(rho, times[-2])
    assert last.any()
    np.testing.assert_allclose(made.target[last], data(20_000)[last], atol=1e-6)


def test_easy_consistency_tuning_moves_the_second_level():
    network, x_0 = TARGET.score_fn(EDM, "data"), data(256)
    first = targets_of(students.ect, network, KEY, x_0, stage=0)
    small = np.asarray(first.t) < 1.9  # r = 0: diffusion training
    assert 100 < small.sum() < 250
    np.testing.assert_array_equal(np.asarray(first.target)[small], np.asarray(x_0)[small])
    close(np.asarray(first.weight)[small], 1 / np.asarray(first.t)[small], rtol=1e-3)
    later = targets_of(students.ect, network, KEY, x_0, stage=6)
    rho = np.asarray(later.t, np.float64)
    r = np.maximum(0, rho * (1 - (1 + 8 / (1 + np.exp(rho))) / 2.0**7))
    close(later.weight, 1 / (rho - r), rtol=1e-3)
    noise = (np.asarray(later.x) - np.asarray(x_0)) / rho[:, None]
    expected = posterior(EDM, np.asarray(x_0) + r[:, None] * noise, np.maximum(r, 0.02))
    close(np.asarray(later.target)[r > 0.02], expected[r > 0.02], atol=2e-3)


@pytest.mark.parametrize("heun", [True, False])
def test_distillation_steps_with_the_teacher(heun):
    teacher = TARGET.score_fn(EDM, "data")
    student = ds.ScoreFn(lambda p, x, t: x, None, EDM, prediction="data")
    times = [2.0, 1.0, 0.4]
    made = targets_of(
        students.consistency_distillation,
        student,
        KEY,
        data(64),
        teacher=teacher,
        times=times,
        heun=heun,
    )
    t = np.asarray(made.t)
    r = np.where(np.isclose(t, 2.0), 1.0, 0.4)
    x = np.asarray(made.x, np.float64)
    d = posterior(EDM, x, t)
    end = ddim(EDM, d, x, t, r)
    if heun:
        end = ddim(EDM, (d + posterior(EDM, end, r)) / 2, x, t, r)
    close(made.target, end, atol=1e-3)
    assert set(np.round(t, 4)) == {1.0, 2.0}


def test_fresh_noise_keeps_the_law():
    """Stochastic distillation: the lower state has its level's variance, and forgets more."""
    teacher = TARGET.score_fn(EDM, "data")
    student = ds.ScoreFn(lambda p, x, t: x, None, EDM, prediction="data")
    options = {"teacher": teacher, "times": [2.0, 1.9], "heun": False}
    made = targets_of(
        students.consistency_distillation, student, KEY, data(40_000), eta=1.0, **options
    )
    lower = np.asarray(made.target)[:, 0]
    x = np.asarray(made.x)[:, 0]
    # DDPM's posterior for this step, on the Gaussian: exact mean and variance
    d = posterior(EDM, np.asarray(made.x), np.full(40_000, 2.0))[:, 0]
    noise = (x - d) / 2.0
    c = 1.9 * np.sqrt(1 - (1.9 / 2.0) ** 2)
    expected = d + np.sqrt(1.9**2 - c**2) * noise
    assert (lower - expected).std() == pytest.approx(c, rel=0.02)
    assert abs((lower - expected).mean()) < 4 * c / 200
    with pytest.raises(ValueError, match="fresh noise needs heun=False"):
        students.consistency_distillation(
            student, KEY, data(4), teacher=teacher, times=[2.0, 1.0], eta=1.0
        )


def consistency(params, x, t):
    """TrigFlow's F of the exact consistency function of the Gaussian."""
    scale = jnp.sqrt((jnp.cos(t) * STD) ** 2 + jnp.sin(t) ** 2)
    f = MEAN + (STD / scale)[:, None] * (x - jnp.cos(t)[:, None] * MEAN)
    return params * (jnp.cos(t)[:, None] * x - f) / jnp.sin(t)[:, None]


def test_the_tangent_of_the_exact_consistency_function_is_zero():
    network = ds.ScoreFn(consistency, jnp.ones(()), TRIG, prediction="velocity", time="t")
    teacher = TARGET.score_fn(TRIG, "velocity")
    x_0 = data(64)
    made = targets_of(students.scm, network, KEY, x_0, teacher=teacher, normalise=None)
    said = ask(network, made)
    close(made.target, said, atol=3e-3)
    wrong = ds.ScoreFn(consistency, jnp.asarray(1.02), TRIG, prediction="velocity", time="t")
    other = targets_of(students.scm, wrong, KEY, x_0, teacher=teacher, normalise=None)
    g = np.asarray(other.target - ask(wrong, other))
    assert np.abs(g).max() > 8e-3
    small = targets_of(students.scm, wrong, KEY, x_0, teacher=teacher, normalise=0.1)
    normed = np.asarray(small.target - ask(wrong, small))
    close(normed[:, 0], g[:, 0] / (np.abs(g[:, 0]) + 0.1), atol=2e-3)
    # no warm-up: only the first term is left
    cold = targets_of(students.scm, wrong, KEY, x_0, teacher=teacher, normalise=None, warmup=0.0)
    t = np.asarray(cold.t)[:, None]
    v = ask(teacher, cold)
    f = ask(wrong, cold)
    close(cold.target - f, -(np.cos(t) ** 2) * np.asarray(f - v), atol=2e-3)


# -- trajectories ---------------------------------------------------------------------------------


def test_progressive_distillation_is_two_steps_in_one():
    network = TARGET.score_fn(EDM, "noise")
    times = [3.0, 1.0, 0.0]
    made = targets_of(students.progressive_distillation, network, KEY, data(64), times=times)
    t = np.asarray(made.t, np.float64)
    s = np.where(np.isclose(t, 3.0), 1.0, 0.0)
    x = np.asarray(made.x, np.float64)
    middle = (t + s) / 2
    half = ddim(EDM, posterior(EDM, x, t), x, t, middle)
    end = ddim(EDM, posterior(EDM, half, middle), half, middle, s)
    close(ddim(EDM, np.asarray(made.target, np.float64), x, t, s), end, atol=1e-3)
    close(made.weight, np.maximum(1 / t**2, 1), rtol=1e-4)
    plus = targets_of(
        students.progressive_distillation,
        network,
        KEY,
        data(64),
        times=times,
        weight="snr_plus_one",
    )
    close(plus.weight, 1 / t**2 + 1, rtol=1e-4)


def test_few_points_on_the_teachers_own_trajectory():
    network = TARGET.score_fn(EDM, "noise")
    times = [20.0, 2.0, 0.0]
    made = targets_of(students.sfd, network, KEY, data(32), times=times, substeps=3)
    t = np.asarray(made.t, np.float64)
    first = np.isclose(t, 20.0)
    assert 5 < first.sum() < 27
    s = np.where(first, 2.0, 0.0)
    x = np.asarray(made.x, np.float64)
    end = x
    for i in range(3):
        a, b = (t + (s - t) * k / 3 for k in (i, i + 1))
        end = ddim(EDM, posterior(EDM, end, a), end, a, b)
    close(ddim(EDM, np.asarray(made.target, np.float64), x, t, s), end, atol=2e-3)
    # its states are the sampler's: those at 2 have the teacher's spread there, not the data's
    assert np.abs(x[first]).max() > 10


def test_reflow_straightens_in_one_round():
    network = TARGET.score_fn(FLOW, "velocity")
    tableau = ds.solvers.heun(FLOW, ds.schedules.uniform(FLOW, 100), coordinates="flow")
    for density in ("uniform", "exponential"):
        made = targets_of(
            students.reflow, network, KEY, data(256), tableau=tableau, density=density
        )
        t, x = np.asarray(made.t)[:, None], np.asarray(made.x)
        expected = (1 - STD) * (x - (1 - t) * MEAN) / ((1 - t) * STD + t) - MEAN
        close(made.target, expected, atol=3e-3)
    assert np.mean(t) > 0.55  # 10^t: 1 / (1 - 1/10) - 1 / ln 10 = 0.677
    assert np.mean(t) == pytest.approx(10 / 9 - 1 / np.log(10), abs=0.05)


@pytest.mark.parametrize("method", ["perflow", "boss"])
def test_a_window_becomes_a_chord(method):
    network = TARGET.score_fn(FLOW, "velocity")
    ends = [1.0, 0.7, 0.2, 0.0]
    options = {"windows": ends} if method == "perflow" else {"times": ends}
    made = getattr(students, method)(network, KEY, data(64), steps=60, **options)
    t = np.asarray(made.t, np.float64)
    high = np.select([t > 0.7, t > 0.2], [1.0, 0.7], 0.2)
    low = np.select([t > 0.7, t > 0.2], [0.7, 0.2], 0.0)
    x, slope = (np.asarray(v, np.float64) for v in (made.x, made.target))
    start = x + (high - t)[:, None] * slope
    end = x - (t - low)[:, None] * slope
    close(end, flow_to(FLOW, start, high, low), atol=1e-2)
    if method == "perflow":
        equal = students.perflow(network, KEY, data(64), windows=4, steps=2)
        assert np.asarray(equal.t).max() <= 1


# -- distributions and policies -------------------------------------------------------------------


def test_distribution_matching_is_the_gradient_of_the_divergence():
    mean, std = -0.3, 0.8
    fake = ds.targets.gaussian([mean], std**2).score_fn(FLOW, "data")
    real = TARGET.score_fn(FLOW, "data")
    generated = ds.targets.gaussian([mean], std**2).sample(KEY, 512)
    made = targets_of(
        students.dmd2, real, KEY, generated, fake=fake, low=0.6, high=0.6, normalise=False
    )
    np.testing.assert_allclose(made.t, 0.6, rtol=1e-6)
    a, s = 0.4, 0.6

    def told(x, m, c):
        return m + a * c**2 / (a**2 * c**2 + s**2) * (x - a * m)

    x = np.asarray(made.x, np.float64)
    gradient = np.asarray(generated - made.target)
    close(gradient, told(x, mean, std) - told(x, MEAN, STD), atol=1e-3)

    def divergence(m, c):
        """KL(N(a m, ..) || the teacher's law at the same noise)."""
        q, p = a**2 * c**2 + s**2, a**2 * STD**2 + s**2
        return 0.5 * (q / p - 1 - np.log(q / p)) + (a * (m - MEAN)) ** 2 / (2 * p)

    h = 1e-5
    by_mean = (divergence(mean + h, std) - divergence(mean - h, std)) / (2 * h)
    # E over x ~ q of alpha^2 / sigma^2 times the gradient; it is affine, so at the mean
    at_mean = told(a * mean, mean, std) - told(a * mean, MEAN, STD)
    assert a**2 / s**2 * at_mean == pytest.approx(by_mean, rel=1e-6)
    normed = targets_of(students.dmd2, real, KEY, generated, fake=fake, low=0.6, high=0.6)
    size = np.abs(np.asarray(generated) - told(x, MEAN, STD))
    close(generated - normed.target, gradient / size, rtol=1e-2, atol=1e-2)


def test_f_divergences_weigh_it():
    fake = ds.targets.gaussian([-0.3], 0.64).score_fn(FLOW, "data")
    real, generated = TARGET.score_fn(FLOW, "data"), data(16, seed=4)
    ratio = jnp.linspace(0.01, 30.0, 16)
    r = np.clip(np.asarray(ratio, np.float64), 0.1, 20)
    plain = targets_of(students.dmd2, real, KEY, generated, fake=fake)
    expected = {
        "rkl": np.ones(16),
        "kl": r,
        "js": r / (1 + r),
        "hellinger": np.sqrt(r),
        "jeffreys": 1 + r,
        "softened": 1 / (1 + r),
    }
    for name, h in expected.items():
        made = targets_of(
            students.f_distill, real, KEY, generated, fake=fake, ratio=ratio, divergence=name
        )
        close(generated - made.target, h[:, None] * np.asarray(generated - plain.target))
        close(made.weight, h)
    # each is f'' r^2 of its f, by differences (Jensen-Shannon, Hellinger: up to a constant factor)
    f = {"rkl": lambda v: -np.log(v), "kl": lambda v: v * np.log(v)}
    for name, function in f.items():
        at, e = np.array([0.5, 2.0]), 1e-4
        second = (function(at + e) - 2 * function(at) + function(at - e)) / e**2
        close(students.f_weight(at, name), second * at**2, rtol=1e-3)


def test_the_policy_gradient_of_a_linear_reward():
    """A Gaussian row with a known mean: Gauss-Hermite nodes in place of samples."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    tableau = ds.solvers.ddpm(EDM, [2.0, 1.0])

    def apply(params, x, t):
        return params + 0 * x

    start = jnp.full((20, 1), 1.5)
    mean = tableau.a[0, 0] * 1.5 + tableau.b[0, 0] * 0.3
    ends = jnp.asarray(mean + tableau.c[0] * nodes, jnp.float32)[:, None]
    path = ds.Trajectory(tableau.times, jnp.stack([start, ends]), jnp.full((1, 20, 1), 0.3))
    reward = np.asarray(ends)[:, 0] - mean

    def objective(params, clip):
        other = ds.ScoreFn(apply, params, EDM, prediction="data")
        each = students.policy_loss(other, tableau, path, reward, clip=clip)
        return jnp.sum(each * weights)

    slope_of = jax.jit(jax.grad(objective), static_argnums=1)
    for clip in (None, 0.2):
        gradient = slope_of(jnp.asarray(0.3), clip)
        assert -float(gradient) == pytest.approx(tableau.b[0, 0], rel=2e-3)
    # far from where it was, a clipped ratio has no gradient in the direction of more
    pushed = slope_of(jnp.asarray(0.3 + 4.0), 0.2)
    assert abs(float(pushed)) < abs(float(gradient))


def test_a_baseline_a_row_and_two_rows_of_a_linear_critic():
    """Shortcut fine-tuning: the gradient of E f(x_N), by nodes in place of samples."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    z, w = np.meshgrid(nodes, nodes), np.outer(weights, weights).ravel() / weights.sum() ** 2
    tableau, theta, slope = ds.solvers.ddpm(EDM, [2.0, 1.2, 0.7]), 0.3, 0.7
    start = np.full(144, 1.5)
    middle = tableau.a[0, 0] * start + tableau.b[0, 0] * theta + tableau.c[0] * z[0].ravel()
    end = tableau.a[1, 0] * middle + tableau.b[1, 0] * theta + tableau.c[1] * z[1].ravel()
    points = jnp.asarray(np.stack([start, middle, end])[..., None], jnp.float32)
    path = ds.Trajectory(tableau.times, points, jnp.full((2, 144, 1), theta))

    def objective(params, value, path=path):
        network = ds.ScoreFn(lambda p, x, t: p + 0 * x, params, EDM, prediction="data")
        each = students.shortcut_fine_tuning(
            network, tableau, path, lambda x: slope * x[:, 0], value=value
        )
        return jnp.sum(each * jnp.asarray(w, each.dtype))

    want = slope * (tableau.a[1, 0] * tableau.b[0, 0] + tableau.b[1, 0])
    slope_of = jax.jit(jax.grad(objective), static_argnums=1)
    for value in (None, lambda x: 0.4 * x[..., 0] ** 2 - 1):
        gradient = slope_of(jnp.asarray(theta), value)
        assert float(gradient) == pytest.approx(want, rel=3e-3)
    wrong = path._replace(points=points.at[2].multiply(1.02))
    assert abs(float(slope_of(jnp.asarray(theta), None, wrong)) / want - 1) > 0.015


def test_the_critic_of_two_gaussians():
    """f = w x with a penalty: w = 1 + (distance of the means) / (2 lambda), in closed form."""
    x_0, generated, penalty = data(64), 1.3 + 2 * data(64, seed=5), 0.8
    gap = float(jnp.mean(generated) - jnp.mean(x_0))

    def total(w):
        each = students.critic_loss(lambda v: w * v[:, 0], x_0, generated, key=KEY, penalty=penalty)
        assert each.shape == (64,)
        return jnp.mean(each)

    best, slope_at = 1 + gap / (2 * penalty), jax.jit(jax.grad(total))
    assert abs(float(slope_at(best))) < 1e-5
    assert abs(float(slope_at(1.02 * best))) > 0.02
    plain = students.critic_loss(lambda v: v[:, 0], x_0, generated)
    close(jnp.mean(plain), -gap)
    with pytest.raises(ValueError, match="a penalty needs a `key`"):
        students.critic_loss(lambda v: v[:, 0], x_0, generated, penalty=1.0)


def test_score_mismatching_halves_what_it_can_tell():
    """Where the generator is right: regression on both gives half of E[eps | x], Gaussian."""
    level = [0.6]
    network = TARGET.score_fn(FLOW, "noise")
    n = 200_000
    real = targets_of(students.score_mismatching, network, KEY, data(n), times=level, fake=False)
    false = targets_of(
        students.score_mismatching,
        network,
        jax.random.key(7),
        data(n, seed=2),
        times=level,
        fake=True,
    )
    close((real.x - 0.4 * data(n)) / 0.6, real.target, atol=1e-5)
    added = (false.x - 0.4 * data(n, seed=2)) / 0.6
    assert abs(np.corrcoef(np.asarray(added)[:, 0], np.asarray(false.target)[:, 0])[0, 1]) < 0.01
    x = np.concatenate([real.x, false.x]).astype(np.float64)[:, 0]
    y = np.concatenate([real.target, false.target]).astype(np.float64)[:, 0]
    slope, offset = np.polyfit(x, y, 1)
    half = 0.5 * 0.6 / (0.16 * STD**2 + 0.36)
    assert slope == pytest.approx(half, rel=0.015)
    assert offset == pytest.approx(-half * 0.4 * MEAN, abs=0.006)
    spread_over = targets_of(
        students.score_mismatching, network, KEY, data(3000), times=[0.9, 0.6, 0.3], fake=False
    )
    assert all(900 < np.sum(np.isclose(spread_over.t, t)) < 1100 for t in (0.9, 0.6, 0.3))


def test_a_generator_against_a_score_network_that_rests():
    """Affine eps = a + b x, generator N(m, c^2): its loss and gradient in closed form."""
    a, b, m, c, n = 0.2, 0.9, -0.5, 0.3, 100_000
    alpha, sigma = 0.4, 0.6
    z = jax.random.normal(jax.random.key(3), (n, 1))
    z = (z - z.mean()) / z.std()

    def apply(params, x, t):
        return params[0] + params[1] * x

    def loss(generator, params):
        network = ds.ScoreFn(apply, params, FLOW, prediction="noise")
        x_0 = generator[0] + generator[1] * z
        return jnp.mean(students.mismatching_loss(network, KEY, x_0, times=[sigma]))

    generator, params = jnp.asarray([m, c]), jnp.asarray([a, b])
    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (slope, none) = both(generator, params)
    error = (a + b * alpha * m) ** 2 + (b * alpha * c) ** 2 + (b * sigma - 1) ** 2
    assert float(value) == pytest.approx(error / 2, rel=0.015)
    want = [b * alpha * (a + b * alpha * m), (b * alpha) ** 2 * c]
    np.testing.assert_allclose(slope, want, atol=0.004)
    np.testing.assert_array_equal(none, 0)
    # the minimiser: one point, where the network says no noise
    point = jnp.asarray([-a / (b * alpha), 0.0])
    np.testing.assert_allclose(both(point, params)[1][0], 0, atol=0.004)


# -- all ------------------------------------------------------------------------------------------

FINE = ds.solvers.dpmpp(FLOW, ds.schedules.logsnr(FLOW, 4), order=2)
METHODS = {
    "shortcut": (FLOW, "dt", {"bootstrap": 0.0}),
    "mean_flow": (FLOW, "r", {}),
    "ict": (EDM, None, {"times": [3.0, 1.0, 0.2, 0.0]}),
    "ect": (EDM, None, {"stage": 3}),
    "consistency_distillation": (EDM, None, {"times": [3.0, 1.0, 0.2], "teacher": EDM}),
    "scm": (TRIG, None, {}),
    "progressive_distillation": (EDM, None, {"times": [3.0, 1.0, 0.2]}),
    "sfd": (EDM, None, {"times": [20.0, 1.0, 0.2]}),
    "perflow": (FLOW, None, {}),
    "boss": (FLOW, None, {"times": [1.0, 0.4, 0.0]}),
    "reflow": (FLOW, None, {"tableau": FINE}),
    "dmd2": (FLOW, None, {"fake": FLOW}),
    "score_mismatching": (FLOW, None, {"times": [0.9, 0.5, 0.2], "fake": True}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_sample_depends_on_its_own_key_and_condition(name):
    process, condition, options = METHODS[name]

    def apply(params, x, t, label, **more):
        added = sum(jnp.asarray(v, x.dtype) for v in more.values()) if more else 0.0 * t
        return 0.3 * x + 0.1 * (label + added)[:, None] + 0.05 * jnp.sin(t)[:, None]

    network = ds.ScoreFn(apply, None, process, prediction="velocity", time="t")
    options = {k: network if k == "teacher" or v is FLOW else v for k, v in options.items()}
    method = functools.partial(getattr(students, name), network, **options)
    keys, x_0, label = jax.random.split(KEY, 5), data(5), {"label": jnp.arange(5.0)}
    method = jax.jit(method)
    whole = method(keys, x_0, label)
    assert whole.prediction in ("data", "noise", "velocity")
    assert jnp.all(jnp.isfinite(whole.target))
    part = method(keys[3:4], x_0[3:4], {"label": label["label"][3:4]})
    for field in ("x", "t", "target", "weight"):
        close(getattr(whole, field)[3:4], getattr(part, field), rtol=1e-5, atol=1e-5)
    assert set(whole.condition) == {"label", *([condition] if condition else [])}
    # nothing is differentiated, and a student of this form can be trained on it
    slope = jax.jit(jax.grad(lambda k: jnp.sum(method(keys, x_0 * k, label).target)))(1.0)
    assert slope == 0
    if name != "dmd2":
        loss = functools.partial(students.loss, distance=students.pseudo_huber())
        assert jax.eval_shape(loss, network, whole).shape == (5,)


def test_what_they_refuse():
    network = TARGET.score_fn(EDM, "data")
    for name in ("shortcut", "mean_flow"):
        with pytest.raises(ValueError, match=r"needs processes\.flow\(\); got EDM"):
            getattr(students, name)(network, KEY, data(2))
    with pytest.raises(ValueError, match=r"its network needs processes\.flow"):
        students.reflow(network, KEY, data(2), tableau=FINE)
    with pytest.raises(ValueError, match=r"processes\.trig\(sigma_data, end=pi / 2\)"):
        students.scm(network, KEY, data(2))
    with pytest.raises(ValueError, match="`weight` must be one of"):
        students.progressive_distillation(network, KEY, data(2), times=[1.0, 0.0], weight="snr")
    with pytest.raises(TypeError, match="`score_fn` must be"):
        students.ict(lambda x, t: x, KEY, data(2), times=[1.0, 0.0])


def test_distances():
    difference = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    close(students.squared_error(difference), [12.5, 0.0])
    close(students.pseudo_huber(1.0)(difference), [np.sqrt(26) - 1, 0.0])
    close(students.pseudo_huber()(difference)[0], 5.0, rtol=1e-3)


@pytest.mark.long
def test_robust_weights_move_a_skewed_minimiser():
    """What a Gaussian cannot show: the minimiser of a robust distance is no mean."""
    values = np.concatenate([np.zeros(90), np.full(10, 5.0)])[:, None]
    grid = np.linspace(-1, 2, 601)

    def minimiser(distance):
        losses = [float(jnp.mean(distance(jnp.asarray(values - g)))) for g in grid]
        return grid[int(np.argmin(losses))]

    assert minimiser(students.squared_error) == pytest.approx(0.5, abs=0.01)
    assert minimiser(students.pseudo_huber(0.1)) < 0.1
