"""Step-by-step agreement with diffusers and k-diffusion, and where a peer is wrong.

`fixtures/peers.json` holds the states the peers visit on an analytic model, made by
`fixtures/make_peers.py`. diffusers keeps sigmas, and in several schedulers the state, in float32:
agreement is to a few float32 roundings of the largest state (TOLERANCE); k-diffusion runs in
float64 and agrees to 1e-9.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import skewed_mixture, twin

import diffsamp as ds
from diffsamp import solvers

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = json.loads((FIXTURES / "peers.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-5
POSTERIOR = skewed_mixture().posterior
START = np.array(GOLDEN["start"])[:, None]


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
    sampler = ds.from_diffusers(case["config"])
    dynamic = case["config"].get("use_dynamic_shifting")
    times = sampler.times(case["n"], mu=GOLDEN["mu"]) if dynamic else sampler.times(case["n"])
    return sampler, times, sampler.solver(sampler.process, times)


def largest_difference(tableau, case):
    """In units of the largest state visited, at least 1."""
    got, want = states(tableau, START), np.array(case["states"])
    assert got.shape == want.shape
    return np.abs(got - want).max() / max(1.0, np.abs(want).max())


@pytest.mark.parametrize("name", [n for n in GOLDEN["diffusers"] if n != "ddim linspace"])
def test_diffusers_step_by_step(name):
    case = GOLDEN["diffusers"][name]
    _, _, tableau = ours(case)
    # third-order DEIS takes differences of float32 logarithms, which cancel
    assert largest_difference(tableau, case) < (3 if name == "deis 3" else 1) * TOLERANCE


def test_diffusers_ddim_integrates_over_the_wrong_interval_with_linspace():
    """DDIMScheduler ends every step at t - T // n, which is not the next time it evaluates at.

    With n = 8, linspace times are 999, 856, 714, .. and the steps end at 874, 731, 589, ..: states
    labelled 714 live at 731. Built as diffusers does it, with that mismatch, we agree; our own
    steps, which end where the next begins, differ by far more than rounding.
    """
    case = GOLDEN["diffusers"]["ddim linspace"]
    sampler, times, tableau = ours(case)
    assert largest_difference(tableau, case) > 1e-2
    x, process = START, sampler.process
    for t, want in zip(times[:-1], case["states"], strict=True):
        end = max(t - 1000 // case["n"], -1.0)
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        data, noise = POSTERIOR(x, alpha, sigma)
        x = float(process.alpha(end)) * data + float(process.sigma(end)) * noise
        np.testing.assert_allclose(x[:, 0], want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["dpmpp 3m", "dpmpp 3m long"])
def test_diffusers_third_order_lacks_a_factor_two(name):
    """Its states are those of `compatible=True`; the third-order method gives others."""
    case = GOLDEN["diffusers"][name]
    sampler, times, tableau = ours(case)
    right = solvers.dpmpp(sampler.process, times, order=3, lower_order_final=case["n"] < 15)
    assert largest_difference(tableau, case) < TOLERANCE
    assert largest_difference(right, case) > 1e-4


def test_diffusers_deis_interpolates_in_log_rho():
    """What it calls DEIS is neither the paper's tAB nor its rhoAB."""
    case = GOLDEN["diffusers"]["deis 2"]
    sampler, times, _ = ours(case)
    for variable in ("t", "rho"):
        other = solvers.deis(
            sampler.process, times, order=1, variable=variable, lower_order_final=True
        )
        assert largest_difference(other, case) > 1e-4


def test_diffusers_karras_labels_are_rounded_ours_are_not():
    case = GOLDEN["diffusers"]["dpmpp 2m karras"]
    _, times, _ = ours(case)
    assert np.any(np.abs(times - np.round(times)) > 0.1)


@pytest.mark.parametrize("name", list(GOLDEN["k_diffusion"]))
def test_k_diffusion_step_by_step(name):
    """Its grid is Karras's with sigma_N = 0; its sampler is ours on those times.

    LMS integrates its weights with a quadrature of relative tolerance 1e-4, which is exact here
    because the integrands are cubic polynomials.
    """
    case = GOLDEN["k_diffusion"][name]
    sigmas = np.array(case["sigmas"])
    process = ds.processes.edm(sigmas[-2], sigmas[0])
    np.testing.assert_allclose(
        ds.schedules.karras(process, len(sigmas) - 1), sigmas, rtol=2e-6
    )  # get_sigmas_karras works in float32
    free = {"lower_order_final": False}
    tableau = {
        "euler": lambda: solvers.euler(process, sigmas),
        "heun": lambda: solvers.heun(process, sigmas),
        "dpmpp_2m": lambda: solvers.dpmpp(process, sigmas, **free),
        "lms": lambda: solvers.get("lms")(process, sigmas),
        "dpm_2": lambda: solvers.dpm2(process, sigmas),
        "euler_ancestral": lambda: solvers.ddim(process, sigmas, eta=1.0),
        "dpmpp_2m_sde": lambda: solvers.dpmpp(process, sigmas, eta=1.0, **free),
        "dpmpp_2m_sde_heun": lambda: solvers.dpmpp(
            process, sigmas, eta=0.5, variant="heun", **free
        ),
        "dpmpp_3m_sde": lambda: solvers.dpmpp(
            process, sigmas, order=3, eta=1.0, compatible=True, variant="heun", **free
        ),
        "dpmpp_sde": lambda: solvers.dpmpp_sde(process, sigmas),
    }[name]()
    got = states(tableau, START * sigmas[0], noises=np.array(case["noises"])[..., None])
    if tableau.nfe > len(
        case["states"]
    ):  # two stages: its callback sees whole steps, we also have the predicted points
        got = np.concatenate([got[1:-1:2], got[-1:]])
    want = np.array(case["states"])
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * sigmas[0])


@pytest.mark.peers
def test_the_golden_file_is_what_the_installed_peers_do():
    """Live: run the peers again and compare with the file, so that it cannot go stale."""
    pytest.importorskip("diffusers", reason="make test-peers installs it")
    pytest.importorskip("torch", reason="make test-peers installs it")
    sys.path.insert(0, str(FIXTURES))
    try:
        live = importlib.import_module("make_peers").make()
    finally:
        sys.path.remove(str(FIXTURES))
    for group in ("diffusers", "k_diffusion"):
        assert set(live[group]) == set(GOLDEN[group])
        for name, case in live[group].items():
            want = GOLDEN[group][name]
            np.testing.assert_allclose(case["states"], want["states"], rtol=1e-5, atol=1e-5)
