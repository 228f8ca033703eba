"""From data to noise and back: exact inverses of two-step methods, and translation by two models.

Any deterministic solver encodes when its times rise, `solvers.ddim(process, times[::-1])`; what
decoding then returns is off by the discretisation error. A row of BDIA or O-BELM,

    u_{n+1} = a_0 u_n + a_1 u_{n-1} + b_0 m_n,

can instead be solved for u_{n-1}, with the same output m_n: `encode` and `diffsamp.resume` undo one
another up to rounding, however few the steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp._core.checks import expect_state
from diffsamp._core.types import Conditions, PyTree
from diffsamp.sampling import State, init, resume, sample
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["Encoded", "encode", "inverse", "translate"]

_MOST_GROWTH = 1e8  # beyond 1 / eps of float32 rounding alone makes the noise


class Encoded(NamedTuple):
    """What `encode` returns.

    Attributes:
      x_T: the state at the first time of the tableau. Sampling from it alone returns the data up
        to the discretisation error.
      state: before the tableau's second row; `diffsamp.resume` on it returns the data to rounding.
    """

    x_T: PyTree
    state: State


def inverse(tableau: Tableau) -> Tableau:
    """The tableau that runs an invertible two-step method backwards, from data to noise.

    Its first row, which has one state only, is DDIM's. The others ask the network what the forward
    rows asked it. One evaluation a row, the first at the last level of `tableau`, which must
    therefore not be the clean end.

    Args:
      tableau: one of `solvers.bdia` or `solvers.belm`, or of that form, on a grid that ends at
        sigma > 0 (a schedule with final="t_min").

    Raises:
      ValueError: a tableau that cannot be inverted, a last level of sigma = 0, or one whose
        backward run multiplies rounding errors by more than 10^8 (a small gamma of BDIA).

    Reference: Zhang, Lewis & Kleijn 2023, arXiv:2307.10829, equation 25; Wang et al. 2024,
    arXiv:2410.07273.
    """
    a, b = np.asarray(tableau.a), np.asarray(tableau.b)
    rows = tableau.rows
    if not (
        a.ndim == 2
        and not tableau.stochastic
        and tableau.nfe == rows > 1
        and tableau.p == 2
        and np.all(a[1:, 1] != 0)
        and np.all(b[:, 1:] == 0)
    ):
        raise ValueError(
            f"tableau {tableau.name!r} cannot be inverted: every row after the first must combine "
            "two states and one output, as solvers.bdia (gamma > 0) and solvers.belm do. Any "
            "deterministic solver encodes approximately with rising times."
        )
    alpha, sigma = tableau.alpha[::-1], tableau.sigma[::-1]
    if sigma[0] == 0:
        raise ValueError(
            f"tableau {tableau.name!r} ends at sigma = 0, where the network cannot be asked for "
            'the noise. Build it on a grid that ends before, such as a schedule with final="t_min".'
        )
    new_a, new_b = np.zeros((rows, 2)), np.zeros((rows, 1))
    forward = np.arange(rows - 1, 0, -1)  # row k backwards is forward row N - k
    new_a[1:, 0] = -a[forward, 0] / a[forward, 1]
    new_a[1:, 1] = 1 / a[forward, 1]
    new_b[1:, 0] = -b[forward, 0] / a[forward, 1]
    target = np.concatenate([[[0.0, 1.0]], tableau.target[forward]])
    new_a[0, 0] = alpha[1] / alpha[0]
    new_b[0, 0] = sigma[1] - sigma[0] * alpha[1] / alpha[0]

    error, growth = np.zeros(rows + 1), 1.0
    error[1] = 1.0
    for k in range(1, rows):  # an error of the second state, in x / alpha, which DDIM carries as is
        error[k + 1] = new_a[k, 0] * error[k] + new_a[k, 1] * error[k - 1]
        growth = max(
            growth,
            abs(error[k + 1]) * np.hypot(alpha[1], sigma[1]) / np.hypot(alpha[k + 1], sigma[k + 1]),
        )
    if growth > _MOST_GROWTH:
        raise ValueError(
            f"running {tableau.name!r} backwards multiplies rounding errors by {growth:.1g}: "
            "take gamma in [0.92, 1], fewer steps, or a more even grid."
        )
    return Tableau.create(
        times=tableau.times[::-1],
        alpha=alpha,
        sigma=sigma,
        target=target,
        a=new_a,
        b=new_b,
        asked=None
        if tableau.asked is None
        else np.concatenate([tableau.times[-1:], tableau.asked[forward]]),
        name=f"inverse of {tableau.name}",
        source=tableau.source,
        check="none",
    )


def encode(
    score_fn: ScoreFn,
    tableau: Tableau,
    x_0: PyTree,
    *,
    cond: Conditions | None = None,
) -> Encoded:
    """The noise from which an invertible tableau makes `x_0`, and the state that returns it.

    Examples:
      >>> import jax.numpy as jnp, diffsamp as ds
      >>> process = ds.processes.vp_linear()
      >>> score_fn = ds.targets.gaussian([0.5], 0.04).score_fn(process)
      >>> times = ds.schedules.logsnr(process, 20, final="t_min")
      >>> tableau = ds.solvers.bdia(process, times)
      >>> x_0 = jnp.array([[0.3], [0.7]])
      >>> noise = ds.inversion.encode(score_fn, tableau, x_0)
      >>> back = ds.resume(score_fn, tableau, noise.state)
      >>> bool(jnp.abs(back.x - x_0).max() < 1e-6)
      True

    Args:
      score_fn: the network.
      tableau: that decodes; see `inverse` for which can be.
      x_0: the data, at the last time of the tableau.
      cond: keyword arguments for the network. Decode with the same to return x_0, with others to
        edit it.

    Returns:
      An `Encoded`; N evaluations. Decoding costs N - 1. What returns is off by rounding of the
      largest state on the way, which for VE and EDM is some 100 times the data.

    Raises:
      TypeError, ValueError: as `inverse` and `sample`.
    """
    backwards = inverse(tableau)
    batch = expect_state(x_0, "x_0", score_fn.batched)
    done = resume(score_fn, backwards, init(backwards, x_0, batched=batch is not None), cond=cond)
    x_T, second = done.x, jax.tree.map(lambda slots: slots[(tableau.rows - 1) % 2], done.points)
    state = init(tableau, x_T, batched=batch is not None)
    points = jax.tree.map(lambda slots, u: slots.at[0].set(u), state.points, x_T)
    return Encoded(x_T, state._replace(row=jnp.ones((), jnp.int32), x=second, points=points))


def translate(
    source_fn: ScoreFn,
    target_fn: ScoreFn,
    x: PyTree,
    up: Tableau,
    down: Tableau,
    *,
    source_cond: Conditions | None = None,
    target_cond: Conditions | None = None,
) -> PyTree:
    """Dual diffusion implicit bridge: encode with one model, decode with another.

    Both ways with the same model, only discretisation error is left; x, translated there and back,
    returns up to it.

    Args:
      source_fn: the model of the domain x comes from.
      target_fn: the model of the domain it goes to.
      x: data at the first time of `up`.
      up: a deterministic tableau of `source_fn.process` on rising times.
      down: a deterministic tableau of `target_fn.process` from the level where `up` ends.
      source_cond: keyword arguments for the first network.
      target_cond: for the second.

    Returns:
      The translated data, like x.

    Raises:
      ValueError: a stochastic tableau, `up` that does not rise, or levels that do not meet.

    Reference: Su et al. 2022, arXiv:2203.08382, algorithm 1.
    """
    for name, tableau in (("up", up), ("down", down)):
        if tableau.stochastic:
            raise ValueError(
                f"`{name}` must be deterministic, or what it loses cannot come back; "
                f"{tableau.name!r} adds noise."
            )
    if not up.times[-1] > up.times[0]:
        raise ValueError(
            "`up` must be built on rising times, from data to noise; got times from "
            f"{up.times[0]:g} to {up.times[-1]:g}. Pass times[::-1] to the solver."
        )
    up.then(down)  # raises where the levels do not meet
    noise = sample(source_fn, up, x, cond=source_cond)
    return sample(target_fn, down, noise, cond=target_cond)
