"""Every published config of fixtures/schedulers ends where diffusers does, at 1 to 50 steps.

`fixtures/diffusers.json` holds the last states of diffusers' own code in float64, made by
`fixtures/make_diffusers.py`. EXACT is a few thousand roundings, of what the grids amplify; the
exceptions say why they are larger. Tests marked `peers` run diffusers itself.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from cases import skewed_mixture, twin

import diffsamp as ds

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = json.loads((FIXTURES / "diffusers.json").read_text(encoding="utf-8"))
START = np.array(json.loads((FIXTURES / "peers.json").read_text(encoding="utf-8"))["start"])
POSTERIOR = skewed_mixture().posterior
EXACT = 1e-9
# SCM starts at 1.5708 there, 3.7e-6 beyond pi / 2, which is 1.6e-5 in its samples
LOOSE = {"sana-sprint": 2e-5}
# steps of no length at all: the start comes back
NO_STEP = {("cosmos-1", "1")}
MU = 0.9


def noise_of(call):
    return np.random.default_rng(1000 + call).normal(size=START.size)[:, None]


def tableau_of(name, n, **options):
    sampler = ds.from_diffusers(FIXTURES / "schedulers" / f"{name}.json")
    config = json.loads((FIXTURES / "schedulers" / f"{name}.json").read_text(encoding="utf-8"))
    if config.get("use_dynamic_shifting"):
        options.setdefault("mu", MU)
    # diffusers' linspace DDIM steps over other intervals than those between its evaluations
    compatible = {"compatible": True} if name == "animatediff" else {}
    return sampler, sampler.solver(sampler.process, sampler.times(n, **options), **compatible)


def last_state(sampler, tableau):
    """u_N from diffusers' start, in diffusers' units."""
    calls = np.cumsum(tableau.evaluates) - 1
    noises = [noise_of(calls[k]) for k in range(tableau.rows) if tableau.c[k] != 0]
    scale = sampler.process.prior_std
    if isinstance(sampler.process, ds.processes.EDM):
        scale = tableau.sigma[0]
    return twin(tableau, POSTERIOR, START[:, None] * scale, noises=noises)[:, 0]


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_published_config_ends_where_diffusers_does(name):
    for n, want in GOLDEN[name].items():
        if want is None:
            continue
        if (name, n) in NO_STEP:
            with pytest.raises(ValueError, match="takes no step at all"):
                tableau_of(name, int(n))
            continue
        sampler, tableau = tableau_of(name, int(n))
        got = last_state(sampler, tableau)
        scale = max(1.0, np.abs(want).max())
        apart = np.abs(got - want).max() / scale
        assert apart < LOOSE.get(name, EXACT), (name, n, apart)
