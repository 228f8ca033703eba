"""The search of training-free guidance's strengths, on Gaussians whose posterior is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.exact import build, law

import diffsamp as ds
from diffsamp import search

PROCESS = ds.processes.vp_linear()
NETWORK = ds.targets.gaussian([0.0, 0.0], [[1.0, 0.8], [0.8, 1.0]]).score_fn(PROCESS, "data")
TABLEAU = build("ddim", PROCESS, 8)
N = 16
X_T = PROCESS.prior_sample(jax.random.key(0), (N, 2))
WANTED = jnp.full((N, 2), 0.9)


def misfit(data, level, cond):
    del level, cond
    return 0.5 * ((data - 0.9) ** 2).sum(-1)


def objective(x, wanted):
    assert x.shape == wanted.shape
    return jnp.mean((x - wanted) ** 2)


def find(**options):
    named = {"objective": objective, "key": jax.random.key(1), "reference": WANTED, **options}
    return search.tfg(NETWORK, misfit, TABLEAU, X_T, **named)


@pytest.mark.long
def test_it_finds_what_a_grid_finds():
    """y = x_1 + .3 z = 1: of powers of two the strengths whose law is nearest the posterior.

    The search sees 192 samples, the grid the exact laws; the posterior is N((.917, .734), ..) with
    variances .083 and .413.
    """
    mean, variance = np.array([0.917, 0.734]), np.array([0.083, 0.413])

    def away(got, spread):
        return ((got - mean) ** 2).sum() + ((spread - variance) ** 2).sum()

    def square(data, level, cond):
        del level, cond
        return 0.5 * (data[:, 0] - 1.0) ** 2 / 0.09

    found = search.tfg(
        NETWORK,
        square,
        TABLEAU,
        PROCESS.prior_sample(jax.random.key(0), (256, 2)),
        objective=lambda x, _: away(x.mean(0), x.var(0)),
        key=jax.random.key(1),
        rho=2.0**-5,
        mu=2.0**-5,
        repeats=(1,),
        rounds=5,
        steps=1,
    )
    grid = {}
    for rho in (0.0, *2.0 ** np.arange(-7, -1)):
        for mu in (0.0, *2.0 ** np.arange(-8, -3)):
            guided = ds.guidance.tfg(NETWORK, square, TABLEAU, rho, mu, steps=1)
            got, cov = law(guided, TABLEAU, 2)
            grid[rho, mu] = away(got, np.diag(cov))
    low = min(v for v in grid.values() if np.isfinite(v))
    own = grid[found.best.rho, found.best.mu]
    assert own < low + 0.02
    assert np.median(list(grid.values())) > low + 0.05
    assert list(found.values.values()) == sorted(found.values.values())


def test_its_costs_are_counted_and_limited():
    calls = []

    def apply(params, x, t):
        jax.debug.callback(lambda: calls.append(len(x)))
        return NETWORK.apply(params, x, t)

    counted = ds.ScoreFn(apply, NETWORK.params, PROCESS, prediction="data")
    named = {"objective": objective, "key": jax.random.key(1), "reference": WANTED}
    found = search.tfg(counted, misfit, TABLEAU, X_T, rounds=1, **named)
    jax.effects_barrier()
    # every forward is a call; a gradient, which calls nothing, counts as two
    gradients = sum(12 * 8 * one.repeats for one in found.values if one.rho > 0)
    gradients += 4 * 8 * found.best.repeats if found.best.rho > 0 else 0
    assert found.evaluations == sum(calls) + 2 * gradients
    short = find(rounds=5, evaluations=700)
    assert 1 <= len(short.values) < len(found.values)
    assert short.evaluations <= 700
    assert list(short.values.values()) == sorted(short.values.values())
    assert find(rounds=5, evaluations=700).values == short.values
    with pytest.raises(ValueError, match="`evaluations` is too low"):
        find(evaluations=50)


@pytest.mark.long
def test_more_passes_and_draws():
    """Passes are rows; every sample's draws are its own, whatever the batch."""
    options = {"rounds": 0, "repeats": (2,), "smooth": 0.2, "samples": 2, "steps": 1}
    found, batched = find(**options), find(**options, batch=4)
    assert found.tableau.nfe == 16
    for one, value in batched.values.items():
        assert value == pytest.approx(found.values[one], rel=1e-3)
    assert batched.held_out == pytest.approx(found.held_out, rel=1e-3)


def test_it_says_what_is_wrong():
    with pytest.raises(ValueError, match="`rho` must be positive"):
        find(rho=0.0)
    with pytest.raises(ValueError, match="`repeats` must be rising"):
        find(repeats=(2, 1))
    with pytest.raises(ValueError, match="are held out"):
        find(held_out=N)
    with pytest.raises(ValueError, match="not finite"):
        find(objective=lambda x, r: jnp.nan, rounds=0)
