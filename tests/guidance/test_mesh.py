"""On a mesh a batch stays where it is: no transform and no particle reads another sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guidance.exact import build
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import diffsamp as ds
from diffsamp import guidance, inverse, steering

PROCESS = ds.processes.vp_linear()
ROWS, SIZE = build("ddim", PROCESS, 3), 8
DDPM = build("ddpm", PROCESS, 3)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def network(params, x, t):
    return jnp.tanh(params * x + t[:, None])


def misfit(data, level, cond):
    del level
    return ((data[:, :2] - cond["y"]) ** 2).sum(1)


def made(name, score_fn):
    """What is sampled, and by what."""
    keep = np.array([1.0, 1.0, 0.0, 0.0])
    seen = inverse.mask(keep)
    key = jax.random.key(2)
    return {
        "loss": lambda: guidance.loss(score_fn, misfit, 0.1, names=["y"]),
        "draws": lambda: guidance.loss(score_fn, misfit, 0.1, names=["y"], samples=2, key=key),
        "tfg": lambda: guidance.tfg(score_fn, misfit, ROWS, 0.01, 0.01, names=["y"]),
        "measurement": lambda: guidance.measurement(score_fn, seen, "full", 0.1, iterations=3),
        "on_data": lambda: guidance.inpaint(score_fn, "full", keep, ROWS),
    }[name]()


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "measurement",
        "on_data",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("draws", "tfg")),
        "steering",
    ],
)
def test_a_batch_stays_where_it_is(name):
    count = len(jax.devices())
    assert SIZE % count == 0
    mesh = jax.make_mesh((count,), ("batch",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    score_fn = ds.ScoreFn(network, jnp.ones(()), PROCESS)
    x_T = PROCESS.prior_sample(jax.random.key(0), (SIZE, 4), dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(1), SIZE)
    cond = None
    if name in ("loss", "draws", "tfg"):
        cond = {"y": jnp.ones((SIZE, 2), jnp.float32)}
    elif name != "steering":
        cond = {"full": jnp.ones((SIZE, 4), jnp.float32)}

    def run(score_fn, x_T, keys, cond):
        if name == "steering":
            potential = steering.reward(lambda x, level, cond: x.sum(1), 0.5)
            options = {"potential": potential, "particles": 3}
            return steering.sample(score_fn, DDPM, x_T, key=keys, **options)
        return ds.sample(made(name, score_fn), ROWS, x_T, cond=cond)

    arguments = jax.device_put((x_T, keys, cond), sharding)
    program = jax.jit(run).lower(score_fn, *arguments).compile()
    text = program.as_text()
    assert not [word for word in COLLECTIVES if f"{word}(" in text]
    got, want = program(score_fn, *arguments), jax.jit(run)(score_fn, x_T, keys, cond)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.sharding.is_equivalent_to(sharding, one.ndim)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
