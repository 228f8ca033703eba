"""The tableau: its self-check, shapes, padding, joining and files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from cases import CASES, DETERMINISTIC, skewed_mixture, twin

import diffsamp as ds
from diffsamp import schedules, solvers

ARRAYS = ("times", "alpha", "sigma", "target", "a", "b", "c", "evaluates")
PROCESS = ds.processes.vp_linear()


def build(name="dpmpp_2m", n=6):
    return solvers.get(name)(PROCESS, schedules.logsnr(PROCESS, n))


def arrays(tableau, **changes):
    return {**{key: getattr(tableau, key) for key in ARRAYS}, **changes}


def assert_equal(one, two):
    for key in ARRAYS:
        np.testing.assert_array_equal(getattr(one, key), getattr(two, key), err_msg=key)


@pytest.mark.parametrize("case", [c for c in CASES if c.check == "full"], ids=str)
@pytest.mark.parametrize("which", ["a", "b", "c"])
def test_any_wrong_coefficient_fails_at_construction_with_its_row(case, which):
    """Every nonzero number of every solver, changed by 1 % in a middle row, is caught."""
    tableau = case.solver(PROCESS, schedules.logsnr(PROCESS, 6))
    row = 3
    numbers = getattr(tableau, which)
    for column in np.ndindex(numbers.shape[1:]):
        if abs(numbers[(row, *column)]) < 1e-6:
            continue
        changed = numbers.copy()
        changed[(row, *column)] *= 1.01
        with pytest.raises(ValueError, match=f"row {row} of tableau 'x' is not consistent"):
            ds.Tableau.create(**arrays(tableau, **{which: changed}), name="x")
        ds.Tableau.create(**arrays(tableau, **{which: changed}), check="none")


def test_mean_check_lets_the_noise_be():
    large = solvers.ddpm(PROCESS, schedules.logsnr(PROCESS, 6), variance="large")
    with pytest.raises(ValueError, match="not consistent"):
        large.check()
    large.check(std=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": np.zeros(1)}, "needs at least one row"),
        ({"alpha": np.ones(3)}, r"`alpha` must have shape \(7,\); got \(3,\)"),
        ({"target": np.ones((6, 3))}, r"`target` must have shape \(6, 2\)"),
        ({"a": np.ones((5, 1))}, r"`a` must have shape \(6, columns >= 1\); got \(5, 1\)"),
        ({"b": np.ones((6, 0))}, r"`b` must have shape \(6, columns >= 1\)"),
        ({"c": np.ones(7)}, r"`c` must have shape \(6,\)"),
        ({"evaluates": np.ones(6)}, "`evaluates` must be booleans"),
        ({"a": np.full((6, 1), np.nan)}, r"`a` must be finite; got nan at \(0, 0\)"),
        ({"sigma": -np.ones(7)}, "must not be negative"),
    ],
)
def test_bad_arrays(changes, message):
    with pytest.raises(ValueError, match=message):
        ds.Tableau.create(**arrays(build(), **changes))


def test_numbers_are_read_only_when_concrete():
    tableau = build()
    assert (tableau.rows, tableau.p, tableau.q, tableau.nfe) == (6, 1, 2, 6)
    assert repr(tableau) == "<dpmpp_2m: 6 NFE, 6 rows, p = 1, q = 2>"

    @jax.jit
    def inside(tableau):
        assert tableau.rows == 6
        assert "traced" in repr(tableau)
        return tableau.nfe

    with pytest.raises(TypeError, match=r"`tableau\.nfe` is not known inside a traced function"):
        inside(tableau)


def test_padding():
    tableau = build("unipc3", 5)
    padded = tableau.pad(rows=9, p=2, q=6)
    assert (padded.rows, padded.p, padded.q, padded.nfe) == (9, 2, 6, 5)
    assert padded.name == tableau.name
    padded.check()
    posterior = skewed_mixture().posterior
    x = np.linspace(-1, 1, 5)[:, None]
    np.testing.assert_allclose(twin(padded, posterior, x), twin(tableau, posterior, x), rtol=1e-14)
    with pytest.raises(ValueError, match="`rows` must be at least 5; got 3"):
        tableau.pad(rows=3)
    with pytest.raises(ValueError, match="at least one tableau"):
        ds.Tableau.pad_together([])


def test_joining_two_solvers():
    """Heun down to the middle, then UniPC: the second starts without history."""
    times = schedules.logsnr(PROCESS, 12)
    first = solvers.heun(PROCESS, times[:5])
    second = solvers.unipc(PROCESS, times[4:])
    joined = first.then(second)
    assert joined.nfe == first.nfe + second.nfe == 8 + 8
    assert joined.name == "heun then unipc3_bh2"
    joined.check()
    posterior = skewed_mixture().posterior
    x = np.linspace(-1, 1, 5)[:, None]
    middle = twin(first, posterior, x)
    np.testing.assert_allclose(
        twin(joined, posterior, x), twin(second, posterior, middle), rtol=1e-12
    )
    with pytest.raises(ValueError, match="must start where the first ends"):
        first.then(solvers.unipc(PROCESS, times[5:]))


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_unroll_against_the_recursion(case):
    tableau = case.solver(PROCESS, schedules.logsnr(PROCESS, 5))
    rng = np.random.default_rng(0)
    x_T, m = rng.normal(size=3), rng.normal(size=(tableau.rows, 3))
    u = [x_T]
    for n in range(tableau.rows):
        u.append(
            sum(tableau.a[n, i] * u[n - i] for i in range(min(tableau.p, n + 1)))
            + sum(tableau.b[n, j] * m[n - j] for j in range(min(tableau.q, n + 1)))
        )
    on_start, on_outputs, on_noise = tableau.unroll()
    scale = np.abs(on_outputs).max()
    np.testing.assert_allclose(
        on_start[:, None] * x_T + on_outputs @ m, np.stack(u), rtol=0, atol=1e-13 * scale
    )
    assert np.all(np.triu(on_outputs) == 0)
    assert not on_noise.any()


@pytest.mark.parametrize("name", ["ddpm", "unipc3", "heun"])
def test_files_keep_every_bit(tmp_path, name):
    tableau = build(name)
    path = tmp_path / "sampler.json"
    tableau.save(path)
    loaded = ds.Tableau.load(path)
    assert_equal(tableau, loaded)
    assert (loaded.name, loaded.source) == (tableau.name, tableau.source)
    assert [p.name for p in tmp_path.iterdir()] == ["sampler.json"]  # nothing temporary left
    assert json.loads(path.read_text())["nfe"] == tableau.nfe
    assert len(path.read_text()) < 6000


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "sampler.json"
    build("ddim").save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        build("unipc3").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["sampler.json"]
    with pytest.raises(OSError, match="no/such/folder"):
        build().save(tmp_path / "no/such/folder/x.json")


def corrupt(data, **changes):
    return json.dumps({**data, **changes})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: "{", "is corrupt: not JSON"),
        (lambda d: "[]", "is not a diffsamp tableau"),
        (lambda d: corrupt(d, format="other"), "is not a diffsamp tableau"),
        (lambda d: corrupt(d, version=99), "has version 99; this diffsamp reads version 1"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "b"}), "lacks 'b'"),
        (lambda d: corrupt(d, a=d["a"][:-1]), r"is corrupt: `a` must have shape"),
        (lambda d: corrupt(d, a="abc"), "is corrupt"),
        (lambda d: corrupt(d, times=None), "is corrupt"),
        (lambda d: corrupt(d, c=[float("nan")] * 6), "is corrupt: `c` must be finite"),
        (lambda d: corrupt(d, nfe=5), 'says "nfe": 5, its rows evaluate 6 times'),
    ],
)
def test_corrupt_files(tmp_path, edit, message):
    path = tmp_path / "sampler.json"
    build().save(path)
    path.write_text(edit(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message) as error:
        ds.Tableau.load(path)
    assert str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ds.Tableau.load(tmp_path / "none.json")


def test_stack_is_per_sample():
    one, two = build("ddim", 3), build("unipc3", 5)
    stacked = ds.Tableau.stack([one, two])
    assert stacked.a.shape == (5, 1, 2)
    assert stacked.evaluates.shape == (5, 2)
    np.testing.assert_array_equal(stacked.evaluates[:, 0], [True, True, True, False, False])
    with pytest.raises(ValueError, match="before stacking"):
        stacked.check()


def test_labels_survive_replace_but_not_tree_map():
    tableau = build()
    assert dataclasses.replace(tableau, name="mine").name == "mine"
    assert jax.tree.map(np.asarray, tableau).name == ""


def test_coefficients_with_axes_of_the_data():
    """One number per element: each element is sampled as by a tableau of its own."""
    process = ds.processes.vp_linear()
    times = ds.schedules.logsnr(process, 5, final="t_min")
    one = ds.solvers.dpmpp(process, times, order=2)
    two = ds.solvers.unipc(process, times, order=2)
    one, two = ds.Tableau.pad_together([one, two])
    fields = {k: getattr(one, k) for k in ("times", "alpha", "sigma", "target", "evaluates")}
    both = ds.Tableau.create(
        **fields,
        **{k: np.stack([getattr(one, k), getattr(two, k)], -1)[:, :, None] for k in ("a", "b")},
        check="none",
    )
    assert both.pad(rows=7).a.shape == (7, 1, 1, 2)
    network = ds.targets.gaussian([0.3], 0.4).score_fn(process)
    columns = ds.ScoreFn(
        lambda f, x, t: jax.numpy.concatenate([f(x[:, :1], t), f(x[:, 1:], t)], axis=1),
        network,
        process,
        prediction="data",
    )
    x_T = process.prior_sample(jax.random.key(0), (4, 2))
    got = ds.sample(columns, both.pad(rows=7), x_T)
    for i, tableau in enumerate((one, two)):
        want = ds.sample(network, tableau, x_T[:, i : i + 1])
        np.testing.assert_allclose(got[:, i : i + 1], want, rtol=1e-5, atol=1e-6)
    for broken in (both.a[:, :, 0], both.a[:, :, :, :1]):
        with pytest.raises(ValueError, match="must have shape"):
            ds.Tableau.create(**fields, a=broken, b=both.b, check="none")
    with pytest.raises(ValueError, match="axes of the data"):
        both.check()
    with pytest.raises(ValueError, match="plain numbers"):
        both.unroll()
