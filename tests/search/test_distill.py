"""Distill: exact starts, consistency, gains on held-out noise, its options, clear errors."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DETERMINISTIC, skewed_mixture, twin
from common import PROCESS, start

import diffsamp as ds
from diffsamp import schedules, search, solvers
from diffsamp.search import canonical, from_canonical


def ends(tableau):
    return {k: getattr(tableau, k)[[0, -1]] for k in ("times", "alpha", "sigma")}


ONE_STAGE = [c for c in DETERMINISTIC if c.solver.stages == 1 and c.levels == "given"]


@pytest.mark.parametrize(
    "process",
    [ds.processes.vp_linear(), ds.processes.edm(), ds.processes.flow(), ds.processes.vp_cosine()],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize("case", ONE_STAGE, ids=str)
def test_the_canonical_form_reproduces_any_start(case, process):
    """Another tableau, the same sampler: data prediction, dense rows, equal to rounding."""
    tableau = case.solver(process, schedules.logsnr(process, 7))
    numbers = canonical(tableau)
    # two-step methods that can be inverted amplify rounding by the size of their weights
    growth = max(1.0, np.abs(numbers["weights"]).max())
    if case.check == "full":
        np.testing.assert_allclose(numbers["sums"], 0, atol=1e-10 * growth)
        np.testing.assert_allclose(numbers["state"], 0, atol=1e-10 * growth)
    else:  # a free data weight is a free sum, which from_canonical keeps
        assert np.abs(numbers["sums"]).max() > 1e-3
    arrays = from_canonical(numbers, ends(tableau), process)
    rebuilt = ds.Tableau.create(**arrays, check=case.check)  # checks itself
    np.testing.assert_allclose(rebuilt.times, tableau.times, rtol=1e-9)
    x = np.linspace(-1, 1, 5)[:, None] * float(process.prior_std)
    posterior = skewed_mixture().posterior
    np.testing.assert_allclose(
        twin(rebuilt, posterior, x), twin(tableau, posterior, x), rtol=0, atol=1e-9 * growth
    )


def test_any_numbers_keep_a_constant_prediction_exact():
    """Consistency holds for whatever is learned, not only near the start."""
    rng = np.random.default_rng(0)
    tableau = solvers.ddim(PROCESS, schedules.karras(PROCESS, 6))
    numbers = canonical(tableau)
    numbers["weights"] = np.tril(rng.normal(size=(6, 6)), -1)
    numbers["log_snr"] = np.sort(rng.uniform(-2, 3, size=5))
    ds.Tableau.create(**from_canonical(numbers, ends(tableau), PROCESS)).check()
    numbers["sums"] = numbers["sums"] + 0.01
    with pytest.raises(ValueError, match="not consistent"):
        ds.Tableau.create(**from_canonical(numbers, ends(tableau), PROCESS))


def test_what_cannot_be_distilled():
    times = schedules.karras(PROCESS, 4)
    for tableau, message in (
        (solvers.dpmpp_sde(PROCESS, times), "uses noise of an earlier row"),
        (solvers.heun(PROCESS, times), "must fall from row to row"),
    ):
        assert not search.can_distill(tableau)
        with pytest.raises(ValueError, match=message):
            canonical(tableau)
    assert search.can_distill(solvers.ddim(PROCESS, times).pad(rows=9))


def test_distill_gains_on_noise_it_has_not_seen(score_fn):
    x_T = start(192)
    first = solvers.dpmpp(PROCESS, schedules.logsnr(PROCESS, 5))
    plan = search.distill(
        score_fn, x_T, start=first, key=jax.random.key(0), steps=120, batch=48, learning_rate=3e-2
    )
    assert plan.nfe == plan.tableau.nfe == 5
    assert plan.start == "dpmpp_2m"
    plan.tableau.check()  # still exact on a constant prediction
    # fresh noise that distill was never given
    fresh = start(256, seed=9)
    reference = ds.sample(score_fn, search.reference_tableau(PROCESS), fresh)

    def psnr(tableau):
        return float(ds.metrics.psnr(ds.sample(score_fn, tableau, fresh), reference))

    assert psnr(plan.tableau) > psnr(first) + 4
    # and what it reports of its own held-out noise is that
    held = plan.psnr["held_out"]
    assert held["found"] - held["start"] == pytest.approx(psnr(plan.tableau) - psnr(first), abs=2)
    assert plan.history[0][0] == 0
    assert min(h[2] for h in plan.history) < plan.history[0][2]


def test_distill_starts_exactly_and_never_gets_worse(score_fn):
    """With a learning rate of 0 the result is the start; a wild one is rejected."""
    x_T = start(64)
    first = solvers.ipndm(PROCESS, schedules.karras(PROCESS, 4), order=3)
    options = {"start": first, "key": jax.random.key(0), "steps": 6, "batch": 32}
    still = search.distill(score_fn, x_T, learning_rate=0.0, evaluate_every=3, **options)
    same = ds.sample(score_fn, still.tableau, x_T), ds.sample(score_fn, first, x_T)
    np.testing.assert_allclose(*same, rtol=0, atol=2e-4)
    wild = search.distill(score_fn, x_T, learning_rate=30.0, evaluate_every=1, **options)
    assert min(h[2] for h in wild.history) <= wild.history[0][2]
    assert wild.psnr["held_out"]["found"] >= wild.psnr["held_out"]["start"] - 0.5


@pytest.mark.long
def test_several_starts_are_tried(score_fn):
    """The one that gets furthest in a short run is taken, not the one that begins best."""
    x_T = start(96)
    poor = solvers.ddim(PROCESS, [20.0, 19.0, 18.0, 17.0, 0.0])
    good = solvers.dpmpp(PROCESS, schedules.logsnr(PROCESS, 4))
    plan = search.distill(
        score_fn, x_T, start=[poor, good], key=jax.random.key(0), steps=24, batch=32
    )
    assert plan.start == "dpmpp_2m"
    found = search.compare(score_fn, x_T[:16], nfe=(3, 4), key=jax.random.key(0))
    several = search.candidates(found, 4)
    assert len(several) == 4
    assert all(tableau.nfe == 4 and search.can_distill(tableau) for tableau in several)
    best = found.best(4, where=lambda entry: search.can_distill(entry.tableau))
    assert several[0].name == best.tableau.name
    with pytest.raises(ValueError, match="no sampler of 9 evaluations can be distilled"):
        search.candidates(found, 9)
    with pytest.raises(ValueError, match="`start` must hold at least one tableau"):
        search.distill(score_fn, x_T, start=[], key=jax.random.key(0))


@pytest.mark.long
def test_distill_is_reproducible_and_frees_more_when_asked(score_fn):
    x_T = start(64)
    options = {"nfe": 3, "key": jax.random.key(1), "steps": 15, "batch": 24}
    one, two = (search.distill(score_fn, x_T, **options) for _ in range(2))
    np.testing.assert_array_equal(one.tableau.b, two.tableau.b)
    assert one.start == two.start
    free = search.distill(score_fn, x_T, consistent=False, **options)
    with pytest.raises(ValueError, match="not consistent"):
        free.tableau.check()


@pytest.mark.long
def test_distill_with_conditioning_and_patience(score_fn):
    """`cond` is cut along with the starts; `patience` ends a run without gain."""

    def apply(params, x, t, *, gain):
        return x * (gain * params)[:, None]

    conditional = ds.ScoreFn(apply, jnp.asarray(0.3), PROCESS, prediction="data")
    gain = jnp.linspace(0.5, 1.5, 40)
    plan = search.distill(
        conditional,
        start(40),
        nfe=3,
        cond={"gain": gain},
        key=jax.random.key(0),
        steps=50,
        batch=16,
        learning_rate=0.0,
        evaluate_every=1,
        patience=2,
    )
    assert plan.history[-1][0] == 2
    with pytest.raises(ValueError, match=r"cond\['gain'\] must have one entry per sample, 40"):
        search.distill(
            conditional, start(40), nfe=3, cond={"gain": gain[:7]}, key=jax.random.key(0)
        )


@pytest.mark.usefixtures("x64")
def test_the_gradient_distill_follows_matches_finite_differences():
    target = skewed_mixture()
    score_fn = target.score_fn(PROCESS, "data")
    tableau = solvers.dpmpp(PROCESS, schedules.karras(PROCESS, 4))
    base, fixed = canonical(tableau), ends(tableau)
    x_T = jnp.linspace(-20, 20, 7)[:, None]

    def loss(log_snr, weights):
        numbers = {**base, "log_snr": log_snr, "weights": weights}
        arrays = from_canonical(numbers, fixed, PROCESS)
        made = ds.Tableau(**arrays, c=jnp.zeros(4), evaluates=np.ones(4, bool))
        return jnp.sum(jnp.sin(ds.sample(score_fn, made, x_T)))

    point = jnp.asarray(base["log_snr"]), jnp.asarray(base["weights"])
    along = jnp.array([0.3, -0.7, 0.5]), jnp.tril(jnp.ones((4, 4)), -1) * 0.4
    gradient = jax.grad(loss, argnums=(0, 1))(*point)
    exact = sum(jnp.sum(g * d) for g, d in zip(gradient, along, strict=True))
    h = 1e-6
    ahead, behind = (loss(*(p + s * d for p, d in zip(point, along, strict=True))) for s in (h, -h))
    assert float((ahead - behind) / (2 * h)) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: search.compare(f, x, nfe=(0,)), "`nfe` must be at least 1; got 0"),
        (lambda f, x: search.compare(f, x, nfe=()), "at least one choice"),
        (lambda f, x: search.compare(f, x, solver=("nope",)), "`solver` must be one of"),
        (lambda f, x: search.compare(f, x, schedule=("nope",)), "`schedule` must be one of"),
        (
            lambda f, x: search.compare(f, x, nfe=(4,), solver=("heun",)),
            r"none of \['heun'\] can make exactly \[4\] evaluations",
        ),
        (lambda f, x: search.distill(f, x, key=jax.random.key(0)), "give `nfe`, the budget"),
        (
            lambda f, x: search.distill(
                f, x, nfe=4, key=jax.random.key(0), start=solvers.ddim(PROCESS, [20.0, 1.0, 0.0])
            ),
            "`start` makes 2 evaluations, not the 4 asked for",
        ),
        (
            lambda f, x: search.distill(f, x, nfe=2, key=jax.random.key(0), held_out=8),
            "8 starts, of which 8 are held out: none is left",
        ),
        (
            lambda f, x: search.distill(
                f, x, nfe=2, key=jax.random.key(0), reference=jnp.full((8, 4), jnp.nan)
            ),
            "reference samples are not all finite",
        ),
    ],
)
def test_errors(score_fn, call, message):
    with pytest.raises(ValueError, match=message):
        call(score_fn, start(8))


def test_unbatched_networks_are_refused(score_fn):
    alone = ds.ScoreFn(lambda p, x, t: x, 1.0, PROCESS, batched=False)
    with pytest.raises(ValueError, match="needs a network with a batch axis"):
        search.compare(alone, start(4))


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({"learn": "times"}, {"log_snr"}),
        ({"learn": "weights"}, {"weights"}),
        ({"learn": "all"}, {"log_snr", "weights"}),
    ],
)
def test_what_is_learned_moves_and_nothing_else(score_fn, options, moves):
    first = solvers.ipndm(PROCESS, schedules.karras(PROCESS, 5), order=3)
    plan = search.distill(
        score_fn, start(64), start=first, key=jax.random.key(0), steps=30, batch=32, **options
    )
    before, after = canonical(first), canonical(plan.tableau)
    for name in ("log_snr", "weights"):
        change = np.abs(after[name] - before[name]).max()
        assert change > 1e-3 if name in moves else change < 1e-6
    assert min(h[2] for h in plan.history) < plan.history[0][2]
    assert plan.settings["learn"] == options["learn"]


@pytest.mark.long
def test_a_band_keeps_the_start_outside_it(score_fn):
    first = solvers.ipndm(PROCESS, schedules.karras(PROCESS, 6), order=4)
    before = canonical(first)["weights"]
    lag = np.subtract.outer(np.arange(6), np.arange(6))
    for memory in (2, 3):
        plan = search.distill(
            score_fn,
            start(48),
            start=first,
            key=jax.random.key(0),
            steps=20,
            batch=24,
            memory=memory,
            learn="weights",
        )
        change = np.abs(canonical(plan.tableau)["weights"] - before)
        assert change[lag >= memory].max() < 1e-6
        assert change[(lag > 0) & (lag < memory)].min() > 0
    assert before[lag == 3].any()  # the start has weights outside the band, which stayed


def test_relaxed_starts_stay_in_their_ball(score_fn):
    """Every step moves a start by a tenth of the radius, and none beyond it."""
    from diffsamp.search._gradient import _relax

    x_T = start(32)
    own, size = x_T, np.linalg.norm(np.asarray(x_T), axis=1)
    first = _relax(0.05, x_T, own, jax.random.normal(jax.random.key(0), x_T.shape))
    moved = np.linalg.norm(np.asarray(first - x_T), axis=1) / size
    np.testing.assert_allclose(moved, 0.005, rtol=1e-3)
    for i in range(30):
        own = _relax(0.05, x_T, own, jax.random.normal(jax.random.key(i), x_T.shape))
        away = np.linalg.norm(np.asarray(own - x_T), axis=1) / size
        assert np.all(away <= 0.05 * (1 + 1e-5))
    assert away.min() > 0
    pushed = _relax(0.05, x_T, own, jnp.full_like(x_T, jnp.nan))
    assert np.all(np.isfinite(pushed))  # a gradient that is not finite moves nothing
    first = solvers.dpmpp(PROCESS, schedules.logsnr(PROCESS, 4))
    options = {"start": first, "key": jax.random.key(0), "steps": 60, "batch": 48}
    relaxed = search.distill(score_fn, start(96), radius=0.02, **options)
    plain = search.distill(score_fn, start(96), **options)
    assert not np.array_equal(relaxed.tableau.b, plain.tableau.b)
    assert relaxed.psnr["held_out"]["found"] > relaxed.psnr["held_out"]["start"] + 3


def test_distill_follows_features(score_fn):
    """An objective on features ignores what they do not see."""
    first = solvers.dpmpp(PROCESS, schedules.logsnr(PROCESS, 4))
    goal = search.objective.feature_error(lambda x: x[:, :1], name="first axis")
    plan = search.distill(
        score_fn, start(96), start=first, key=jax.random.key(0), steps=80, batch=48, objective=goal
    )
    scores = plan.scores["first axis"]["held_out"]
    assert scores["found"] < scores["start"] - 1
    assert set(plan.scores) == {"first axis", "psnr"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn": "some"}, "`learn` must be one of 'all', 'times', 'labels', 'weights'"),
        ({"memory": 0}, "`memory` must be at least 1"),
        ({"radius": -1.0}, "`radius` must be at least 0"),
        ({"learn": "times", "consistent": False}, "frees every number"),
        (
            {"objective": search.objective.Objective("fid", lambda x, r: 0.0)},
            "objective 'fid' is no mean over samples and cannot be descended",
        ),
    ],
)
def test_options_that_do_not_fit(score_fn, options, message):
    with pytest.raises(ValueError, match=message):
        search.distill(score_fn, start(8), nfe=2, key=jax.random.key(0), **options)


@pytest.mark.parametrize("radius", [pytest.param(0.0, marks=pytest.mark.long), 0.02])
def test_micro_batches_give_the_same_plan(score_fn, radius):
    """The gradient of a step in pieces is that of the whole, for the starts as for the numbers."""
    first = solvers.ipndm(PROCESS, schedules.karras(PROCESS, 4), order=3)
    options = {"start": first, "key": jax.random.key(0), "steps": 10, "batch": 24, "radius": radius}
    whole = search.distill(score_fn, start(40), **options)
    pieces = search.distill(score_fn, start(40), micro_batch=6, **options)
    np.testing.assert_allclose(pieces.tableau.b, whole.tableau.b, rtol=2e-3, atol=2e-4)
    with pytest.raises(ValueError, match="`micro_batch` must divide the batch of 24; got 5"):
        search.distill(score_fn, start(40), micro_batch=5, **options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"micro_batch": 4},
        pytest.param({"radius": 0.1}, marks=pytest.mark.long),
    ],
)
def test_a_gradient_step_on_a_mesh_sums_the_gradient_and_moves_nothing_else(
    score_fn, monkeypatch, options
):
    """Each device keeps its samples; what goes between them is the gradient of the tableau."""
    module = sys.modules["diffsamp.search._descent"]
    real, programs = module.fit_step, []

    def recorded(*arguments, **named):
        programs.append(real.lower(*arguments, **named).compile().as_text())
        return real(*arguments, **named)

    monkeypatch.setattr(module, "fit_step", recorded)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    first = solvers.ddim(PROCESS, schedules.karras(PROCESS, 4))
    job = {"start": first, "key": jax.random.key(0), "steps": 2, "batch": 8, "held_out": 7}
    many = search.distill(score_fn, start(24), sharding=spread, **job, **options)
    assert len(programs) == 2
    assert "all-reduce(" in programs[0]
    for kind in ("all-gather(", "all-to-all(", "collective-permute(", "callback"):
        assert kind not in programs[0]
    monkeypatch.undo()
    one = search.distill(score_fn, start(24), **job, **options)
    np.testing.assert_allclose(many.tableau.b, one.tableau.b, rtol=1e-3, atol=1e-4)
