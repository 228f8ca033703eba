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
    from measurements to samples. With A = U S V^T, `filter(h, x)` is V h(S) V^T x.
    """

    forward_: Partial
    adjoint_: Partial | None
    pinv_: Partial | None
    filter_: Partial | None
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

    def filter(self, h: Callable[[jax.Array], jax.Array], x: PyTree) -> PyTree:
        """V h(S) V^T x, a batch of samples: every right singular vector times h of its value.

        Args:
          h: elementwise, of singular values at least 0; 0 for what A does not see.
          x: (batch, ...).

        Raises:
          TypeError: a nonlinear operator.
        """
        return self._expect(self.filter_, "singular values")(h, x)

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
    return Operator(f, f, f, Partial(_filter_mask, *f.args), "mask")


def _mask(keep: PyTree, x: jax.Array) -> jax.Array:
    return x * jnp.broadcast_to(jnp.asarray(keep).astype(x.dtype), x.shape)


def _filter_mask(keep: PyTree, h: PyTree, x: jax.Array) -> jax.Array:
    return x * jnp.broadcast_to(h(jnp.abs(jnp.asarray(keep).astype(x.dtype))), x.shape)


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
        Partial(_filter_means[factor]),
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


def _make_filter_means(factor: int) -> Callable[[PyTree, jax.Array], jax.Array]:
    def filtered(h: PyTree, x: jax.Array) -> jax.Array:
        seen = _repeat[factor, False](_means[factor](x))
        return h(jnp.asarray(1 / factor, x.dtype)) * seen + h(jnp.zeros((), x.dtype)) * (x - seen)

    return filtered


_means, _repeat = _Made(_make_means), _Made(_make_repeat)
_filter_means = _Made(_make_filter_means)


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
        Partial(_filter_blur, kernel, float(cutoff)),
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


def _wide(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _by_frequency(factors: jax.Array, x: jax.Array) -> jax.Array:
    spectrum = jnp.fft.fft2(_wide(x), axes=(1, 2))
    return jnp.fft.ifft2(spectrum * factors.astype(spectrum.dtype), axes=(1, 2)).real.astype(
        x.dtype
    )


def _convolve(kernel: PyTree, x: jax.Array) -> jax.Array:
    return _by_frequency(_response(kernel, _wide(x)), x)


def _seen(kernel: PyTree, cutoff: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Spectrum of the kernel, and its size where it is not left out, else 0."""
    spectrum = _response(kernel, _wide(x))
    size = jnp.abs(spectrum)
    seen = size > jnp.asarray(cutoff, size.dtype) * jnp.max(size)
    return spectrum, jnp.where(seen, size, 0)


def _deconvolve(kernel: PyTree, cutoff: PyTree, y: jax.Array) -> jax.Array:
    spectrum, size = _seen(kernel, cutoff, y)
    square = jnp.where(size > 0, size, 1) ** 2
    back = jnp.where(size > 0, jnp.conj(spectrum) / square.astype(spectrum.dtype), 0)
    return _by_frequency(back, y)


def _filter_blur(kernel: PyTree, cutoff: PyTree, h: PyTree, x: jax.Array) -> jax.Array:
    return _by_frequency(h(_seen(kernel, cutoff, x)[1]), x)


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
    left, values, vectors = np.linalg.svd(matrix, full_matrices=False)
    seen = values > np.finfo(np.float64).eps * max(matrix.shape) * values.max(initial=0.0)
    left, values, vectors = left[:, seen], values[seen], vectors[seen]
    return Operator(
        Partial(_measure, matrix),
        Partial(back, matrix.T),
        Partial(back, (vectors.T / values) @ left.T),
        Partial(_filter_linear, values, vectors),
        "linear",
    )


def _measure(matrix: Array, x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1) @ jnp.asarray(matrix, x.dtype).T


def _filter_linear(values: Array, vectors: Array, h: PyTree, x: jax.Array) -> jax.Array:
    flat, v = x.reshape(x.shape[0], -1), jnp.asarray(vectors, x.dtype)
    unseen = h(jnp.zeros((), x.dtype))
    change = jnp.broadcast_to(h(jnp.asarray(values, x.dtype)) - unseen, (1, len(v)))
    return (unseen * flat + (flat @ v.T * change) @ v).reshape(x.shape)


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
    return Operator(f if isinstance(f, Partial) else Partial(f), None, None, None, "nonlinear")
