"""Pictures show what they are given, as wide as a column, in letters that can be read."""

import sys

import jax
import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgba

import diffsamp as ds
from diffsamp import plot
from diffsamp.evaluation.describe import gaussian_spread
from diffsamp.plot._style import COLORS, WIDTH
from diffsamp.search.compare import Comparison, Entry
from diffsamp.search.plan import Front, Plan

PROCESS = ds.processes.edm(0.02, 20.0)
RNG = np.random.default_rng(0)


def made_comparison():
    """Three solvers on two schedules at two budgets, with numbers that say which is which."""
    table = ds.solvers.ddim(PROCESS, ds.schedules.karras(PROCESS, 4))
    entries = [
        Entry(s, g, n, table, 10.0 * i + j + n, {"d": 1.0 / (1 + i + j + n)})
        for i, s in enumerate(("low", "middle", "high"))
        for j, g in enumerate(("karras", "logsnr"))
        for n in (4, 8)
    ]
    entries.append(Entry("high", "broken", 4, table, -np.inf, {"d": np.nan}))
    return Comparison(tuple(entries), np.zeros((1, 2)))


def made_front():
    table = ds.solvers.ddim(PROCESS, ds.schedules.karras(PROCESS, 4))

    def plan(value):
        spans = {"start": 20.0, "found": value}
        scores = {
            "psnr": {"held_out": spans},
            "log_mse": {"chosen_on": {"start": 0.0, "found": -value}},
        }
        return Plan(table, "regress", "ddim", scores, (), 1.0, {}, [0])

    return Front({4: plan(25.0), 6: plan(24.0), 8: plan(30.0)}, 0, "log_mse")


def pictures(n=3, channels=1):
    return RNG.uniform(-1, 1, (n, 6, 8, channels))


def run(shape):
    score_fn = ds.targets.gaussian(np.zeros(int(np.prod(shape))), 1.0).score_fn(PROCESS)
    network = ds.ScoreFn(
        lambda p, x, t: score_fn(x.reshape(len(x), -1), t).reshape(x.shape),
        None,
        PROCESS,
        prediction="edm_f",
        time="t",
    )
    x_T = PROCESS.prior_sample(jax.random.key(0), (3, *shape))
    return ds.trajectory(network, ds.sampler(network, "ddim", nfe=12).tableau, x_T)


def drawings():
    """One of every kind."""
    tableau = ds.solvers.unipc(PROCESS, ds.schedules.karras(PROCESS, 6), order=3)
    panels = [("a", "error", {"x": [(4, 1.0)], "y": [(4, 0.5)]}, None)] * 3
    return {
        "comparison": plot.comparison(made_comparison(), score="d"),
        "front": plot.front(made_front()),
        "error_against_nfe": plot.error_against_nfe(panels),
        "image_grid": plot.image_grid([("row", pictures(10))], title="title"),
        "inverse": plot.inverse(pictures(8), None, {"method": pictures(8)}),
        "schedule": plot.schedule(PROCESS, {"karras": tableau.times}),
        "tableau": plot.tableau(tableau),
        "trajectory": plot.trajectory(run((8, 6, 1)), outputs=True),
    }


def test_all_are_as_wide_as_a_column_and_can_be_read(tmp_path):
    before = dict(matplotlib.rcParams)
    found = drawings()
    assert {*found, "save"} == set(plot.__all__)
    for name, figure in found.items():
        path = tmp_path / f"{name}.png"
        plot.save(figure, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
        assert figure.get_figwidth() <= WIDTH + 1e-6
        sizes = [t.get_fontsize() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]
        assert min(sizes) >= 6, name
    assert dict(matplotlib.rcParams) == before  # a user's own style stays as it is


def test_colours_differ_and_belong_to_names():
    one = ("a", "e", {"x": [(4, 1.0), (8, 0.5)], "y": [(4, 2.0), (8, np.nan)]}, None)
    two = ("b", "e", {"y": [(4, 3.0), (8, -1.0)], "found": [(4, 0.1)]}, 0.2)
    figure = plot.error_against_nfe([one, two], strong="found")
    left, right = figure.axes
    color = {line.get_label(): to_rgba(line.get_color()) for line in left.lines}
    assert color["y"] == to_rgba(right.lines[0].get_color())
    assert to_rgba(right.lines[1].get_color()) == to_rgba("black")
    np.testing.assert_array_equal(left.lines[1].get_xydata(), [(4, 2.0)])  # what is finite
    np.testing.assert_array_equal(right.lines[0].get_xydata(), [(4, 3.0)])  # and positive
    assert right.lines[2].get_ydata()[0] == 0.2
    linear = plot.error_against_nfe([two], log=False).axes[0]
    np.testing.assert_array_equal(linear.lines[0].get_xydata(), [(4, 3.0), (8, -1.0)])
    assert len(set(COLORS)) == len(COLORS)


def test_a_comparison_is_a_panel_a_solver():
    found = made_comparison()
    figure = plot.comparison(found, marks={"mine": [(8, 99.0, 0.5)]}, score="d", most=2)
    assert [axis.get_title() for axis in figure.axes] == ["high", "middle", "", ""]
    best, karras, logsnr, mine = figure.axes[1].lines
    np.testing.assert_array_equal(best.get_xydata(), [(4, 25.0), (8, 29.0)])
    np.testing.assert_array_equal(karras.get_xydata(), [(4, 14.0), (8, 18.0)])
    np.testing.assert_array_equal(logsnr.get_xydata(), [(4, 15.0), (8, 19.0)])
    np.testing.assert_array_equal(mine.get_xydata(), [(8, 99.0)])
    below = figure.axes[3].lines
    np.testing.assert_allclose(below[0].get_ydata(), [1 / 8, 1 / 12])
    np.testing.assert_allclose(below[3].get_ydata(), [0.5])
    assert [t.get_text() for t in figure.legends[0].get_texts()][:2] == ["best of all", "mine"]


def test_a_front_marks_what_a_cheaper_plan_equals():
    figure = plot.front(made_front())
    axis = figure.axes[0]
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), [20.0] * 3)
    np.testing.assert_array_equal(axis.lines[1].get_xydata(), [(4, 25.0), (6, 24.0), (8, 30.0)])
    dots = {line.get_xdata()[0]: line for line in axis.lines if len(line.get_xdata()) == 1}
    hollow = [n for n, line in dots.items() if line.get_markerfacecolor() == "white"]
    assert hollow == [6]
    assert [text.get_text() for text in axis.texts] == ["+5.0", "+4.0", "+10.0"]
    with pytest.raises(ValueError, match="has no 'fid' on held-out noise"):
        plot.front(made_front(), score="fid")


def test_pictures_may_have_channels_first_and_any_size():
    grey, colour = pictures(3), pictures(2, 3)
    axis = plot.image_grid([("a", grey), ("b", np.moveaxis(colour, -1, 1))]).axes[0]
    shown = [image.get_array() for image in axis.images]
    assert len(shown) == 5
    np.testing.assert_allclose(shown[0], grey[0, ..., 0], rtol=1e-6)
    np.testing.assert_allclose(shown[3], (colour[0] + 1) / 2, rtol=1e-5)
    assert [text.get_text() for text in axis.texts] == ["a", "b"]
    for shape in ((3, 8, 8), (3, 8, 8, 2), (3, 2, 8, 8)):
        with pytest.raises(ValueError, match="pictures must be"):
            plot.image_grid([("", np.zeros(shape))])


def test_inverse_problems_say_how_near_each_picture_is():
    truth = pictures(3).astype(np.float32)
    near = truth + np.array([0.1, 0.01, 0.0])[:, None, None, None].astype(np.float32)
    axis = plot.inverse(truth, truth[:, ::2, ::2], {"near": near}).axes[0]
    assert len(axis.images) == 9
    words = [text.get_text() for text in axis.texts]
    assert words == ["truth", "measured", "26.0 dB", "46.0 dB", "inf dB", "near"]
    ours = float(ds.metrics.psnr(near[:1], truth[:1]))
    assert words[2] == f"{ours:.1f} dB"
    with pytest.raises(ValueError, match="'far' must be shaped like `truth`"):
        plot.inverse(truth, None, {"far": truth[:2]})


def test_a_filmstrip_has_both_ends_and_paths_every_point():
    strip = run((8, 6, 1))
    axis = plot.trajectory(strip, samples=2, columns=4, outputs=True).axes[0]
    assert len(axis.images) == 2 * (4 + 3)  # nothing is said at the last state
    np.testing.assert_allclose(axis.images[0].get_array(), strip.points[0, 0, ..., 0])
    np.testing.assert_allclose(axis.images[3].get_array(), strip.points[-1, 0, ..., 0])
    np.testing.assert_allclose(axis.images[4].get_array(), strip.outputs[0, 0, ..., 0])
    assert axis.images[0].get_clim()[1] > 5 > axis.images[3].get_clim()[1] >= 1
    heads = [text.get_text() for text in axis.texts if text.get_text().startswith("t = ")]
    assert heads[0] == "t = 20"
    assert heads[-1] == "t = 0"
    flat = run((2,))
    lines = plot.trajectory(flat, samples=1).axes[0].lines
    np.testing.assert_allclose(lines[0].get_xydata(), flat.points[:, 0])
    with pytest.raises(ValueError, match="pictures must be"):
        plot.trajectory(run((5,)))


@pytest.mark.parametrize("name", ["unipc3", "ipndm3", "heun", "ddpm", "er_sde2"])
def test_the_spread_of_gaussian_data_is_what_a_sampler_makes(name):
    """Against runs: without noise the ratio of one, with noise the standard deviation of many."""
    solver = ds.solvers.get(name)
    table = solver(PROCESS, ds.schedules.karras(PROCESS, 6))
    for std in (0.05, 1.0):
        network = ds.targets.gaussian([0.0], std**2).score_fn(PROCESS, "data")
        count = 40_000 if table.stochastic else 1
        width = (std**2 + PROCESS.t_max**2) ** 0.5
        start = jax.random.normal(jax.random.key(1), (count, 1)) * width
        x = np.asarray(ds.sample(network, table, start, key=jax.random.key(2)), np.float64)
        want = gaussian_spread(table, np.array([std]))[0]
        if table.stochastic:
            found = x.std() / std
            assert found == pytest.approx(want, rel=5 / (2 * count) ** 0.5)  # five standard errors
        else:
            found = float(abs(x[0, 0] / start[0, 0])) * width / std
            assert found == pytest.approx(want, rel=1e-4)
        assert found != pytest.approx(1.02 * want, rel=1e-2)
    fine = solver(PROCESS, ds.schedules.karras(PROCESS, 400))
    np.testing.assert_allclose(gaussian_spread(fine, np.array([0.1, 1.0])), 1, atol=0.05)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'plots need matplotlib: pip install "diffsamp'):
        plot.image_grid([("", pictures())])
