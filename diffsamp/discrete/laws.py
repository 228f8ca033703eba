"""The exact law of a sampler with an exact network, on small spaces: the ground truth of tests."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np

from diffsamp._core.types import Value
from diffsamp.discrete.rows import Rows

__all__ = ["conditionals", "law"]

State = tuple[int, ...]


def conditionals(joint: np.ndarray, state: State) -> np.ndarray:
    """(length, vocabulary): what each position may be, given those of `state` that are not masked.

    Args:
      joint: (V, .., V), one axis a position, non-negative.
      state: a token for each position, V where masked. A state of probability 0 gives the uniform
        law.
    """
    length, size = joint.ndim, joint.shape[0]
    index = tuple(slice(None) if v == size else slice(v, v + 1) for v in state)
    part = joint[index]
    total = part.sum()
    told = np.full((length, size), 1 / size)
    for i in range(length):
        axes = tuple(k for k in range(length) if k != i)
        own = part.sum(axis=axes)
        if total > 0 and state[i] == size:
            told[i] = own / total
        elif state[i] != size:
            told[i] = np.eye(size)[state[i]]
    return told


def law(joint: np.ndarray, rows: Rows, order: str = "random") -> np.ndarray:
    """The distribution of what the rows make of all-masked sequences and the exact network.

    Dynamic programming over the (V + 1)^L states; ranks of equal confidence are shared evenly.

    Args:
      joint: (V, .., V), one axis for each of L positions; normalised here.
      rows: the sampler; noise on confidences, uniform noise and remasking by confidence, which need
        more than the state, are refused (first hitting's law is that of its counts).
      order: "random", "max", "margin" or "entropy".

    Returns:
      (V, .., V), like the joint. What is still masked at the end is left out of it.

    Raises:
      ValueError: rows or an order of which this does not know.
    """
    joint = np.asarray(joint, np.float64)
    joint = joint / joint.sum()
    size, length = joint.shape[0], joint.ndim
    if len(set(joint.shape)) != 1:
        raise ValueError("every axis of `joint` must have as many tokens.")
    if order not in ("random", "max", "margin", "entropy"):
        raise ValueError(f"`order` must look at distributions only; got {order!r}.")
    noisy = np.any(np.asarray(rows.noise) != 0) and order != "random"
    if noisy or np.any(np.asarray(rows.confident)) or np.any(np.asarray(rows.uniform)):
        raise ValueError("the law of these rows needs more than the state.")
    states: dict[State, float] = {(size,) * length: 1.0}
    for n in range(rows.rows):
        new: dict[State, float] = defaultdict(float)
        for state, weight in states.items():
            for after, chance in _row(joint, rows, n, state, order).items():
                new[after] += weight * chance
        states = new
    result = np.zeros(joint.shape)
    for state, weight in states.items():
        if size not in state:
            result[state] += weight
    return result


def _row(joint: np.ndarray, rows: Rows, n: int, state: State, order: str) -> dict[State, float]:
    """{next state: probability}."""
    size = joint.shape[0]
    low, high = (int(v) for v in np.asarray(rows.block)[n])
    inside = range(low, min(high, len(state)))
    free = [i for i in inside if state[i] == size]
    earlier = [i for i in inside if state[i] != size]
    told = conditionals(joint, state)
    u, sigma, count = (
        float(np.asarray(getattr(rows, k))[n]) for k in ("unmask", "remask", "count")
    )
    result: dict[State, float] = defaultdict(float)
    for counted, chance in _by_rank(told, free, int(count), order).items():
        fixed = set(counted) | _sure(told, free, rows, n)
        others = [i for i in free if i not in fixed]
        for coins in itertools.product((0, 1), repeat=len(others)):
            share = np.prod([u if c else 1 - u for c in coins]) if others else 1.0
            if share == 0:
                continue
            chosen = sorted(fixed | {i for i, c in zip(others, coins, strict=True) if c})
            for tokens in itertools.product(range(size), repeat=len(chosen)):
                p = np.prod([told[i, v] for i, v in zip(chosen, tokens, strict=True)] or [1.0])
                if p == 0:
                    continue
                after = list(state)
                for i, v in zip(chosen, tokens, strict=True):
                    after[i] = v
                for masks in itertools.product((0, 1), repeat=len(earlier) if sigma else 0):
                    q = np.prod([sigma if m else 1 - sigma for m in masks] or [1.0])
                    last = list(after)
                    for i, m in zip(earlier, masks, strict=False):
                        last[i] = size if m else last[i]
                    result[tuple(last)] += chance * share * p * q
    return result


def _sure(told: np.ndarray, free: list[int], rows: Rows, n: int) -> set[int]:
    """Positions that a threshold or a bound on entropies takes."""
    taken = {i for i in free if told[i].max() >= np.asarray(rows.threshold)[n]}
    bound = float(np.asarray(rows.bound)[n])
    entropy = {i: _entropy(told[i]) for i in free}
    total = 0.0
    for i in sorted(free, key=lambda i: entropy[i]):
        total += entropy[i]
        if total - entropy[i] <= bound:
            taken.add(i)
    return taken


def _entropy(p: np.ndarray) -> float:
    inside = p[p > 0]
    return float(-np.sum(inside * np.log(inside)))


def _by_rank(
    told: np.ndarray, free: list[int], count: int, order: str
) -> dict[tuple[int, ...], float]:
    """{the first `count` positions: probability}."""
    count = min(count, len(free))
    if count == 0:
        return {(): 1.0}
    if order == "random":
        sets = list(itertools.combinations(free, count))
        return dict.fromkeys(sets, 1 / len(sets))
    scores: dict[int, Value] = {}
    for i in free:
        top = np.sort(told[i])
        values = {"max": top[-1], "margin": top[-1] - top[-2], "entropy": -_entropy(told[i])}
        scores[i] = round(float(values[order]), 9)
    ranked = sorted(free, key=lambda i: -scores[i])
    edge = scores[ranked[count - 1]]
    sure = [i for i in ranked if scores[i] > edge]
    tied = [i for i in ranked if scores[i] == edge]
    sets = [(*sure, *more) for more in itertools.combinations(tied, count - len(sure))]
    return dict.fromkeys(sets, 1 / len(sets))
