"""Read a diffusers `scheduler_config.json` as process, prediction, times and solver.

What the scheduler does is written out in this library's terms; the tests compare it with diffusers
0.42.1. docs/diffusers.md lists every class. Where diffusers is off, on purpose not followed:

- DDIMScheduler steps from t to t - T // n whatever its spacing. Where that is not the next time it
  evaluates ("linspace", or "trailing" when n does not divide T) it integrates over another interval
  and may end at a level that is not clean. Here a step ends where the next one begins, and the
  linspace grid at the clean end; `solver(process, times, compatible=True)` does as diffusers does.
  PNDMScheduler and CogVideoX's two likewise, on grids other than "leading".
- "trailing" gives one timestep too many, labelled -1, for 62 of the n up to 1000 (61 the first), by
  rounding. Here n are n.
- With sigmas of their own (Karras, flow, ..) the multistep schedulers round the network's label, or
  cut it off, to an integer, though not the sigma. Here the network gets the sigma's real label.
- Karras, exponential or beta sigmas that end at "sigma_min" (DEIS: always) repeat the last one, an
  evaluation for a step of size zero. That is refused; of the EDM classes, whose published configs
  do so, it is left out: n - 1 evaluations, the same sample.
- UniPC "bh1" gives NaN in a step to sigma = 0. Here that step is the data prediction.
- DDPMScheduler with "fixed_large" adds noise in its last step too, unless that starts at t = 0.
- Classes that hold x / alpha (Euler, Heun, LMS, KDPM2, DPMSolverSDE, CosineDPM) start, with
  "linspace" and "trailing", at sigma_max N(0, I), which is alpha sigma_max = 0.9977 times our
  x_T ~ N(0, I) on Stable Diffusion's table: 2.3e-3. With "sigma_min" at the end they return
  x / alpha where ours is x, 4.3e-4 apart (alpha = 0.99957 there): divide by `tableau.alpha[-1]`.
- DPMSolverSDE and the stage of its step draw from one Brownian path there, independently here.
- SCM's pipelines start at 1.5708, which is beyond pi / 2 by 3.7e-6: here at pi / 2, which moves a
  sample by up to 1.6e-5 of its size.

Reproduced, though not what it seems: the third order of DPMSolverMultistepScheduler (half of a
coefficient, `compatible` in `solvers.dpmpp`), the second stage of DPMSolverSinglestep's; DEIS,
which interpolates in log rho; the `shift` of FlowMatchEulerDiscreteScheduler, applied to its
smallest sigma twice; Euler's, Heun's and the LMS scheduler's sigmas, linear between table entries,
whose label here is that of the log-SNR; IPNDM, whose first step takes the data to be 0;
DDIMInverse, which asks the network where a step ends.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsamp import processes
from diffsamp._core.files import read_json
from diffsamp._core.numeric import namespace
from diffsamp._core.types import Array, Network, PyTree, Value
from diffsamp.interop.diffusers import _fields as fields
from diffsamp.interop.diffusers import _grids as grids
from diffsamp.interop.diffusers import _own_grids as own_grids
from diffsamp.interop.diffusers._classes import solver_of
from diffsamp.interop.diffusers._pipelines import find_pipeline
from diffsamp.predictions import Level, canonical_name
from diffsamp.processes import Process
from diffsamp.score import ScoreFn
from diffsamp.tableau import Tableau

__all__ = ["DiffusersSampler", "from_diffusers"]


class _Four(NamedTuple):
    process: Process
    prediction: str
    times: Callable[..., np.ndarray]
    solver: Callable[..., Tableau]


class DiffusersSampler(_Four):
    """What a diffusers scheduler amounts to: a tuple of four.

    Attributes:
      process: the noise process; a discrete one's time is the training timestep, -1 is clean.
      prediction: what the network predicts, a name for `ScoreFn`.
      times: n -> (n + 1,) times; n is diffusers' `num_inference_steps`.
      solver: (process, times) -> Tableau.
      network: options of `ScoreFn` that make it give the network what the pipeline does: its time
        as label, EDM's `sigma_data`.
      negated: whether the network returns minus the prediction (see `score_fn`).
    """

    network: Mapping[str, Network]
    negated: bool

    def __new__(
        cls,
        process: Process,
        prediction: str,
        times: Callable[..., np.ndarray],
        solver: Callable[..., Tableau],
        network: Mapping[str, Network] | None = None,
        negated: bool = False,
    ) -> DiffusersSampler:
        self = super().__new__(cls, process, prediction, times, solver)
        self.network, self.negated = dict(network or {}), negated
        return self

    def score_fn(self, apply: Callable[..., Value], params: PyTree, **options: Value) -> ScoreFn:
        """The network, called as diffusers' pipeline calls it.

        Args:
          apply: `apply(params, x, t, **cond)` with the pipeline's x and timestep.
          params: the network's pytree.
          **options: further options of `ScoreFn`.
        """
        if self.negated:
            apply = _Negated(apply)
        return ScoreFn(
            apply, params, self.process, prediction=self.prediction, **{**self.network, **options}
        )


@dataclasses.dataclass(frozen=True)
class _Negated:
    """A network that returns minus another's output; equal for one `apply`, so compiled once."""

    apply: Callable[..., Value]

    def __call__(self, params: PyTree, x: PyTree, t: Array, **cond: PyTree) -> PyTree:
        return jax.tree.map(jnp.negative, self.apply(params, x, t, **cond))


# Time inputs as module functions: a ScoreFn compares them by identity.
def _thousandths(level: Level) -> Value:
    """CMStochasticIterative: 250 log sigma."""
    return 250 * namespace(level.sigma).log(level.sigma)


def _angle(level: Level) -> Value:
    """CosineDPM on an EDM network: 2 / pi arctan sigma."""
    return namespace(level.sigma).arctan(level.sigma) * (2 / math.pi)


def _from_noise(level: Level) -> Value:
    """Flow models whose time is 0 at the noise, 1 at the data."""
    return 1 - level.t


@functools.cache  # one function for each number, since they are compared by identity
def _label_of(levels: int, reverse: bool) -> Callable[[Level], Value]:
    """`levels` times t, or times 1 - t."""

    def label(level: Level) -> Value:
        return levels * (1 - level.t if reverse else level.t)

    return label


def _wuerstchen_label(level: Level) -> Value:
    """Its first level is clamped to alpha^2 = 1e-4, and still called 1."""
    xp = namespace(level.t)
    return xp.where(level.alpha**2 < 1.0001e-4, xp.ones_like(level.t), level.t)


def from_diffusers(
    config: Mapping[str, Value] | str | os.PathLike[str],
    *,
    ignore: Iterable[str] = (),
    pipeline: str | None = None,
) -> DiffusersSampler:
    """Process, prediction, times and solver of a diffusers scheduler.

    docs/diffusers.md lists the classes that are read (36 of diffusers 0.42) and why the others are
    not. As in diffusers, most can sample a network that came with another's config: change
    `_class_name`. Fields that say what the network is are kept then, or the class refused: a flow
    model's `shift` becomes DPM-Solver's `flow_shift` and does not make it a noise model.

    The network's time input is in `sampler.network`, and `sampler.score_fn(apply, params)` makes
    the ScoreFn: flow models take 1000 t (`time="label"`), EDM's log(sigma) / 4.

    What `times(n)` gives is the scheduler's grid, `set_timesteps(n)`. Many pipelines of flow models
    pass sigmas of their own: Flux, Qwen-Image, LTX, Chroma and Lumina 2 take 1, .., 1/n, so that
    FLUX.1-schnell with n = 4 is 1, .75, .5, .25, 0 and not the scheduler's 1, .667, .334, .001, 0.
    Say which pipeline it is to get that one's grid; a folder with the pipeline's `model_index.json`
    says it by itself.

    Examples:
      >>> import diffsamp as ds
      >>> sampler = ds.from_diffusers({"_class_name": "UniPCMultistepScheduler"})
      >>> sampler.solver(sampler.process, sampler.times(8)).nfe
      8
      >>> schnell = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
      >>> ds.from_diffusers(schnell, pipeline="FluxPipeline").times(4).tolist()
      [1.0, 0.75, 0.5, 0.25, 0.0]

    Args:
      config: the dict, or the path of a `scheduler_config.json`, of the folder that holds it, or of
        a pipeline's folder (with `model_index.json` and `scheduler/`).
      ignore: names of fields whose effect is to be left out knowingly, such as ("clip_sample",),
        which is on by default in DDIMScheduler and DDPMScheduler.
      pipeline: the pipeline's class, such as "FluxPipeline"; None: that of the folder, if any.

    Returns:
      A `DiffusersSampler`. Its `times(n)` also takes `sigmas` or `timesteps` (and then no n): n of
      one's own, after which the grid ends where the class's does (clean, but for DEIS, SASolver,
      TCD, DDPMWuerstchen, "sigma_min" and DDIM or PNDM with 'set_alpha_to_one' False, which end at
      their first level), or n + 1 that hold the end. Timesteps are what the network is told, for
      CMStochasticIterative the indices of its grid. Sigmas are sigma / alpha; for flow models
      sigma, before the config's shift (after it for MiniMaxH3, LTXEulerAncestralRF and the Karras
      grids of Cosmos). With dynamic shifting (any flow class) it takes `mu`, or the `image_seq_len`
      or `image_size` (height, width[, frames]) from which mu is computed: by the line of Flux, or
      `mu_rule` "empirical" (Flux 2) or "sqrt" (CogView 4), the pipeline's by default. LCM and TCD
      take `original_inference_steps`. `solver` takes `eta` for DDIM and TCD.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a class or a field's value that is not reproduced; the message names it.
    """
    if not isinstance(config, Mapping):
        config, found = _load(config)
        pipeline = pipeline or found
    name = str(config.get("_class_name")).removesuffix("Scheduler")
    if name in fields.REFUSED:
        why, way = fields.REFUSED[name]
        raise ValueError(f"{name}Scheduler is not read: {why}. Use {way}.")
    if name not in fields.CLASSES:
        raise ValueError(
            f"`_class_name` must be one of {'Scheduler, '.join(fields.CLASSES)}Scheduler; got "
            f"{config.get('_class_name')!r}. The network can be sampled with those of its kind: "
            'pass {**config, "_class_name": ...}.'
        )
    config = fields.translated(name, config)
    values = fields.read_values(name, config, {ignore} if isinstance(ignore, str) else set(ignore))
    make = _MAKERS.get(name) or _MAKERS[fields.family(name)]
    return make(name, values, pipeline)


def _load(path: str | os.PathLike[str]) -> tuple[dict[str, Value], str | None]:
    """(config, the pipeline's class if its folder says it)."""
    file = Path(path)
    pipeline = None
    if file.is_dir():
        if not (file / "scheduler_config.json").exists() and (file / "scheduler").is_dir():
            file = file / "scheduler"
        file = file / "scheduler_config.json"
    index = file.parent.parent / "model_index.json"
    if file.parent.name == "scheduler" and index.is_file():
        pipeline = str(read_json(index).get("_class_name"))
        try:
            find_pipeline(pipeline)
        except ValueError:
            pipeline = None
    data = read_json(file)
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(data).__name__}.")
    return data, pipeline


def _flow(name: str, values: dict[str, Value], pipeline: str | None) -> DiffusersSampler:
    found = None if pipeline is None else find_pipeline(pipeline)
    levels = values.get("num_train_timesteps", 1000)
    reverse = bool(values.get("invert_sigmas")) or name == "MiniMaxH3"
    time: str | Callable[[Level], Value] = "label"
    if name == "MiniMaxH3":
        time = _from_noise
    elif grids.in_ratios(values):  # Cosmos 2, whose network takes the time itself
        time = "t"
    elif reverse or levels != 1000:
        time = _label_of(levels, reverse)
    return DiffusersSampler(
        processes.flow(),
        "velocity",
        functools.partial(grids.flow_times, name, {"grid": "", **values}, found),
        solver_of(name, values),
        {"time": time},
        negated=reverse,
    )


def _table(name: str, values: dict[str, Value], pipeline: str | None) -> DiffusersSampler:
    if fields.on_flow(values):
        return _flow(name, values, pipeline)
    prediction = canonical_name(values["prediction_type"])
    continuous = values.get("timestep_type") == "continuous" and prediction == "v"
    if name == "EulerDiscrete" and continuous:
        process: Process = processes.trig()
        times = functools.partial(grids.continuous_times, values, process)
        network = {"time": "c_noise"}
        return DiffusersSampler(process, "v", times, solver_of(name, values), network)
    floor = "final_sigmas_type" in values or name in grids.REAL
    process = grids.discrete(values, floor)
    make: Callable[..., np.ndarray] = grids.table_times
    if name in ("LCM", "TCD"):
        make = grids.lcm_times
    if name in ("DDIMInverse", "DPMSolverMultistepInverse"):
        make = own_grids.rising_times
    if name == "UnCLIP":
        make = own_grids.unclip_times
    return DiffusersSampler(
        process, prediction, functools.partial(make, name, values, process), solver_of(name, values)
    )


def _edm(name: str, values: dict[str, Value], pipeline: str | None) -> DiffusersSampler:
    network: dict[str, Network] = {"sigma_data": float(values["sigma_data"])}
    cosine = name == "CosineDPMSolverMultistep"
    if name == "SCM":
        process: Process = processes.trig(network["sigma_data"], end=math.pi / 2)
        return DiffusersSampler(
            process,
            "velocity",
            functools.partial(own_grids.scm_times, process),
            solver_of(name, values),
        )
    if values.get("prediction_type") == "v_prediction":  # sigma_data is 1: the angle is the time
        process = processes.trig()
        network = {"time": "t" if cosine else "c_noise"}
        prediction = "v"
    else:
        process = processes.edm(values["sigma_min"], values["sigma_max"])
        prediction = "edm_f" if values.get("prediction_type") != "sample" else "data"
        network["scale_input"] = True
        network["time"] = _angle if cosine else "c_noise"
    times: Callable[..., np.ndarray] = functools.partial(grids.edm_times, name, values, process)
    if name == "CMStochasticIterative":
        network["time"], times = (
            _thousandths,
            functools.partial(own_grids.consistency_times, values, process),
        )
    return DiffusersSampler(process, prediction, times, solver_of(name, values), network)


def _ipndm(name: str, values: dict[str, Value], pipeline: str | None) -> DiffusersSampler:
    process = processes.trig()
    return DiffusersSampler(
        process, "v", functools.partial(own_grids.ipndm_times, process), solver_of(name, values)
    )


def _wuerstchen(name: str, values: dict[str, Value], pipeline: str | None) -> DiffusersSampler:
    process = processes.vp_cosine(values["s"])
    times = functools.partial(own_grids.wuerstchen_times, process)
    network = {"time": _wuerstchen_label}
    return DiffusersSampler(process, "noise", times, solver_of(name, values), network)


_MAKERS: dict[str, Callable[[str, dict[str, Value], str | None], DiffusersSampler]] = {
    "flow": _flow,
    "table": _table,
    "edm": _edm,
    "IPNDM": _ipndm,
    "DDPMWuerstchen": _wuerstchen,
}
