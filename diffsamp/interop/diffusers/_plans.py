"""What a plan is to diffusers, in numbers; neither diffusers nor torch is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffsamp.interop import numpy as reader

__all__ = ["TABLE", "expect_like", "scheduler_config", "start_std"]

TABLE = ("times", "alpha", "sigma", "target", "a", "b", "c", "evaluates", "d", "asked")
_THEIRS = {"noise": "epsilon", "data": "sample", "v": "v_prediction", "velocity": "flow_prediction"}
_FLOW_LABELS = ("t", "label", None)


def scheduler_config(
    plan: Any,
    prediction: str | None = None,
    *,
    timesteps: list[float] | None = None,
    num_train_timesteps: int = 1000,
) -> dict[str, Any]:
    """What the `scheduler_config.json` of a `TableauScheduler` holds; diffusers is not needed.

    Args:
      plan: a plan or tableau, its file, or what the file holds.
      prediction: what the pipeline's network predicts: "noise", "data", "v", "velocity", "edm_f" or
        diffusers' `prediction_type`. None: what the plan says.
      timesteps: what the network is told at each evaluation. None: 1000 sigma for flow models, else
        what the plan says, or the tableau's times.
      num_train_timesteps: how many levels the network was trained on.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no plan; coefficients that are no plain numbers; a prediction that is not known or
        does not determine what a row wants.
    """
    table, network = reader.read(plan)
    if any(np.ndim(table[key]) != 2 for key in ("a", "b")):
        raise ValueError("only a table of plain numbers runs here; this one has fields.")
    calls = reader.calls(table, network, prediction)
    rows = [n for n, asked in enumerate(table["evaluates"]) if asked]
    if timesteps is None:
        own, flow = calls["time"], np.allclose(np.add(table["alpha"], table["sigma"]), 1.0)
        if flow and network.get("time") in _FLOW_LABELS:
            own = [1000 * t for t in table.get("asked") or table["sigma"]]
        timesteps = [own[n] for n in rows]
    elif len(timesteps) != len(rows):
        raise ValueError(
            f"`timesteps` must hold {len(rows)} numbers, one per evaluation; got {len(timesteps)}."
        )
    said = str(prediction or network.get("prediction"))
    return {
        "_class_name": "TableauScheduler",
        "table": {key: table[key] for key in TABLE if table.get(key) is not None},
        "calls": calls,
        "timesteps": [float(t) for t in timesteps],
        "prediction_type": _THEIRS.get(said, said),
        "num_train_timesteps": num_train_timesteps,
        "name": str(table.get("name", "")),
    }


def start_std(table: Mapping[str, Any], first: int) -> float:
    """Standard deviation of the state at the first evaluation, row `first`.

    Rows before it move the start alone: a searched plan begins at t_max and is scaled to its own
    first level, accelerated DDPM adds noise first. The sum is Gaussian, so it is drawn at once.

    Raises:
      ValueError: rows before it that do something else, or a noise of theirs that is used later.
    """
    alpha, sigma = table["alpha"][0], table["sigma"][0]
    std = 1.0 if abs(alpha**2 + sigma**2 - 1) < 1e-6 else sigma
    for n in range(first):
        later = [w for k, a in enumerate(table["a"][first:]) for w in a[k + 1 :]]
        if np.any(table["a"][n][1:]) or table.get("d") is not None or np.any(later):
            raise ValueError(f"row {n}, before the first evaluation, does more than scale.")
        std = np.hypot(table["a"][n][0] * std, table["c"][n])
    return float(std)


def expect_like(config: Any, other: Any) -> None:
    """Raise unless a plan is for the process and prediction of another scheduler.

    Raises:
      ValueError: what differs.
    """
    table, theirs = config.table, other.config
    flow = bool(np.allclose(np.add(table["alpha"], table["sigma"]), 1.0))
    if flow != bool(type(other).__name__.startswith("FlowMatch") or theirs.get("use_flow_sigmas")):
        kind = "a flow model" if flow else "a model with noise levels of its own"
        raise ValueError(f"the plan is for {kind}; {type(other).__name__} is for the other kind.")
    said = theirs.get("prediction_type")
    if not flow and said not in (None, config.prediction_type):
        raise ValueError(
            f"the plan is for {config.prediction_type!r}, the pipeline's scheduler says {said!r}."
        )
    products = getattr(other, "alphas_cumprod", None)
    if flow or products is None:
        return
    rows = [n for n, asked in enumerate(table["evaluates"]) if asked]
    alpha_bar = np.asarray(products, np.float64)
    times = list(config.timesteps)
    if table.get("asked") is not None:  # what the network is told says no more where a state is
        unit = 1.0 if max(table["times"]) > 1 else len(alpha_bar) - 1.0
        times = [unit * table["times"][n] for n in rows]
    for t, n in zip(times, rows, strict=True):
        want = float(np.interp(t, np.arange(len(alpha_bar)), alpha_bar))
        alpha, sigma = float(table["alpha"][n]), float(table["sigma"][n])
        # linear between the table's entries here, which is off by less than that
        if abs(np.arctan2(sigma, alpha) - np.arctan2((1 - want) ** 0.5, want**0.5)) > 0.01:
            raise ValueError(
                f"the plan is for another process: at timestep {t:g} it has alpha = {alpha:.4g}, "
                f"the pipeline's scheduler {want**0.5:.4g}."
            )
