"""Conditioning times: what the network is told apart from the state's own time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PROCESS, mixture, start

import diffsamp as ds
from diffsamp import search
from diffsamp.loops.policies import replay
from diffsamp.search.explicit import label_offsets, told_times

KEY = jax.random.key(3)
SHIFT = 0.3


def build(n=4, process=PROCESS):
    return ds.solvers.get("dpmpp_2m")(process, ds.schedules.logsnr(process, n))


def with_offsets(tableau, offsets, process=PROCESS):
    asked = told_times(process, tableau.times[:-1], np.broadcast_to(offsets, (tableau.rows,)))
    return ds.Tableau.create(
        **{k: getattr(tableau, k) for k in ("times", "alpha", "sigma", "target", "a", "b")},
        asked=asked,
        name=tableau.name,
    )


def late(network):
    """The network as trained with labels whose log-SNR is too large by SHIFT."""

    def apply(params, x, t):
        true = PROCESS.time(PROCESS.log_snr(t) - SHIFT)
        return network.apply(params, x, true)

    return ds.ScoreFn(apply, network.params, PROCESS, prediction="data", time="t")


def exact():
    return ds.targets.gaussian_mixture(
        [0.6, 0.4], [[0.5, -0.3, 0.2, 0.0], [-0.4, 0.1, -0.6, 0.3]], np.array([0.03, 0.08])
    ).score_fn(PROCESS, "data")


def test_the_network_is_told_them_and_nothing_else_changes():
    """Against the recursion written out."""
    process = ds.processes.vp_linear()

    def apply(params, x, t):
        return jnp.tanh(params * x) * jnp.cos(t)[:, None]

    network = ds.ScoreFn(apply, jnp.asarray(0.7), process, prediction="noise")
    tableau = with_offsets(build(5, process), [0.2, -0.1, 0.4, 0.3, -0.2], process)
    x_T = process.prior_sample(KEY, (3, 2))
    points, answers = [np.asarray(x_T, np.float64)], []
    for n in range(tableau.rows):
        u = points[-1]
        told = jnp.full(3, tableau.asked[n])
        eps = np.asarray(apply(jnp.asarray(0.7), jnp.asarray(u, jnp.float32), told))
        answers.append((u - tableau.sigma[n] * eps) / tableau.alpha[n])
        new = sum(tableau.a[n, i] * points[n - i] for i in range(min(tableau.p, n + 1)))
        points.append(new + sum(tableau.b[n, j] * answers[n - j] for j in range(min(2, n + 1))))
    np.testing.assert_allclose(ds.sample(network, tableau, x_T), points[-1], rtol=1e-5, atol=2e-5)
    plain = ds.sample(network, build(5, process), x_T)
    assert np.abs(plain - points[-1]).max() > 0.01
    # each way to run a tableau
    at_once = ds.parallel.sample_parallel(network, tableau, x_T, tolerance=0.0)
    np.testing.assert_allclose(at_once.x, points[-1], rtol=1e-5, atol=2e-5)
    path = ds.trajectory(network, tableau, x_T)
    np.testing.assert_allclose(
        replay(network, tableau, path.points), path.outputs, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("process", [PROCESS, ds.processes.flow(), ds.processes.vp_cosine()])
def test_offsets_and_times_are_inverse(process):
    times = ds.schedules.logsnr(process, 5)[:-1]
    offsets = np.array([0.0, 0.2, -0.3, 0.1, 0.4])
    asked = told_times(process, times, offsets)
    np.testing.assert_allclose(label_offsets(process, times, asked), offsets, atol=1e-9)
    assert asked[0] == pytest.approx(times[0], rel=1e-12)
    # outside the process's range there is nothing to ask
    beyond = told_times(process, times, np.full(5, -100.0))
    assert np.all(beyond <= process.t_max)


def test_own_times_change_nothing():
    network = mixture().score_fn(PROCESS, "edm_f")
    tableau = build()
    same = with_offsets(tableau, 0.0)
    np.testing.assert_array_equal(
        ds.sample(network, same, start(3)), ds.sample(network, tableau, start(3))
    )


def test_they_survive_every_change_of_shape(tmp_path):
    network, x_T = mixture().score_fn(PROCESS, "edm_f"), start(3)
    tableau = with_offsets(build(), [0.1, 0.2, 0.3, 0.4])
    expected = ds.sample(network, tableau, x_T)
    tableau.save(tmp_path / "told.json")
    loaded = ds.Tableau.load(tmp_path / "told.json")
    np.testing.assert_array_equal(loaded.asked, tableau.asked)
    np.testing.assert_allclose(
        ds.sample(network, tableau.pad(rows=7, p=2, q=4), x_T), expected, atol=3e-5
    )
    stacked = ds.Tableau.stack([tableau, build(), tableau])
    mixed = ds.sample(network, stacked, x_T)
    np.testing.assert_allclose(mixed[0], expected[0], atol=3e-5)
    np.testing.assert_allclose(mixed[1], ds.sample(network, build(), x_T)[1], atol=3e-5)
    first = ds.solvers.get("ddim")(PROCESS, ds.schedules.logsnr(PROCESS, 4)[:3])
    rest = with_offsets(
        ds.solvers.get("ddim")(PROCESS, ds.schedules.logsnr(PROCESS, 4)[2:]), [0.1, 0.2]
    )
    joined = first.then(rest)
    np.testing.assert_allclose(joined.asked, [*first.times[:2], *rest.asked])
    text = str(ds.describe(tableau))
    assert f"told t = {tableau.asked[2]:.5g}" in text
    with pytest.raises(ValueError, match="`asked` must be finite times of shape"):
        with_offsets(tableau, [0.1, np.nan, 0.2, 0.3])


def test_guidance_passes_them_on():
    def apply(params, x, t, shift):
        return params * x * jnp.cos(t)[:, None] + shift[:, None]

    network = ds.ScoreFn(apply, jnp.asarray(0.3), PROCESS, prediction="data", time="t")
    tableau, x_T = with_offsets(build(), 0.3), start(3)
    cond = {"shift": jnp.ones(3)}
    guided = ds.guidance.cfg(network, 2.0, {"shift": 0.0})
    rows, which = ds.guidance.unfold(tableau, 2.0)
    unfolded = ds.guidance.select(network, {"shift": 0.0}, which)
    np.testing.assert_allclose(
        ds.sample(unfolded, rows, x_T, cond=cond),
        ds.sample(guided, tableau, x_T, cond=cond),
        rtol=1e-4,
        atol=1e-5,
    )
    shifted = ds.time_shift.time_shift(network, window=0.1, cutoff=0.0)
    with pytest.raises(ValueError, match="time shift chooses what the network is told"):
        ds.sample(shifted, tableau, x_T, cond=cond)


@pytest.mark.usefixtures("optimised")
def test_refine_and_distill_find_how_far_a_network_is_off():
    """A network told wrong labels equals the right one if it is told SHIFT less."""
    network, wrong, x_T = exact(), late(exact()), start(48)
    tableau = build(3)
    reference = ds.sample(network, tableau, x_T)
    plan = search.refine(
        wrong, tableau, x_T, key=KEY, reference=reference, numbers=("labels",), iterations=10
    )
    found = label_offsets(PROCESS, tableau.times[:-1], plan.tableau.asked)
    assert plan.psnr["held_out"]["found"] > plan.psnr["held_out"]["start"] + 25
    np.testing.assert_allclose(found[1:], SHIFT, atol=0.02)
    np.testing.assert_array_equal(plan.tableau.times, tableau.times)
    learned = search.distill(
        wrong,
        x_T,
        start=tableau,
        key=KEY,
        reference=reference,
        learn="labels",
        steps=150,
        batch=36,
        learning_rate=0.05,
    )
    found = label_offsets(PROCESS, tableau.times[:-1], learned.tableau.asked)
    np.testing.assert_allclose(found[1], SHIFT, atol=0.03)
    assert learned.psnr["held_out"]["found"] > learned.psnr["held_out"]["start"] + 10
    # and goes on from there with all numbers
    again = search.refine(wrong, learned.tableau, x_T, key=KEY, reference=reference, iterations=2)
    assert again.psnr["held_out"]["found"] >= learned.psnr["held_out"]["found"] - 0.5


def test_a_sampler_with_them_has_a_canonical_form():
    tableau = with_offsets(build(), [0.1, 0.2, 0.3, 0.4])
    numbers = search.canonical(tableau, PROCESS)
    np.testing.assert_allclose(numbers["labels"], [0.1, 0.2, 0.3, 0.4], atol=1e-9)
    ends = {k: getattr(tableau, k)[[0, -1]] for k in ("times", "alpha", "sigma")}
    again = search.from_canonical(numbers, ends, PROCESS)
    np.testing.assert_allclose(again["asked"], tableau.asked, rtol=1e-9)
    assert "labels" not in search.canonical(tableau)
    assert search.can_distill(tableau)


def test_times_and_labels_are_learned_together_and_nothing_else():
    """What LD3 learns: the weights, in units of the step, stay."""
    tableau, x_T = build(), start(24)
    learned = search.distill(
        exact(), x_T, start=tableau, key=KEY, learn=("times", "labels"), steps=8, batch=8
    )
    assert learned.settings["learn"] == ["times", "labels"]
    before, after = (search.canonical(t, PROCESS) for t in (tableau, learned.tableau))
    np.testing.assert_allclose(after["weights"], before["weights"], atol=1e-9)
    assert np.abs(after["log_snr"] - before["log_snr"]).max() > 1e-3
    assert np.abs(after["labels"]).max() > 1e-3
    with pytest.raises(ValueError, match="at least one"):
        search.distill(exact(), x_T, start=tableau, key=KEY, learn=())
    with pytest.raises(ValueError, match="must be one of"):
        search.distill(exact(), x_T, start=tableau, key=KEY, learn=("times", "sums"))
