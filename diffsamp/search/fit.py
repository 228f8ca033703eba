"""Fits of the few numbers that some published solvers take from a network.

`fit_dc` for DC-Solver, `fit_iia` for IIA, `model_statistics` for DPM-Solver-v3. Each is greedy,
step by step, on a handful of samples, and far cheaper than `distill`, which frees all numbers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize_scalar

from diffsamp import solvers
from diffsamp._core import random
from diffsamp._core.checks import expect_choice, expect_int, expect_state, expect_times
from diffsamp._core.types import Array, Conditions, Key, Network, PyTree, Times, Value
from diffsamp.predictions import Level
from diffsamp.processes import Process
from diffsamp.sampling import sample, trajectory
from diffsamp.score import ScoreFn
from diffsamp.search.running import Progress
from diffsamp.solvers import ModelStatistics
from diffsamp.solvers.iia import FEATURES, iia_features
from diffsamp.tableau import Tableau

__all__ = ["Fit", "RatioPolynomial", "fit_dc", "fit_dc_cascade", "fit_iia", "model_statistics"]


class Fit(NamedTuple):
    """A fitted sampler.

    Attributes:
      tableau: the sampler.
      values: the numbers fitted, per step.
      errors: (n, 2) mean squared error of the state after each step, before and after its fit.
    """

    tableau: Tableau
    values: np.ndarray
    errors: np.ndarray


def fit_dc(
    score_fn: ScoreFn,
    times: Times,
    x_T: PyTree,
    *,
    order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool = True,
    correct_first: bool = True,
    cond: Conditions | None = None,
    bounds: tuple[float, float] = (0.5, 1.5),
    refine: int = 20,
    progress: Progress | None = None,
) -> Fit:
    """DC-Solver's ratios for this network: `solvers.dc_solver`, fitted step by step.

    The ratio of step n minimises the distance of the corrected state after it to the fine
    solution's, the earlier ratios fixed; ratio 1, UniPC itself, is kept where nothing is better.

    Args:
      score_fn: the network (with guidance, as it will be sampled).
      times: (n + 1,) decreasing times.
      x_T: (batch, ...) starts at times[0], an array; ten are enough.
      order: of UniPC; also the other options of `solvers.dc_solver`.
      variant: as there.
      lower_order_final: as there.
      correct_first: as there.
      cond: keyword arguments for the network.
      bounds: in which the ratios are sought.
      refine: steps of the fine solution per step.
      progress: called with ("fitting", steps done, n).

    Returns:
      A `Fit`; its values are the (n,) ratios.

    Reference: Zhao et al. 2024, arXiv:2409.03755, algorithm 1.
    """
    process, times = score_fn.process, expect_times(times)
    steps = len(times) - 1
    truth = _fine_states(score_fn, times, x_T, refine, cond)
    options: dict[str, Value] = {
        "order": order,
        "variant": variant,
        "lower_order_final": lower_order_final,
        "correct_first": correct_first,
    }
    ratios, errors = np.ones(steps), np.full((steps, 2), np.nan)
    shape = {"rows": steps, "p": 1, "q": steps}  # one program for all trials

    def error(ratio: float, n: int) -> float:
        trial = np.array([*ratios[:n], ratio, *ratios[n + 1 :]])
        tableau = solvers.dc_solver(process, times, ratios=trial, stop=n + 1, **options)
        x = sample(score_fn, tableau.pad(**_at_least(tableau, shape)), x_T, cond=cond)
        return float(jnp.mean((x - truth[n + 1]) ** 2))

    for n in range(steps):
        before = error(1.0, n)
        errors[n] = before
        if n >= 2:
            found = minimize_scalar(
                error,
                bounds=bounds,
                args=(n,),
                method="bounded",
                options={"xatol": 1e-3, "maxiter": 25},
            )
            if found.fun < before:
                ratios[n], errors[n, 1] = found.x, found.fun
        if progress is not None:
            progress("fitting", n + 1, steps)
    return Fit(solvers.dc_solver(process, times, ratios=ratios, **options), ratios, errors)


class RatioPolynomial(NamedTuple):
    """DC-Solver's ratios for any number of evaluations and guidance scale; made by
    `fit_dc_cascade`.

    Attributes:
      coefficients: (4, 3, 3), of the powers 3..0 of i / NFE, 2..0 of scale / 12 and 2..0 of
        NFE / 50, i the step's number from 1 on: the authors' 36 numbers, in their order.
    """

    coefficients: np.ndarray

    def __call__(self, nfe: int, scale: float = 1.0) -> np.ndarray:
        """The (nfe,) ratios for `solvers.dc_solver`; those of the first two steps are 1."""
        nfe = expect_int(nfe, "nfe", at_least=1)
        ratios = np.ones(nfe)
        basis = _cascade_basis(np.arange(3, nfe + 1), nfe, scale)
        ratios[2:] = basis @ np.asarray(self.coefficients, np.float64).reshape(-1)
        return ratios


def fit_dc_cascade(ratios: Mapping[tuple[int, float], Array]) -> RatioPolynomial:
    """DC-Solver's ratios as a polynomial in step, evaluations and guidance, from known ones.

    rho(i, NFE, scale) = sum_k c_k (i / NFE)^k, every c_k a quadratic in scale / 12 whose
    coefficients are quadratics in NFE / 50. The authors fit one variable after the other; here
    all 36 numbers are one least-squares fit, of least norm where the data leave some open.

    Args:
      ratios: {(nfe, guidance scale): (nfe,) ratios}, each from `fit_dc` on that grid and with that
        guidance; three of either determine the quadratics.

    Returns:
      A `RatioPolynomial`; `solvers.dc_solver(process, times, ratios=found(nfe, scale))`.

    Raises:
      ValueError: another number of ratios than evaluations, or none beyond the first two steps.

    Reference: Zhao et al. 2024, arXiv:2409.03755, section 3.3 (cascade polynomial regression).
    """
    rows, values = [], []
    for (nfe, scale), given in ratios.items():
        given = np.asarray(given, np.float64)
        if given.shape != (nfe,) or not np.all(np.isfinite(given)):
            raise ValueError(
                f"the ratios of ({nfe}, {scale:g}) must be {nfe} finite numbers, one per step; got "
                f"{given}."
            )
        rows.append(_cascade_basis(np.arange(3, nfe + 1), nfe, scale))
        values.append(given[2:])
    if not sum(len(v) for v in values):
        raise ValueError(
            "`ratios` must hold some with 3 evaluations and more: those of the first two steps are "
            "not used."
        )
    found = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=1e-10)[0]
    return RatioPolynomial(found.reshape(4, 3, 3))


def _cascade_basis(i: np.ndarray, nfe: int, scale: float) -> np.ndarray:
    """(len(i), 36) products of powers, highest first."""
    of_step = np.vander(i / nfe, 4)
    of_scale, of_nfe = np.vander([scale / 12], 3)[0], np.vander([nfe / 50], 3)[0]
    return np.einsum("ik,s,n->iksn", of_step, of_scale, of_nfe).reshape(len(i), 36)


def fit_iia(
    score_fn: ScoreFn,
    times: Times,
    x_T: PyTree,
    *,
    method: str = "ddim",
    cond: Conditions | None = None,
    refine: int = 10,
    ridge: float = 1e-6,
    progress: Progress | None = None,
) -> Fit:
    """IIA's coefficients for this network: one small least-squares problem a step.

    From the state that the fitted sampler itself reaches, a fine solution over the step is compared
    with the solver's step, and the difference regressed on the step's features over all samples and
    elements.

    Args:
      score_fn: the network (with guidance, as it will be sampled).
      times: (n + 1,) decreasing times.
      x_T: (batch, ...) starts at times[0], an array; twenty are enough.
      method: as for `solvers.iia`.
      cond: keyword arguments for the network.
      refine: steps of the fine solution (Heun's) per step.
      ridge: added to the normal equations, relative to their largest diagonal entry.
      progress: called with ("fitting", steps done, n).

    Returns:
      A `Fit`; its values are the coefficients of `solvers.iia`.

    Reference: Zhang, Niwa & Kleijn 2023, arXiv:2304.11328.
    """
    process, times = score_fn.process, expect_times(times)
    steps = len(times) - 1
    expect_choice(method, "method", tuple(FEATURES))
    values, errors = np.zeros((steps, FEATURES[method])), np.zeros((steps, 2))
    full, _, rows = iia_features(process, times, values + 1.0, method)
    shape = {"rows": full.rows, "p": full.p, "q": full.q}
    for n in range(steps):
        tableau, features, _ = iia_features(process, times, values, method)
        run = trajectory(score_fn, tableau.pad(**_at_least(tableau, shape)), x_T, cond=cond)
        points, outputs = (np.asarray(v, np.float64) for v in (run.points, run.outputs))
        start = rows[n - 1] if n else 0
        fine = _fine_states(score_fn, times[n : n + 2], run.points[start], refine, cond)[-1]
        missing = np.asarray(fine, np.float64) - points[rows[n]]
        errors[n] = np.mean(missing**2)
        if features[n]:
            known = {"u": points, "m": outputs}
            columns = np.stack(
                [
                    sum(weight * known[kind][k] for (kind, k), weight in feature.terms.items())
                    for feature in features[n]
                ]
            ).reshape(len(features[n]), -1)
            gram = columns @ columns.T
            gram += ridge * np.max(np.diag(gram)) * np.eye(len(gram))
            values[n] = np.linalg.solve(gram, columns @ missing.reshape(-1))
            errors[n, 1] = np.mean((missing.reshape(-1) - values[n] @ columns) ** 2)
        if progress is not None:
            progress("fitting", n + 1, steps)
    tableau = solvers.iia(process, times, coefficients=values, method=method)
    return Fit(tableau, values, errors)


def model_statistics(
    score_fn: ScoreFn,
    x_0: PyTree,
    *,
    key: Key,
    log_snr: Array = None,
    per_element: bool = False,
    cond: Conditions | None = None,
    progress: Progress | None = None,
) -> ModelStatistics:
    """The statistics of a network that DPM-Solver-v3 puts into its coefficients.

    At each level, over x = alpha x_0 + sigma eps: l = E[sigma d eps / dx] on the diagonal, by one
    Jacobian-vector product with random signs; then for f = (sigma eps - l x) / alpha and f' its
    derivative along the ODE, by another, the regression f' = s f + b: s = Cov(f, f') / Var(f), b =
    E[f'] - s E[f]. (Where f is a constant, s is 0.)

    Args:
      score_fn: the network, with a batch axis.
      x_0: (batch, ...) data, an array; a few hundred for `per_element`, far fewer without.
      key: random key for the noise and the signs.
      log_snr: (M,) rising levels, nats; None: 60 from t_max to t_min.
      per_element: a number for every element of the data, else one for all.
      cond: keyword arguments for the network, with the batch axis.
      progress: called with ("statistics", levels done, M).

    Returns:
      `ModelStatistics`, to keep with `save` and to give to `solvers.dpm_solver_v3`.

    Raises:
      ValueError: levels that do not rise.

    Reference: Zheng et al. 2023, arXiv:2310.13268, section 3.2.
    """
    process = score_fn.process
    size = expect_state(x_0, "x_0", batched=True)
    keys = random.sample_keys(key, size)
    if log_snr is None:
        ends = [np.maximum(process.log_snr(process.t_max), -12), process.log_snr(process.t_min)]
        log_snr = np.linspace(ends[0], ends[1], 60)
    log_snr = np.asarray(log_snr, np.float64)
    linear = []
    for n, lam in enumerate(log_snr):
        linear.append(np.asarray(_linear_part(score_fn, x_0, keys, n, lam, cond), np.float64))
        if progress is not None:
            progress("statistics", n + 1, 2 * len(log_snr))
    axes = (0,) if per_element else tuple(range(np.ndim(x_0)))
    l = np.stack([v.mean(axis=axes) for v in linear])  # noqa: E741 - the paper's letter
    slope = np.gradient(l, log_snr, axis=0)
    s, b = [], []
    for n, lam in enumerate(log_snr):
        numbers = (jnp.asarray(l[n], x_0.dtype), jnp.asarray(slope[n], x_0.dtype))
        f, change = (
            np.asarray(v, np.float64)
            for v in _remainder(score_fn, x_0, keys, n, lam, *numbers, cond)
        )
        mean, rate, power = (np.mean(v, axis=axes) for v in (f, change, f * f))
        # the last term: rounding is no variance where f is constant
        spread = power - mean**2 + 1e-6 * power
        s.append((np.mean(f * change, axis=axes) - mean * rate) / np.maximum(spread, 1e-30))
        b.append(rate - s[-1] * mean)
        if progress is not None:
            progress("statistics", len(log_snr) + n + 1, 2 * len(log_snr))
    return ModelStatistics(log_snr, l, np.stack(s), np.stack(b))


def _noise(score_fn: Network, log_snr: Array, scaled: PyTree, cond: Conditions | None) -> PyTree:
    """The noise prediction at x = alpha * scaled, as a function of log-SNR."""
    process: Process = score_fn.process
    t = process.time(log_snr)
    level = Level(t, process.alpha(t), process.sigma(t))
    bound = score_fn.bind(level, (jnp.zeros_like(t), jnp.ones_like(t)))
    return score_fn.predict(level.alpha.astype(scaled.dtype) * scaled, bound, cond)


def _diffused(x_0: PyTree, keys: Key, n: Array, rho: Array) -> PyTree:
    return x_0 + rho * random.normal_like(keys, n, x_0)


@jax.jit
def _linear_part(
    score_fn: Network, x_0: PyTree, keys: Key, n: Array, log_snr: Array, cond: Conditions | None
) -> PyTree:
    """sigma v (d eps / dx) v, whose mean over random signs v is the diagonal."""
    log_snr = jnp.asarray(log_snr, x_0.dtype)
    rho = jnp.exp(-log_snr)
    scaled = _diffused(x_0, keys, n, rho)
    signs = jax.vmap(
        lambda k: jax.random.rademacher(jax.random.fold_in(k, n + 2**20), x_0.shape[1:], x_0.dtype)
    )(keys)
    _, change = jax.jvp(lambda y: _noise(score_fn, log_snr, y, cond), (scaled,), (signs,))
    return rho * signs * change  # d/dx = d/d(x / alpha) / alpha


@jax.jit
def _remainder(
    score_fn: Network,
    x_0: PyTree,
    keys: Key,
    n: Array,
    log_snr: Array,
    linear: PyTree,
    slope: PyTree,
    cond: Conditions | None,
) -> PyTree:
    """f and its derivative by log-SNR along the ODE, d(x / alpha) = -rho eps d log-SNR."""
    log_snr = jnp.asarray(log_snr, x_0.dtype)
    rho = jnp.exp(-log_snr)
    scaled = _diffused(x_0, keys, n, rho)
    direction = -rho * _noise(score_fn, log_snr, scaled, cond)
    eps, eps_dot = jax.jvp(
        functools.partial(_noise, score_fn, cond=cond),
        (log_snr, scaled),
        (jnp.ones_like(log_snr), direction),
    )
    linear, slope = (v.reshape((1,) * (eps.ndim - v.ndim) + v.shape) for v in (linear, slope))
    f = rho * eps - linear * scaled
    return f, rho * ((linear - 1) * eps + eps_dot) - slope * scaled


def _at_least(tableau: Tableau, shape: Mapping[str, int]) -> dict[str, int]:
    return {name: max(size, getattr(tableau, name)) for name, size in shape.items()}


def _fine_states(
    score_fn: ScoreFn, times: np.ndarray, x: PyTree, refine: int, cond: Conditions | None
) -> PyTree:
    """The ODE's states at `times`, by `refine` steps of Heun's method between each two.

    The steps are uniform in log-SNR, or in time where that is infinite.
    """
    process = score_fn.process
    refine = expect_int(refine, "refine", at_least=1)
    grid = [times[:1]]
    for s, t in itertools.pairwise(times):
        ends = process.log_snr(np.array([s, t]))
        if np.all(np.isfinite(ends)):
            inner = process.time(np.linspace(ends[0], ends[1], refine + 1)[1:-1])
        else:
            inner = np.linspace(s, t, refine + 1)[1:-1]
        grid.append(np.array([*inner, t]))
    # one row for a step to sigma = 0, whatever the network predicts
    tableau = solvers.heun(process, np.concatenate(grid), clean_end="euler")
    points = trajectory(score_fn, tableau, x, cond=cond).points
    return points[:: 2 * refine] if times[-1] > process.t_clean else _with_last(points, refine)


def _with_last(points: PyTree, refine: int) -> PyTree:
    """Every (2 refine)-th state and the last: Heun's step to sigma = 0 is one row."""
    return jnp.concatenate([points[: -1 : 2 * refine], points[-1:]])
