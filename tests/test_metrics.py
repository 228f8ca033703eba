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
    assert np.isfinite(float(metrics.psnr(x, x)))
    with pytest.raises(ValueError, match="must have one shape"):
        metrics.rmse(x, reference[:1])


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
    assert metrics.sliced_wasserstein(x, x[::2], key) < 0.2
    # equal means and covariances, other shape: the Frechet distance is blind, this is not
    signs = rng.choice([-1.0, 1.0], size=(20_000, 1))
    normal = rng.normal(size=(20_000, 1))
    normal = (normal - normal.mean()) / normal.std() * signs.std() + signs.mean()
    assert metrics.frechet_distance(signs, normal) < 1e-3
    assert metrics.sliced_wasserstein(signs, normal, key) > 0.4
    with pytest.raises(ValueError, match="as many dimensions"):
        metrics.sliced_wasserstein(x, x[:, :2], key)
