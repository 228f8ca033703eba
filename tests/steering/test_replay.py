"""The particle loop replayed in NumPy with the same draws, and its weights' law in closed form.

Monte Carlo sees an error of 2 % only with some 10^5 particles. Here nothing is left to chance: a
second loop, written from the papers' formulas, must give the same particles, weights and log Z to
rounding; and what those weights aim at follows from Gaussian integrals, row by row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.exact import gaussians, labels

import diffsamp as ds
from diffsamp import guidance, steering
from diffsamp.steering.potentials import Told

PROCESS = ds.processes.vp_linear()
PARTS = ((1.0, 0.25), (0.0, 1.0))  # mean and variance of q_1, q_2
BATCH, PARTICLES = 3, 8
Y, NOISE = 0.9, 0.5  # a measurement y = x + NOISE z


def answer(x, alpha, sigma, part=1):
    """E[x_0 | x] of one of the Gaussians."""
    mean, variance = PARTS[part]
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)


def log_psi(data, alpha, sigma):
    total = NOISE**2 + sigma**2 / (sigma**2 + alpha**2)
    return -0.5 * (Y - data) ** 2 / total - 0.5 * np.log(total)


class Reward:
    """exp(x / T) by differences at data predictions; T by default 0.4."""

    def __init__(self, temperature=0.4):
        self.temperature = temperature

    def grow(self, x, n, tableau, before):
        value = self.at(answer(x, tableau.alpha[n], tableau.sigma[n]), 0, 0)
        return value - before, value

    def at(self, data, alpha, sigma):
        del alpha, sigma
        return data / self.temperature

    def move(self, x, n, tableau):
        data = answer(x, tableau.alpha[n], tableau.sigma[n])
        return data, data


class Twist(Reward):
    """log psi by differences, and a proposal guided by `scale` times its gradient."""

    def __init__(self, scale=1.3):
        self.scale = scale

    def grow(self, x, n, tableau, before):
        alpha, sigma = tableau.alpha[n], tableau.sigma[n]
        value = log_psi(answer(x, alpha, sigma), alpha, sigma)
        return value - before, value

    def at(self, data, alpha, sigma):
        return log_psi(data, alpha, sigma)

    def move(self, x, n, tableau):
        alpha, sigma = tableau.alpha[n], tableau.sigma[n]
        plain = answer(x, alpha, sigma)
        if tableau.c[n] == 0:
            return plain, plain
        variance = PARTS[1][1]
        covariance = variance * sigma**2 / (alpha**2 * variance + sigma**2)
        total = NOISE**2 + sigma**2 / (sigma**2 + alpha**2)
        return plain + self.scale * covariance * (Y - plain) / total, plain


class Scores(Reward):
    """h (|E|^2 - sum beta |E_i|^2) on ancestral rows of E = sum beta_i E_i."""

    def __init__(self, betas=(2.0, -1.0), factor=1.0):
        self.betas, self.factor = betas, factor

    def noises(self, x, n, tableau):
        alpha, sigma = tableau.alpha[n], tableau.sigma[n]
        return [(x - alpha * answer(x, alpha, sigma, i)) / sigma for i in (0, 1)]

    def grow(self, x, n, tableau, before):
        noises = self.noises(x, n, tableau)
        mixed = sum(b * e for b, e in zip(self.betas, noises, strict=True))
        own = sum(b * e**2 for b, e in zip(self.betas, noises, strict=True))
        if tableau.sigma[n + 1] == 0:
            return 0 * x, before
        ratio = tableau.alpha[n + 1] * tableau.sigma[n] / tableau.alpha[n] / tableau.sigma[n + 1]
        return self.factor * np.log(ratio) * (mixed**2 - own), before

    def at(self, data, alpha, sigma):
        return 0 * data

    def move(self, x, n, tableau):
        mixed = sum(b * e for b, e in zip(self.betas, self.noises(x, n, tableau), strict=True))
        data = (x - tableau.sigma[n] * mixed) / tableau.alpha[n]
        return data, data


def replay(rule, tableau, x_T, keys, threshold, one=False):
    """Particles, normalised log-weights and log Z, sample after sample."""
    found = []
    for key, x in zip(keys, np.asarray(x_T)[..., 0], strict=True):
        own = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(PARTICLES))
        log_w, before, log_z = np.zeros(PARTICLES), np.zeros(PARTICLES), 0.0
        for n in range(tableau.rows):
            grown, before = rule.grow(x, n, tableau, before)
            log_w = log_w + grown
            share = np.exp(log_w - log_w.max())
            share /= share.sum()
            if 1 / (share**2).sum() < threshold * PARTICLES or (one and threshold == 1):
                draw = jax.random.fold_in(jax.random.fold_in(key, 0x5EED), n)
                u = float(jax.random.uniform(draw, dtype=jnp.float64))
                places = [u] * PARTICLES if one else (u + np.arange(PARTICLES)) / PARTICLES
                pick = np.searchsorted(np.cumsum(share), places)
                log_z += log_w.max() + np.log(np.mean(np.exp(log_w - log_w.max())))
                x, before, log_w = x[pick], before[pick], np.zeros(PARTICLES)
            data, plain = rule.move(x, n, tableau)
            noise = np.asarray(ds.random.normal_like(own, n, jnp.zeros((PARTICLES, 1))))[:, 0]
            a, b, c = tableau.a[n, 0], tableau.b[n, 0], tableau.c[n]
            if c > 0:
                delta = b * (data - plain)
                log_w = log_w - noise * delta / c - delta**2 / (2 * c**2)
            x = a * x + b * data + c * noise
        log_w = log_w + rule.at(x, tableau.alpha[-1], tableau.sigma[-1]) - before
        total = log_w.max() + np.log(np.sum(np.exp(log_w - log_w.max())))
        found.append((x, log_w - total, log_z + total - np.log(PARTICLES)))
    return [np.stack(v) for v in zip(*found, strict=True)]


def network():
    return ds.targets.gaussian([PARTS[1][0]], PARTS[1][1]).score_fn(PROCESS, "data")


def both(betas):
    """q_1^beta_1 q_2^beta_2 as a combination of one conditional network."""
    pair = gaussians(*zip(*PARTS, strict=True), PROCESS)
    return guidance.combine([(pair, {}), (pair, {"label": 1})], betas), {"label": labels(BATCH, 0)}


def asked(data, level, cond):
    del cond
    total = NOISE**2 + level.sigma**2 / (level.sigma**2 + level.alpha**2)
    return -0.5 * (Y - data[:, 0]) ** 2 / total - 0.5 * jnp.log(total)


def setting(kind):
    """(network, cond, options of `steering.sample`, the replay's rule, and one 2 % off)."""
    if kind == "scores":
        combined, cond = both([2.0, -1.0])
        potential = steering.scores([2.0, -1.0])
        return combined, cond, {"potential": potential}, Scores(), Scores(factor=1.02)
    if kind == "twist":
        plain = network()
        guided = guidance.loss(plain, lambda d, level, cond: -asked(d, level, cond), 1.3)
        options = {"potential": steering.twist(asked), "proposal": guided}
        return plain, None, options, Twist(), Twist(1.02 * 1.3)
    f = lambda x, level, cond: x[:, 0]  # noqa: E731
    return network(), None, {"potential": steering.reward(f, 0.4)}, Reward(), Reward(1.02 * 0.4)


@pytest.mark.parametrize(
    ("kind", "threshold", "one"),
    [
        ("reward", 0.5, False),
        ("reward", 1.0, True),
        ("scores", 0.9, False),
        ("twist", 0.0, False),
        ("twist", 0.8, False),
    ],
)
def test_it_is_the_papers_loop(kind, threshold, one, x64):
    score_fn, cond, options, rule, wrong = setting(kind)
    tableau = ds.solvers.ddpm(PROCESS, ds.schedules.logsnr(PROCESS, 6))
    keys = jax.random.split(jax.random.key(1), BATCH)
    shape = (BATCH, PARTICLES, 1)
    x_T = PROCESS.prior_sample(jax.random.key(0), shape, dtype=jnp.float64)
    options |= {"particles": PARTICLES, "threshold": threshold, "select_one": one}
    got = steering.sample(score_fn, tableau, x_T, key=keys, cond=cond, **options)
    want = replay(rule, tableau, x_T, keys, threshold, one)
    for mine, other in zip((got.x[..., 0], got.log_weights, got.log_Z), want, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-8, atol=1e-9)
    off = replay(wrong, tableau, x_T, keys, threshold, one)
    assert max(np.abs(a - b).max() for a, b in zip(off, want, strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("kind", "threshold", "one"), [("reward", 1.0, True), ("twist", 0.99, False)]
)
def test_rows_that_ask_nothing_choose_nothing(kind, threshold, one, x64):
    score_fn, cond, options, *_ = setting(kind)
    times = ds.schedules.logsnr(PROCESS, 6, final="t_min")  # the last row draws noise, too
    tableau = ds.solvers.ddpm(PROCESS, times)
    keys = jax.random.split(jax.random.key(1), BATCH)
    x_T = PROCESS.prior_sample(jax.random.key(0), (BATCH, PARTICLES, 1), dtype=jnp.float64)
    options |= {"particles": PARTICLES, "threshold": threshold, "select_one": one, "key": keys}
    got, want = (
        steering.sample(score_fn, rows, x_T, cond=cond, **options)
        for rows in (tableau.pad(9), tableau)
    )
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12)


def weighted(betas, rows, factor=1.0):
    """Mean and variance of the weighted particles, infinitely many, of `rows` ancestral rows.

    The increments are quadratic in a particle and are read off the library's own at -1, 0 and 1; a
    Gaussian times their exponential is a Gaussian.
    """
    process = ds.processes.edm()
    pair = gaussians(*zip(*PARTS, strict=True), process)
    combined = guidance.combine([(pair, {"label": i}) for i in range(len(betas))], betas)
    times = np.append(np.geomspace(80.0, 0.003, rows), 0.0)
    tableau = ds.solvers.ddpm(process, times)
    potential = steering.scores(betas)
    level = ds.predictions.Level(*(v[:-1] for v in (tableau.times, tableau.alpha, tableau.sigma)))
    bound = combined.bind(level, (tableau.target[:, 0], tableau.target[:, 1]))
    points, cond = jnp.array([[-1.0], [0.0], [1.0]]), {"label": labels(3, 0)}

    def ask(one, numbers):
        told, parts = combined.with_parts(points, one, cond)
        grown, _ = potential.grow(
            points, Told(told, told, told, tuple(parts)), jnp.zeros(3), None, numbers, None
        )
        return told[:, 0], grown

    numbers = potential.rows(combined, tableau)
    told, grown = (
        np.asarray(v) for v in jax.vmap(ask)(*jax.tree.map(jnp.asarray, (bound, numbers)))
    )
    mean, variance = 0.0, tableau.sigma[0] ** 2 / sum(betas)
    for n in range(tableau.rows):
        low, zero, high = factor * grown[n]
        second, first = (high + low) / 2 - zero, (high - low) / 2
        mean = (mean / variance + first) / (1 / variance - 2 * second)
        variance = 1 / (1 / variance - 2 * second)
        slope = tableau.a[n, 0] + tableau.b[n, 0] * (told[n, 2] - told[n, 1])
        mean = slope * mean + tableau.b[n, 0] * told[n, 1]
        variance = slope**2 * variance + tableau.c[n] ** 2
    return np.array([mean, variance])


@pytest.mark.parametrize(
    ("betas", "target"),
    [
        ((2.0, -1.0), (8 / 7, 1 / 7)),
        ((1.5, -0.5), (12 / 11, 2 / 11)),
        ((1.0, 1.0), (0.8, 0.2)),
        ((1.5,), (1.0, 1 / 6)),
    ],
)
def test_the_weights_aim_at_the_tilted_density(betas, target, x64):
    """To first order in the step: 1500, 750 and 375 rows, extrapolated to none."""

    def limit(factor=1.0):
        fine, middle, coarse = (weighted(betas, rows, factor) for rows in (1500, 750, 375))
        return (8 * fine - 6 * middle + coarse) / 3

    np.testing.assert_allclose(limit(), target, rtol=7e-4)
    assert np.abs(limit(1.02) / target - 1).max() > 2e-3
