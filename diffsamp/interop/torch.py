"""PyTorch modules as networks: extracted once, then JAX like any other.

The module's code is traced by torchax, with its weights as arguments: a pure function of (weights,
x, t, conditions) that XLA compiles, differentiates and scans. torch is needed while that function
is traced, and not at all once it is exported (`diffsamp.export_network`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from diffsamp._core.checks import expect_choice
from diffsamp._core.types import Array, Conditions, DType, PyTree, Value
from diffsamp.interop._extraction import Extracted, common_dtype, extract, to_jax
from diffsamp.predictions import Level
from diffsamp.processes import Process, expect_process
from diffsamp.score import ScoreFn

__all__ = ["common_dtype", "extract", "from_torch", "to_jax"]

_LAYOUTS = ("NCHW", "NHWC")
_SECOND_HEAD = ("drop", "keep")
# what modules call their time, for `arguments=None`
_TIMES = ("t", "timestep", "timesteps", "time", "times", "time_step", "sigma", "noise_labels")
_ARGUMENT = "argument:"  # no name of a weight holds a colon


def from_torch(
    module: Value,
    *,
    process: Process,
    prediction: str = "noise",
    arguments: Mapping[str, str] | None = None,
    fixed: Mapping[str, Value] | None = None,
    layout: str = "NCHW",
    second_head: str = "drop",
    time: str | Callable[[Level], PyTree] | None = None,
    scale_input: bool | None = None,
    sigma_data: float = 0.5,
    dtype: DType = None,
) -> ScoreFn:
    """A PyTorch module as a `ScoreFn`, whose `params` are its weights as JAX arrays.

    The module is copied once, without its weights, in evaluation mode; the one that was given is
    left as it is and may be deleted. Everything that takes a ScoreFn takes the result: samplers,
    searches, gradients by x, `ds.export_network`. Tracing the module takes seconds, once for each
    set of shapes; then it runs as compiled code.

    Examples:
      >>> import diffsamp as ds
      >>> score_fn = ds.from_torch(  # doctest: +SKIP
      ...     unet, process=ds.processes.vp_discrete("scaled_linear"), prediction="noise",
      ...     arguments={"x": "sample", "t": "timestep", "text": "encoder_hidden_states"})
      >>> ds.sample(score_fn, tableau, x_T, cond={"text": embeddings})  # doctest: +SKIP

    Args:
      module: a `torch.nn.Module` on any device. It must do the same whatever the numbers are: no
        branch or shape may depend on values, and nothing be drawn at random.
      process: the noise process it was trained on.
      prediction: what it predicts, as for `ScoreFn`.
      arguments: the module's names of our arguments: {"x": .., "t": ..} and one for each condition
        that has another name there. A condition that is not named here goes by its own name. None:
        x is its first argument and t the first that is called "timestep" or the like. Conditions
        may be pytrees, such as {"added_cond_kwargs": {"text_embeds": .., "time_ids": ..}}.
      fixed: further arguments of the module that are the same for every sample and call, such as
        {"img_ids": positions}. Arrays and tensors become part of `params`, under "argument:" and
        their name; all else is static.
      layout: of the states: "NCHW" as PyTorch has them, or "NHWC", channels last (for any number
        of spatial axes), which is transposed around the module.
      second_head: of a network whose output is twice as wide as x (a learned variance): "drop" it,
        or "keep" it, a pair for `guidance.learned_range`.
      time: what the network takes as its time, as for `ScoreFn`.
      scale_input: as for `ScoreFn`.
      sigma_data: as for `ScoreFn`.
      dtype: x is cast to it before the network. None: the dtype of the module's weights.

    Returns:
      A `ScoreFn`. Its params are {name: array}, with the names of the module's `state_dict` (and
      of buffers and tensors that are not in it).

    Raises:
      TypeError: not a module, or arguments of another kind.
      ValueError: unknown names of arguments; weights without values (on the device "meta"). When
        it is first called: a module that cannot be traced, or not with these shapes; the message
        names the operation and the line of the module's code.
      ImportError: torch or torchax is missing (`pip install "diffsamp[torch]"`), or the two do not
        work together.
    """
    expect_process(process)
    expect_choice(layout, "layout", _LAYOUTS)
    expect_choice(second_head, "second_head", _SECOND_HEAD)
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    function, params = extract(module)
    names = _Names(module, arguments, fixed or {})
    dtype = dtype or common_dtype(params)
    static: dict[str, Value] = {}
    for name, value in (fixed or {}).items():
        if hasattr(value, "is_meta"):  # a tensor
            params[_ARGUMENT + name] = to_jax(value, name)
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            params[_ARGUMENT + name] = jnp.asarray(value)
        else:
            static[name] = value
    call = _Call(function, names, static, layout == "NHWC", second_head == "keep")
    return ScoreFn(
        call,
        params,
        process,
        prediction=prediction,
        time=time,
        scale_input=scale_input,
        sigma_data=sigma_data,
        dtype=dtype,
    )


class _Names:
    """Which of the module's arguments are x, t and the conditions."""

    def __init__(
        self,
        module: Value,
        arguments: Mapping[str, str] | None,
        fixed: Mapping[str, Value],
    ) -> None:
        self.module = type(module).__name__
        parameters = inspect.signature(module.forward).parameters
        self.known = [
            n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        self.open = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        required = [n for n in self.known if parameters[n].default is inspect.Parameter.empty]
        if arguments is None:
            times = [n for n in self.known[1:] if n in _TIMES]
            if not times and len(required) == 2:
                times = required[1:]
            if not self.known or not times:
                raise ValueError(
                    f"it is not clear which argument of {self.module} is the time; it has "
                    f'{self.known}. Say `arguments={{"x": .., "t": ..}}`.'
                )
            arguments = {"x": self.known[0], "t": times[0]}
        if not isinstance(arguments, Mapping):
            raise TypeError(
                '`arguments` must map our names to the module\'s, such as {"x": "sample", "t": '
                f'"timestep"}}; got {arguments!r}.'
            )
        if not {"x", "t"} <= set(arguments):
            turned = {"x", "t"} <= set(map(str, arguments.values()))
            hint = {v: k for k, v in arguments.items()} if turned else '{"x": .., "t": .., ..}'
            raise ValueError(
                f"`arguments` must name the module's argument for x and for t; got "
                f"{dict(arguments)}. Our names come first: {hint}."
            )
        self.ours = dict(arguments)
        self.fixed = dict(fixed)
        self.wants_dict = "return_dict" in self.known and "return_dict" not in self.fixed
        for name in (*self.ours.values(), *self.fixed):
            self._expect(name)
        taken = [*self.ours.values(), *self.fixed]
        if len(set(taken)) < len(taken):
            raise ValueError(f"an argument of {self.module} is given twice: {sorted(taken)}.")
        self.required = required

    def _expect(self, name: str) -> None:
        if name not in self.known and not self.open:
            raise ValueError(
                f"{self.module} has no argument {name!r}; it has {', '.join(self.known)}."
            )

    def keywords(self, x: PyTree, t: Array, cond: Conditions) -> dict[str, Value]:
        """The module's keyword arguments.

        Raises:
          ValueError: names that it does not have, or that are missing.
        """
        values = {self.ours["x"]: x, self.ours["t"]: t, **self.fixed}
        for name, value in cond.items():
            own = self.ours.get(name, name)
            self._expect(own)
            if own in values:
                raise ValueError(
                    f"the condition {name!r} is the argument {own!r} of {self.module}, which is "
                    "given already."
                )
            values[own] = value
        missing = [name for name in self.required if name not in values]
        if missing:
            ours = {theirs: name for name, theirs in self.ours.items()}
            raise ValueError(
                f"{self.module} needs {', '.join(missing)}: pass "
                f"cond={{{', '.join(repr(ours.get(n, n)) + ': ..' for n in missing)}}}."
            )
        if self.wants_dict:
            values["return_dict"] = False
        return values


class _Call:
    """`apply(params, x, t, **cond)`: the module's own code, run on JAX arrays.

    Traced once for each set of shapes: `jax.jit` keeps what it has seen, also when the sampler
    around it is compiled anew.
    """

    def __init__(
        self,
        function: Extracted,
        names: _Names,
        static: Mapping[str, Value],
        last: bool,
        keep: bool,
    ) -> None:
        self.function, self.names = function, names
        self.static, self.last, self.keep = dict(static), last, keep
        self.run = jax.jit(self._run)

    def __call__(self, params: PyTree, x: PyTree, t: Array, **cond: PyTree) -> PyTree:
        return self.run(params, x, t, cond)

    def _run(self, params: PyTree, x: PyTree, t: Array, cond: Conditions) -> PyTree:
        weights = {k: v for k, v in params.items() if not k.startswith(_ARGUMENT)}
        given = {k.removeprefix(_ARGUMENT): v for k, v in params.items() if k.startswith(_ARGUMENT)}
        if self.last:
            x = jnp.moveaxis(x, -1, 1)
        keywords = self.names.keywords(x, t, cond) | given | self.static
        output = self.function(weights, keywords)
        first, second = _heads(output, x)
        if self.last:
            first = jnp.moveaxis(first, 1, -1)
            second = None if second is None else jnp.moveaxis(second, 1, -1)
        if not self.keep:
            return first
        if second is None:
            raise ValueError(
                f"{self.names.module} has no second head to keep: its output has the shape "
                f"{jnp.shape(output)} for x of {jnp.shape(x)}."
            )
        return first, second


def _heads(output: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The output, cut in two where one axis is twice as long as that of x."""
    if output.ndim == x.ndim and output.shape != x.shape:
        axes = [a for a in range(x.ndim) if output.shape[a] != x.shape[a]]
        if len(axes) == 1 and output.shape[axes[0]] == 2 * x.shape[axes[0]] and axes[0] > 0:
            first, second = jnp.split(output, 2, axis=axes[0])
            return first, second
    return output, None
