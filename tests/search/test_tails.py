"""Tables run from where they differ: where they end, and what that asks of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PROCESS, mixture, start

import diffsamp as ds
from diffsamp import search, solvers
from diffsamp.search._tails import count_tail, run_table, run_variants
from diffsamp.search.explicit import Explicit
from diffsamp.search.objective import first_time
from diffsamp.search.refine import _Numbers, _used
from diffsamp.search.starts import Starts

KEY = jax.random.key(3)
NAMES = ("times", "labels", "weights", "sums")


def counted(calls):
    network = mixture().score_fn(PROCESS, "edm_f")

    def apply(params, x, t):
        jax.debug.callback(lambda n: calls.append(int(n)), jnp.asarray(x.shape[0]))
        return network(x, t, prediction="data")

    return ds.ScoreFn(apply, {}, PROCESS, prediction="data")


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
@pytest.mark.parametrize("together", [1, 3])
def test_they_end_where_whole_runs_do(solver, together):
    """Every number of a table moved, at the cost of what comes after it only."""
    calls = []
    starts = Starts.split(counted(calls), start(12), None, KEY, 4, 5, None)
    times = ds.schedules.karras(PROCESS, 2 if solver == "heun" else 4, t_max=10.0)
    given = solvers.get(solver)(PROCESS, times)
    table = _Numbers.of(Explicit.of(given), PROCESS, NAMES, _used(given, False))
    path = run_table(starts, table.explicit(table.start), 0, 8)
    whole = search.run(starts.score_fn, given, given.sigma[0] / 20 * starts.x_T[:8])
    np.testing.assert_allclose(path.end, whole, rtol=3e-5, atol=3e-5)
    variants = [table.explicit(vector) for vector in table.moved(table.start)]
    jax.effects_barrier()
    calls.clear()
    starts.spent = 0
    # in two parts, which a batch holds
    parts = [
        list(run_variants(starts, path.part(low, low + 4), variants, together=together))
        for low in (0, 4)
    ]
    jax.effects_barrier()
    assert starts.spent == sum(calls)
    if together == 1:
        assert sum(calls) == 8 * sum(count_tail(v, path.table) for v in variants)
        assert sum(calls) < 0.6 * 8 * given.nfe * len(variants)
    for i, vector in enumerate(table.moved(table.start)):
        whole = search.run(starts.score_fn, table.tableau(vector), starts.x_T[:8])
        ends = np.concatenate([part[i] for part in parts])
        np.testing.assert_allclose(ends, whole, rtol=3e-5, atol=3e-5)


def test_what_is_left_of_a_table():
    """N - n for time or label n, N - n - 1 for a weight of row n: none for those of the last."""
    given = solvers.dpmpp(PROCESS, ds.schedules.karras(PROCESS, 4), order=2)
    table = _Numbers.of(Explicit.of(given), PROCESS, NAMES[:3], _used(given, False))
    whole = table.explicit(table.start)
    left = [count_tail(table.explicit(v), whole) for v in table.moved(table.start)]
    assert left == [4, 3, 2, 1] * 2 + [2, 1, 1, 0, 0, 0]


def test_the_reference_begins_at_t_max():
    """A flow's exact solution from pure noise; begun at log-SNR -5.1 it is 0.02 off."""
    process = ds.processes.flow()
    mean, std = np.array([3.0, -1.0]), np.array([0.5, 1.5])
    network = ds.targets.gaussian(mean, std**2).score_fn(process, "velocity")
    x_T = process.prior_sample(jax.random.key(0), (64, 2))
    exact = mean + std * np.asarray(x_T)
    error = {}
    tableau = search.reference_tableau(process)
    late = solvers.unipc(process, ds.schedules.karras(process, 100), order=3)
    for name, one in {"own": tableau, "late": late}.items():
        error[name] = np.abs(np.asarray(ds.sample(network, one, x_T)) - exact).max()
    assert (tableau.nfe, tableau.times[0]) == (100, process.t_max)
    assert error["own"] < 5e-4
    assert error["late"] > 0.02


def test_networks_that_say_nothing_of_the_data_at_t_max():
    """Noise at alpha = 0: the search begins where schedules do, with the start scaled."""
    process = ds.processes.flow()
    target = ds.targets.gaussian([0.5, -0.3], [0.25, 1.0])
    x_T = process.prior_sample(jax.random.key(0), (24, 2))
    found = {}
    for prediction in ("noise", "velocity"):
        network = target.score_fn(process, prediction)
        plan = search.best(network, x_T, nfe=(3,), key=KEY).plans[3]
        assert plan.psnr["held_out"]["found"] > 50
        found[prediction] = ds.sample(network, plan.tableau, x_T)
    np.testing.assert_allclose(found["noise"], found["velocity"], atol=0.02)
    own = search.reference_tableau(process, first=first_time(target.score_fn(process, "noise")))
    assert own.nfe == 100
    np.testing.assert_allclose(own.times[:2], [1.0, ds.schedules.karras(process, 4)[0]])
    table = search.compare(target.score_fn(process, "noise"), x_T, nfe=(3,), solver=["ddim"])
    assert {"uniform", "karras"} == {"uniform", "karras"} & {
        *(one.schedule for one in table.left_out),
        *(entry.schedule for entry in table.entries),
    }
    assert "does not determine" in {one.schedule: one.reason for one in table.left_out}["uniform"]
