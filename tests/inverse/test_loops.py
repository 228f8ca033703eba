"""DAPS, RED-diff and RePaint, replayed in NumPy with the same draws; RePaint's exact law."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import inverse, steering

PROCESS = ds.processes.vp_linear()
COV = np.array([[1.0, 0.8], [0.8, 1.0]])
MEAN = np.array([0.2, -0.1])
NETWORK = ds.targets.gaussian(MEAN, COV).score_fn(PROCESS, "noise")
MATRIX = np.array([[1.0, 0.5]])
Y, NOISE = np.array([[1.0], [0.3], [-0.4]]), 0.5
KEYS = jax.random.split(jax.random.key(3), 3)


def answer(x, alpha, sigma):
    """(E[x_0 | x], the noise prediction) of the prior."""
    total = alpha**2 * COV + sigma**2 * np.eye(2)
    data = MEAN + (x - alpha * MEAN) @ np.linalg.solve(total, alpha * COV)
    return data, (x - alpha * data) / sigma


def normal(keys, n):
    return np.asarray(ds.random.normal_like(keys, n, jnp.zeros((3, 2))))


def starts():
    return np.asarray(PROCESS.prior_sample(jax.random.key(0), (3, 2), dtype=jnp.float64))


def agree(got, loop, *wrong):
    """The library's numbers are the loop's, and not those of a loop that is 2 % off."""
    want = loop()
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)
    for change in wrong:
        assert np.abs(loop(**change) - want).max() > 1e-6, change


def test_red_diff(x64):
    """Adam on |y - A mu|^2 / 2 + weight (sigma / alpha) <E(alpha mu + sigma eps) - eps, mu>."""
    times = np.linspace(0.9, 0.1, 12)

    def loop(weight=0.25, rate=0.1, first=0.9, second=0.99):
        mu, m, v = Y @ MATRIX, 0.0, 0.0
        for n, t in enumerate(times):
            alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
            eps = normal(KEYS, n)
            _, noise = answer(alpha * mu + sigma * eps, alpha, sigma)
            slope = (mu @ MATRIX.T - Y) @ MATRIX + weight * sigma / alpha * (noise - eps)
            m, v = first * m + (1 - first) * slope, second * v + (1 - second) * slope**2
            step = (m / (1 - first ** (n + 1))) / (np.sqrt(v / (1 - second ** (n + 1))) + 1e-8)
            mu = mu - rate * step
        return mu

    operator = inverse.linear(MATRIX)
    got = inverse.red_diff(
        NETWORK, operator, jnp.asarray(Y), jnp.asarray(Y @ MATRIX), times, key=KEYS
    )
    changes = [{"weight": 0.255}, {"rate": 0.102}, {"first": 0.918}, {"second": 0.9898}]
    agree(got, loop, *changes)


def test_daps(x64):
    """x^ by DDIM, a chain on its density, new noise. The chain itself is tested with `mala`."""
    times, x_T = PROCESS.time(np.linspace(-1.0, 4.0, 6)), starts()

    @jax.jit
    def chain(guess, keys, noise, r, size):
        def log_prob(v):
            misfit = ((v @ jnp.asarray(MATRIX.T) - Y) ** 2).sum(1) / noise**2
            return -0.5 * (misfit + ((v - guess) ** 2).sum(1) / r**2)

        return steering.mala(log_prob, guess, key=keys, step=size, steps=7)[0]

    def loop(noise=NOISE, spread=0.7, step=0.3):
        x = x_T
        for n, (s, t) in enumerate(itertools.pairwise(times)):
            alpha, sigma = PROCESS.alpha(s), PROCESS.sigma(s)
            guess, _ = answer(x, alpha, sigma)
            r = spread * sigma / alpha
            own = jax.vmap(jax.random.fold_in, (0, None))(KEYS, n)
            moved = chain(guess, own, noise, r, step / (1 / noise**2 + 1 / r**2))
            x = PROCESS.alpha(t) * np.asarray(moved) + PROCESS.sigma(t) * normal(own, 8)
        return x

    got = inverse.daps(
        NETWORK,
        inverse.linear(MATRIX),
        jnp.asarray(Y),
        NOISE,
        jnp.asarray(x_T),
        times,
        key=KEYS,
        ode_steps=1,
        chain=7,
        spread=lambda level: 0.7 * level.sigma / level.alpha,
    )
    agree(got, loop, {"noise": 0.51}, {"spread": 0.714}, {"step": 0.306})


def test_repaint(x64):
    """The known element noised before every pass, ancestral rows, the forward process between."""
    times, x_T, repeats = ds.schedules.logsnr(PROCESS, 4), starts(), 3
    known = np.array([1.0, 0.0])

    def loop(value=1.0, back=1.0):
        x, row = x_T, 0
        own = jax.vmap(jax.random.fold_in, (0, None))(KEYS, 0x9A17)
        for s, t in itertools.pairwise(times):
            (alpha, after), (sigma, small) = (
                PROCESS.alpha(np.array([s, t])),
                PROCESS.sigma(np.array([s, t])),
            )
            for i in range(repeats):
                x = np.stack([alpha * value + sigma * normal(own, row)[:, 0], x[:, 1]], axis=1)
                data, noise = answer(x, alpha, sigma)
                ratio = alpha * small / (after * sigma) if small else 0.0  # exp(-h)
                x = after * data + ratio * small * noise
                x = x + small * np.sqrt(1 - ratio**2) * normal(KEYS, row)
                row += 1
                if i < repeats - 1:
                    up = alpha / after
                    x = up * x + back * np.sqrt(sigma**2 - (up * small) ** 2) * normal(KEYS, row)
                    row += 1
        return np.stack([np.full(3, value), x[:, 1]], axis=1)

    got = inverse.repaint(
        NETWORK, known, np.array([1.0, 0.0]), jnp.asarray(x_T), times, key=KEYS, repeats=repeats
    )
    agree(got, loop, {"value": 1.02}, {"back": 1.02})


@pytest.mark.parametrize(("repeats", "want"), [(1, 0.490), (3, 0.681), (10, 0.767)])
def test_repaint_tends_to_the_conditional(repeats, want):
    """Of the pair with x_1 = 1 known, mean .8: the law of 200 rows, from the rows themselves."""
    tableau = ds.solvers.travel(
        ds.solvers.ddpm(PROCESS, ds.schedules.logsnr(PROCESS, 200)), repeats
    )

    def mean_of(value):
        mean = np.zeros(2)
        for n in range(tableau.rows):
            alpha, sigma = tableau.alpha[n], tableau.sigma[n]
            if tableau.evaluates[n]:
                mean[0] = alpha * value
                data = mean @ np.linalg.solve(alpha**2 * COV + sigma**2 * np.eye(2), alpha * COV)
                mean = tableau.a[n, 0] * mean + tableau.b[n, 0] * data
            else:
                mean = tableau.a[n, 0] * mean
        return mean[1]

    assert mean_of(1.0) == pytest.approx(want, abs=4e-3)  # on another grid
    assert abs(mean_of(1.02) - want) > 8e-3


def truth_and_singular(shape, values):
    """A matrix of these singular values, (U, s, V^T), its operator and measurements."""
    rng = np.random.default_rng(5)
    u, _ = np.linalg.qr(rng.normal(size=(shape[0], shape[0])))
    v, _ = np.linalg.qr(rng.normal(size=(shape[1], shape[1])))
    s = np.zeros(shape)
    np.fill_diagonal(s, values)
    return u @ s @ v.T, v, s.sum(axis=0)


WIDE = np.array([[1.0, 0.3, 0.1], [0.3, 0.8, -0.2], [0.1, -0.2, 0.6]])
DENSE = ds.targets.gaussian(np.zeros(3), WIDE).score_fn(PROCESS, "noise")


def directions(method, noise=NOISE, eta=0.85, eta_b=1.0, values=(1.2, 0.15)):
    """The rows of a measured (2, 3) matrix, one right singular vector after the other."""
    matrix, v, s = truth_and_singular((2, 3), values)
    times = ds.schedules.logsnr(PROCESS, 6)
    x = np.asarray(PROCESS.prior_sample(jax.random.key(0), (3, 3), dtype=jnp.float64))
    truth = np.array([[0.5, -1.0, 0.3], [1.5, 0.2, -0.6], [-0.3, 0.1, 0.9]])
    ybar = truth @ matrix.T @ np.linalg.pinv(matrix).T @ v
    for n, (one, two) in enumerate(itertools.pairwise(times)):
        alpha, sigma = PROCESS.alpha(one), PROCESS.sigma(one)
        total = alpha**2 * WIDE + sigma**2 * np.eye(3)
        data = x @ np.linalg.solve(total, alpha * WIDE)
        told, error = data @ v, (x - alpha * data) / sigma @ v
        alpha, sigma = PROCESS.alpha(two), PROCESS.sigma(two)
        z = np.asarray(ds.random.normal_like(KEYS, n, jnp.zeros((3, 3)))) @ v
        rho, out = sigma / alpha, np.zeros((3, 3))
        for i in range(3):
            own = np.inf if s[i] == 0 else noise / s[i]
            gap = 0.0 if s[i] == 0 else ybar[:, i] - told[:, i]
            if method == "ddnm_plus":
                share = min(1.0, rho / own)
                left = rho**2 - (share * own) ** 2 if s[i] else rho**2
                out[:, i] = told[:, i] + share * gap + np.sqrt(max(left, 0.0)) * z[:, i]
            elif s[i] == 0 or rho < own:
                kept = np.sqrt(1 - eta**2) * rho
                towards = kept * (error[:, i] if s[i] == 0 else gap / own)
                out[:, i] = told[:, i] + towards + eta * rho * z[:, i]
            else:
                out[:, i] = told[:, i] + eta_b * gap
                out[:, i] += np.sqrt(rho**2 - eta_b**2 * own**2) * z[:, i]
        x = alpha * out @ v.T
    return x, (matrix, truth @ matrix.T)


@pytest.mark.parametrize("method", ["ddnm_plus", "ddrm"])
@pytest.mark.parametrize("named", [False, True])
def test_every_singular_value_has_its_own_rows(method, named, x64):
    """A (2, 3) matrix of values 1.2, .15 and 0, replayed one direction at a time."""
    want, (matrix, y) = directions(method)
    operator = inverse.linear(matrix)
    x_T = PROCESS.prior_sample(jax.random.key(0), (3, 3), dtype=jnp.float64)
    times = ds.schedules.logsnr(PROCESS, 6)
    given = "y" if named else jnp.asarray(y)
    make = getattr(inverse, method)
    transform, rows = make(DENSE, operator, given, NOISE, times, KEYS)
    got = ds.sample(transform, rows, x_T, cond={"y": jnp.asarray(y)} if named else None)
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)
    assert rows.nfe == 6
    wrong = [{"noise": 0.51}, {"values": (1.2, 0.153)}]
    for change in wrong + [{"eta": 0.87}, {"eta_b": 0.98}] * (method == "ddrm"):
        assert np.abs(directions(method, **change)[0] - want).max() > 1e-5, change
    with pytest.raises(ValueError, match="`noise` must be positive"):
        make(DENSE, operator, given, 0.0, times, KEYS)
    with pytest.raises(TypeError, match="needs an operator with `filter"):
        make(DENSE, object(), given, NOISE, times, KEYS)


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        (inverse.mask(np.array([[1.0, 0.0], [0.0, 1.0]])[..., None]), (2, 2, 1)),
        (inverse.downsample(2), (4, 4, 1)),
        (inverse.blur(np.array([[0.0, 0.1, 0.0], [0.3, 0.4, 0.1], [0.0, 0.1, 0.0]])), (4, 4, 1)),
        (inverse.linear(np.arange(8.0).reshape(2, 4) % 3, (2, 2, 1)), (2, 2, 1)),
        (inverse.linear(np.ones((2, 3))), (3,)),
    ],
    ids=["mask", "downsample", "blur", "linear", "rank one"],
)
def test_filters_are_functions_of_the_gram_matrix(operator, shape, x64):
    """V h(S) V^T from the eigenvectors of A^T A, for h of every kind; and A^+ = V S^+ U^T."""
    n = int(np.prod(shape))
    units = jnp.eye(n).reshape(n, *shape)
    matrix = np.asarray(operator(units)).reshape(n, -1).T
    values, v = np.linalg.eigh(matrix.T @ matrix)
    s = np.sqrt(np.where(values < 1e-12, 0.0, values))

    def h(s):
        return 1.3 / (1.0 + 2.0 * s**2) + s

    got = np.asarray(operator.filter(h, units)).reshape(n, n)
    np.testing.assert_allclose(got, (v * h(s)) @ v.T, atol=1e-9)
    back = np.asarray(operator.pinv(operator(units))).reshape(n, n)
    np.testing.assert_allclose(back, (v * (s > 0)) @ v.T, atol=1e-9)
