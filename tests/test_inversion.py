"""Encoding: exact inverses of two-step methods, encode and decode at a solver's order, DDIB."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DETERMINISTIC, all_processes, skewed_mixture

import diffsamp as ds
from diffsamp import schedules, solvers

PROCESSES = all_processes()
BELM_FAILS = ("vp_zero_snr", "flow", "flow_shift")  # from alpha = 0 its second row is DDIM's


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def data(n=64):
    return jnp.asarray(skewed_mixture().sample(jax.random.key(0), n), jnp.float32)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", PROCESSES)
def test_round_trip_is_exact_to_rounding_in_float32(name, steps):
    process = PROCESSES[name]
    score_fn, x_0 = skewed_mixture().score_fn(process), data()
    tableaux = []
    for schedule in ("uniform", "logsnr", "karras"):
        times = schedules.get(schedule)(process, steps, final="t_min")
        tableaux += [solvers.bdia(process, times, gamma=gamma) for gamma in (1.0, 0.98)]
        # backwards on trig's grids in log-SNR it multiplies rounding by 1e8, and says so
        if name != "trig" and (name not in BELM_FAILS or schedule != "uniform"):
            tableaux.append(solvers.belm(process, times))
    for tableau in tableaux:
        noise = ds.inversion.encode(score_fn, tableau, x_0)
        back = ds.resume(score_fn, tableau, noise.state)
        assert int(back.row) == steps
        # each row rounds states as large as the noise, which for VE and EDM is sigma_max
        largest = max(1.0, float(jnp.abs(noise.x_T).max()))
        bound = 1e-6 if "vp" in name or "flow" in name else steps * 1.2e-7 * largest
        assert rms(back.x - x_0) < bound, tableau.name


@pytest.mark.parametrize("make", [solvers.bdia, solvers.belm], ids=["bdia", "belm"])
def test_few_steps_return_exactly_what_ddim_does_not(make):
    """Against the alternative: DDIM up and down with as many evaluations."""
    process = PROCESSES["vp_linear"]
    score_fn, x_0 = skewed_mixture().score_fn(process), data()
    times = schedules.uniform(process, 10, final="t_min")
    tableau = make(process, times)
    noise = ds.inversion.encode(score_fn, tableau, x_0)
    exact = ds.resume(score_fn, tableau, noise.state).x
    up = ds.sample(score_fn, solvers.ddim(process, times[::-1]), x_0)
    down = ds.sample(score_fn, solvers.ddim(process, times), up)
    assert rms(exact - x_0) < 1e-6 < 1e-2 < rms(down - x_0)


@pytest.mark.usefixtures("x64")
def test_the_inverse_is_the_inverse_of_sampling():
    """Started from what sampling leaves, not from data: all states return, in reverse."""
    process = PROCESSES["vp_linear"]
    target = skewed_mixture()
    score_fn = target.score_fn(process)
    tableau = solvers.bdia(process, schedules.logsnr(process, 12, final="t_min"), gamma=0.95)
    x_T = jnp.linspace(-2, 2, 7)[:, None]
    points = ds.trajectory(score_fn, tableau, x_T).points
    backwards = ds.inversion.inverse(tableau)
    assert backwards.nfe == 12
    state = ds.init(backwards, points[-1])
    first = state.points.at[0].set(points[-1])
    state = state._replace(row=jnp.ones((), jnp.int32), x=points[-2], points=first)
    for n in range(10, -1, -1):
        state = ds.step(score_fn, backwards, state)
        np.testing.assert_allclose(state.x, points[n], atol=1e-9)
    np.testing.assert_allclose(state.x, x_T, atol=1e-9)


@pytest.mark.parametrize("use_key", [False, True])
def test_resume_is_the_rest_of_sample(use_key):
    process = PROCESSES["edm"]
    score_fn = skewed_mixture().score_fn(process)
    times = schedules.karras(process, 9)
    tableau = solvers.get("dpmpp_3m_sde" if use_key else "unipc3")(process, times)
    key = jax.random.key(3) if use_key else None
    x_T = jnp.linspace(-80, 80, 5)[:, None]
    full = ds.sample(score_fn, tableau, x_T, key=key)
    for first in (0, 4, 9):
        state = ds.init(tableau, x_T, key)
        for _ in range(first):
            state = ds.step(score_fn, tableau, state)
        done = ds.resume(score_fn, tableau, state)
        np.testing.assert_allclose(done.x, full, rtol=1e-6, atol=1e-6)
        assert int(done.row) == tableau.rows


# the order at which decode(encode(x)) returns to x; multistep starts are of lower order
ORDERS = {"ddim": 1, "heun": 2, "dpmpp_2m": 2, "deis_tab1": 2, "rho_kutta3": 3, "dpmpp_3s": 3}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ORDERS)
def test_encode_and_decode_error_falls_at_the_order(name):
    case = next(c for c in DETERMINISTIC if c.name == name)
    process = PROCESSES["vp_linear"]
    target = skewed_mixture()
    score_fn = target.score_fn(process)
    x_0 = np.linspace(-1, 1.5, 6)[:, None]
    ends = {"t_min": 0.02, "t_max": 1.0}
    encoded = target.ode_solution(x_0, process, 0.02, 1.0)
    errors = []
    for steps in (40, 80, 160):
        times = schedules.logsnr(process, steps, final="t_min", **ends)
        up = case.solver(process, times[::-1], **case.free)
        down = case.solver(process, times, **case.free)
        assert up.nfe == down.nfe
        noise = ds.sample(score_fn, up, jnp.asarray(x_0))
        back = ds.sample(score_fn, down, noise)
        errors.append([rms(noise - encoded), rms(back - x_0)])
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert slopes[-1].min() > ORDERS[name] - 0.35, slopes
    assert errors[-1][0] < 0.02


@pytest.mark.usefixtures("x64")
def test_translate_with_gaussians_is_the_known_map():
    """N(1, .04) goes to N(-2, .25) by x -> -2 + 2.5 (x - 1), as t_min -> 0 and t_max -> oo."""
    process = PROCESSES["vp_linear"]
    one, two = ds.targets.gaussian([1.0], 0.04), ds.targets.gaussian([-2.0], 0.25)
    f, g = one.score_fn(process), two.score_fn(process, "velocity")
    x = jnp.linspace(0.6, 1.4, 9)[:, None]
    errors, cycles = [], []
    for steps in (50, 100):
        times = schedules.logsnr(process, steps, final="t_min", t_min=1e-3)
        up, down = solvers.heun(process, times[::-1]), solvers.heun(process, times)
        moved = ds.inversion.translate(f, g, x, up, down)
        # exact: standardise at the clean end and at the noise end, with each model's own moments
        level = [
            [
                (process.alpha(t), np.sqrt(v * process.alpha(t) ** 2 + process.sigma(t) ** 2))
                for v in (0.04, 0.25)
            ]
            for t in (times[-1], times[0])
        ]
        (lo_1, lo_2), (hi_1, hi_2) = level
        z = hi_1[0] * 1.0 + (np.asarray(x) - lo_1[0] * 1.0) / lo_1[1] * hi_1[1]
        exact = lo_2[0] * -2.0 + (z - hi_2[0] * -2.0) / hi_2[1] * lo_2[1]
        errors.append(rms(moved - exact))
        cycles.append(rms(ds.inversion.translate(g, f, moved, up, down) - x))
    assert errors[1] < 2e-3
    assert errors[1] < errors[0] / 3
    assert cycles[1] < 2e-3
    assert cycles[1] < cycles[0] / 3
    np.testing.assert_allclose(moved, -2 + 2.5 * (x - 1), atol=0.05)


def test_the_condition_is_passed_on():
    process = PROCESSES["flow"]

    def apply(params, x, t, shift):
        return params * x + shift

    score_fn = ds.ScoreFn(apply, jnp.asarray(0.3), process, prediction="velocity")
    times = schedules.uniform(process, 8, final="t_min", t_max=0.99)
    tableau = solvers.bdia(process, times)
    x_0, cond = data(5), {"shift": jnp.asarray(0.4)}
    noise = ds.inversion.encode(score_fn, tableau, x_0, cond=cond)
    same = ds.resume(score_fn, tableau, noise.state, cond=cond).x
    other = ds.resume(score_fn, tableau, noise.state, cond={"shift": jnp.asarray(0.9)}).x
    assert rms(same - x_0) < 1e-6 < 0.1 < rms(other - x_0)
    up = solvers.ddim(process, times[::-1])
    down = solvers.ddim(process, times)
    conds = {"source_cond": cond, "target_cond": {"shift": jnp.asarray(0.9)}}
    got = ds.inversion.translate(score_fn, score_fn, x_0, up, down, **conds)
    middle = ds.sample(score_fn, up, x_0, cond=cond)
    want = ds.sample(score_fn, down, middle, cond=conds["target_cond"])
    np.testing.assert_array_equal(got, want)


def test_without_a_batch_axis():
    process = PROCESSES["vp_linear"]
    score_fn = ds.ScoreFn(lambda p, x, t: 0.1 * x, None, process, batched=False)
    tableau = solvers.bdia(process, schedules.logsnr(process, 10, final="t_min"))
    x_0 = jnp.array([0.3, -0.2])
    noise = ds.inversion.encode(score_fn, tableau, x_0)
    assert noise.x_T.shape == (2,)
    assert rms(ds.resume(score_fn, tableau, noise.state).x - x_0) < 1e-6


def test_what_cannot_be_inverted():
    process = PROCESSES["vp_linear"]
    times = schedules.logsnr(process, 50, final="t_min")
    for tableau, message in (
        (solvers.ddim(process, times), "every row after the first must combine two states"),
        (solvers.bdia(process, times, gamma=0.0), "solvers.bdia \\(gamma > 0\\)"),
        (solvers.heun(process, times), "cannot be inverted"),
        (solvers.ddpm(process, times), "cannot be inverted"),
        (solvers.bdia(process, times[:2]), "cannot be inverted"),
        (solvers.bdia(process, schedules.logsnr(process, 9)), "ends at sigma = 0"),
        (
            solvers.bdia(process, times, gamma=0.5),
            r"multiplies rounding errors by 5e\+16: take gam",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ds.inversion.inverse(tableau)


def test_a_state_must_fit_its_tableau():
    process = PROCESSES["vp_linear"]
    score_fn, x_T = skewed_mixture().score_fn(process), data(3)
    times = schedules.logsnr(process, 5)
    ddim, ddpm = solvers.ddim(process, times), solvers.ddpm(process, times)
    state = ds.init(ddim, x_T)
    for run in (ds.resume, ds.step):
        with pytest.raises(ValueError, match="adds noise and needs a random key"):
            run(score_fn, ddpm, state)
        with pytest.raises(ValueError, match="one for p = 1 states and q = 1 outputs; tableau"):
            run(score_fn, solvers.unipc(process, times), state)


def test_what_cannot_be_translated():
    process = PROCESSES["vp_linear"]
    score_fn = skewed_mixture().score_fn(process)
    times = schedules.logsnr(process, 5, final="t_min")
    up, down = solvers.ddim(process, times[::-1]), solvers.ddim(process, times)
    for pair, message in (
        ((down, down), "`up` must be built on rising times"),
        ((up, solvers.ddpm(process, times)), "`down` must be deterministic"),
        ((up, solvers.ddim(process, times[1:])), "must start where the first ends"),
    ):
        with pytest.raises(ValueError, match=message):
            ds.inversion.translate(score_fn, score_fn, data(3), *pair)
