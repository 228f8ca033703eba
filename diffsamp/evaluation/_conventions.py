"""The conventions in which a network may be called, around one that was declared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from diffsamp import predictions, processes
from diffsamp._core.numeric import to_host
from diffsamp.score import ScoreFn

__all__ = ["DECLARED", "Convention", "others", "shifted"]

DECLARED = "as declared"

Affine = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Convention:
    """One way to call a network: names of what differs from what was declared, and how."""

    score_fn: ScoreFn
    changes: tuple[str, ...] = ()
    label: Callable[[np.ndarray], np.ndarray] | None = None
    sign: float = 1.0
    data: Affine = (1.0, 0.0)

    @property
    def name(self) -> str:
        return " and ".join(self.changes) or DECLARED

    @property
    def mistakes(self) -> int:
        """How many things differ."""
        return self.name.count(" and ") + 1 if self.changes else 0

    def but(self, change: str, **fields: object) -> Convention:
        return dataclasses.replace(self, changes=(*self.changes, change), **fields)  # type: ignore[arg-type]


def others(start: Convention) -> Iterator[Convention]:
    """The conventions one change away."""
    score_fn = start.score_fn
    changed = " ".join(start.changes)
    asked = [start, *([] if "time" in changed else _times(start))]
    if "prediction" not in changed:
        for one in asked:  # what is made of an answer is cheap to try, so both together
            yield from _predictions(one)
        edm = dataclasses.replace(score_fn, prediction="edm_f", time="c_noise", scale_input=True)
        if score_fn.prediction != "edm_f" and score_fn.time != "c_noise":
            said = 'prediction="edm_f" and time="c_noise" and scale_input=True'
            yield start.but(said, score_fn=edm)
    yield from asked[1:]
    if "scale_input" not in changed:
        other = dataclasses.replace(score_fn, scale_input=not score_fn.scale_input)
        yield start.but(f"scale_input={other.scale_input}", score_fn=other)
    if "process" not in changed:
        yield from _processes(start)
    if "data" not in changed:
        for said, data in _SCALES.items():
            yield start.but(said, data=data)


def _predictions(start: Convention) -> Iterator[Convention]:
    for name in predictions.NAMES:
        for sign in (1.0, -1.0):
            if (name, sign) != (start.score_fn.prediction, 1.0):
                said = f'prediction="{name}"' + (" of the other sign" if sign < 0 else "")
                other = dataclasses.replace(start.score_fn, prediction=name)
                yield start.but(said, score_fn=other, sign=sign)


_SCALES: dict[str, Affine] = {
    "data from [0, 1] to [-1, 1] (2 x - 1)": (2.0, -1.0),
    "data from [-1, 1] to [0, 1] ((x + 1) / 2)": (0.5, 0.5),
    "data times 2": (2.0, 0.0),
    "data divided by 2": (0.5, 0.0),
    "data from [-.5, .5] to [0, 1] (x + 1/2)": (1.0, 0.5),
    "data from [0, 1] to [-.5, .5] (x - 1/2)": (1.0, -0.5),
    "data from 0..255 to [-1, 1] (x / 127.5 - 1)": (1 / 127.5, -1.0),
    "data from 0..255 to [0, 1] (x / 255)": (1 / 255, 0.0),
    "data from [0, 1] to 0..255 (255 x)": (255.0, 0.0),
    "data from [-1, 1] to 0..255 (127.5 (x + 1))": (127.5, 127.5),
}


def _times(start: Convention) -> Iterator[Convention]:
    score_fn = start.score_fn
    process = score_fn.process
    table = process.t_clean < 0
    for name in ("t", "sigma", "rho", "log_snr", "c_noise", "label"):
        same = {"t", "label"} if table else {name}
        if score_fn.time != name and not {score_fn.time, name} <= same:
            other = dataclasses.replace(score_fn, time=name)
            yield start.but(f'time="{name}"', score_fn=other)
    count = process.t_max + 1 if table else 1000.0
    # in the network's own label: what it is at the two ends
    ends = predictions.level_at(process, np.array([process.t_min, process.t_max], np.float64))
    labels = score_fn.bind(ends, (np.ones(2), np.zeros(2))).label
    low, high = (float(v) for v in np.asarray(to_host(labels), np.float64))
    if math.isfinite(low) and math.isfinite(high):
        total = high + (low if table else max(low, 0.0) if low > 0.1 else 0.0)
        yield start.but("the time reversed", label=lambda t: total - t)
    yield start.but(f"the time divided by {count:g}", label=lambda t: t / count)
    yield start.but(f"the time times {count:g}", label=lambda t: t * count)


def shifted(start: Convention) -> tuple[Convention, ...]:
    """Those whose index is one more and one less, for networks that are told an index.

    They are no more than a little better or worse, and so not among `others`.
    """
    process, time = start.score_fn.process, start.score_fn.time
    if time != "label" and not (time == "t" and process.t_clean < 0):
        return ()
    inner = start.label

    def after(change: float) -> Callable[[np.ndarray], np.ndarray]:
        def label(index: np.ndarray) -> np.ndarray:
            index = np.maximum(index + change, 0.0)
            return index if inner is None else inner(index)

        return label

    return (
        start.but("the time's index plus 1", label=after(1.0)),
        start.but("the time's index minus 1", label=after(-1.0)),
    )


def _processes(start: Convention) -> Iterator[Convention]:
    """Processes with the same times and other levels."""
    process = start.score_fn.process
    others: dict[str, processes.Process] = {}
    if isinstance(process, processes.VPDiscrete):
        count = int(process.t_max) + 1
        vp = processes.vp_discrete
        others = {
            'vp_discrete("linear")': vp("linear", num_levels=count),
            'vp_discrete("scaled_linear", beta_start=.00085, beta_end=.012)': vp(
                "scaled_linear", num_levels=count, beta_start=0.00085, beta_end=0.012
            ),
            'vp_discrete("squaredcos_cap_v2")': vp("squaredcos_cap_v2", num_levels=count),
        }
    elif isinstance(process, processes.VPLinear | processes.VPCosine | processes.Trig):
        others = {"vp_linear()": processes.vp_linear(), "vp_cosine()": processes.vp_cosine()}
        others["trig()"] = processes.trig()
    for said, other in others.items():
        if type(other) is type(process) and all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(process), strict=True)
        ):
            continue
        yield start.but(
            f"process={said}", score_fn=dataclasses.replace(start.score_fn, process=other)
        )
