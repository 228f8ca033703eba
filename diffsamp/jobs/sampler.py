"""`sampler`: from names and a budget to a function that samples."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from diffsamp import schedules, solvers
from diffsamp._core import random
from diffsamp._core.types import Conditions, Key, PyTree, Value
from diffsamp.sampling import Policy, sample
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["Sampler", "sampler"]


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A network and a tableau, ready to sample; made by `sampler`.

    A pytree: pass it through `jax.jit`, or jit its call.

    Attributes:
      score_fn: the network.
      tableau: the sampler.
    """

    score_fn: ScoreFn
    tableau: Tableau

    def __call__(
        self,
        key: Key,
        x_T: PyTree,
        *,
        cond: Conditions | None = None,
        checkpoint: bool | Policy = False,
    ) -> PyTree:
        """Sample.

        Args:
          key: a random key, or one per sample; for the start, if it is drawn here, and the noise.
            With `x_T` given also what `diffsamp.brownian_key` returns.
          x_T: the start, or the shape (batch, ...) of one to draw: the process's prior, scaled to
            the level at which the tableau begins (`process.start_sample`).
          cond: keyword arguments for the network.
          checkpoint: as for `diffsamp.sample`.

        Returns:
          Samples shaped like x_T.
        """
        if isinstance(x_T, tuple) and all(isinstance(size, int) for size in x_T):
            if isinstance(key, random.Brownian):
                raise TypeError(
                    "a start cannot be drawn with a `brownian_key`: draw `x_T` by "
                    "`score_fn.process.start_sample` and pass it."
                )
            shape = x_T if self.score_fn.batched else (1, *x_T)
            keys = random.sample_keys(key, shape[0] if self.score_fn.batched else None)
            split = jax.vmap(jax.random.split) if keys.ndim else jax.random.split
            pair = split(keys)
            key_prior, key = (pair[..., i] for i in (0, 1))
            first = self.tableau.times[0]
            keys = jnp.reshape(key_prior, shape[:1])
            x_T = self.score_fn.process.start_sample(keys, shape, first)
            x_T = x_T if self.score_fn.batched else x_T[0]
        return sample(self.score_fn, self.tableau, x_T, key=key, cond=cond, checkpoint=checkpoint)


jax.tree_util.register_dataclass(Sampler, ["score_fn", "tableau"], [])


def sampler(
    score_fn: ScoreFn,
    solver: str,
    *,
    nfe: int,
    schedule: str | None = None,
    final: str = "clean",
    **options: Value,
) -> Sampler:
    """A function that samples, from names and a budget.

    Examples:
      >>> import jax, diffsamp as ds
      >>> network = ds.targets.gaussian([0.0, 1.0], 0.1).score_fn(ds.processes.flow())
      >>> generate = ds.sampler(network, "unipc", nfe=8)
      >>> generate(jax.random.key(0), (16, 2)).shape
      (16, 2)

    Args:
      score_fn: the network.
      solver: a name of `ds.solvers.names()`, or what diffusers or k-diffusion call it.
      nfe: exactly how many network evaluations.
      schedule: a name in `ds.schedules.NAMES`; None: the solver's own, log-SNR for most.
      final: "clean" or "t_min", where the schedule ends.
      **options: of the solver's function, such as order=2.

    Returns:
      A `Sampler`: call it with (key, x_T or shape); its `tableau` says what it does.

    Raises:
      ValueError: an unknown name, a budget the solver cannot meet, with the nearest it can, or
        options that change how many evaluations a step takes.
    """
    found = solvers.get(solver)
    closed = final == "clean"
    steps = found.steps(nfe, closed=closed)
    if steps is None:
        near = [n for n in range(max(1, nfe - 4), nfe + 5) if found.steps(n, closed=closed)]
        near.sort(key=lambda n: abs(n - nfe))
        raise ValueError(
            f"{found.name} cannot make exactly {nfe} evaluations; the nearest it can are "
            f"{' and '.join(str(n) for n in sorted(near[:2]))}."
        )
    times = schedules.get(schedule or found.schedule)(score_fn.process, steps, final=final)
    tableau = found(score_fn.process, times, **options)
    if tableau.nfe != nfe:
        raise ValueError(
            f"with {options} {found.name} makes {tableau.nfe} evaluations in {steps} steps, not "
            f"{nfe}; build the tableau with ds.solvers and pass it to ds.sample or ds.Sampler."
        )
    return Sampler(score_fn, tableau)
