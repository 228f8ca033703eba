"""Evolution: genomes keep their budget, encode known solvers, and selection works."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import PROCESS, start

import diffsamp as ds
from diffsamp import schedules, search
from diffsamp.search import genome
from diffsamp.search.evolve import _rank, _tableau


@pytest.mark.parametrize(
    "process",
    [PROCESS, ds.processes.flow(), ds.processes.vp_discrete()],
    ids=lambda p: type(p).__name__,
)
@pytest.mark.parametrize("nfe", [1, 2, 3, 6, 10])
def test_every_child_meets_the_budget_exactly(process, nfe):
    """Solvers of one and two evaluations a step in one plan; a consistent tableau every time."""
    rng = np.random.default_rng(nfe)
    pool = [genome.random_genome(rng, nfe, process, ("logsnr", "uniform")) for _ in range(12)]
    mixed_costs = lost = 0
    for _ in range(60):
        one, two = (pool[i] for i in rng.integers(0, len(pool), 2))
        child = genome.crossover(rng, one, two) or one
        child = genome.mutate(rng, child)
        assert child.nfe == nfe
        tableau = _tableau(child, process)  # checks itself
        if tableau is None:  # weights of thousands: far extrapolation between close points
            lost += 1
            continue
        assert tableau.nfe == nfe
        assert genome.features(child).shape == (12 * nfe,)
        assert search.Genome.from_list(child.to_list()) == child
        mixed_costs += {step.stages for step in child.steps} == {1, 2}
        pool[int(rng.integers(len(pool)))] = child
    assert mixed_costs > 5 or nfe < 3
    assert lost < 3


@pytest.mark.parametrize("name", list(genome.KINDS))
def test_known_solvers_are_genomes(name, score_fn):
    """Up to the order of the last steps, which some of them lower."""
    times = schedules.karras(PROCESS, 7)
    own = genome.from_times(PROCESS, times, [genome.KINDS[name]] * 7).tableau(PROCESS)
    solver = ds.solvers.get(name)
    options = {} if name.startswith(("deis", "ipndm", "ddim")) else {"lower_order_final": False}
    if name.startswith("uni"):
        options |= {"order": genome.KINDS[name].order}
    other = solver(PROCESS, times, **options)
    np.testing.assert_allclose(own.times, other.times, rtol=1e-9)
    x_T = start(16)
    got, want = ds.sample(score_fn, own, x_T), ds.sample(score_fn, other, x_T)
    if name.startswith("uni"):
        # UniPC fixes its two-point weights at one half (bh2), the genome integrates them: alike
        # from where the order is full, so nearer to each other than to another family
        far = ds.sample(score_fn, ds.solvers.ddim(PROCESS, times), x_T)
        assert float(ds.metrics.rmse(got, want)) < float(ds.metrics.rmse(far, want))
    else:
        assert float(jnp.abs(got - want).max()) < 2e-4


def test_evolution_improves_on_what_it_started_from(score_fn):
    x_T, fresh = start(96), start(256, 7)
    table = search.compare(score_fn, x_T, nfe=(5,))
    result = search.evolve(
        score_fn, x_T, nfe=5, key=jax.random.key(0), start=table, population=16, rounds=6
    )
    assert len(result.values) == 7 * 16
    assert list(result.values) == sorted(result.values)
    assert len(set(result.genomes)) == len(result.genomes)
    reference = ds.sample(score_fn, search.reference_tableau(PROCESS), fresh)

    def psnr(tableau):
        return float(ds.metrics.psnr(ds.sample(score_fn, tableau, fresh), reference))

    best = result.best.tableau(PROCESS)
    assert best.nfe == 5
    assert psnr(best) > psnr(table.best(5).tableau) + 0.5


@pytest.mark.long
def test_the_same_seed_gives_the_same_evolution_however_it_is_cut(score_fn, tmp_path):
    options = {"nfe": 4, "population": 6, "rounds": 3}
    x_T = start(24)
    whole = search.evolve(score_fn, x_T, key=jax.random.key(3), **options)
    file = tmp_path / "state.json"
    stopped = []

    def stop(what, done, total):
        if what == "evolving" and done == 2:
            stopped.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.evolve(score_fn, x_T, key=jax.random.key(3), state=file, progress=stop, **options)
    calls = []
    resumed = search.evolve(
        score_fn,
        x_T,
        key=jax.random.key(3),
        state=file,
        **options,
        progress=lambda what, done, total: calls.append((what, done)),
    )
    assert [done for what, done in calls if what == "evolving"] == [3, 4]  # nothing twice
    assert resumed.genomes == whole.genomes
    assert resumed.values == whole.values
    other = search.evolve(score_fn, x_T, key=jax.random.key(4), **options)
    assert other.genomes != whole.genomes


def test_a_state_belongs_to_its_search(score_fn, tmp_path):
    options = {"nfe": 3, "population": 4, "rounds": 1, "reference": start(12)}
    x_T, file = start(12), tmp_path / "state.json"
    search.evolve(score_fn, x_T, key=jax.random.key(3), state=file, **options)
    louder = dataclasses.replace(score_fn, sigma_data=0.6)
    with pytest.raises(ValueError, match="state of another search: network changed"):
        search.evolve(louder, x_T, key=jax.random.key(3), state=file, **options)
    with pytest.raises(ValueError, match="state of another search: starts changed"):
        search.evolve(score_fn, start(12, 1), key=jax.random.key(3), state=file, **options)
    with pytest.raises(ValueError, match="state of another search: key changed"):
        search.evolve(score_fn, x_T, key=jax.random.key(4), state=file, **options)
    file.write_text("{")
    with pytest.raises(ValueError, match="is no state of `evolve`"):
        search.evolve(score_fn, x_T, key=jax.random.key(3), state=file, **options)


def test_the_predictor_ranks():
    """Trained on pairs of a known function it orders points it has not seen."""
    rng = np.random.default_rng(0)
    seen, unseen = rng.normal(size=(2, 200, 24)).astype(np.float32)

    def value(rows):
        return rows[:, 0] - 2 * rows[:, 5] + 0.5 * rows[:, 7] ** 2

    order = _rank(rng, seen, value(seen), unseen)
    places = np.argsort(np.argsort(value(unseen)[order]))
    assert np.corrcoef(places, np.arange(200))[0, 1] > 0.85


def test_diverging_candidates_are_counted_and_never_chosen():
    def apply(params, x, t):
        return jnp.where((t[:, None] > 1.0) & (t[:, None] < 3.0), jnp.nan, params * x)

    broken = ds.ScoreFn(apply, jnp.asarray(0.1), PROCESS, prediction="data")
    result = search.evolve(
        broken,
        start(8),
        nfe=4,
        key=jax.random.key(0),
        reference=start(8, 1),
        population=8,
        rounds=2,
    )
    assert 0 < result.discarded < len(result.values)
    assert np.isfinite(result.values[0])
    assert result.discarded == np.sum(np.isinf(result.values))
    nothing = ds.ScoreFn(lambda p, x, t: x * jnp.nan, 1.0, PROCESS, prediction="data")
    result = search.evolve(
        nothing, start(8), nfe=2, key=jax.random.key(0), reference=start(8), population=4, rounds=0
    )
    with pytest.raises(ValueError, match="all 4 candidates gave samples that are not finite"):
        _ = result.best


def test_an_objective_of_ones_own(score_fn):
    """A distribution distance, which no gradient follows, is a goal like any other."""
    data = start(64, 3) * 0.05
    result = search.evolve(
        score_fn,
        start(64),
        nfe=3,
        key=jax.random.key(0),
        reference=start(64),
        population=4,
        rounds=1,
        objective=search.objective.frechet(data),
        predictor=False,
        together=3,
    )
    x = ds.sample(score_fn, result.best.tableau(PROCESS), start(64))
    assert result.values[0] == pytest.approx(ds.metrics.frechet_distance(x, data), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 0}, "`nfe` must be at least 1"),
        ({"population": 1}, "`population` must be at least 2"),
        ({"schedule": ()}, "`schedule` must name at least one grid"),
        ({"schedule": ("no",)}, "`schedule` must be one of"),
    ],
)
def test_errors(score_fn, options, message):
    with pytest.raises(ValueError, match=message):
        search.evolve(score_fn, start(4), **{"nfe": 3, "key": jax.random.key(0), **options})
