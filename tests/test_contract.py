"""What every solver must do, over the one table of cases."""

import jax
import numpy as np
import pytest
from cases import CASES, all_processes, gaussian_moments, twin

import diffsamp as ds
from diffsamp import schedules, solvers

PROCESSES = all_processes()
NFES = (1, 2, 3, 5, 6, 8, 12)
# every budget on grids of each kind; the others are more of the same to a solver
BUDGETS = {"uniform": NFES, "logsnr": NFES, "karras": NFES, "quadratic": (3, 8), "polynomial": (3,)}


def tableaux(case, process):
    for name, budgets in BUDGETS.items():
        for nfe in budgets:
            steps = case.solver.steps(nfe)
            if steps is not None:
                yield nfe, case.solver(process, schedules.get(name)(process, steps))


def test_no_solver_escapes():
    assert [case.name for case in CASES] == list(solvers.SOLVERS)
    functions = {s.function for s in solvers.SOLVERS.values()}
    kinds = (solvers.COMPOSED, solvers.FITTED, solvers.AT_ONE_LEVEL, solvers.FEW_STEP)
    others = {"get", "names"}.union(*kinds)
    functions_of = [n for n in solvers.__all__ if n not in others and n[0].islower()]
    public = {getattr(solvers, n) for n in functions_of}
    assert functions == public


def test_names_and_aliases():
    for solver in solvers.SOLVERS.values():
        assert solvers.get(solver.name) is solver
        for alias in solver.aliases:
            assert isinstance(solvers.get(alias), solvers.Solver)
    with pytest.raises(ValueError, match="must be one of 'ddim'"):
        solvers.get("no_such")
    aliases = [a for s in solvers.SOLVERS.values() for a in s.aliases if a not in solvers.SOLVERS]
    assert len(aliases) == len(set(aliases))


def expect_exact_in_one_step(tableau, process):
    """If the network always says x_0, the closed sample is x_0, whatever x_T was."""
    x_0 = np.array([[0.3], [-1.2], [0.0]])

    def posterior(x, alpha, sigma):
        return x_0, (x - alpha * x_0) / sigma

    size = max(1.0, float(process.prior_std))
    x_T = np.array([[1.0], [2.0], [-0.5]]) * float(process.prior_std)
    error = np.abs(twin(tableau, posterior, x_T) - x_0).max()
    # rounding in units of the largest state, times what the method makes of it (two-step
    # methods that can be inverted amplify it)
    if error >= 1e-11 * size:
        assert error < 1e-11 * size * np.abs(tableau.unroll()[1]).max()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_process_schedule_and_budget(case, process):
    """Built, consistent (checked at construction), exactly the budget, ends where it should.

    And exact for one datum, without noise and where the tableau is to be consistent.
    """
    for nfe, tableau in tableaux(case, process):
        assert tableau.nfe == nfe
        assert tableau.stochastic == case.solver.stochastic or nfe == 1
        assert tableau.sigma[-1] == 0
        np.testing.assert_allclose(tableau.alpha[-1], 1, rtol=1e-12)
        assert tableau.times[0] <= process.t_max
        if case.check == "full" and not case.solver.stochastic:
            expect_exact_in_one_step(tableau, process)


@pytest.fixture(scope="module")
def counted():
    """A network and the list of its calls."""
    calls = []

    def apply(params, x, t):
        jax.debug.callback(lambda: calls.append(1))
        return params * x

    process = ds.processes.vp_linear()
    return ds.ScoreFn(apply, np.float32(0.1), process, prediction="noise"), calls


@pytest.mark.parametrize("case", CASES, ids=str)
def test_counted_evaluations(case, counted):
    """The network is really called `nfe` times: counted at run time, padding included."""
    score_fn, calls = counted
    process = score_fn.process
    tableau = case.solver(process, schedules.logsnr(process, 5))
    tableau = tableau.pad(rows=25, p=5, q=13)  # one shape: one program for all
    x = process.prior_sample(jax.random.key(0), (2, 3))
    calls.clear()
    jax.block_until_ready(ds.sample(score_fn, tableau, x, key=jax.random.key(1)))
    jax.effects_barrier()
    assert len(calls) == tableau.nfe


@pytest.mark.parametrize("case", [c for c in CASES if c.solver.stochastic], ids=str)
def test_stochastic_moments_converge(case):
    """Weak order on Gaussian data: the variance error falls as the steps double."""
    mean, variance = 0.7, 0.35**2
    process = ds.processes.vp_linear()

    def end_moments(n):
        times = schedules.logsnr(process, n, t_min=0.05, final="t_min")
        tableau = case.solver(process, times, **case.free)
        alpha, sigma = tableau.alpha[-1], tableau.sigma[-1]
        got = gaussian_moments(tableau, mean, variance)
        return abs(got[0] - alpha * mean), abs(got[1] - alpha**2 * variance - sigma**2)

    coarse, fine = end_moments(640), end_moments(1280)
    assert max(coarse[0], fine[0]) < 1e-11  # a linear network keeps the mean exactly
    assert np.log2(coarse[1] / fine[1]) == pytest.approx(case.order, abs=0.15)


def test_noise_scaled_by_five_percent_is_caught():
    """The power of the variance test above, and of the self-check: 1.05 is far outside both."""
    process = ds.processes.vp_linear()
    tableau = solvers.ddpm(process, schedules.logsnr(process, 10))
    arrays = {k: getattr(tableau, k) for k in ("times", "alpha", "sigma", "target", "a", "b")}
    ds.Tableau.create(**arrays, c=tableau.c)
    with pytest.raises(ValueError, match="not consistent"):
        ds.Tableau.create(**arrays, c=tableau.c * 1.05)


def test_steps_for_a_budget():
    heun = solvers.get("heun")
    assert [heun.steps(n) for n in (1, 2, 3, 4, 5)] == [1, None, 2, None, 3]
    assert [heun.steps(n, closed=False) for n in (1, 2, 3, 4)] == [None, 1, None, 2]
    assert solvers.get("unipc3").steps(7) == 7
    with pytest.raises(ValueError, match="`nfe` must be at least 1; got 0"):
        heun.steps(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, t: solvers.ddim(p, t, eta=1.5), r"`eta` must lie in \[0, 1\]"),
        (lambda p, t: solvers.ddpm(p, t, variance="fixed"), "`variance` must be one of"),
        (lambda p, t: solvers.dpmpp(p, t, order=4), "`order` must be from 1 to 3; got 4"),
        (lambda p, t: solvers.dpmpp(p, t, variant="x"), "`variant` must be one of"),
        (lambda p, t: solvers.deis(p, t, order=-1), "`order` must be from 0 to 3"),
        (lambda p, t: solvers.deis(p, t, variable="x"), "`variable` must be one of"),
        (lambda p, t: solvers.ipndm(p, t, order=5), "`order` must be from 1 to 4"),
        (lambda p, t: solvers.unipc(p, t, variant="bh3"), "`variant` must be one of"),
        (lambda p, t: solvers.euler(p, t, churn=-1.0), "must not be negative"),
        (lambda p, t: solvers.heun(p, t, coordinates="x"), "`coordinates` must be one of"),
        (lambda p, t: solvers.ddim(p, t[::-1]), "at t = 0, where sigma = 0. Falling times may end"),
        (lambda p, t: solvers.ddim(p, [0.5, 0.2, 0.3]), "`times` must decrease from noise to data"),
        (lambda p, t: solvers.ddpm(p, t[-2::-1]), "adds noise, and so cannot encode"),
        (lambda p, t: solvers.ddim(p, t + 1), "must lie between"),
        (lambda p, t: solvers.ddim(p, [0.0, -0.1]), "must lie between"),
    ],
)
def test_bad_options(call, message):
    process = ds.processes.vp_linear()
    with pytest.raises((ValueError, TypeError), match=message):
        call(process, schedules.uniform(process, 4))


def test_a_process_is_needed():
    with pytest.raises(TypeError, match=r"`process` must be a diffsamp process, .* got ndarray"):
        solvers.ddim(np.linspace(1, 0, 5), None)
