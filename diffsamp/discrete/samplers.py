"""The samplers of discrete models: functions that build rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp.discrete.rows import Rows, Schedule, levels

__all__ = [
    "SAMPLERS",
    "ancestral",
    "blocks",
    "entropy_bounded",
    "first_hitting",
    "flow_matching",
    "maskgit",
    "parallel",
    "remdm",
    "remdm_loop",
    "tau_leaping",
    "threshold",
    "uniform",
]


def ancestral(schedule: str | Schedule = "linear", n: int = 16) -> Rows:
    """Every masked token is unmasked with probability (alpha' - alpha) / (1 - alpha).

    Args:
      schedule: of `SCHEDULES`, or the share of unmasked tokens as a function of t in [0, 1].
      n: rows.

    Reference: Sahoo et al. 2024 (MDLM), arXiv:2406.07524; Shi et al. 2024 (MD4), arXiv:2406.04329.
    SEDD's analytic step (Lou et al. 2023, arXiv:2310.16834) for masks is the same.
    """
    times, alpha = levels(schedule, n)
    unmask = _ratio(alpha)
    return Rows.create(times=times, alpha=alpha, unmask=unmask, name=f"ancestral, {n} rows")


def flow_matching(kappa: str | Schedule = "linear", n: int = 16) -> Rows:
    """Discrete flow matching with masked sources: the exact step of its rate, which is `ancestral`.

    The authors' code jumps with 1 - exp(-h kappa' / (1 - kappa)), first order, and leaves half as
    many tokens again to the last row.

    Args:
      kappa: the share of data as a function of t.
      n: rows.

    Reference: Gat et al. 2024, arXiv:2407.15595.
    """
    return dataclasses.replace(ancestral(kappa, n), name=f"flow_matching, {n} rows")


def tau_leaping(schedule: str | Schedule = "linear", n: int = 16) -> Rows:
    """Euler's step of the reverse rate: probability h alpha' / (1 - alpha), the last row all.

    First order: it leaves more to the last row than `ancestral`.

    Args:
      schedule: as for `ancestral`.
      n: rows.

    Reference: Lou et al. 2023 (SEDD), arXiv:2310.16834, section 4.1.
    """
    times, alpha = levels(schedule, n)
    grid, fine = levels(schedule, 10_000)
    slope = np.interp(times[:-1], grid[::-1], np.gradient(fine, grid)[::-1])
    unmask = np.clip(-slope / n / np.maximum(1 - alpha[:-1], 1e-6), 0, 1)
    unmask[-1] = 1.0
    share = [0.0]
    for u in unmask:
        share.append(share[-1] + u * (1 - share[-1]))
    return Rows.create(times=times, alpha=share, unmask=unmask, name=f"tau_leaping, {n} rows")


def first_hitting(length: int) -> Rows:
    """One uniformly random token a row, at its own first-hitting time: exact for an exact network.

    Args:
      length: of the sequence, as many rows.

    Reference: Zheng et al. 2024, arXiv:2409.02908.
    """
    length = expect_int(length, "length", at_least=1)
    return _counted(
        np.ones(length, int), f"first_hitting, {length} rows", hitting=np.ones(length, bool)
    )


def parallel(length: int, n: int, *, law: str | Schedule | np.ndarray = "linear") -> Rows:
    """A fixed number of tokens a row, in the order that `sample` is given.

    With order "random" the parallel form of first hitting; with "max", "margin" or "entropy"
    confidence decoding (LLaDA, Dream).

    Args:
      length: of the sequence.
      n: rows.
      law: the share unmasked as a function of t, by name; or the counts themselves, (n,).

    Raises:
      ValueError: counts that do not add up to the length.

    Reference: Nie et al. 2025 (LLaDA), arXiv:2502.09992; Zheng et al. 2024, arXiv:2409.02908.
    """
    n, length = expect_int(n, "n", at_least=1), expect_int(length, "length", at_least=1)
    if isinstance(law, np.ndarray | list | tuple):
        counts = np.asarray(law, int)
        if counts.shape != (n,) or np.any(counts < 0) or counts.sum() != length:
            raise ValueError(
                f"the counts must be {n} numbers that add up to the length {length}; got {law}."
            )
    else:
        done = np.round(length * levels(law, n)[1]).astype(int)
        counts = np.diff(done)
    return _counted(counts, f"parallel, {n} rows")


def maskgit(length: int, n: int = 12, *, temperature: float = 4.5) -> Rows:
    """MaskGIT: all but floor(L cos(pi r / 2)) are kept after row r, with Gumbel noise that fades.

    To be run with order "sampled": positions by the probability of the token that was drawn, which
    is biased towards likely tokens, as the method is defined; "max" is its unbiased form.

    Args:
      length: of the sequence.
      n: rows.
      temperature: of the noise on log-probabilities at the start; it falls linearly to 0.

    Reference: Chang et al. 2022, arXiv:2202.04200, section 3.2.
    """
    n, length = expect_int(n, "n", at_least=1), expect_int(length, "length", at_least=1)
    ratio = np.arange(1, n + 1) / n
    left = np.floor(length * np.cos(np.pi / 2 * ratio) + 1e-9).astype(int)
    left[-1] = 0
    masked, counts = length, []
    for n_left in left:
        keep = min(n_left, max(masked - 1, 0))
        counts.append(masked - keep)
        masked = keep
    noise = temperature * (1 - ratio)
    return _counted(np.array(counts), f"maskgit, {n} rows", noise=noise)


def threshold(length: int, probability: float = 0.9) -> Rows:
    """All tokens whose likeliest value has at least this probability, and at least one (Fast-dLLM).

    Args:
      length: of the sequence; as many rows, of which those that are not needed call nothing.
      probability: in (0, 1].

    Reference: Wu et al. 2025, arXiv:2505.22618.
    """
    length = expect_int(length, "length", at_least=1)
    if not 0 < probability <= 1:
        raise ValueError(f"`probability` must lie in (0, 1]; got {probability}.")
    return _counted(
        np.ones(length, int), f"threshold {probability:g}", threshold=np.full(length, probability)
    )


def entropy_bounded(length: int, gamma: float = 0.1) -> Rows:
    """As many, by rising entropy, as keep sum(H) - max(H) <= gamma, and at least one.

    Run it with order "entropy".

    Args:
      length: of the sequence; as many rows.
      gamma: nats.

    Reference: Ben-Hamu et al. 2025 (EB-sampler), arXiv:2505.24857.
    """
    length = expect_int(length, "length", at_least=1)
    if not gamma >= 0:
        raise ValueError(f"`gamma` must not be negative; got {gamma}.")
    return _counted(
        np.ones(length, int), f"entropy_bounded {gamma:g}", bound=np.full(length, gamma)
    )


def remdm(rows: Rows, eta: float = 0.1, *, kind: str = "cap") -> Rows:
    """Remasking: sampled tokens are masked again with sigma, and masked ones make up for it.

    sigma <= min(1, (1 - alpha') / alpha); the share of unmasked tokens stays alpha.

    Args:
      rows: Bernoulli rows, such as `ancestral`.
      eta: its size.
      kind: "cap": min(eta, the largest); "rescale": eta times the largest; "conf": the largest,
        divided among the tokens by the softmax of minus the probability each had when sampled.

    Raises:
      ValueError: rows that count, or an unknown kind.

    Reference: Wang et al. 2025 (ReMDM), arXiv:2503.00307, section 4.
    """
    expect_choice(kind, "kind", ("cap", "rescale", "conf"))
    if np.any(np.asarray(rows.count) > 0):
        raise ValueError("remasking is defined for rows of coins, such as `ancestral`.")
    alpha = np.asarray(rows.alpha)
    most = np.minimum(1, (1 - alpha[1:]) / np.maximum(alpha[:-1], 1e-300))
    most[alpha[:-1] == 0] = 0.0
    sigma = {"cap": np.minimum(eta, most), "rescale": eta * most, "conf": most}[kind]
    confident = np.full(rows.rows, kind == "conf")
    kept = alpha[:-1] if kind == "conf" else (1 - sigma) * alpha[:-1]
    unmask = (alpha[1:] - kept) / (1 - alpha[:-1])
    return Rows.create(
        times=rows.times,
        alpha=alpha,
        unmask=np.clip(unmask, 0, 1),
        remask=sigma,
        confident=confident,
        name=f"{rows.name}, remasked ({kind} {eta:g})",
    )


def remdm_loop(
    schedule: str | Schedule = "linear",
    n: int = 16,
    *,
    loops: int = 8,
    at: float = 0.9,
    eta: float = 0.02,
) -> Rows:
    """Ancestral rows to a share `at`, rows that remask and unmask there, ancestral rows to the end.

    Args:
      schedule: as for `ancestral`.
      n: ancestral rows.
      loops: rows in between.
      at: share of unmasked tokens where they happen.
      eta: their remasking probability, at most what keeps the share.

    Reference: Wang et al. 2025, arXiv:2503.00307, the "loop" schedule.
    """
    times, alpha = levels(schedule, n)
    if not 0 < at < 1:
        raise ValueError(f"`at` must lie in (0, 1); got {at}.")
    loops = expect_int(loops, "loops", at_least=1)
    place = int(np.searchsorted(alpha, at))
    when = float(np.interp(at, alpha, times))
    share = np.concatenate([alpha[:place], np.full(loops + 1, at), alpha[place:]])
    told = np.concatenate([times[:place], np.full(loops + 1, when), times[place:]])
    sigma = np.zeros(len(share) - 1)
    sigma[place : place + loops] = min(eta, (1 - at) / at)
    unmask = (share[1:] - (1 - sigma) * share[:-1]) / np.maximum(1 - share[:-1], 1e-300)
    return Rows.create(
        times=told, alpha=share, unmask=np.clip(unmask, 0, 1), remask=sigma, name="remdm_loop"
    )


def blocks(rows: Rows, size: int, length: int) -> Rows:
    """The same rows for one block after another (semi-autoregressive decoding).

    Args:
      rows: for a block of `size` tokens.
      size: of a block.
      length: of the sequence; the last block may be shorter.

    Reference: Nie et al. 2025 (LLaDA), arXiv:2502.09992; Arriola et al. 2025 (BD3-LM),
    arXiv:2503.09573.
    """
    size, length = expect_int(size, "size", at_least=1), expect_int(length, "length", at_least=1)
    starts = np.arange(0, length, size)
    many = len(starts)
    names = ("unmask", "remask", "count", "threshold", "bound", "noise")
    flags = ("hitting", "confident", "uniform")
    repeated = {k: np.tile(np.asarray(getattr(rows, k)), many) for k in (*names, *flags)}
    ends = np.minimum(starts + size, length)
    block = np.repeat(np.stack([starts, ends], axis=1), rows.rows, axis=0)
    times = np.concatenate([np.tile(np.asarray(rows.times)[:-1], many), rows.times[-1:]])
    alpha = np.concatenate([np.tile(np.asarray(rows.alpha)[:-1], many), rows.alpha[-1:]])
    return Rows(
        times=times, alpha=alpha, **repeated, block=block, name=f"{rows.name}, blocks of {size}"
    )


def uniform(schedule: str | Schedule = "linear", n: int = 16) -> Rows:
    """Uniform noise: every token is drawn anew from its posterior, row by row.

    The network says what the clean tokens may be; with a share alpha of them kept and a = alpha /
    alpha' from the next level to this one,

        p(x' = v | x = w) = (a [v = w] + (1 - a) / V) (alpha' r(v) + (1 - alpha') / V sum r),
        r(u) = p(u) / (alpha [u = w] + (1 - alpha) / V).

    Args:
      schedule: the share that is kept, as a function of t.
      n: rows.

    Reference: Austin et al. 2021 (D3PM), arXiv:2107.03006; Lou et al. 2023, arXiv:2310.16834.
    """
    times, alpha = levels(schedule, n)
    return Rows.create(
        times=times, alpha=alpha, uniform=np.ones(n, bool), name=f"uniform, {n} rows"
    )


SAMPLERS: Mapping[str, Callable[..., Rows]] = {
    "ancestral": ancestral,
    "blocks": blocks,
    "entropy_bounded": entropy_bounded,
    "first_hitting": first_hitting,
    "flow_matching": flow_matching,
    "maskgit": maskgit,
    "parallel": parallel,
    "remdm": remdm,
    "remdm_loop": remdm_loop,
    "tau_leaping": tau_leaping,
    "threshold": threshold,
    "uniform": uniform,
}
"""By name."""


def _ratio(alpha: np.ndarray) -> np.ndarray:
    unmask = np.diff(alpha) / np.maximum(1 - alpha[:-1], 1e-300)
    unmask[-1] = 1.0
    return np.clip(unmask, 0, 1)


def _counted(counts: np.ndarray, name: str, **more: np.ndarray) -> Rows:
    done = np.concatenate([[0], np.cumsum(counts)])
    alpha = done / done[-1]
    return Rows.create(times=1 - alpha, alpha=alpha, count=counts, name=name, **more)
