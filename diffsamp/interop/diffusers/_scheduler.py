"""`TableauScheduler`: a plan as a scheduler of diffusers.

A timestep is a row that evaluates; rows that only move the state run inside `step`, after it. The
state is the network's own (for flow models (1 - sigma) x_0 + sigma eps, for the rest alpha x_0 +
sigma eps), so that nothing but EDM's preconditioning scales the network's input. Only diffusers and
torch are needed, both imported when the class is made.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffsamp.interop import numpy as reader
from diffsamp.interop.diffusers._plans import TABLE, expect_like, scheduler_config, start_std

__all__ = ["scheduler_class"]

# by how much a start may be off: a plan that scales it says what it wants; a grid that begins just
# below t_max takes the prior as it is, here as in `ds.sample`
_START, _PRIOR = 1e-4, 1e-2


@functools.cache
def scheduler_class() -> Any:
    """The class, which diffusers' base classes are needed for.

    Raises:
      ModuleNotFoundError: diffusers or torch is missing; the message says how to install them.
    """
    try:
        import torch
        from diffusers.configuration_utils import ConfigMixin, register_to_config
        from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
        from diffusers.utils.torch_utils import randn_tensor
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"TableauScheduler needs diffusers and torch ({error.name} is missing): pip install "
            '"diffsamp[diffusers]"',
            name=error.name,
        ) from error

    class TableauScheduler(SchedulerMixin, ConfigMixin):
        """A plan, or any tableau, as a scheduler of diffusers' pipelines.

        Make it with `from_plan(path)` or `from_tableau(tableau, prediction=..)`, put it into a
        pipeline (`pipe.scheduler = ..`) and call that with as many steps as the plan makes
        evaluations. `save_pretrained` writes one `scheduler_config.json` that holds the table.

        Examples:
          >>> pipe.scheduler = TableauScheduler.from_plan("plan-6.json")  # doctest: +SKIP
          >>> pipe("a prompt", num_inference_steps=6)  # doctest: +SKIP

        Attributes:
          timesteps: (evaluations,) what the network is told, as the pipeline passes it.
          order: 1, since every evaluation is a timestep of its own.
          init_noise_sigma: standard deviation of the noise to start from. Whoever makes the start
            must read it: Stable Diffusion's pipelines do, those of flow models take `latents=`.
        """

        _compatibles: list[str] = []  # noqa: RUF012
        order = 1

        @register_to_config
        def __init__(
            self,
            table: Mapping[str, Any] | None = None,
            calls: Mapping[str, Any] | None = None,
            timesteps: list[float] | None = None,
            prediction_type: str = "epsilon",
            num_train_timesteps: int = 1000,
            name: str = "",
        ) -> None:
            if table is None or calls is None or timesteps is None:
                raise ValueError(
                    "make a TableauScheduler with from_plan(path) or from_tableau(tableau, "
                    "prediction=..), or from the folder of one; a config of another scheduler "
                    "holds no plan."
                )
            self._table: dict[str, Any] = {key: table.get(key) for key in TABLE}
            self._rows = [n for n, asked in enumerate(table["evaluates"]) if asked]
            self._start_std = start_std(self._table, self._rows[0])
            self._start_was_asked_for = False
            self.num_inference_steps = len(self._rows)
            self._begin_index: int | None = None
            self.set_timesteps()

        # -- making it ----------------------------------------------------------------------------

        @classmethod
        def from_tableau(
            cls,
            tableau: Any,
            prediction: str | None = None,
            *,
            timesteps: list[float] | None = None,
            num_train_timesteps: int = 1000,
        ) -> TableauScheduler:
            """From a `diffsamp.Tableau`, its file or a plan; see `scheduler_config`.

            Args:
              tableau: the object, a file's path, or what the file holds.
              prediction: what the pipeline's network predicts; None: what the plan says.
              timesteps: what the network is told; None: 1000 sigma, or what the plan says.
              num_train_timesteps: how many levels the network was trained on.

            Raises:
              FileNotFoundError, ValueError: as `scheduler_config`.
            """
            options: Any = {"timesteps": timesteps, "num_train_timesteps": num_train_timesteps}
            config = scheduler_config(tableau, prediction, **options)
            return cls(**{key: v for key, v in config.items() if not key.startswith("_")})

        @classmethod
        def from_plan(
            cls, path: Any, *, prediction: str | None = None, like: Any = None, **options: Any
        ) -> TableauScheduler:
            """From the file of a `diffsamp.search.Plan`.

            Args:
              path: the file, the object, or what the file holds.
              prediction: as for `from_tableau`, for plans that do not say it (of version 1) or a
                network of another prediction.
              like: the scheduler that is replaced, `pipe.scheduler`, to check that the plan is for
                its process and prediction; None: that is not checked.
              **options: of `from_tableau`.

            Raises:
              FileNotFoundError, ValueError: as `from_tableau`; a plan for another process.
            """
            made = cls.from_tableau(path, prediction, **options)
            if like is not None:
                expect_like(made.config, like)
            return made

        # -- what pipelines use -------------------------------------------------------------------

        def __len__(self) -> int:
            return int(self.config.num_train_timesteps)

        @property
        def init_noise_sigma(self) -> float:
            """Standard deviation of the noise to start from."""
            self._start_was_asked_for = True
            return self._start_std

        @property
        def step_index(self) -> int | None:
            """The evaluation that comes next, or None before the first."""
            return self._step_index

        @property
        def begin_index(self) -> int | None:
            """The first evaluation, if a pipeline has set it."""
            return self._begin_index

        def set_begin_index(self, begin_index: int = 0) -> None:
            """Begin at a later evaluation (image to image).

            Args:
              begin_index: index into `timesteps`.
            """
            self._begin_index = begin_index

        def set_timesteps(
            self,
            num_inference_steps: int | None = None,
            device: Any = None,
            sigmas: Any = None,
            mu: float | None = None,
            timesteps: Any = None,
        ) -> None:
            """Start again; the plan's own levels stay, whatever `sigmas` and `mu` a pipeline has.

            Args:
              num_inference_steps: the plan's number of evaluations.
              device: of `timesteps`.
              sigmas: as many as the plan makes evaluations; not used.
              mu: not used.
              timesteps: likewise, and must be the plan's.

            Raises:
              ValueError: another number of steps, or other timesteps.
            """
            own, count = self.config.timesteps, len(self._rows)
            for given, what in ((sigmas, "sigmas"), (timesteps, "timesteps")):
                if given is not None and len(given) != count:
                    raise ValueError(
                        f"the plan makes {count} evaluations; got {len(given)} {what}."
                    )
            if num_inference_steps not in (None, count):
                raise ValueError(
                    f"the plan {self.config.name!r} makes {count} evaluations: pass "
                    f"num_inference_steps={count}, not {num_inference_steps}."
                )
            if timesteps is not None and not np.allclose(np.asarray(timesteps), own):
                raise ValueError(f"a plan has timesteps of its own, {list(own)}: pass none.")
            self.timesteps = torch.tensor(own, dtype=torch.float32, device=device)
            self._step_index: int | None = None
            self._begin_index = None
            self._past: tuple[list[Any], list[Any]] = ([], [])

        def index_for_timestep(self, timestep: Any) -> int:
            """The evaluation of a timestep; of several the present, else the first one.

            Raises:
              ValueError: none of the plan's.
            """
            value, own = float(timestep), np.asarray(self.config.timesteps)
            # float16 pipelines hold 1000 to 0.5
            fits = np.flatnonzero(np.abs(own - value) <= 1e-3 * max(1.0, abs(value)))
            if not fits.size:
                raise ValueError(
                    f"{value:g} is none of the plan's timesteps, {own.round(3).tolist()}."
                )
            for index in (self._step_index, self._begin_index):
                if index is not None and index in fits:
                    return index
            return int(fits[np.argmin(np.abs(own[fits] - value))])

        def scale_model_input(self, sample: Any, timestep: Any = None) -> Any:
            """What the network is given; the sample itself but for EDM's preconditioning.

            Args:
              sample: the state.
              timestep: as the pipeline has it; None: the next.
            """
            index = self._step_index or 0
            if timestep is not None:
                index = self.index_for_timestep(timestep)
            scale = self.config.calls["scale"][self._rows[index]]
            return sample if scale == 1 else sample * scale

        def step(
            self,
            model_output: Any,
            timestep: Any,
            sample: Any,
            generator: Any = None,
            variance_noise: Any = None,
            return_dict: bool = True,
        ) -> Any:
            """From one evaluation to the state of the next.

            Args:
              model_output: the network's, in the plan's prediction.
              timestep: as the pipeline has it.
              sample: the state there.
              generator: of the fresh noise, for plans that add some.
              variance_noise: that noise instead: a tensor like `sample`, or one for every row that
                adds some before the next evaluation.
              return_dict: a `SchedulerOutput` with `prev_sample`, or a tuple.

            Raises:
              ValueError: no evaluation left, an output of another shape, too little noise; a plan
                whose start is not of standard deviation 1, where nobody asked what it is.
            """
            if self._step_index is None:
                begin = self._begin_index
                self._step_index = self.index_for_timestep(timestep) if begin is None else begin
                unaware = self._step_index == 0 and not self._start_was_asked_for
                if unaware and abs(self._start_std - 1) > (_START if self._rows[0] else _PRIOR):
                    raise ValueError(
                        f"the plan {self.config.name!r} starts from noise of standard deviation "
                        f"{self._start_std:.4g}, and nobody has asked for it: pipelines that do "
                        "not start from that of 1. Pass `latents=scheduler.init_noise_sigma * "
                        "noise`, or, where a pipeline takes no latents, write its loop "
                        "(docs/plans_elsewhere.md)."
                    )
            if self._step_index >= len(self._rows):
                raise ValueError("all evaluations of the plan were made; call set_timesteps first.")
            if model_output.shape != sample.shape:
                raise ValueError(
                    f"`model_output` must have the sample's shape {tuple(sample.shape)}; got "
                    f"{tuple(model_output.shape)}. Split off a learned variance."
                )
            table, calls, n = self._table, self.config.calls, self._rows[self._step_index]
            several = isinstance(variance_noise, list | tuple)
            given = iter(variance_noise if several else [variance_noise])
            dtype = torch.promote_types(sample.dtype, torch.float32)

            def draw(row: int) -> Any:
                if variance_noise is None:
                    return randn_tensor(sample.shape, generator, device=sample.device, dtype=dtype)
                noise = next(given, None)
                if noise is None:
                    raise ValueError(f"`variance_noise` is too short: row {row} adds noise too.")
                return noise.to(dtype)

            x = sample.to(dtype)
            output = calls["state"][n] * x + calls["output"][n] * model_output.to(dtype)
            states, outputs = self._past
            if outputs:
                states, outputs = [x, *states[1:]], [output, *outputs]
            elif self._step_index == 0:  # states before the first evaluation are not used
                states, outputs = [x], [output, *[torch.zeros_like(x)] * n]
            else:
                states, outputs = reader.as_if_before(table, n, x, output)
            end = self._rows[self._step_index + 1 :][:1] or [len(table["evaluates"])]
            for row in range(n, end[0]):
                if row > n:
                    outputs.insert(0, torch.zeros_like(x))
                states.insert(0, reader.advance(table, row, states, outputs, draw))
                del states[len(table["a"][row]) + 1 :], outputs[len(table["b"][row]) :]
            self._past = (states, outputs)
            self._step_index += 1
            found = states[0].to(model_output.dtype)
            return SchedulerOutput(prev_sample=found) if return_dict else (found,)

        # -- image to image -----------------------------------------------------------------------

        def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
            """Data noised to the level of some of the plan's timesteps.

            Args:
              original_samples: (batch, ...) data.
              noise: (batch, ...) standard noise.
              timesteps: () or (batch,) of the plan's.

            Raises:
              ValueError: a timestep that is none of the plan's.
            """
            times = torch.as_tensor(timesteps).reshape(-1)
            rows = [self._rows[self.index_for_timestep(t)] for t in times]
            shape = (len(rows), *(1,) * (original_samples.ndim - 1))

            def column(name: str) -> Any:
                values = [self._table[name][n] for n in rows]
                return torch.tensor(values).to(original_samples).reshape(shape)

            return column("alpha") * original_samples + column("sigma") * noise

        def scale_noise(self, sample: Any, timestep: Any, noise: Any) -> Any:
            """As `add_noise`, in the order in which pipelines of flow models call it.

            Args:
              sample: (batch, ...) data.
              timestep: () or (batch,) of the plan's.
              noise: (batch, ...) standard noise.
            """
            return self.add_noise(sample, noise, timestep)

    TableauScheduler.__module__ = "diffsamp.interop.diffusers"
    TableauScheduler.__qualname__ = "TableauScheduler"
    return TableauScheduler
