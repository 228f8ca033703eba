"""Times that can be compared: functions run in turn in one process, the fastest of each."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import jax


def fastest(
    functions: dict[str, Callable[[], Any]],
    seconds: float = 20.0,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    rounds: int = 3,
) -> dict[str, float]:
    """Fastest time of each function in seconds, run in turn so that all see the same machine.

    Args:
      functions: by name; each is run once before anything is timed.
      seconds: for all rounds together; at most 200 are made.
      wait: called on what a function returns, until it is there.
      rounds: made at least, whatever they take.
    """
    times = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        wait(function())
    gc.collect()
    gc.disable()
    began, made = time.perf_counter(), 0
    while made < rounds or (made < 200 and time.perf_counter() - began < seconds):
        for name, function in functions.items():
            start = time.perf_counter()
            wait(function())
            times[name] = min(times[name], time.perf_counter() - start)
        made += 1
    gc.enable()
    return times
