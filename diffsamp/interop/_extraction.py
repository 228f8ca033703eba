"""A PyTorch module taken apart: its code as a function of JAX arrays, and its weights."""

from __future__ import annotations

import contextlib
import copy
import traceback
import warnings
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from diffsamp._core.types import DType, Value
from diffsamp.interop._torchax import torchax_of_torch

__all__ = ["Extracted", "common_dtype", "extract", "to_jax"]


def extract(module: Value, method: str = "forward") -> tuple[Extracted, dict[str, jax.Array]]:
    """A pure function that does what a module does, and its weights.

    The module is copied once, without its weights, in evaluation mode; the one that was given is
    left as it is and may be deleted.

    Args:
      module: a `torch.nn.Module`.
      method: the method to call.

    Returns:
      (function, weights): `function(weights, arguments)` with {name of an argument: JAX array},
      traceable by JAX, gives the module's first output. Weights are {name: array}, with the names
      of `state_dict`, and of buffers and tensors that are not in it.

    Raises:
      TypeError: not a module.
      ValueError: it has no such method, cannot be copied, or has weights without values.
      ImportError: torch or torchax is missing, or the two do not work together.
    """
    torchax_of_torch()
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module; got {type(module).__name__}.")
    if not callable(getattr(module, method, None)):
        raise ValueError(f"{type(module).__name__} has no method {method!r}.")
    skeleton, weights = _taken_apart(module)
    return Extracted(skeleton, method), weights


class Extracted:
    """What `extract` returns: a module's code, to be run on JAX arrays."""

    def __init__(self, skeleton: Value, method: str) -> None:
        self.name = type(skeleton).__name__
        self.module = _wrapped(skeleton, method)

    def __call__(self, weights: Mapping[str, jax.Array], arguments: dict[str, Value]) -> jax.Array:
        """The module's first output.

        Raises:
          ValueError: when it is traced: what it does cannot be, or not with these shapes. The
            message names the operation, and the line of the module's code.
        """
        torchax = torchax_of_torch()
        import torch

        env = torchax.default_env()
        before = env.param.prng
        module = copy.deepcopy(self.module)  # what it keeps of one trace is not for the next
        named = {f"module.{name}": weight for name, weight in weights.items()}
        try:
            # the module's own rules for dtypes and ranks, not those of the user's JAX
            with _quiet(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                tensors, given = env.j2t_iso((named, arguments))
                with env, _made_by_jax(torchax):
                    output = torch.func.functional_call(module, tensors, (), given)
                output = env.t2j_iso(output)
        except Exception as error:  # whatever torch, torchax or JAX says
            raise _explained(error, self.name, arguments) from error
        if env.param.prng is not before:
            raise ValueError(
                f"{self.name} draws random numbers, which would be the same in every call. "
                "Make it deterministic, or pass what it draws as an argument."
            )
        while isinstance(output, tuple | list | Mapping):
            output = next(iter(output.values() if isinstance(output, Mapping) else output))
        if not isinstance(output, jax.Array):
            raise ValueError(
                f"{self.name} must return a tensor, or a tuple whose first entry is one; "
                f"got {type(output).__name__}."
            )
        return output


def common_dtype(weights: Mapping[str, jax.Array]) -> DType:
    """The floating dtype of most weights, or None; a few may be kept in another."""
    found = [w.dtype for w in weights.values() if jnp.issubdtype(w.dtype, jnp.floating)]
    return max(found, key=found.count) if found else None


def to_jax(tensor: Value, name: str = "a tensor") -> jax.Array:
    """A tensor's values as a JAX array of its own; 64-bit ones as JAX is set up to hold them.

    Raises:
      ValueError: it has no values.
    """
    import torch

    if tensor.is_meta:
        raise ValueError(f'{name} has no values (its device is "meta"). Load the weights first.')
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # which NumPy does not know
        return jnp.array(tensor.view(torch.int16).numpy().view(jnp.bfloat16))
    return jnp.array(tensor.numpy())  # a copy: the tensor may change


def _wrapped(module: Value, method: str) -> Value:
    """A module whose `forward` is another's `method`."""
    import torch

    class Method(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, **keywords: Value) -> Value:
            return getattr(self.module, method)(**keywords)

    return Method()


def _taken_apart(module: Value) -> tuple[Value, dict[str, jax.Array]]:
    """(a copy of the module without its weights, {name: weight}); tied weights are one.

    Tensors that are mere attributes of a module become buffers of the copy.
    """
    import torch

    params: dict[str, jax.Array] = {}
    empty: dict[int, Value] = {}  # deepcopy's memory: what each tensor becomes
    attributes: list[tuple[str, str]] = []
    for path, part in module.named_modules():
        found = {**part._parameters, **part._buffers}
        loose = {n: v for n, v in vars(part).items() if isinstance(v, torch.Tensor)}
        attributes += [(path, name) for name in loose]
        for name, tensor in (found | loose).items():
            if tensor is None or id(tensor) in empty:
                continue
            key = f"{path}.{name}".removeprefix(".")
            params[key] = to_jax(tensor, key)
            bare = torch.empty_like(tensor, device="meta", requires_grad=False)
            is_weight = isinstance(tensor, torch.nn.Parameter)
            empty[id(tensor)] = torch.nn.Parameter(bare, False) if is_weight else bare
    try:
        skeleton = copy.deepcopy(module, empty)
    except Exception as error:
        raise ValueError(f"{type(module).__name__} cannot be copied: {error}") from error
    for path, name in attributes:
        part = skeleton.get_submodule(path)
        tensor = vars(part).pop(name)
        part.register_buffer(name, tensor, persistent=False)
    return skeleton.eval(), params


def _made_by_jax(torchax: Value) -> Value:
    """A mode in which tensors that the module makes on no device in particular are JAX arrays.

    `torch.device("jax")` does not do: which functions it is for, torch lists once, and transformers
    exchanges one of them for a while.
    """
    from torch.overrides import TorchFunctionMode

    class Made(TorchFunctionMode):
        def __torch_function__(
            self, func: Value, types: Value, args: Value = (), kwargs: Value = None
        ) -> Value:
            kwargs = dict(kwargs or {})
            if func in torchax.tensor.TENSOR_CONSTRUCTORS and kwargs.get("device") is None:
                kwargs["device"] = "jax"
            return func(*args, **kwargs)

    return Made()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without JAX's and torchax's remarks on 64-bit integers, which the module asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[iI]nt64.*")
        warnings.filterwarnings("ignore", message=".*float64.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def _explained(error: Exception, module: str, arguments: Mapping[str, Value]) -> Exception:
    """The error in words: the operation, and the line of the module's code that asked for it."""
    operation, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.endswith("tensor.py") and frame.f_code.co_name == "dispatch":
            operation = str(frame.f_locals.get("func", operation))
        package = frame.f_globals.get("__name__", "").split(".")[0]
        if package not in ("torch", "torchax", "jax", "diffsamp", "contextlib"):
            line = f"{file}, line {number}"
    where = (f" in the operation {operation}" if operation else "") + (f" ({line})" if line else "")
    first = str(error).strip().split("\n")[0]
    kinds = (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.NonConcreteBooleanIndexError,
    )
    if isinstance(error, kinds):
        return ValueError(
            f"{module} cannot be extracted: what it computes depends on the values of its tensors"
            f"{where}. Write that part without a branch, a shape or a Python number that depends "
            f"on data (torch.where instead of `if`). {first}"
        )
    if type(error).__name__ == "OperatorNotFound":
        return ValueError(
            f"{module} cannot be extracted: torchax does not know an operation, {first}{where}. "
            "Write it with others, or register it with torchax."
        )
    shapes = {
        name: jax.tree.map(jnp.shape, value)
        for name, value in arguments.items()
        if value is not None and not isinstance(value, bool)
    }
    return ValueError(
        f"{module} cannot be called with arguments of the shapes {shapes}: "
        f"{type(error).__name__}{where}: {first}"
    )
