"""Objectives without a teacher or a gradient, and samplers that learn how much noise they add."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PROCESS, mixture, start
from scipy import optimize, stats

import diffsamp as ds
from diffsamp import search
from diffsamp.search import objective

KEY = jax.random.key(4)
STOCHASTIC = ["ddpm", "dpmpp_2m_sde", "dpmpp_3m_sde", "sa_solver", "er_sde3", "seeds2"]


def ends(tableau):
    count = tableau.nfe
    return {k: getattr(tableau, k)[[0, count]] for k in ("times", "alpha", "sigma")}


def build(name="dpmpp_2m", n=3, process=PROCESS):
    return ds.solvers.get(name)(process, ds.schedules.logsnr(process, n))


def variance_of(tableau, variance):
    """Exact variance of the samples of N(0, variance) in one dimension: a linear recursion."""
    size = 1 + tableau.rows
    states = [np.zeros(size)]
    states[0][0] = float(PROCESS.prior_std)
    answers = []
    for n in range(tableau.rows):
        alpha, sigma = tableau.alpha[n], tableau.sigma[n]
        answers.append(states[n] * alpha * variance / (alpha**2 * variance + sigma**2))
        new = np.zeros(size)
        for i in range(min(tableau.p, n + 1)):
            new += tableau.a[n, i] * states[n - i]
        for j in range(min(tableau.q, n + 1)):
            new += tableau.b[n, j] * answers[n - j]
        new[1 + n] += tableau.c[n]
        states.append(new)
    return float(states[-1] @ states[-1])


# -- the canonical form of samplers that add noise -------------------------------------------------


@pytest.mark.parametrize("process", [PROCESS, ds.processes.vp_linear(), ds.processes.flow()])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_is_one_angle_a_row(name, process):
    tableau = build(name, 4, process)
    numbers = search.canonical(tableau, process)
    assert np.any(numbers["noise"] > 0.1)
    again = ds.Tableau.create(**search.from_canonical(numbers, ends(tableau), process))
    for got, wanted in zip(
        again.unroll(prediction="data"), tableau.unroll(prediction="data"), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-8)


def test_any_angles_keep_mean_and_variance():
    """The self-check of a tableau is of both; 2 % more noise fails it."""
    tableau = build("ddpm", 4)
    numbers = search.canonical(tableau)
    numbers["noise"] = np.array([0.3, -0.8, 2.0, 0.1])
    arrays = search.from_canonical(numbers, ends(tableau), PROCESS)
    ds.Tableau.create(**arrays).check()
    with pytest.raises(ValueError, match="not consistent"):
        ds.Tableau.create(**{**arrays, "c": arrays["c"] * 1.02})
    numbers["noise"] = np.zeros(4)
    arrays = search.from_canonical(numbers, ends(tableau), PROCESS)
    ddim = ds.solvers.ddim(PROCESS, ds.schedules.logsnr(PROCESS, 4))
    np.testing.assert_allclose(
        ds.Tableau.create(**arrays).unroll()[1], ddim.unroll(prediction="data")[1], atol=1e-9
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dpmpp_sde", "uses noise of an earlier row apart from the state"),
        ("interpolant_em", "adds more or less noise"),
        ("accelerated_ddpm", "every row must make an evaluation"),
    ],
)
def test_noise_that_has_no_angle(name, words):
    with pytest.raises(ValueError, match=words):
        search.canonical(build(name))


def test_distill_learns_how_much_noise_gives_the_right_spread():
    """On a Gaussian every choice of angles has an exact variance, and there is a best one."""
    variance, n = 0.09, 4
    network = ds.targets.gaussian_mixture([1.0], [[0.0]], [variance]).score_fn(PROCESS, "data")
    tableau = ds.solvers.ddim(PROCESS, ds.schedules.logsnr(PROCESS, n), eta=1.0)
    before = search.canonical(tableau)

    def of(angles):
        numbers = {**before, "noise": np.append(angles, 0.0)}
        arrays = search.from_canonical(numbers, ends(tableau), PROCESS)
        return variance_of(ds.Tableau.create(**arrays), variance)

    best = optimize.minimize(lambda v: -of(v), np.full(n - 1, 0.7)).fun * -1
    assert variance_of(tableau, variance) < 0.9 * best < variance  # coarse rows contract
    x_T = PROCESS.prior_sample(jax.random.key(0), (512, 1))
    plan = search.distill(
        network,
        x_T,
        start=tableau,
        key=KEY,
        reference=np.sqrt(variance) * jax.random.normal(jax.random.key(1), (512, 1)),
        objective=objective.energy(),
        learn="noise",
        steps=150,
        batch=128,
        learning_rate=0.1,
    )
    after = search.canonical(plan.tableau)
    np.testing.assert_allclose(after["log_snr"], before["log_snr"], atol=1e-6)
    np.testing.assert_allclose(after["weights"], before["weights"], atol=1e-6)
    assert variance_of(plan.tableau, variance) > 0.97 * best
    plan.tableau.check()
    assert set(plan.scores["energy"]["held_out"]) == {"start", "found"}


def test_what_is_learned_of_noise_must_be_there():
    with pytest.raises(ValueError, match="none of the numbers to learn"):
        search.distill(
            mixture().score_fn(PROCESS, "data"), start(8), start=build(), key=KEY, learn="noise"
        )


# -- objectives ------------------------------------------------------------------------------------


def test_energy_distance_is_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 1)), rng.normal(0.5, 2.0, size=(30, 1))
    ours = float(ds.metrics.energy_distance(x, y))
    # scipy's is the root, of the biased form
    biased = stats.energy_distance(x[:, 0], y[:, 0]) ** 2

    def within(v):
        return np.abs(v - v.T).mean()

    corrected = biased - within(x) / (len(x) - 1) - within(y) / (len(y) - 1)
    assert ours == pytest.approx(corrected, rel=1e-5)
    with pytest.raises(ValueError, match="two samples"):
        ds.metrics.energy_distance(x[:1], y)


def test_the_gradient_of_the_energy_is_that_of_the_distance():
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(size=(6, 3)), jnp.float32) for _ in range(2))
    of_terms = jax.grad(lambda v: 2 * jnp.mean(objective.energy().loss(v, y)))(x)
    of_value = jax.grad(lambda v: ds.metrics.energy_distance(v, y))(x)
    np.testing.assert_allclose(of_terms, of_value, atol=1e-6)
    same = jax.grad(lambda v: jnp.mean(objective.energy().loss(v, v)))(x)
    assert np.all(np.isfinite(same))


def test_a_classifiers_objective_wants_the_class_that_was_asked_for():
    logits = np.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], np.float32)
    judge = objective.classifier(lambda x: jnp.asarray(logits), "digit")
    labels = jnp.array([0, 2])
    wanted = -np.log(np.exp(logits)[[0, 1], [0, 2]] / np.exp(logits).sum(1))
    assert judge(None, None, {"digit": labels}) == pytest.approx(wanted.mean(), rel=1e-6)
    with pytest.raises(ValueError, match=r"cond=\{'digit'"):
        judge(None, None, {"label": labels})


def test_distill_follows_conditions():
    """A classifier of the mixture's own components as the only judge."""
    target = mixture()
    exact = target.score_fn(PROCESS, "data")
    means = jnp.asarray(target.means, jnp.float32)

    def apply(params, x, t, *, part):
        return exact.apply(params, x, t) + 0 * part[:, None].astype(x.dtype)

    network = ds.ScoreFn(apply, exact.params, PROCESS, prediction="data")
    judge = objective.classifier(
        lambda x: -jnp.sum(jnp.square(x[:, None] - means[None]), axis=-1), "part"
    )
    x_T = start(192)
    ends_ = search.run(
        network, search.reference_tableau(PROCESS), x_T, cond={"part": jnp.zeros(192)}
    )
    labels = jnp.argmin(jnp.sum(jnp.square(ends_[:, None] - means[None]), axis=-1), axis=-1)
    plan = search.distill(
        network,
        x_T,
        start=build("ddim", 4),
        key=KEY,
        cond={"part": labels},
        objective=judge,
        steps=60,
        batch=64,
        learning_rate=0.05,
        held_out=128,
    )
    scores = plan.scores["classifier"]["held_out"]
    assert scores["found"] < scores["start"] / 2


# -- evolution strategy ----------------------------------------------------------------------------


class Host:
    """A judge that is no JAX function, and counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, x):
        self.calls += 1
        return self.function(np.asarray(x))


def test_it_finds_what_least_squares_find(score_fn):
    """By samples of the error alone: part of the way that `refine` goes."""
    x_T = start(48)
    reference = search.run(score_fn, search.reference_tableau(PROCESS), x_T)
    plan = search.evolution_strategy(
        score_fn, build(n=4), x_T, key=KEY, reference=reference, rounds=60, spread=0.1
    )
    held = plan.psnr["held_out"]
    assert held["found"] > held["start"] + 4
    assert plan.history[-1][0] == 60
    decided = [value for _, _, value in plan.history]
    assert min(decided) < decided[0]
    plan.tableau.check()


def test_a_reward_moves_samples_where_it_wants_them(score_fn):
    judge = Host(lambda x: -np.abs(x[:, 0] - 1.5))
    plan = search.evolution_strategy(
        score_fn,
        build(n=3),
        start(32),
        key=KEY,
        objective=objective.reward(judge),
        rounds=25,
        spread=0.1,
    )
    scores = plan.scores["-reward"]["held_out"]
    assert scores["found"] < scores["start"] - 0.05
    assert judge.calls >= 25 * 16
    assert plan.settings["objective"] == "-reward"


def test_evaluations_are_counted_and_limited(score_fn):
    x_T = start(32)
    reference = search.run(score_fn, search.reference_tableau(PROCESS), x_T)
    calls = []

    def apply(params, x, t):
        jax.debug.callback(lambda n: calls.append(int(n)), jnp.asarray(x.shape[0]))
        return score_fn.apply(params, x, t)

    counted = dataclasses.replace(score_fn, apply=apply)
    plan = search.evolution_strategy(
        counted, build(), x_T, key=KEY, reference=reference, evaluations=9000, batch=8
    )
    jax.effects_barrier()
    assert sum(calls) == plan.settings["evaluations"]
    each = 3 * 24 * 16
    assert plan.settings["rounds"] == (9000 - 3 * (4 + 24) - 8) // (each + 3 * 4)
    again = search.evolution_strategy(
        score_fn, build(), x_T, key=KEY, reference=reference, rounds=plan.settings["rounds"]
    )
    np.testing.assert_allclose(again.tableau.b, plan.tableau.b, atol=1e-4)


@pytest.mark.long
def test_a_sampler_with_noise_by_a_distance_between_sets():
    target = ds.targets.gaussian_mixture([1.0], [[0.0]], [0.09])
    network = target.score_fn(PROCESS, "data")
    data = np.asarray(target.sample(jax.random.key(2), 256))
    tableau = ds.solvers.ddim(PROCESS, ds.schedules.logsnr(PROCESS, 3), eta=0.5)
    plan = search.evolution_strategy(
        network,
        tableau,
        PROCESS.prior_sample(jax.random.key(0), (256, 1)),
        key=KEY,
        objective=objective.frechet(data),
        rounds=40,
        batch=256,
    )
    assert plan.tableau.stochastic
    assert abs(variance_of(plan.tableau, 0.09) - 0.09) < abs(variance_of(tableau, 0.09) - 0.09) / 2


def numbers_of(keys):
    return [tuple(row) for row in np.asarray(jax.random.key_data(keys)).reshape(-1, 2)]


def test_every_round_draws_noise_of_its_own(score_fn, monkeypatch):
    """All candidates of a round see the same noise, no two rounds do."""
    from diffsamp.search.starts import Starts

    real, rounds = Starts.many, []

    def recorded(self, tableaux, low, high, *, together=1, key=None):
        rounds.append(numbers_of(key))
        return real(self, tableaux, low, high, together=together, key=key)

    monkeypatch.setattr(Starts, "many", recorded)
    ddpm = ds.solvers.ddpm(PROCESS, ds.schedules.logsnr(PROCESS, 2))
    search.evolution_strategy(
        score_fn,
        ddpm,
        start(10),
        key=KEY,
        objective=objective.energy(),
        reference=start(10, 1),
        held_out=4,
        rounds=3,
        population=2,
    )
    assert [len(keys) for keys in rounds] == [6] * 3
    assert len({key for keys in rounds for key in keys}) == 3 * 6


def test_every_gradient_step_draws_noise_of_its_own(score_fn, monkeypatch):
    from diffsamp.search import _descent

    real, steps = _descent.fit_step, []

    def recorded(*arguments, **options):
        steps.append(numbers_of(arguments[8]))
        return real(*arguments, **options)

    monkeypatch.setattr(_descent, "fit_step", recorded)
    search.distill(
        score_fn,
        start(8),
        start=ds.solvers.ddpm(PROCESS, ds.schedules.logsnr(PROCESS, 2)),
        key=KEY,
        objective=objective.energy(),
        reference=start(8, 1),
        steps=3,
        batch=4,
        held_out=4,
    )
    assert [len(keys) for keys in steps] == [4] * 3
    assert len({key for keys in steps for key in keys}) == 3 * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"population": 7}, "must be even"),
        ({"spread": 0.0}, "`spread` must be positive"),
        ({"rounds": 0}, "rounds"),
        ({"tableau": build("heun")}, "cannot be distilled"),
        ({"objective": objective.reward(lambda x: x[:, 0] * np.nan)}, "not finite"),
    ],
)
def test_errors(score_fn, options, words):
    options = {"tableau": build(), **options}
    with pytest.raises(ValueError, match=words):
        search.evolution_strategy(score_fn, options.pop("tableau"), start(16), key=KEY, **options)
