"""Metrics against values by hand and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsamp import metrics


def test_errors_by_hand():
    x = jnp.array([[[1.0, 2.0]], [[0.0, 0.0]]])
    reference = jnp.array([[[0.0, 2.0]], [[0.0, 0.2]]])
    np.testing.assert_allclose(metrics.mean_squared_error(x, reference), [0.5, 0.02], rtol=1e-6)
    assert float(metrics.rmse(x, reference)) == pytest.approx(np.sqrt(0.26), rel=1e-6)
    want = np.mean(10 * np.log10(4 / np.array([0.5, 0.02])))
    assert float(metrics.psnr(x, reference)) == pytest.approx(want, rel=1e-6)
    assert float(metrics.psnr(x, reference, data_range=1.0)) == pytest.approx(
        want - 20 * np.log10(2), rel=1e-6
    )
    # equal sets: float32's smallest number for the error, 10 log10(4 / 1.18e-38)
    assert float(metrics.psnr(x, x)) == pytest.approx(10 * np.log10(4 / 2.0**-126), rel=1e-6)
    # PSNR is a mean of logarithms, which the logarithm of the mean is not
    assert abs(want - 10 * np.log10(4 / 0.26)) > 1
    with pytest.raises(ValueError, match="must have one shape"):
        metrics.rmse(x, reference[:1])
    with pytest.raises(ValueError, match=r"must have one shape, \(batch, ...\); got \(\)"):
        metrics.psnr(jnp.ones(()), jnp.ones(()))
    for bad in (0.0, -2.0, np.nan):
        with pytest.raises(ValueError, match="`data_range` must be positive"):
            metrics.psnr(x, reference, data_range=bad)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, jnp.bfloat16, np.float64])
def test_errors_of_other_dtypes(dtype):
    """Computed in float32: 8-bit differences do not wrap around, and dtypes may differ."""
    x, reference = np.array([[200, 10]], dtype), np.array([[10.0, 30.0]], np.float32)
    for other in (reference, reference.astype(dtype)):  # all exact in bfloat16 too
        for got in (metrics.mean_squared_error(x, other), metrics.mean_squared_error(other, x)):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, [(190**2 + 20**2) / 2], rtol=1e-6)  # float32


@pytest.mark.usefixtures("x64")
def test_errors_in_float64():
    x, reference = jnp.ones((1, 3)), jnp.ones((1, 3)) * (1 + 1e-10)
    assert metrics.mean_squared_error(x, reference).dtype == jnp.float64
    # the difference keeps 6 digits: 1e-16 of 1, relative to 1e-10
    assert float(metrics.rmse(x, reference)) == pytest.approx(1e-10, rel=1e-5)


def test_frechet_distance_of_known_gaussians():
    """Sets whose sample moments are exact: the closed form of two Gaussians that commute."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(400, 3))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    scale, shift = np.array([1.0, 2.0, 0.5]), np.array([0.3, -1.0, 0.0])
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    other = white * scale + shift
    want = np.sum(shift**2) + np.sum((1 - scale) ** 2)
    assert metrics.frechet_distance(white, other) == pytest.approx(want, rel=1e-9)
    assert metrics.frechet_distance(other, white) == pytest.approx(want, rel=1e-9)
    turned = metrics.frechet_distance(white @ rotation, other @ rotation)
    assert turned == pytest.approx(want, rel=1e-9)
    assert metrics.frechet_distance(other, other) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(white, 1.01 * other) != pytest.approx(want, rel=1e-3)
    # a common shift changes nothing, a common scale its square; trailing axes are flattened
    moved = metrics.frechet_distance(white + 5, other + 5)
    assert moved == pytest.approx(want, rel=1e-9)
    assert metrics.frechet_distance(3 * white, 3 * other) == pytest.approx(9 * want, rel=1e-9)
    images = metrics.frechet_distance(white.reshape(400, 3, 1), other.reshape(400, 1, 3))
    assert images == pytest.approx(want, rel=1e-9)
    # sets of different sizes and one dimension: (m_1 - m_2)^2 + (s_1 - s_2)^2
    first, second = white[:, :1], 2 * white[:150, :1] + 1
    want_1d = (first.mean() - second.mean()) ** 2
    want_1d += (first.std(ddof=1) - second.std(ddof=1)) ** 2
    assert metrics.frechet_distance(first, second) == pytest.approx(want_1d, rel=1e-9)
    # fewer samples than dimensions: singular covariances, the root of rounding (1e-16) at most
    few = rng.normal(size=(3, 8))
    assert metrics.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(few, few + 0.5) == pytest.approx(8 * 0.25, abs=1e-6)
    # covariances that do not commute: against scipy-free square root by eigenvalues of the product
    skew = white @ rng.normal(size=(3, 3))
    product = np.cov(skew.T) @ np.cov(other.T)
    cross = np.sqrt(np.linalg.eigvals(product).real).sum()
    want = np.sum((skew.mean(0) - shift) ** 2) + np.trace(np.cov(skew.T) + np.cov(other.T))
    assert metrics.frechet_distance(skew, other) == pytest.approx(want - 2 * cross, rel=1e-8)
    with pytest.raises(ValueError, match="`features` must have shape"):
        metrics.frechet_distance(white[:1], white)
    with pytest.raises(ValueError, match="as many dimensions; got 3 and 2"):
        metrics.frechet_distance(white, white[:, :2])


def test_sliced_wasserstein():
    rng = np.random.default_rng(0)
    x, key = rng.normal(size=(500, 4)), jax.random.key(0)
    shift = np.array([1.0, 0.0, 0.0, 0.0])
    # a shift s moves every projection by s . direction, whose mean square is |s|^2 / dim
    got = metrics.sliced_wasserstein(x, x + shift, key, projections=4000)
    assert got == pytest.approx(0.5, rel=5 / np.sqrt(4000))
    assert metrics.sliced_wasserstein(x, x, key) == 0
    # one dimension: every direction is +-1, and the distance is that of sorted values
    a, b = x[:, :1], 1.5 * x[::-1, 1:2] + 1
    want = np.sqrt(np.mean((np.sort(a[:, 0]) - np.sort(b[:, 0])) ** 2))
    for key_1d in (key, jax.random.PRNGKey(5)):
        assert metrics.sliced_wasserstein(a, b, key_1d) == pytest.approx(want, rel=1e-12)
    assert metrics.sliced_wasserstein(a, 1.01 * b, key) != pytest.approx(want, rel=1e-3)
    # neither the order of samples, nor a common shift or turn of 180 degrees matters
    y = rng.normal(size=(300, 4)) ** 3
    base = metrics.sliced_wasserstein(x, y, key)
    assert metrics.sliced_wasserstein(x[::-1], y[::-1], key) == pytest.approx(base, rel=1e-12)
    assert metrics.sliced_wasserstein(x + 3, y + 3, key) == pytest.approx(base, rel=1e-10)
    assert metrics.sliced_wasserstein(-x, -y, key) == pytest.approx(base, rel=1e-12)
    assert metrics.sliced_wasserstein(y, x, key) == pytest.approx(base, rel=1e-12)
    assert metrics.sliced_wasserstein(x, x[::2], key) < 0.2
    # equal means and covariances, other shape: the Frechet distance is blind, this is not
    signs = rng.choice([-1.0, 1.0], size=(20_000, 1))
    normal = rng.normal(size=(20_000, 1))
    normal = (normal - normal.mean()) / normal.std() * signs.std() + signs.mean()
    assert metrics.frechet_distance(signs, normal) < 1e-3
    assert metrics.sliced_wasserstein(signs, normal, key) > 0.4
    with pytest.raises(ValueError, match="as many dimensions"):
        metrics.sliced_wasserstein(x, x[:, :2], key)
    for bad in (np.float64(1.0), np.ones((0, 4))):
        with pytest.raises(ValueError, match=r"`x` must have shape \(n >= 1, ...\)"):
            metrics.sliced_wasserstein(bad, x, key)
    with pytest.raises(ValueError, match="`projections` must be at least 1; got 0"):
        metrics.sliced_wasserstein(x, x, key, projections=0)
