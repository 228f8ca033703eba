"""Step-by-step agreement with diffusers and k-diffusion, and where a peer is wrong.

`fixtures/peers.json` holds the states the peers visit on an analytic model, made by
`fixtures/make_peers.py` with the peers' code in float64; EXACT is a few thousand roundings of the
largest state. As shipped diffusers keeps its tables, its sigmas and partly its states in float32:
AS_SHIPPED is a few hundred roundings of that. Tests marked `peers` run the peers themselves.
"""

import functools
import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from cases import skewed_mixture, twin

import diffsamp as ds
from diffsamp import solvers

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = json.loads((FIXTURES / "peers.json").read_text(encoding="utf-8"))
EXACT, AS_SHIPPED = 1e-12, 5e-5
POSTERIOR = skewed_mixture().posterior
START = np.array(GOLDEN["start"])[:, None]
# where diffusers is not followed; each has its own test below
NOT_FOLLOWED = (
    "ddim linspace",
    "ddim trailing 7",
    "ddpm large trailing",
    "repeated sigma",
    "repeated sigma deis",
)
FOLLOWED = [name for name in GOLDEN["diffusers"] if name not in NOT_FOLLOWED]


def states(tableau, x, noises=()):
    """u_1 .. u_N of a tableau, in float64."""
    visited = []
    for n in range(1, tableau.rows + 1):
        part = ds.Tableau(
            **{
                key: getattr(tableau, key)[: n + (key in ("times", "alpha", "sigma"))]
                for key in ("times", "alpha", "sigma", "target", "a", "b", "c", "evaluates")
            }
        )
        visited.append(twin(part, POSTERIOR, x, noises=noises)[:, 0])
    return np.array(visited)


def ours(case):
    """(sampler, times, tableau) of a case's config."""
    config, n = case["config"], case["n"]
    sampler = ds.from_diffusers(config)
    options = {"mu": GOLDEN["mu"]} if config.get("use_dynamic_shifting") else {}
    if config.get("shift_terminal"):  # the case that passes sigmas, as diffusers' pipelines do
        options["sigmas"] = np.linspace(1, 1 / n, n)
    times = sampler.times(n, **options)
    return sampler, times, sampler.solver(sampler.process, times)


def difference(tableau, case):
    """Per state, in units of the largest one visited (at least 1); NaN where the peer has none."""
    got = states(tableau, START, noises=np.array(case["noises"])[..., None])
    want = np.array([[np.nan] * len(START) if x is None else x for x in case["states"]])
    assert got.shape == want.shape
    return np.abs(got - want).max(axis=1) / max(1.0, np.nanmax(np.abs(want)))


def check_diffusers(case):
    """The sigmas, the network's labels and all states of a case are ours."""
    sampler, _, tableau = ours(case)
    assert np.nanmax(difference(tableau, case)) < EXACT
    flow = isinstance(sampler.process, ds.processes.Flow)
    if case["sigmas"] is not None:
        rho = tableau.sigma if flow else tableau.sigma / tableau.alpha
        np.testing.assert_allclose(rho, case["sigmas"], rtol=1e-11, atol=1e-15)
    if case["shipped"] is not None:
        last = states(tableau, START, noises=np.array(case["noises"])[..., None])[-1]
        np.testing.assert_allclose(last, case["shipped"], rtol=0, atol=AS_SHIPPED)

    labels = tableau.times[:-1] * (1000 if flow else 1)
    apart = np.abs(labels - case["timesteps"])
    if flow or any(value is True for key, value in case["config"].items() if "use_" in key):
        assert np.all(apart < 1)  # rounded or cut off by the peer
    else:
        assert np.all(apart < 1e-3)  # 0 unless a timestep lies between two levels


def check_k_diffusion(name, case):
    """The grid is Karras's with sigma_N = 0; the sampler is ours on it, at every step.

    LMS integrates its weights with a quadrature of relative tolerance 1e-4, which is exact here
    because the integrands are cubic polynomials.
    """
    sigmas = np.array(case["sigmas"])
    process = ds.processes.edm(sigmas[-2], sigmas[0])
    np.testing.assert_allclose(ds.schedules.karras(process, len(sigmas) - 1), sigmas, rtol=1e-13)
    dpmpp = functools.partial(solvers.dpmpp, lower_order_final=False)
    tableau = {
        "euler": solvers.euler,
        "heun": solvers.heun,
        "dpmpp_2m": dpmpp,
        "lms": solvers.get("lms"),
        "dpm_2": solvers.dpm2,
        "euler_ancestral": functools.partial(solvers.ddim, eta=1.0),
        "euler_ancestral_half": functools.partial(solvers.ddim, eta=0.5),
        "euler_ancestral_0": solvers.euler,
        "dpmpp_2m_sde": functools.partial(dpmpp, eta=1.0),
        "dpmpp_2m_sde_heun": functools.partial(dpmpp, eta=0.5, variant="heun"),
        "dpmpp_3m_sde": functools.partial(dpmpp, order=3, eta=1.0, compatible=True, variant="heun"),
        "dpmpp_sde": solvers.dpmpp_sde,
        "dpm_2_ancestral": solvers.dpm2_ancestral,
        "dpm_2_ancestral_half": functools.partial(solvers.dpm2_ancestral, eta=0.5),
        "dpmpp_2s": _with_midpoints,
    }[name](process, sigmas)
    got = states(tableau, START * sigmas[0], noises=np.array(case["noises"])[..., None])
    if tableau.nfe > len(case["states"]):
        # two stages: its callback sees whole steps, we also have the predicted points
        got = np.concatenate([got[1:-1:2], got[-1:]])
    np.testing.assert_allclose(got, case["states"], rtol=1e-12, atol=1e-12 * sigmas[0])


def _with_midpoints(process, sigmas):
    """k-diffusion's grid has the steps, ours all evaluations: stages at the geometric means."""
    pairs = np.stack([sigmas[:-2], np.sqrt(sigmas[:-2] * sigmas[1:-1])], axis=1)
    times = np.concatenate([pairs.reshape(-1), sigmas[-2:]])
    return solvers.dpm_solver(process, times, order=2, prediction="data")


def check_consistency(case):
    """Jumps to the data and the noises added after them; what is drawn last is not used."""
    sigmas = np.array(case["sigmas"])
    process = ds.processes.edm(sigmas[-1], sigmas[0])
    tableau = solvers.consistency(process, [*sigmas[:-1], 0.0], rho_min=sigmas[-1])
    got = states(tableau, START * sigmas[0], noises=np.array(case["noises"])[..., None])
    np.testing.assert_allclose(got, case["states"], rtol=1e-12, atol=EXACT * sigmas[0])


def single_step(case, order, steps=None):
    """Our DPM-Solver++ (or DPM-Solver) on the sigmas of a case."""
    process, rho = ds.processes.vp_discrete("scaled_linear"), np.array(case["sigmas"])
    closed = np.where(rho > 0, rho, 1.0)
    times = np.where(rho > 0, process.time(-np.log(closed)), process.t_clean)[:steps]
    noise = case["config"].get("algorithm_type") == "dpmsolver"
    return solvers.dpm_solver(process, times, order=order, prediction="noise" if noise else "data")


@pytest.mark.parametrize("name", ["singlestep 2", "singlestep 2 odd"])
def test_diffusers_single_step(name):
    case = GOLDEN["diffusers_solvers"][name]
    np.testing.assert_allclose(states(single_step(case, 2), START), case["states"], atol=EXACT)


def test_diffusers_consistency():
    check_consistency(GOLDEN["consistency"])


@pytest.mark.parametrize("name", FOLLOWED)
def test_diffusers_step_by_step(name):
    check_diffusers(GOLDEN["diffusers"][name])


@pytest.mark.parametrize("name", list(GOLDEN["k_diffusion"]))
def test_k_diffusion_step_by_step(name):
    check_k_diffusion(name, GOLDEN["k_diffusion"][name])


# -- defects of the peers: each test fails when the peer's behaviour changes ---------------------


@pytest.mark.parametrize(("name", "clean"), [("ddim linspace", True), ("ddim trailing 7", False)])
def test_diffusers_ddim_integrates_over_the_wrong_interval(name, clean):
    """DDIMScheduler ends every step at t - T // n, which is not the next time it evaluates at.

    With n = 8, linspace times are 999, 856, 714, .. and the steps end at 874, 731, 589, ..: states
    labelled 714 live at 731. With n = 7, trailing times end at 142 and 142 - 1000 // 7 = 0, so the
    sample keeps the noise of the first level. Built as diffusers does it we agree; our own steps,
    which end where the next begins, differ by far more than rounding.
    """
    case = GOLDEN["diffusers"][name]
    sampler, times, tableau = ours(case)
    assert difference(tableau, case).max() > 1e-3
    assert tableau.sigma[-1] == 0
    x, process = START, sampler.process
    for t, want in zip(times[:-1], case["states"], strict=True):
        end = max(t - 1000 // case["n"], -1.0)
        data, noise = POSTERIOR(x, float(process.alpha(t)), float(process.sigma(t)))
        x = float(process.alpha(end)) * data + float(process.sigma(end)) * noise
        np.testing.assert_allclose(x[:, 0], want, rtol=0, atol=EXACT)
    assert (end == -1) == clean


def test_diffusers_trailing_makes_a_timestep_too_many():
    """numpy.arange(1000, 0, -1000 / 61) has 62 elements, the last about 0, which becomes label -1.

    Its scheduler then steps from alphas_cumprod[-1], the noisiest level. We make n of n.
    """
    assert len(GOLDEN["trailing 61"]) == 62
    assert GOLDEN["trailing 61"][-1] == -1
    config = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    times = ds.from_diffusers(config, ignore=("clip_sample",)).times(61)
    np.testing.assert_array_equal(times, GOLDEN["trailing 61"])  # whose last is our clean end


def test_diffusers_ddpm_with_large_variance_ends_noisy():
    """With "fixed_large" its last step adds beta's noise, unless that step starts at t = 0."""
    case = GOLDEN["diffusers"]["ddpm large trailing"]
    sampler, times, tableau = ours(case)
    apart = difference(tableau, case)
    assert apart[:-1].max() < EXACT
    assert apart[-1] > 0.1
    # the forward standard deviation from the clean end, which is sigma itself
    last = states(tableau, START, noises=np.array(case["noises"])[..., None])[-1]
    added = float(sampler.process.sigma(times[-2])) * np.array(case["noises"][-1])
    np.testing.assert_allclose(last + added, case["states"][-1], rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["dpmpp 3m", "dpmpp 3m long"])
def test_diffusers_third_order_lacks_a_factor_two(name):
    """Its states are those of `compatible=True`; the third-order method gives others."""
    case = GOLDEN["diffusers"][name]
    sampler, times, _ = ours(case)
    right = solvers.dpmpp(sampler.process, times, order=3, lower_order_final=case["n"] < 15)
    assert difference(right, case).max() > 1e-4


@pytest.mark.parametrize("name", ["singlestep 3", "singlestep 3 noise"])
def test_diffusers_single_step_3_takes_another_stage(name):
    """Its second stage is the second-order update (half of phi_1), not algorithm 2's with phi_2.

    That stage alone is then ours of order 2, and the step another than the paper's.
    """
    case = GOLDEN["diffusers_solvers"][name]
    stage = states(single_step(case, 2, steps=3), START)
    np.testing.assert_allclose(stage, case["states"][:2], rtol=0, atol=EXACT)
    published = states(single_step(case, 3), START)
    assert published.shape == np.shape(case["states"])  # the same rule for the orders of steps
    np.testing.assert_allclose(published[0], case["states"][0], rtol=0, atol=EXACT)
    assert np.abs(published - case["states"])[1:].max(axis=1).min() > 1e-5


def test_diffusers_deis_interpolates_in_log_rho():
    """What it calls DEIS is neither the paper's tAB nor its rhoAB."""
    case = GOLDEN["diffusers"]["deis 2"]
    sampler, times, _ = ours(case)
    for variable in ("t", "rho"):
        other = solvers.deis(
            sampler.process, times, order=1, variable=variable, lower_order_final=True
        )
        assert difference(other, case).max() > 1e-4


def test_diffusers_unipc_bh1_is_not_finite_at_zero_noise():
    """B(h) = -inf there, and it is multiplied by a sum that is empty; ours is the data."""
    case = GOLDEN["diffusers"]["unipc 2 bh1 to zero"]
    assert case["states"][-1] is None
    assert None not in case["states"][:-1]
    _, _, tableau = ours(case)
    assert np.all(np.isfinite(states(tableau, START)))
    assert tableau.sigma[-1] == 0


@pytest.mark.parametrize("name", ["repeated sigma", "repeated sigma deis"])
def test_diffusers_repeats_the_last_sigma(name):
    """An evaluation is spent on a step of size zero, which leaves the state where it is."""
    case = GOLDEN["diffusers"][name]
    assert case["sigmas"][-1] == pytest.approx(case["sigmas"][-2], rel=1e-12)
    np.testing.assert_allclose(case["states"][-1], case["states"][-2], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="a step of size zero; unset 'use_"):
        ours(case)


def test_diffusers_rounds_labels_but_not_sigmas():
    """Karras and lu labels are rounded; exponential and beta ones are cut off, almost 1 away."""
    for name, least in (("karras", 0.2), ("lu", 0.2), ("exponential", 0.9), ("beta", 0.9)):
        case = GOLDEN["diffusers"][f"dpmpp 2m {name}"]
        _, times, _ = ours(case)
        assert np.all(np.array(case["timesteps"]) == np.round(case["timesteps"]))
        assert np.abs(times[:-1] - case["timesteps"]).max() > least


def test_diffusers_flow_shift_is_applied_to_the_smallest_sigma_twice():
    case = GOLDEN["diffusers"]["flow match shift 3"]
    once = 3 * 0.001 / (1 + 2 * 0.001)
    assert case["sigmas"][-2] == pytest.approx(3 * once / (1 + 2 * once), rel=1e-12)


# -- live -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live():
    """The cases, run again with the installed peers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        for package in ("torch", "diffusers"):
            pytest.importorskip(package, reason="make test-peers installs it")
    if importlib.util.find_spec("k_diffusion") is None:  # importing it needs image packages
        pytest.skip("no k-diffusion; make test-peers installs it")
    spec = importlib.util.spec_from_file_location("make_peers", FIXTURES / "make_peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module.make()


@pytest.mark.peers
def test_the_golden_file_is_what_the_installed_peers_do(live):
    assert live["fields"] == GOLDEN["fields"]
    assert live["trailing 61"] == GOLDEN["trailing 61"]
    check_consistency(live["consistency"])
    for group in ("diffusers", "diffusers_solvers", "k_diffusion"):
        assert set(live[group]) == set(GOLDEN[group])
        for name, case in live[group].items():
            for key in set(case) & {"timesteps", "sigmas", "noises", "states", "shipped"}:
                got, want = (
                    [np.nan if x is None else x for x in cases[name][key] or []]
                    for cases in (live[group], GOLDEN[group])
                )
                assert len(got) == len(want), (name, key)
                tolerance = AS_SHIPPED if key == "shipped" else 1e-9
                for g, w in zip(got, want, strict=True):
                    np.testing.assert_allclose(g, w, tolerance, tolerance, err_msg=f"{name} {key}")


@pytest.mark.peers
def test_diffusers_live(live):
    for name in FOLLOWED:
        check_diffusers(live["diffusers"][name])


@pytest.mark.peers
def test_k_diffusion_live(live):
    for name, case in live["k_diffusion"].items():
        check_k_diffusion(name, case)
