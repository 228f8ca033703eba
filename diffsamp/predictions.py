"""What a network predicts, and the exact conversion between any two predictions.

Every prediction in use is a fixed combination of the two unknowns of x = alpha x_0 + sigma eps:

    g F = w_0 x_0 + w_1 eps

    prediction   w_0            w_1            g       F is
    "data"       1              0              1       x_0
    "noise"      0              1              1       eps
    "v"          -sigma         alpha          1       alpha eps - sigma x_0
    "score"      0              -1             sigma   -eps / sigma
    "velocity"   alpha'         sigma'         1       dx/dt (eps - x_0 for the flow process)
    "edm_f"      sigma/(s Q)    -s alpha/Q     1       EDM's raw network output, s = sigma_data,
                                                       Q = sqrt(sigma^2 + s^2 alpha^2)

So a conversion from F to a target g_T T = v_0 x_0 + v_1 eps is T = r x + s F with the two numbers
that solve a 2 x 2 system. They are closed forms, with no detour through a third prediction, and
finite wherever the target is determined at all by x and F:

- from "noise" or "score" nothing but the noise is known at alpha = 0;
- from "data" nothing but the data is known at sigma = 0; "score" as a target is infinite there;
- from "v" (variance preserving), "velocity" (flow) and "edm_f" every target is determined at both
  ends, the score at sigma = 0 excepted;
- where the target is the network's own prediction the conversion is the identity everywhere.

Undetermined conversions give NaN or inf numbers; `ScoreFn` turns those into an error naming the
row when it can see the values.
"""

from __future__ import annotations

from typing import NamedTuple

from diffsamp._core.numeric import as_float, namespace, silence
from diffsamp._core.types import Array, PyTree, Value
from diffsamp.processes import Process

__all__ = ["NAMES", "Level", "canonical_name", "conversion", "convert", "level_at", "weights"]

NAMES = ("data", "noise", "v", "score", "velocity", "edm_f")

_ALIASES = {
    "x0": "data",
    "x_0": "data",
    "sample": "data",
    "denoised": "data",
    "eps": "noise",
    "epsilon": "noise",
    "v_prediction": "v",
    "flow_prediction": "velocity",
    "flow": "velocity",
}


class Level(NamedTuple):
    """A time and what the process says there; arrays of one shape.

    Attributes:
      t: the time of the state.
      alpha: its signal coefficient.
      sigma: its noise standard deviation.
      asked: the time that the network is told (a conditioning time), or None: t.
    """

    t: Array
    alpha: Array
    sigma: Array
    asked: Array | None = None


def level_at(process: Process, t: Array) -> Level:
    """The level of `process` at time(s) t."""
    return Level(as_float(t), process.alpha(t), process.sigma(t))


def canonical_name(prediction: str) -> str:
    """The name in `NAMES` that `prediction` means.

    Raises:
      ValueError: an unknown name.
    """
    name = _ALIASES.get(prediction, prediction) if isinstance(prediction, str) else prediction
    if name not in NAMES:
        raise ValueError(
            f"`prediction` must be one of {', '.join(map(repr, NAMES))}; got {prediction!r}."
        )
    return name


@silence
def weights(
    name: str, process: Process, level: Level, sigma_data: float = 0.5
) -> tuple[Array, Array, Array]:
    """The row of the module's table for one prediction.

    Args:
      name: the prediction, in `NAMES` or an alias.
      process: used by "velocity" only, for the derivatives.
      level: where, arrays of one shape.
      sigma_data: standard deviation of the data, used by "edm_f" only.

    Returns:
      (w_0, w_1, g), each of the level's shape.

    Raises:
      ValueError: an unknown name.
    """
    name = canonical_name(name)
    alpha, sigma = level.alpha, level.sigma
    xp = namespace(alpha, sigma)
    zero, one = xp.zeros_like(alpha), xp.ones_like(alpha)
    if name == "data":
        return one, zero, one
    if name == "noise":
        return zero, one, one
    if name == "v":
        return -sigma, alpha, one
    if name == "score":
        return zero, -one, sigma
    if name == "velocity":
        t = as_float(level.t, alpha)
        return as_float(process.alpha_dot(t), alpha), as_float(process.sigma_dot(t), alpha), one
    s = as_float(sigma_data, alpha)
    norm = xp.sqrt(sigma * sigma + s * s * alpha * alpha)
    return sigma / (s * norm), -s * alpha / norm, one


@silence
def conversion(
    source: tuple[Array, Array, Array],
    target: tuple[Array, Array, Array],
    alpha: Array,
    sigma: Array,
) -> tuple[Array, Array]:
    """Numbers (r, s) with target = r x + s F, where F has the `source` weights.

    Args:
      source: (w_0, w_1, g) of the network's output F.
      target: (v_0, v_1, g) of what is wanted.
      alpha: signal coefficient(s) at which x lives.
      sigma: noise standard deviation(s) there.

    Returns:
      Two arrays of the common shape; NaN or inf where the target is not determined.
    """
    f0, f1, f_scale = source
    v0, v1, v_scale = target
    xp = namespace(f0, v0, alpha)
    # g_T T = r' x + s' (g F):  r' alpha + s' f0 = v0,  r' sigma + s' f1 = v1
    determinant = alpha * f1 - sigma * f0
    r = (v0 * f1 - v1 * f0) / determinant
    s = (alpha * v1 - sigma * v0) / determinant
    # At an end where x and F say the same thing, the network's own prediction is still itself.
    parallel = (v0 * f1 - v1 * f0 == 0) & (determinant == 0)
    size = f0 * f0 + f1 * f1
    own = parallel & (size > 0)
    s = xp.where(own, (v0 * f0 + v1 * f1) / xp.where(size > 0, size, 1), s)
    r = xp.where(own, xp.zeros_like(r), r)
    same_scale = f_scale == v_scale
    r, s = r / v_scale, xp.where(same_scale, s, s * f_scale / v_scale)
    # also where a weight is infinite (velocity) or the scale is 0 (score)
    identical = (f0 == v0) & (f1 == v1) & same_scale
    return xp.where(identical, xp.zeros_like(r), r), xp.where(identical, xp.ones_like(s), s)


def convert(
    value: Value,
    x: PyTree,
    *,
    source: str,
    target: str,
    process: Process,
    t: Array,
    sigma_data: float = 0.5,
) -> Array:
    """Convert one array from prediction `source` to prediction `target` at state x and time t.

    Args:
      value: the prediction, same shape as x.
      x: the state alpha x_0 + sigma eps.
      source: what `value` is, a name in `NAMES`.
      target: what is wanted, a name in `NAMES`.
      process: the noise process.
      t: scalar time, or an array that broadcasts against x.
      sigma_data: EDM's data standard deviation, used by "edm_f" only.
    """
    level = level_at(process, t)
    r, s = conversion(
        weights(source, process, level, sigma_data),
        weights(target, process, level, sigma_data),
        level.alpha,
        level.sigma,
    )
    xp = namespace(value, x)
    x, value = xp.asarray(x), xp.asarray(value)
    return xp.asarray(r, x.dtype) * x + xp.asarray(s, x.dtype) * value
