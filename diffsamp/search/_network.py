"""What a plan says of the network it was made for, so that it can be run elsewhere.

A file of numbers is enough to run a sampler only if it also says what the numbers expect: which
prediction the network makes, what it is told as its time, whether its input is scaled. `describe`
writes that down in words and, row by row, in numbers, which no reader has to derive:

    m_n = calls.state[n] u_n + calls.output[n] F(calls.scale[n] u_n, calls.time[n])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from diffsamp._core.digest import digest
from diffsamp._core.numeric import is_concrete, silence
from diffsamp._core.types import Network, PyTree, Value
from diffsamp.guidance.transform import Transform
from diffsamp.processes import Process
from diffsamp.sampling import row_levels
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["describe_network", "expect_calls", "expect_fit"]

_LARGEST = 64  # numbers of one field of a transform that are written down


def describe_network(
    score_fn: Network,
    tableau: Tableau,
    *,
    x_T: PyTree = None,
    data_range: float | None = None,
    checkpoint: str = "",
    fingerprint: str | None = None,
) -> dict[str, Value]:
    """What a reader of a plan must know of its network, as JSON values (docs/plan-format.md).

    Args:
      score_fn: the network, or a transform of one.
      tableau: the sampler, of plain arrays on the host.
      x_T: (batch, ...) starts it was searched with, for the shape of a sample; None: not said.
      data_range: largest minus smallest value of the data; None: not said.
      checkpoint: the name of the weights, for people.
      fingerprint: of the weights; None: computed here, a SHA-256 over all of them.

    Returns:
      A dict of strings, numbers and lists: the field `network` of a `Plan`.
    """
    base, around = _peeled(score_fn)
    found: dict[str, Value] = {
        "process": _process(score_fn.process),
        "prediction": score_fn.prediction,
        "sigma_data": float(score_fn.sigma_data),
        "guidance": around,
        "batched": bool(score_fn.batched),
        "nfe_factor": float(score_fn.nfe_factor),
        "checkpoint": {"name": checkpoint, "fingerprint": fingerprint or _weights(base)},
        "data": {"range": data_range, "shape": _shape(x_T, score_fn.batched)},
    }
    if isinstance(base, ScoreFn):
        found["time"] = base.time if isinstance(base.time, str) else _name(base.time)
        found["scale_input"] = bool(base.scale_input)
        if is_concrete(tableau, base.process):
            found["calls"] = _calls(base, tableau)
    return found


def _peeled(score_fn: Network) -> tuple[Network, list[dict[str, Value]]]:
    """The network inside all transforms, and what is around it, outermost first."""
    around = []
    while isinstance(score_fn, Transform):
        around.append({"name": type(score_fn).__name__, **_numbers(score_fn)})
        score_fn = _inside(score_fn)
    return score_fn, around


def expect_fit(score_fn: Network, tableau: Tableau) -> None:
    """Raise unless the tableau's rows can be asked of this network.

    Raises:
      ValueError: a tableau built for another process, or a prediction that is not determined.
    """
    level = row_levels(tableau)
    bound = score_fn.bind(level, (tableau.target[:, 0], tableau.target[:, 1]))
    score_fn.check_bound(bound, level, tableau.evaluates)


def expect_calls(calls: Value, rows: int, where: str) -> None:
    """Raise unless the numbers of the calls, read from a file, are one per row.

    Raises:
      ValueError: in words.
    """
    for name in ("time", "scale", "state", "output"):
        column = calls.get(name) if isinstance(calls, Mapping) else None
        if not isinstance(column, list) or len(column) != rows:
            raise ValueError(
                f"{where} is corrupt: `network.calls.{name}` must hold {rows} numbers, one per row."
            )


def _inside(transform: PyTree) -> Network:
    terms = getattr(transform, "terms", None)
    return transform.score_fn if terms is None else terms.networks[terms.which[0]]


def _numbers(transform: PyTree) -> dict[str, Value]:
    """The scales and weights of a transform, and the names of its functions."""
    said: dict[str, Value] = {}
    for field in dataclasses.fields(transform):
        if field.name in ("score_fn", "terms", "key"):
            continue
        value = getattr(transform, field.name)
        name = field.name
        if getattr(value, "pair", False):
            name = "scale"  # one number w, of which the weights are w and 1 - w
        if hasattr(value, "kind") and hasattr(value, "value"):  # numbers of the guidance
            value = value.name if value.value is None else value.value
        plain = _plain(value)
        if plain is not None:
            said[name] = plain
    return said


def _plain(value: PyTree) -> Value:
    """A JSON value, or None where it would be no small one."""
    if isinstance(value, jax.tree_util.Partial):
        value = value.func
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if hasattr(value, "dtype") and is_concrete(value):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) or np.size(value) > _LARGEST:
            return None
        return np.asarray(value).tolist()
    return _name(value) if callable(value) else None


def _name(function: PyTree) -> str:
    """module.name of a function, for people."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}.{name}"


def _process(process: Process) -> dict[str, Value]:
    """The class and its numbers."""
    said: dict[str, Value] = {"name": type(process).__name__}
    if not dataclasses.is_dataclass(process):
        return {**said, "says": repr(process)}
    for field in dataclasses.fields(process):
        value = np.asarray(getattr(process, field.name))
        said[field.name] = value.tolist() if value.dtype.kind in "fiub" else str(value)
    return said


def _weights(score_fn: Network) -> str | None:
    leaves = jax.tree.leaves(getattr(score_fn, "params", score_fn))
    if not is_concrete(leaves) or not all(getattr(x, "is_fully_addressable", True) for x in leaves):
        return None  # parts of it lie on other hosts
    return "sha256:" + digest(getattr(score_fn, "params", score_fn))


def _shape(x_T: PyTree, batched: bool) -> Value:
    if x_T is None:
        return None
    shapes = jax.tree.map(lambda x: list(np.shape(x)[1 if batched else 0 :]), x_T)
    return shapes if isinstance(shapes, list | Mapping) else None


@silence
def _calls(score_fn: ScoreFn, tableau: Tableau) -> dict[str, Value]:
    """Per row: the network's time, what its input is multiplied by, the weights of u and F."""
    level = row_levels(tableau)
    asked = np.asarray(tableau.evaluates, bool)
    bound = score_fn.bind(level, (tableau.target[:, 0], tableau.target[:, 1]))

    def numbers(array: PyTree) -> list[Value]:
        array = np.asarray(array, np.float64)
        # a row that does not ask has no level at which a network could be asked
        return np.where(asked & np.isfinite(array), array, 0.0).tolist()

    return {
        "time": numbers(bound.label),
        "scale": numbers(bound.scale),
        "state": numbers(bound.r),
        "output": numbers(bound.s),
    }
