"""Plans inside diffusers: every registered solver, tiny pipelines, files. `make test-peers`."""

import warnings

import jax
import numpy as np
import pytest
from cases import CASES
from elsewhere import network, noises, padded, relative, start, tableau

import diffsamp as ds

pytestmark = pytest.mark.peers
# float32 throughout; a few roundings of each of some twenty operations
CLOSE = 1e-4


@pytest.fixture(scope="module")
def torch():
    """torch, where diffusers is there too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("torch", "diffusers"):
            pytest.importorskip(package, reason="make test-peers installs it")
    import torch

    return torch


@pytest.fixture(scope="module")
def scheduler_class(torch):
    from diffsamp.interop.diffusers import TableauScheduler

    return TableauScheduler


def loop(torch, scheduler, model, x, given=None):
    """A pipeline's loop; `given` holds the noise of every row that adds some."""
    x = torch.tensor(np.asarray(x))
    scheduler.set_timesteps(len(scheduler.timesteps))
    given = iter(given) if given is not None else None
    table = scheduler.config.table
    rows = [n for n, asked in enumerate(table["evaluates"]) if asked] + [len(table["evaluates"])]
    for k, t in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(x, t).numpy()
        output = torch.tensor(model(inputs, np.full(len(inputs), float(t), np.float32)))
        noise = None
        if given is not None:
            noise = [torch.tensor(next(given)) for n in range(*rows[k : k + 2]) if table["c"][n]]
        x = scheduler.step(output, t, x, variance_noise=noise, return_dict=False)[0]
    return x.numpy()


def model_of(score_fn):
    """The network as a pipeline calls it; 1000 t for flow models."""
    per = 1000 if isinstance(score_fn.process, ds.processes.Flow) else 1
    apply = jax.jit(lambda x, t: score_fn.apply(score_fn.params, x, t / per))
    return lambda x, t: np.array(apply(x, t))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prediction", ["noise", "v", "velocity", "edm_f"])
def test_every_registered_solver_agrees_with_sample(torch, scheduler_class, prediction):
    score_fn, key = network(prediction), jax.random.key(7)
    x_T = start(score_fn.process)
    model, names, worst = model_of(score_fn), [], {}
    for case in CASES:
        try:
            tableau(case.name, prediction)
            names.append(case.name)
        except AssertionError:
            assert case.name.startswith("interpolant"), case.name
    for name, table in padded(prediction, names).items():
        own = tableau(name, prediction)
        plan = ds.search.Plan.of(own, score_fn)
        scheduler = scheduler_class.from_plan(plan.to_dict())
        z = noises(own, key, x_T)
        want = ds.sample(score_fn, table, x_T, key=key)
        begin = x_T
        if not own.evaluates[0]:  # noise before the first evaluation belongs to the start
            begin = own.a[0, 0].astype(np.float32) * x_T + own.c[0].astype(np.float32) * z[0]
            z = z[1:]
        c = own.c[len(own.c) - len(z) :]
        z = z[c != 0] if own.stochastic else None
        worst[name] = relative(loop(torch, scheduler, model, begin, z), want)
    assert max(worst.values()) < CLOSE, {k: v for k, v in worst.items() if v >= CLOSE}
    assert len(worst) >= 50
