"""Plans in k-diffusion's form agree with `ds.sample`; NumPy stands for torch."""

import itertools

import jax
import numpy as np
import pytest
from cases import CASES
from elsewhere import NFE, PROCESSES, network, noises, padded, relative, start, tableau

import diffsamp as ds
from diffsamp.interop.k_diffusion import plan_sigmas, sample_tableau


def model_of(prediction):
    """What k-diffusion's wrappers make of a network: (x, sigma) -> denoised x.

    By the exact posterior of the data, not by this library's conversions: noise and v models are
    asked at x_0 + sigma eps, flow models at (1 - sigma) x_0 + sigma eps.
    """
    rng = np.random.default_rng(3)
    target = ds.targets.gaussian_mixture(
        [0.5, 0.3, 0.2], rng.normal(size=(3, 3)) * 0.8, np.array([0.02, 0.05, 0.1])
    )
    flow = prediction == "velocity"

    def model(x, sigma, gain=1.0):
        assert sigma.shape == x.shape[:1]
        sigma = float(sigma[0])
        return gain * target.posterior(x, 1 - sigma if flow else 1.0, sigma)[0]

    return model


def check(prediction, names, tolerance, n=4):
    score_fn, key = network(prediction, "float64"), jax.random.key(7)
    x_T = start(score_fn.process, n, np.float64)
    for name, table in padded(prediction, names).items():
        own = tableau(name, prediction)
        z = iter(noises(own, key, x_T)[np.asarray(own.c) != 0])
        want = ds.sample(score_fn, table, x_T, key=key)
        scale = 1.0 if prediction == "velocity" else own.alpha[0]
        got = sample_tableau(
            model_of(prediction), x_T / scale, plan=own, noise_sampler=lambda *_, z=z: next(z)
        )
        end = 1.0 if prediction == "velocity" else own.alpha[-1]
        assert relative(got * end, want) < tolerance, name
        assert next(z, None) is None


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_every_registered_solver_agrees_with_sample(x64, prediction):
    names = []
    for case in CASES:
        try:
            tableau(case.name, prediction)
            names.append(case.name)
        except AssertionError:
            assert case.name.startswith("interpolant"), case.name
    check(prediction, names, 1e-10)


@pytest.mark.parametrize("prediction", ["v", "edm_f", "score"])
def test_other_predictions_agree_with_sample(x64, prediction):
    check(prediction, ["ddim", "unipc3", "heun", "seeds3"], 1e-10)


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_a_run_may_begin_at_a_later_sigma(x64, prediction):
    """A model that always answers one x_0: every method ends on its line, from wherever."""
    data, noise = np.array([[0.5, -1.0, 2.0]]), np.array([[1.0, 0.3, -0.7]])
    for name in ("unipc3", "heun", "bdia", "ipndm4"):
        table = tableau(name, prediction)
        levels = plan_sigmas(table)
        assert len(levels) == table.nfe + 1
        for k in (0, 2, 5):
            alpha = 1 - levels[k] if prediction == "velocity" else 1.0
            x = alpha * data + levels[k] * noise
            got = sample_tableau(lambda x, sigma: data, x, levels[k:], plan=table)
            end = 1 - levels[-1] if prediction == "velocity" else 1.0
            # a noise prediction is divided by the last, small sigma
            assert relative(got, end * data + levels[-1] * noise) < 1e-9, (name, k)


def test_the_callback_sees_every_evaluation():
    table, seen = tableau("heun", "noise"), []
    x = start(PROCESSES["noise"]) / np.float32(table.alpha[0])
    out = sample_tableau(
        model_of("noise"), x, None, {"gain": 0.9}, seen.append, True, plan=table.to_dict()
    )
    assert [said["i"] for said in seen] == list(range(table.nfe))
    assert [said["sigma"] for said in seen] == plan_sigmas(table)[:-1]
    assert set(seen[0]) == {"x", "i", "sigma", "sigma_hat", "denoised"}
    plain = sample_tableau(model_of("noise"), x, plan=table)
    assert relative(out, plain) > 1e-3  # extra_args reach the model


def test_errors_say_what_is_wrong(tmp_path):
    table = tableau("ddim", "noise")
    assert table.nfe == NFE
    model, x = model_of("noise"), np.ones((2, 3), np.float32)
    with pytest.raises(TypeError, match="pass `plan`"):
        sample_tableau(model, x)
    with pytest.raises(FileNotFoundError, match="there is no plan"):
        sample_tableau(model, x, plan=tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"cannot begin at sigma = 3\.3: its evaluations are at"):
        sample_tableau(model, x, [3.3, 0.0], plan=table)
    with pytest.raises(ValueError, match="must return the shape of x"):
        sample_tableau(lambda x, sigma: x[:1], x, plan=table)
    clean = ds.processes.vp_discrete(zero_terminal_snr=True)
    table = ds.solvers.ddim(clean, [999.0, 700.0, 300.0, 0.0])
    with pytest.raises(ValueError, match="level of noise alone"):
        sample_tableau(model, x, plan=table)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_with_torch_it_is_k_diffusions_own_euler():
    torch = pytest.importorskip("torch", reason="make test-peers installs it")
    process = PROCESSES["edm_f"]
    table = ds.solvers.euler(process, ds.schedules.karras(process, 6))
    sigmas = torch.tensor(plan_sigmas(table))
    x = torch.tensor(start(process))

    def model(x, sigma):
        return torch.tensor(model_of("edm_f")(x.numpy(), sigma.numpy()))

    got = sample_tableau(model, x, sigmas, plan=table)
    for s, t in itertools.pairwise(sigmas):  # arXiv:2206.00364, as k-diffusion has it
        x = x + (x - model(x, s[None].expand(len(x)))) / s * (t - s)
    assert relative(got.numpy(), x.numpy()) < 1e-5
    noisy = ds.solvers.ddpm(process, ds.schedules.karras(process, 6))
    assert torch.isfinite(sample_tableau(model, torch.tensor(start(process)), plan=noisy)).all()
