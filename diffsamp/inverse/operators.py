"""What is measured of a sample: operators with their adjoint and pseudo-inverse.

An operator takes a batch, (batch, ...), and is a pytree: its arrays are leaves. Images are
(batch, height, width, ...).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from diffsamp._core.checks import expect_int
from diffsamp._core.types import Array, Key, PyTree

__all__ = ["Operator", "blur", "downsample", "linear", "mask", "nonlinear"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """A measurement A; made by `mask`, `blur`, `downsample`, `linear` and `nonlinear`.

    Called with a batch it measures (`forward` is the same); `adjoint` is A^T and `pinv` A^+, both
    from measurements to samples.
    """

    forward_: Partial
    adjoint_: Partial | None
    pinv_: Partial | None
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, x: PyTree) -> PyTree:
        """What is measured of a batch of samples."""
        return self.forward_(x)

    def forward(self, x: PyTree) -> PyTree:
        """What is measured of a batch of samples."""
        return self.forward_(x)

    def adjoint(self, y: PyTree) -> PyTree:
        """A^T y.

        Raises:
          TypeError: a nonlinear operator.
        """
        return self._expect(self.adjoint_, "adjoint")(y)

    def pinv(self, y: PyTree) -> PyTree:
        """A^+ y: of all samples with that measurement the smallest.

        Raises:
          TypeError: a nonlinear operator.
        """
        return self._expect(self.pinv_, "pseudo-inverse")(y)

    def _expect(self, f: Partial | None, what: str) -> Partial:
        if f is None:
            raise TypeError(
                f"a {self.name} operator has no {what}: use guidance.loss or guidance.measurement, "
                "which linearise it, or inverse.daps."
            )
        return f


def mask(keep: PyTree) -> Operator:
    """Only some elements are seen: A x = keep x, 0 elsewhere.

    Args:
      keep: 1 or True where an element is seen; broadcasts to a sample.
    """
    f = Partial(_mask, keep if isinstance(keep, jax.Array) else np.asarray(keep))
    return Operator(f, f, f, "mask")


def _mask(keep: PyTree, x: jax.Array) -> jax.Array:
    return x * jnp.broadcast_to(jnp.asarray(keep).astype(x.dtype), x.shape)


def downsample(factor: int) -> Operator:
    """Means over blocks of factor x factor pixels.

    Args:
      factor: at least 1; height and width must be multiples of it.
    """
    factor = expect_int(factor, "factor", at_least=1)
    return Operator(
        Partial(_means[factor]),
        Partial(_repeat[factor, True]),
        Partial(_repeat[factor, False]),
        "downsample",
    )


class _Made(dict[PyTree, PyTree]):
    """Functions by their static arguments, made once: they are compared by identity."""

    def __init__(self, make: Callable[[PyTree], PyTree]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: Key) -> PyTree:
        self[key] = self.make(key)
        return self[key]


def _make_means(factor: int) -> Callable[[jax.Array], jax.Array]:
    def means(x: jax.Array) -> jax.Array:
        b, h, w, *rest = x.shape
        if h % factor or w % factor:
            raise ValueError(
                f"downsample({factor}) needs images (batch, height, width, ..) whose sides it "
                f"divides; got shape {x.shape}."
            )
        blocks = x.reshape(b, h // factor, factor, w // factor, factor, *rest)
        return blocks.mean(axis=(2, 4))

    return means


def _make_repeat(key: tuple[int, bool]) -> Callable[[jax.Array], jax.Array]:
    factor, adjoint = key

    def repeat(y: jax.Array) -> jax.Array:
        y = jnp.repeat(jnp.repeat(y, factor, axis=1), factor, axis=2)
        return y / factor**2 if adjoint else y

    return repeat


_means, _repeat = _Made(_make_means), _Made(_make_repeat)


def blur(kernel: PyTree, *, cutoff: float = 1e-3) -> Operator:
    """Circular convolution of images with a kernel, every channel alike.

    Args:
      kernel: (rows, columns), odd sizes, centred.
      cutoff: frequencies that the kernel damps below this share of its largest are left out of the
        pseudo-inverse.

    Raises:
      ValueError: a kernel of another shape.
    """
    kernel = np.asarray(kernel, np.float64)
    if kernel.ndim != 2 or not all(n % 2 for n in kernel.shape):
        raise ValueError(f"`kernel` must be (rows, columns) of odd sizes; got {kernel.shape}.")
    return Operator(
        Partial(_convolve, kernel),
        Partial(_convolve, kernel[::-1, ::-1]),
        Partial(_deconvolve, kernel, float(cutoff)),
        "blur",
    )


def _response(kernel: PyTree, x: jax.Array) -> jax.Array:
    rows, columns = np.shape(kernel)
    height, width = x.shape[1:3]
    if rows > height or columns > width:
        raise ValueError(f"the kernel, {(rows, columns)}, is larger than the images, {x.shape}.")
    wide = jnp.zeros((height, width), x.dtype).at[:rows, :columns].set(jnp.asarray(kernel, x.dtype))
    centred = jnp.roll(wide, (-(rows // 2), -(columns // 2)), axis=(0, 1))
    spectrum = jnp.fft.fft2(centred)
    return spectrum.reshape(1, height, width, *(1,) * (x.ndim - 3))


def _convolve(kernel: PyTree, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)) if x.dtype != jnp.float64 else x
    told = jnp.fft.ifft2(jnp.fft.fft2(wide, axes=(1, 2)) * _response(kernel, wide), axes=(1, 2))
    return told.real.astype(x.dtype)


def _deconvolve(kernel: PyTree, cutoff: PyTree, y: jax.Array) -> jax.Array:
    spectrum = _response(kernel, y)
    size = jnp.abs(spectrum)
    seen = size > jnp.asarray(cutoff, size.dtype) * jnp.max(size)
    square = jnp.where(seen, size, 1) ** 2
    back = jnp.where(seen, jnp.conj(spectrum) / square.astype(spectrum.dtype), 0)
    return jnp.fft.ifft2(jnp.fft.fft2(y, axes=(1, 2)) * back, axes=(1, 2)).real.astype(y.dtype)


def linear(matrix: Array, shape: tuple[int, ...] | None = None) -> Operator:
    """Any linear measurement, (m, n), of samples with n elements.

    Args:
      matrix: (m, n), on the host.
      shape: of one sample; None: (n,).

    Raises:
      ValueError: a matrix that does not fit the shape.
    """
    matrix = np.asarray(matrix, np.float64)
    shape = (matrix.shape[-1],) if shape is None else tuple(shape)
    if matrix.ndim != 2 or matrix.shape[1] != int(np.prod(shape)):
        raise ValueError(
            f"`matrix` must be (m, {int(np.prod(shape))}) for samples of shape {shape}; got "
            f"{matrix.shape}."
        )
    back = _reshaped[shape]
    return Operator(
        Partial(_measure, matrix),
        Partial(back, matrix.T),
        Partial(back, np.linalg.pinv(matrix)),
        "linear",
    )


def _measure(matrix: Array, x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1) @ jnp.asarray(matrix, x.dtype).T


def _make_reshaped(shape: tuple[int, ...]) -> Callable[[PyTree, jax.Array], jax.Array]:
    def back(matrix: Array, y: jax.Array) -> jax.Array:
        return (y @ jnp.asarray(matrix, y.dtype).T).reshape(y.shape[0], *shape)

    return back


_reshaped = _Made(_make_reshaped)


def nonlinear(f: Callable[[PyTree], PyTree]) -> Operator:
    """Any differentiable measurement, such as a network or the absolute value of a transform.

    Args:
      f: a function of a batch; `jax.tree_util.Partial` binds arrays.
    """
    return Operator(f if isinstance(f, Partial) else Partial(f), None, None, "nonlinear")
