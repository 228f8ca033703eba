"""Every solver on every schedule, for processes whose rho reaches 1e5: built, right, of use."""

import dataclasses

import jax
import numpy as np
import pytest

import diffsamp as ds
from diffsamp import schedules, solvers

TABLE = ds.processes.beta_table("squaredcos_cap_v2", num_levels=4000)
PROCESSES = {
    "squaredcos": ds.processes.vp_discrete("squaredcos_cap_v2"),
    "squaredcos 4000": ds.processes.vp_discrete(TABLE),
    "zero snr": ds.processes.vp_discrete("scaled_linear", zero_terminal_snr=True),
    "edm to 1000": ds.processes.edm(0.002, 1e3),
    "ve to 2000": ds.processes.ve(0.01, 2e3),
    "vp_linear": ds.processes.vp_linear(),
    "flow": ds.processes.flow(),
}
LARGE = PROCESSES["squaredcos"]


def built(process, names, counts):
    """Builds everything."""
    for name in names:
        for n in counts:
            times = schedules.get(name)(process, n)
            for solver in solvers.SOLVERS.values():
                if n <= {"pndm": 3, "s_pndm": 1}.get(solver.name, 0):
                    continue  # their start takes more steps, and they say so
                tableau = solver(process, times)
                assert np.all(np.isfinite(tableau.b)), (solver.name, name, n)


@pytest.mark.parametrize("name", PROCESSES)
def test_everything_builds(name):
    process = PROCESSES[name]
    built(process, ["uniform", "karras"], (1, 4))
    built(process, schedules.names(process)[2:4], (7,))


@pytest.mark.long
@pytest.mark.parametrize("name", PROCESSES)
def test_everything_builds_everywhere(name):
    process = PROCESSES[name]
    built(process, schedules.names(process), (1, 2, 3, 5, 8, 10, 20, 50))


SOLVERS = [s for s in solvers.SOLVERS.values() if not s.stochastic]


# they do not keep a constant data prediction, by definition
UNCHECKED = ("conjugate_ddim", "lawson2", "lawson4")


@pytest.mark.parametrize(
    "solver", [s for s in SOLVERS if s.name not in UNCHECKED], ids=lambda s: s.name
)
def test_a_wrong_coefficient_fails_here_too(solver):
    """What the check forgives is rounding: any weight that matters by 1 % is found."""
    tableau = solver(LARGE, schedules.logsnr(LARGE, 8))
    for array in ("a", "b"):
        numbers = getattr(tableau, array)
        reach = np.abs(numbers).max(axis=1) / np.hypot(tableau.alpha[1:], tableau.sigma[1:])
        row = int(np.argmax(reach))
        wrong = numbers.copy()
        wrong[row, np.argmax(np.abs(wrong[row]))] *= 1.01
        with pytest.raises(ValueError, match=f"row {row} of"):
            dataclasses.replace(tableau, **{array: wrong}).check()


def sample(network, tableau, x_T, rows, p, q):
    """In one program for all."""
    return np.asarray(ds.sample(network, tableau.pad(rows, p, q), x_T))


@pytest.mark.parametrize("name", ["squaredcos", "vp_linear"])
def test_float32_is_enough(name):
    """Against NumPy's float64 run of the same tableau, for a network that knows data exactly.

    A noise network in float32 says nothing of the data at rho = 2e4, whatever the solver; its
    rounding is not what is tested. DEIS of order 3 and more in t extrapolates too far here, and so
    does F-DDIM, whose steps of this length overshoot to ten times the data's size.
    """
    process = PROCESSES[name]
    mean, variance = 0.5, 0.3
    network = ds.targets.gaussian([mean], variance).score_fn(process, "data")
    x_T = process.prior_sample(jax.random.key(0), (32, 1))
    for grid in ("uniform", "logsnr"):
        tableaux = [
            solver(process, schedules.get(grid)(process, 8))
            for solver in SOLVERS
            if solver.name not in ("deis_tab3", "accelerated_ddim", "forward_ddim")
        ]
        size = {k: max(getattr(t, k) for t in tableaux) for k in ("rows", "p", "q")}
        for tableau in tableaux:
            found = np.asarray(ds.sample(network, tableau.pad(**size), x_T))
            want = exact_run(tableau, np.asarray(x_T, np.float64), mean, variance)
            np.testing.assert_allclose(found, want, atol=3e-3, err_msg=f"{tableau.name} on {grid}")


def exact_run(tableau, x, mean, variance):
    """The tableau on a Gaussian's data prediction, in float64."""
    states, outputs = [x], []
    for n in range(tableau.rows):
        alpha, sigma = tableau.alpha[n], tableau.sigma[n]
        u = states[-1]
        data = mean + variance * alpha / (alpha**2 * variance + sigma**2) * (u - alpha * mean)
        w_0, w_1 = tableau.target[n]
        said = w_0 * data + (w_1 / sigma * (u - alpha * data) if w_1 else 0.0)
        outputs.append(said if tableau.evaluates[n] else 0 * u)
        new = sum(tableau.a[n, i] * states[n - i] for i in range(min(tableau.p, n + 1)))
        new += sum(tableau.b[n, j] * outputs[n - j] for j in range(min(tableau.q, n + 1)))
        states.append(new)
    return states[-1]


NOISE_FORM = ["heun", "rho_rk4", "rho_kutta3", "dpm2", "dpm_solver_2s", "dpm_solver_3s"]


@pytest.mark.parametrize("name", NOISE_FORM)
def test_methods_in_noise_form_stay_finite_as_alpha_vanishes(name):
    """From almost no signal the samples are those from none, in which rho has no place."""
    angle = np.linspace(0.01, np.pi / 2, 1000)
    x = np.random.default_rng(0).normal(size=(500, 1))
    found = []
    for alpha in (1e-4, 1e-7, 1e-12, 0.0):
        table = np.cos(angle) ** 2
        table[-1] = alpha**2
        process = ds.processes.vp_discrete(alphas_cumprod=table)
        tableau = solvers.get(name)(process, np.append(np.linspace(999, 0, 13), -1.0))
        assert np.abs(tableau.b).max() < 20
        found.append(exact_run(tableau, x, 0.0, 0.3))
    for samples in found[:3]:
        np.testing.assert_allclose(samples, found[3], atol=2e-3)
    assert abs(found[3].std() / x.std() - np.sqrt(0.3)) < 0.1


def test_a_search_leaves_out_what_cannot_be_built():
    network = ds.targets.gaussian([0.5], 0.3).score_fn(LARGE, "data")
    x_T = LARGE.prior_sample(jax.random.key(0), (8, 1))
    table = ds.search.compare(
        network,
        x_T,
        nfe=(4,),
        solver=("ddim", "dpmpp_2m"),
        schedule={"uniform": schedules.uniform, "broken": lambda p, n: np.ones(n + 1)},
    )
    assert len(table.entries) == 2
    assert {one[:3] for one in table.left_out} == {
        ("ddim", "broken", 4),
        ("dpmpp_2m", "broken", 4),
    }
    assert "must decrease" in table.left_out[0].reason
    assert "left out, 2 that cannot be built: ddim on broken" in table.table()
    with pytest.raises(ValueError, match="none of the 2 samplers can be built"):
        ds.search.compare(
            network,
            x_T,
            nfe=(4,),
            solver=("ddim", "dpmpp_2m"),
            schedule={"broken": lambda p, n: np.ones(n + 1)},
        )
