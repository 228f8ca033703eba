"""A plan as a function of k-diffusion's form, which ComfyUI takes too.

k-diffusion's model is asked for its denoised image, `model(x, sigma, **extra_args)`, at x = x_0 +
sigma eps: for networks that predict noise, v or the data (whatever their process) a state u is
handed over as u / alpha at sigma / alpha. Flow models are asked in their own coordinates, x = (1 -
sigma) x_0 + sigma eps with sigma in [0, 1], as ComfyUI does. Which it is follows from the table.

Neither torch nor JAX is imported: whatever multiplies and adds like an array will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffsamp.interop import numpy as reader

__all__ = ["plan_sigmas", "sample_tableau"]


def plan_sigmas(plan: Any) -> list[float]:
    """The levels of a plan's evaluations and its end, in k-diffusion's coordinates.

    What takes the place of a schedule: the start is to be noised to the first of them, and a run
    that begins at a later one (image to image) takes the rest, `plan_sigmas(plan)[k:]`.

    Args:
      plan: as for `sample_tableau`.

    Raises:
      FileNotFoundError, ValueError: as for `sample_tableau`.
    """
    table = _read(plan)
    return [_level(table, n)[1] for n in [*_asked(table), len(table["evaluates"])]]


def sample_tableau(
    model: Callable[..., Any],
    x: Any,
    sigmas: Any = None,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    plan: Any = None,
    noise_sampler: Callable[[float, float], Any] | None = None,
) -> Any:
    """Run a plan as `k_diffusion.sampling.sample_*` do.

    Args:
      model: `model(x, sigma, **extra_args)`, with sigma of shape (batch,); returns the denoised x.
      x: (batch, ...) the start, noised to the plan's first sigma, or to `sigmas[0]`.
      sigmas: where to begin: its first must be one of `plan_sigmas(plan)`, to one percent, the
        others are the plan's whatever is given. None: the first.
      extra_args: of the model.
      callback: called with x, i, sigma, sigma_hat and denoised after every evaluation.
      disable: of a progress bar, which there is none of.
      plan: a plan's or tableau's path, what it holds, or the object.
      noise_sampler: `noise_sampler(sigma, sigma_next)`, standard noise like x, for plans that add
        some; None: torch's, by its global generator.

    Returns:
      (batch, ...) the sample, at the plan's last sigma.

    Raises:
      FileNotFoundError: no such file.
      TypeError: no plan.
      ValueError: not a plan; one that is not of plain numbers, or asks where no denoised image
        determines what it wants (at alpha = 0, or noise at sigma = 0); `sigmas` that begin nowhere
        on it; an output of another shape.
    """
    del disable
    table = _read(plan)
    numbers = reader.calls(table, {}, "data")
    rows = _asked(table)
    first = rows[0] if sigmas is None else rows[_begin(plan_sigmas(plan)[:-1], float(sigmas[0]))]
    if first == rows[0]:
        first = 0
    u: list[Any] = [_level(table, first)[0] * x]
    m: list[Any] = []
    for n in range(first, len(table["evaluates"])):
        scale, sigma = _level(table, n)
        output = 0 * x
        if table["evaluates"][n]:
            asked = u[0] / scale
            denoised = model(asked, _full(asked, sigma), **(extra_args or {}))
            if denoised.shape != x.shape:
                raise ValueError(
                    f"`model` must return the shape of x, {tuple(x.shape)}; got "
                    f"{tuple(denoised.shape)}."
                )
            output = numbers["state"][n] * u[0] + numbers["output"][n] * denoised
            if callback is not None:
                said = {"x": asked, "i": rows.index(n), "sigma": sigma, "sigma_hat": sigma}
                callback({**said, "denoised": denoised})
        if n == first > 0:
            u, m = reader.as_if_before(table, n, u[0], output)
        else:
            m.insert(0, output)
        next_sigma = _level(table, n + 1)[1]

        def draw(row: int, ends: tuple[float, float] = (sigma, next_sigma)) -> Any:
            del row
            return _noise_like(x) if noise_sampler is None else noise_sampler(*ends)

        u.insert(0, reader.advance(table, n, u, m, draw))
        del u[len(table["a"][n]) + 1 :], m[len(table["b"][n]) :]
    return u[0] / _level(table, len(table["evaluates"]))[0]


def _read(plan: Any) -> Mapping[str, Any]:
    """The table, of plain numbers and levels that k-diffusion's coordinates know."""
    if plan is None:
        raise TypeError("pass `plan`, a plan's file or object: sample_tableau(model, x, plan=..).")
    table, _ = reader.read(plan)
    if any(np.ndim(table[key]) != 2 for key in ("a", "b")):
        raise ValueError("only a table of plain numbers runs here; this one has fields.")
    if table.get("asked") is not None:
        raise ValueError(
            "the plan tells its network other times than the states' (conditioning times), which "
            'k-diffusion\'s models derive from sigma: search with numbers=("times", "weights").'
        )
    if not _is_flow(table) and not np.all(np.asarray(table["alpha"]) > 0):
        raise ValueError(
            "the plan has a level of noise alone (alpha = 0), where sigma / alpha is infinite and "
            "k-diffusion's models cannot be asked."
        )
    return table


def _asked(table: Mapping[str, Any]) -> list[int]:
    return [n for n, asked in enumerate(table["evaluates"]) if asked]


def _is_flow(table: Mapping[str, Any]) -> bool:
    return bool(np.allclose(np.add(table["alpha"], table["sigma"]), 1.0))


def _level(table: Mapping[str, Any], n: int) -> tuple[float, float]:
    """(what the state is divided by, sigma) of row n in k-diffusion's coordinates."""
    alpha, sigma = float(table["alpha"][n]), float(table["sigma"][n])
    return (1.0, sigma) if _is_flow(table) else (alpha, sigma / alpha)


def _begin(levels: list[float], sigma: float) -> int:
    """The evaluation whose level is sigma."""
    apart = [abs(level - sigma) / max(level, 1e-12) for level in levels]
    index = int(np.argmin(apart))
    if apart[index] > 0.01:
        raise ValueError(
            f"the plan cannot begin at sigma = {sigma:g}: its evaluations are at "
            f"{', '.join(f'{level:.4g}' for level in levels)} (plan_sigmas(plan))."
        )
    return index


def _full(x: Any, value: float) -> Any:
    """(batch,) copies of a number, in x's kind of array; whatever x holds, NaN included."""
    if hasattr(x, "new_full"):  # torch
        return x.new_full((x.shape[0],), value)
    return np.full((x.shape[0],), value, x.dtype)


def _noise_like(x: Any) -> Any:
    import torch

    return torch.randn_like(x)
