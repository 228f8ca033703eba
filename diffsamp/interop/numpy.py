"""Run a plan with NumPy alone: the reference reader of docs/plan-format.md, in this one file.

    u[n + 1] = sum_i a[n, i] u[n - i] + sum_j b[n, j] m[n - j] + c[n] z[n] + d[n]
    m[n]     = state[n] u[n] + output[n] F(scale[n] u[n], time[n]), or 0 where no one is asked

u[0] is x_T, u[N] the sample, F the network's own output. It imports nothing of diffsamp and may be
copied; the readers for diffusers and k-diffusion beside it use its `read` and `calls`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["advance", "as_if_before", "calls", "read", "run"]

_NAMES = ("data", "noise", "v", "score", "velocity", "edm_f")
_ALIASES = {
    "sample": "data",
    "epsilon": "noise",
    "eps": "noise",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}


def read(plan: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the table, what is known of its network) of a plan or a tableau.

    Args:
      plan: a file's path, what it holds, or an object with `to_dict`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a plan, another version, or a table that does not hold together.
    """
    where = "the plan"
    if hasattr(plan, "to_dict"):
        plan = plan.to_dict()
    if not isinstance(plan, Mapping):
        where, file = str(plan), Path(plan)
        if not file.is_file():
            raise FileNotFoundError(f"there is no plan {where}.")
        try:
            plan = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{where} is not JSON, so no plan: {error}.") from error
    kind = plan.get("format") if isinstance(plan, Mapping) else None
    newest = {"diffsamp.plan": 2, "diffsamp.tableau": 1}.get(str(kind))
    if newest is None:
        raise ValueError(f'{where} is no plan: its "format" is {kind!r}, not "diffsamp.plan".')
    if plan.get("version") not in range(1, newest + 1):
        raise ValueError(f"{where} has version {plan.get('version')!r}; this reads 1 to {newest}.")
    table = plan.get("tableau", plan)
    arrays = {"times": 1, "alpha": 1, "sigma": 1, "target": 0, "a": 0, "b": 0, "c": 0}
    if lacking := [key for key in (*arrays, "evaluates") if key not in table]:
        raise ValueError(f"{where} lacks {', '.join(lacking)}.")
    rows = len(table["evaluates"])
    if wrong := [key for key, extra in arrays.items() if len(table[key]) != rows + extra]:
        raise ValueError(f"{where} is corrupt: {', '.join(wrong)} do not fit its {rows} rows.")
    if np.ndim(table["times"]) != 1:
        raise ValueError(f"{where} is stacked, one sampler per sample; save each by itself.")
    return dict(table), dict(plan.get("network", {}))


def calls(
    table: Mapping[str, Any], network: Mapping[str, Any], prediction: str | None = None
) -> dict[str, list[float]]:
    """Per row "time", "scale", "state" and "output", as in the module's equation.

    Args:
      table: of `read`.
      network: of `read`.
      prediction: what the network at hand predicts, "data", "noise", "v", "score", "velocity" or
        "edm_f", or diffusers' names; None: what the plan says. Where it differs from that the
        network gets the process's own time ("edm_f": log(sigma / alpha) / 4).

    Raises:
      ValueError: the prediction is not known, or does not determine what a row wants; or rows
        that ask different conditions.
    """
    prediction = _ALIASES.get(str(prediction), prediction)
    around = {str(one["name"]) for one in network.get("guidance", ())}
    if "Selected" in around:
        raise ValueError(
            "the plan asks another condition at some rows (unfolded guidance); this reader does "
            "not. Search the guided network instead, such as guidance.cfg's."
        )
    if "FirstAnswer" in around:
        raise ValueError(
            "the plan's first answer is known without the network, and not in its table: write it "
            "there with solvers.cached_first_answer or analytic_first_step."
        )
    if "calls" in network and prediction in (None, network["prediction"]):
        return {key: [float(v) for v in network["calls"][key]] for key in _KEYS}
    if prediction is None:
        raise ValueError(f"the plan does not say what its network predicts; pass one of {_NAMES}.")
    rows: list[tuple[float, ...]] = []
    for n, asked in enumerate(table["evaluates"]):
        t, alpha, sigma = (float(table[key][n]) for key in ("times", "alpha", "sigma"))
        if table.get("asked") is not None:  # conditioning times
            t = float(table["asked"][n])
            if prediction == "edm_f":
                raise ValueError(
                    "the plan tells its network other times than the states', and not in the form "
                    'that "edm_f" takes; use the prediction that it was made for.'
                )
        scale, size = 1.0, network.get("sigma_data", 0.5)
        if prediction == "edm_f" and asked:
            scale = 1 / np.hypot(sigma, size * alpha)
            t = np.log(sigma / alpha) / 4 if sigma > 0 else -np.inf
        source = _weights(prediction, alpha, sigma, size, table)
        rows.append((t, scale, *_conversion(source, table["target"][n], alpha, sigma)))
        if not asked:
            rows[-1] = (0.0, 0.0, 0.0, 0.0)
        elif not np.all(np.isfinite(rows[-1])):
            raise ValueError(f"at row {n} {prediction!r} does not determine what the plan wants.")
    return dict(zip(_KEYS, np.transpose(rows).tolist(), strict=True))


_KEYS = ("time", "scale", "state", "output")


def _weights(
    prediction: str, alpha: float, sigma: float, size: float, table: Mapping[str, Any]
) -> tuple[float, float, float]:
    """(w_0, w_1, g) with g F = w_0 x_0 + w_1 eps, as in `diffsamp.predictions`."""
    width = float(np.hypot(sigma, size * alpha))
    if prediction == "velocity" and not np.allclose(np.add(table["alpha"], table["sigma"]), 1.0):
        raise ValueError('"velocity" is that of the flow process, alpha + sigma = 1; not this one.')
    found = {
        "data": (1.0, 0.0, 1.0),
        "noise": (0.0, 1.0, 1.0),
        "v": (-sigma, alpha, 1.0),
        "score": (0.0, -1.0, sigma),
        "velocity": (-1.0, 1.0, 1.0),
        "edm_f": (sigma / (size * width), -size * alpha / width, 1.0),
    }
    if prediction not in found:
        raise ValueError(f"`prediction` must be one of {', '.join(found)}; got {prediction!r}.")
    return found[prediction]


def _conversion(
    source: tuple[float, float, float], target: Any, alpha: float, sigma: float
) -> tuple[float, float]:
    """(r, s) with v_0 x_0 + v_1 eps = r u + s F, of the two equations of u and F."""
    (w_0, w_1, g), (v_0, v_1) = source, map(float, target)
    determinant, cross = alpha * w_1 - sigma * w_0, v_0 * w_1 - v_1 * w_0
    if cross == 0:  # F is what is wanted, but for its size
        return 0.0, g * (v_0 * w_0 + v_1 * w_1) / (w_0**2 + w_1**2)
    if determinant == 0:
        return np.nan, np.nan
    return cross / determinant, g * (alpha * v_1 - sigma * v_0) / determinant


def run(
    plan: Any,
    model: Callable[[np.ndarray, np.ndarray], Any],
    x_T: Any,
    noise: Any = None,
    *,
    prediction: str | None = None,
) -> np.ndarray:
    """Sample: run every row of a plan on x_T.

    Args:
      plan: a plan's or tableau's path, what it holds, or the object.
      model: the network at hand, `model(x, t)` with x shaped like x_T and t (batch,); returns its
        own output, in the plan's prediction, guidance and conditions included.
      x_T: (batch, ...) the start, standard noise times the plan's first level.
      noise: for plans that add noise: (rows, batch, ...), or only the rows that add some, in
        order; or a function of the row's number. None: for plans that add none.
      prediction: as for `calls`.

    Returns:
      The sample, of x_T's shape and floating dtype.

    Raises:
      ValueError: as `read` and `calls`; noise missing or too little; an output of another shape.
    """
    table, network = read(plan)
    numbers = calls(table, network, prediction)
    x = np.asarray(x_T)
    if x.dtype.kind != "f":
        raise TypeError(f"`x_T` must be floating; got {x.dtype}.")
    batch = x.shape[:1] if network.get("batched", True) else ()
    draw = _noise(noise, [n for n, c in enumerate(table["c"]) if np.any(c)], len(table["c"]), x)

    def number(weight: Any) -> Any:
        return np.asarray(weight, x.dtype)

    u, m = [x], list[np.ndarray]()
    for n, asked in enumerate(table["evaluates"]):
        output = np.zeros_like(x)
        if asked:
            t = np.full(batch, numbers["time"][n], x.dtype)
            output = np.asarray(model(number(numbers["scale"][n]) * u[0], t), x.dtype)
            if output.shape != x.shape:
                raise ValueError(f"`model` must return the shape {x.shape}; got {output.shape}.")
            output = number(numbers["state"][n]) * u[0] + number(numbers["output"][n]) * output
        m.insert(0, output)
        u.insert(0, advance(table, n, u, m, draw, number))
        del u[len(table["a"][n]) :], m[len(table["b"][n]) :]
    return u[0]


def advance(
    table: Mapping[str, Any],
    n: int,
    u: list[Any],
    m: list[Any],
    draw: Callable[[int], Any],
    number: Callable[[Any], Any] = float,
) -> Any:
    """u[n + 1] of the module's equation, for arrays of any library.

    Args:
      table: of `read`.
      n: the row.
      u: the states up to row n, newest first.
      m: the outputs up to row n, newest first.
      draw: n -> fresh noise, called where the row adds some.
      number: what turns a coefficient into something that multiplies an array.
    """
    terms = [*zip(table["a"][n], u, strict=False), *zip(table["b"][n], m, strict=False)]
    if np.any(table["c"][n]):
        terms.append((table["c"][n], draw(n)))
    new = 0 * u[0]
    for weight, value in terms:
        if np.any(weight):
            new = new + number(weight) * value
    return new if table.get("d") is None else new + number(table["d"][n])


def as_if_before(table: Mapping[str, Any], n: int, u: Any, m: Any) -> tuple[list[Any], list[Any]]:
    """States and outputs up to row n of a run that begins there, newest first.

    A row of several steps needs a past, which a run from the middle (image to image) has not. It is
    taken from the line through u on which data and noise are what the network says there, so that
    the first step is DDIM's whatever the method.

    Args:
      table: of `read`.
      n: the row, which evaluates.
      u: the state there.
      m: the output there, m[n] of the module's equation.
    """
    alpha, sigma, (w_0, w_1) = table["alpha"][n], table["sigma"][n], table["target"][n]
    determinant = alpha * w_1 - sigma * w_0
    data, noise = (w_1 * u - sigma * m) / determinant, (alpha * m - w_0 * u) / determinant
    states, outputs = [u], [m]
    for k in range(n - 1, -1, -1):
        states.append(table["alpha"][k] * data + table["sigma"][k] * noise)
        w_0, w_1 = table["target"][k] if table["evaluates"][k] else (0.0, 0.0)
        outputs.append(w_0 * data + w_1 * noise)
    return states[: len(table["a"][n])], outputs[: len(table["b"][n])]


def _noise(noise: Any, rows: list[int], count: int, x: np.ndarray) -> Callable[[int], np.ndarray]:
    """The fresh noise of each row that adds some."""
    if callable(noise) or not rows:
        return noise if callable(noise) else lambda n: np.zeros_like(x)
    if noise is None or len(noise) not in (count, len(rows)):
        got = "none" if noise is None else len(noise)
        raise ValueError(
            f"the plan adds noise in {len(rows)} of its {count} rows: pass `noise` of shape "
            f"({count}, *x_T.shape), ({len(rows)}, *x_T.shape) or a function of the row; got {got}."
        )
    order = range(count) if len(noise) == count else rows
    drawn = {n: np.asarray(z, x.dtype) for n, z in zip(order, noise, strict=True)}
    if wrong := {z.shape for z in drawn.values()} - {x.shape}:
        raise ValueError(f"each row's `noise` must have the shape {x.shape}; got {wrong}.")
    return lambda n: drawn[n]
