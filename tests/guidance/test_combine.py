"""Combinations of networks and conditions: `combine`, `cfg`, `cfg_pp`, mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_processes, gaussian_moments, skewed_mixture
from guidance.exact import build, gaussians, labels

import diffsamp as ds
from diffsamp import guidance, schedules

PROCESS = ds.processes.vp_linear()
NULL = {"label": 0}


def start(process=PROCESS, size=4, dim=1):
    return process.prior_sample(jax.random.key(0), (size, dim), dtype=jnp.float64)


@pytest.mark.parametrize("solver", ["ddim", "unipc3", "heun"])
@pytest.mark.parametrize("process", all_processes().values(), ids=all_processes())
def test_guidance_of_equal_variances_is_the_shifted_gaussian(process, solver, x64):
    """q_c = N(1, 1/4), q_0 = N(0.2, 1/4): scale 2.5 is N(0.2 + 2.5 * 0.8, 1/4), row for row."""
    network = gaussians([0.2, 1.0], [0.25, 0.25], process)
    tableau = build(solver, process, 6)
    guided = guidance.cfg(network, 2.5, NULL)
    got = ds.sample(guided, tableau, start(process), cond={"label": labels(4, 1)})
    want = ds.sample(
        ds.targets.gaussian([2.2], 0.25).score_fn(process, "data"), tableau, start(process)
    )
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    wrong = guidance.cfg(network, 2.55, NULL)
    off = ds.sample(wrong, tableau, start(process), cond={"label": labels(4, 1)})
    assert np.abs(off - want).max() > 1e-2


def test_the_limits_of_guidance(x64):
    """(mean, variance) of the ODE and SDE limits for (1, 1/4), (0, 1) at scale 2, by slopes."""
    top = 1e4  # a wide prior: what it leaves out is of order 1 / top
    process = ds.processes.edm(sigma_max=top)
    w = 2.0
    network = gaussians([0.0, 1.0], [1.0, 0.25], process)

    def grid(rows):
        return np.append(np.geomspace(top, 1e-3, rows), 0.0)

    def moments(tableau):
        # guided predictions are linear in x: gain and offset are read off at two points
        mean, spread = 0.0, top**2
        for n in range(tableau.rows):
            s = tableau.sigma[n]
            gains = [v / (v + s**2) for v in (1.0, 0.25)]
            gain = (1 - w) * gains[0] + w * gains[1]
            offset = w * 1.0 * (1 - gains[1])
            total = tableau.a[n, 0] + tableau.b[n, 0] * gain
            mean = total * mean + tableau.b[n, 0] * offset
            spread = total**2 * spread + tableau.c[n] ** 2
        return np.array([mean, spread])

    def limit(solver):  # methods of order 1, extrapolated
        return 2 * moments(solver(process, grid(4000))) - moments(solver(process, grid(2000)))

    ode, sde = limit(ds.solvers.ddim), limit(ds.solvers.ddpm)
    # variance c^{2w} u^{2(1-w)} = 1/16; mean and SDE's from the integrals of the linear ODE
    np.testing.assert_allclose(ode, (1.3802, 0.0625), rtol=3e-4)
    np.testing.assert_allclose(sde, (1.25, 7 / 64), rtol=3e-4)
    # and the library's own transform makes these rows
    tableau = ds.solvers.ddim(process, grid(20))
    x = jnp.array([[-3.0], [0.0], [3.0]])
    guided = guidance.cfg(network, w, NULL)
    out = ds.sample(guided, tableau, x, cond={"label": labels(3, 1)})[:, 0]
    slope, middle = (out[2] - out[0]) / 6, out[1]
    mean, spread = moments(tableau)
    np.testing.assert_allclose([middle, top**2 * slope**2], [mean, spread], rtol=1e-9)


def test_scale_one_is_the_network_bit_for_bit():
    network = gaussians([0.2, 1.0], [0.25, 0.5], PROCESS)
    tableau, cond = build("unipc3", PROCESS), {"label": labels(4, 1)}
    x_T = start().astype(jnp.float32)
    want = ds.sample(network, tableau, x_T, cond=cond)
    for scale in (1.0, lambda level: np.ones_like(level.t)):
        got = ds.sample(guidance.cfg(network, scale, NULL), tableau, x_T, cond=cond)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("how", ["array", "name"])
def test_a_scale_per_sample(how, x64):
    network = gaussians([0.2, 1.0], [0.25, 0.5], PROCESS)
    tableau, scale = build("dpmpp_2m", PROCESS), jnp.array([0.0, 1.0, 2.0, 5.0])
    cond = {"label": labels(4, 1)}
    if how == "array":
        got = ds.sample(guidance.cfg(network, scale, NULL), tableau, start(), cond=cond)
    else:
        guided = guidance.cfg(network, "w", NULL)
        got = ds.sample(guided, tableau, start(), cond={**cond, "w": scale})
    for i in range(4):
        one = guidance.cfg(network, float(scale[i]), NULL)
        want = ds.sample(one, tableau, start()[i : i + 1], cond={"label": labels(1, 1)})
        np.testing.assert_allclose(got[i], want[0], rtol=1e-12, atol=1e-12)
    assert guidance.cfg(network, scale, NULL).for_samples(jnp.array([3])).weights.value == 5.0


def test_three_terms_are_one_call(x64):
    """Two-scale guidance: E(0,0) + s_I (E(I,0) - E(0,0)) + s_T (E(I,T) - E(I,0))."""
    calls = []

    def apply(params, x, t, image, text):
        calls.append(x.shape)
        return jnp.tanh(x + image[:, None]) + params * text[:, None]

    network = ds.ScoreFn(apply, 0.3, PROCESS, prediction="data")
    s_i, s_t = 1.5, 7.5
    terms = [(network, {}), (network, {"text": 0.0}), (network, {"text": 0.0, "image": 0.0})]
    guided = guidance.combine(terms, [s_t, s_i - s_t, 1 - s_i])
    assert guided.nfe_factor == 3
    x, image, text = start(), jnp.linspace(0, 1, 4), jnp.linspace(1, 2, 4)
    got = guided(x, 0.5, cond={"image": image, "text": text})
    assert calls == [(12, 1)]
    both, only, none = (
        network(x, 0.5, cond={"image": i, "text": t})
        for i, t in ((image, text), (image, 0 * text), (0 * image, 0 * text))
    )
    want = none + s_i * (only - none) + s_t * (both - only)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    slow = guidance.combine(terms, [s_t, s_i - s_t, 1 - s_i], batched=False)
    np.testing.assert_allclose(
        slow(x, 0.5, cond={"image": image, "text": text}), want, rtol=1e-12, atol=1e-12
    )
    # the order of the batch does not matter
    order = jnp.array([2, 0, 3, 1])
    again = guided(x[order], 0.5, cond={"image": image[order], "text": text[order]})
    np.testing.assert_array_equal(again, got[order])


def test_autoguidance_of_two_networks(x64):
    """Variance c^{2w} u^{2(1-w)} in the limit; two networks in two predictions, own costs."""
    process, w = ds.processes.edm(), 2.0
    good = ds.targets.gaussian([0.0], 0.25).score_fn(process, "data")
    bad = ds.targets.gaussian([0.0], 0.5).score_fn(process, "noise")
    guided = guidance.combine([(good, {}), (bad, {})], [w, 1 - w], costs=(1, 0.25))
    times = np.append(np.geomspace(80.0, 1e-3, 600), 0.0)
    tableau = ds.solvers.ddim(process, times)
    slope = ds.sample(guided, tableau, jnp.ones((1, 1)))[0, 0]
    assert float(slope) ** 2 * 80.0**2 == pytest.approx(0.25**2 / 0.5, rel=0.015)
    assert guided.nfe_factor == 1.25
    assert guided.nfe(tableau) == 1.25 * tableau.nfe
    assert guidance.combine([(good, {}), (bad, {})], [w, 1 - w]).nfe_factor == 2


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
def test_a_product_of_experts_adds_the_noise(name, x64):
    """N(1, 1/4) times N(0, 1), in every prediction and any tableau's form."""
    process = all_processes()[name]
    first, second = (
        ds.targets.gaussian([m], v).score_fn(process, "data") for m, v in ((1, 0.25), (0, 1))
    )
    both = guidance.combine([(first, {}), (second, {})], [1.0, 1.0])
    x, t = jnp.linspace(-1, 2, 5)[:, None], process.time(np.float64(0.3))
    want = sum(net(x, t, prediction="noise") for net in (first, second))
    np.testing.assert_allclose(both(x, t, prediction="noise"), want, rtol=1e-12)
    alpha, sigma = process.alpha(t), process.sigma(t)
    data = both(x, t, prediction="data")
    np.testing.assert_allclose(data, (x - sigma * want) / alpha, rtol=1e-10, atol=1e-12)
    # per sample from `cond`, with another sum for each
    named = guidance.combine([(first, {}), (second, {})], "w")
    share = jnp.array([[1, 1], [2, -1], [0.5, 0.5], [1, 0], [0, 2.0]])
    got = named(x, t, prediction="data", cond={"w": share})
    for i in range(5):
        one = guidance.combine([(first, {}), (second, {})], share[i])
        np.testing.assert_allclose(got[i], one(x, t, prediction="data")[i], rtol=1e-10, atol=1e-12)


def test_the_sde_of_a_product_is_not_the_product(x64):
    """Plain DDPM rows give N(.717, .145) where the product is N(.8, .2): why weights exist.

    Exactly, from the linear SDE in s^2 with v = (1/4, 1):
    mean v_1 v_2 int du / ((v_1 + u)^2 (v_2 + u)),
    variance (v_1 v_2)^2 int du / ((v_1 + u)(v_2 + u))^2.
    """
    exact = 0.25 * (16 / 3 - np.log(4) / 0.5625), 0.0625 * (5 / 0.5625 - 2 * np.log(4) / 0.75**3)
    process, moments = ds.processes.edm(sigma_max=1e4), []
    for rows in (1000, 2000):
        moments.append(_product_moments(process, rows))
    np.testing.assert_allclose(2 * moments[1] - moments[0], exact, rtol=3e-4)
    assert abs(exact[0] - 0.8) > 0.08


def _product_moments(process, rows):
    tableau = ds.solvers.ddpm(process, np.append(np.geomspace(1e4, 1e-3, rows), 0.0))
    mean, spread = 0.0, 1e8 / 2
    for n in range(rows):
        s = tableau.sigma[n]
        noise = [(1 / (v + s**2), m / (v + s**2)) for m, v in ((1, 0.25), (0, 1))]
        slope, offset = (s**2 * sum(pair[k] for pair in noise) for k in (0, 1))
        total = tableau.a[n, 0] + tableau.b[n, 0] * (1 - slope)
        mean, spread = total * mean + tableau.b[n, 0] * offset, total**2 * spread
        spread += tableau.c[n] ** 2
    return np.array([mean, spread])


def test_weights_of_a_mixture_give_the_mixture(x64):
    """Two components and the exact classifier of the noised state make the mixture's network."""
    target = skewed_mixture()
    shares, means, variances = [0.3, 0.5, 0.2], [-1.0, 0.4, 1.5], [0.04, 0.09, 0.25]
    parts = [
        ds.targets.gaussian([m], v).score_fn(PROCESS, "noise")
        for m, v in zip(means, variances, strict=True)
    ]

    def log_prob(x, level):
        alpha, spread = level.alpha, jnp.asarray(variances) * level.alpha**2 + level.sigma**2
        away = x - alpha * jnp.asarray(means)[None]
        return jnp.log(jnp.asarray(shares))[None] - 0.5 * (
            away**2 / spread[None] + jnp.log(spread)[None]
        )

    combined = guidance.combine([(p, {}) for p in parts], guidance.mixture(log_prob))
    tableau = build("unipc3", PROCESS, 8)
    want = ds.sample(target.score_fn(PROCESS, "noise"), tableau, start())
    np.testing.assert_allclose(ds.sample(combined, tableau, start()), want, rtol=1e-9, atol=1e-9)


def test_cfg_pp_is_guided_data_and_free_noise(x64):
    """x' = alpha' D_w + kappa sigma E_0 (+ c z), by hand."""
    for name in ("ddim", "ddpm"):
        for process in (PROCESS, ds.processes.flow()):
            network = gaussians([0.2, 1.0], [0.25, 0.5], process)
            tableau = build(name, process, 6)
            guided = guidance.cfg_pp(network, tableau, 0.6, NULL)
            cond, keys = {"label": labels(4, 1)}, jax.random.split(jax.random.key(3), 4)
            run = ds.trajectory(guided, tableau, start(process), key=keys, cond=cond)
            for n in range(tableau.rows):
                x, t = run.points[n], tableau.times[n]
                free, given = (
                    network(x, t, prediction="data", cond={"label": labels(4, k)}) for k in (0, 1)
                )
                noise = (x - tableau.alpha[n] * free) / tableau.sigma[n]
                left = np.sqrt(tableau.sigma[n + 1] ** 2 - tableau.c[n] ** 2)
                want = tableau.alpha[n + 1] * (free + 0.6 * (given - free)) + left * noise
                z = ds.random.normal_like(keys, n, x)
                np.testing.assert_allclose(
                    run.points[n + 1], want + tableau.c[n] * z, rtol=1e-9, atol=1e-9
                )


def test_cfg_pp_grows_with_the_number_of_rows():
    """The mean reached is a scale of guidance: lambda / (1 - exp(-h)), nearly lambda / h."""
    process = ds.processes.edm()
    for rows in (100, 300, 1000):
        times = schedules.logsnr(process, rows)
        step = np.log(process.t_max / process.t_min) / (rows - 1)
        want = 0.6 / -np.expm1(-step)
        tableau = ds.solvers.ddim(process, times)
        scale = 0.6 * guidance.keep_noise(tableau)
        mean = 0.0
        for n in range(rows):
            s = tableau.sigma[n]
            gain = 0.25 / (0.25 + s**2)
            data = gain * mean + (1 - gain) * scale[n]  # N(0, 1/4) and N(1, 1/4)
            mean = tableau.a[n, 0] * mean + tableau.b[n, 0] * data
        assert mean == pytest.approx(want, rel=0.01), rows


def test_combinations_are_pytrees_that_jit_vmap_and_nest(x64):
    network = gaussians([0.2, 1.0, -1.0], [0.25, 0.5, 0.1], PROCESS)
    tableau, cond = build("ddim", PROCESS, 4), {"label": labels(4, 1)}

    def run(w):
        inner = guidance.cfg(network, w, NULL)
        outer = guidance.combine([(inner, {}), (inner, {"label": 2})], [0.5, 0.5])
        return ds.sample(outer, tableau, start(), cond=cond)

    many = jax.vmap(run)(jnp.array([0.5, 1.0, 3.0]))
    for i, w in enumerate((0.5, 1.0, 3.0)):
        np.testing.assert_allclose(many[i], jax.jit(run)(w), rtol=1e-10, atol=1e-12)
    assert guidance.combine([(guidance.cfg(network, 2.0, NULL), {})] * 2, [1, 0]).nfe_factor == 4
    gradient = jax.grad(lambda w: jnp.sum(run(w)))(2.0)
    slope = (jnp.sum(run(2.001)) - jnp.sum(run(1.999))) / 0.002
    np.testing.assert_allclose(gradient, slope, rtol=1e-4)


def test_pytree_states_conditions_and_bfloat16():
    def apply(params, x, t, text):
        shift = text["tokens"].sum(-1)[:, None]
        return jax.tree.map(lambda v: (0.5 * v + shift).astype(v.dtype), x)

    network = ds.ScoreFn(apply, None, PROCESS, prediction="data")
    guided = guidance.cfg(network, 3.0, {"text": {"tokens": np.zeros(2)}})
    x_T = {"a": jnp.ones((3, 2), jnp.float32), "b": jnp.ones((3, 4, 1), jnp.float32)[..., 0]}
    tokens = jnp.arange(6.0, dtype=jnp.float32).reshape(3, 2)
    out = guided(x_T, 0.5, cond={"text": {"tokens": tokens}})
    np.testing.assert_allclose(
        out["b"], 0.5 + 3 * tokens.sum(-1)[:, None] + 0 * out["b"], rtol=1e-5
    )
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), x_T)
    low = ds.sample(
        guidance.combine([(network, {}), (network, {"text": {"tokens": np.zeros(2)}})], [3, -2]),
        build("ddim", PROCESS, 3),
        half,
        cond={"text": {"tokens": tokens.astype(jnp.bfloat16)}},
    )
    assert low["a"].dtype == jnp.bfloat16


def test_conditions_of_one_call():
    """What a term gives alone, what the batch shares, and what cannot be shared."""

    def apply(params, x, t, label, extra=None):
        out = x + label[:, None].astype(x.dtype)
        return out if extra is None else out + extra

    network = ds.ScoreFn(apply, None, PROCESS, prediction="data")
    x = start().astype(jnp.float32)
    own = guidance.combine([(network, {"label": 1}), (network, {"label": 5})], [2.0, -1.0])
    np.testing.assert_allclose(own(x, 0.5), x + 2 * 1 - 5, rtol=1e-5, atol=1e-5)
    guided = guidance.cfg(network, 2.0, NULL)
    shared = guided(x, 0.5, cond={"label": labels(4, 3), "extra": jnp.float32(0.25)})
    np.testing.assert_allclose(shared, x + 6.25, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"'label' is shared by the whole batch, shape \(\)"):
        guided(x, 0.5, cond={"label": jnp.int32(3)})
    with pytest.raises(ValueError, match=r"`cond` lacks \['label'\], which some terms override"):
        guided(x, 0.5, cond={"extra": jnp.float32(0.25)})
    with pytest.raises(ValueError, match="guidance needs the condition it strengthens"):
        guided(x, 0.5)
    with pytest.raises(ValueError, match=r"`cond` lacks \['w'\], which a transform"):
        guidance.cfg(network, "w", NULL)(x, 0.5, cond={"label": labels(4, 3)})


def test_a_combination_keeps_a_sharded_batch_where_it_is():
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    network = gaussians([0.2, 1.0], [0.25, 0.5], PROCESS)
    guided = guidance.combine([(network, {}), (network, NULL)], [2.0, -1.0])
    tableau = build("ddim", PROCESS, 3)
    x_T, label = (jax.device_put(v, sharding) for v in (start().astype(jnp.float32), labels(4, 1)))
    compiled = jax.jit(ds.sample).lower(guided, tableau, x_T, cond={"label": label}).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def test_it_says_what_is_wrong():
    network = gaussians([0.2, 1.0], [0.25, 0.5], ds.processes.flow())
    with pytest.raises(ValueError, match="`terms` must hold at least one pair"):
        guidance.combine([], [])
    with pytest.raises(TypeError, match="must be a pair of a network and the conditions"):
        guidance.combine([network], [1.0])
    with pytest.raises(TypeError, match="must be a mapping from their names"):
        guidance.combine([(network, 3)], [1.0])
    with pytest.raises(ValueError, match="`weights` must be one number per term"):
        guidance.combine([(network, {}), (network, NULL)], [1.0])
    with pytest.raises(ValueError, match="`costs` must hold one number per term"):
        guidance.combine([(network, {})], [1.0], costs=(1, 2))
    both = guidance.combine([(network, {}), (network, NULL)], [1.0, 1.0])
    tableau = ds.solvers.ddim(network.process, schedules.uniform(network.process, 4))
    with pytest.raises(ValueError, match="does not determine the data at alpha = 0"):
        ds.sample(both, tableau, start(), cond={"label": labels(4, 1)})
    multistep = build("dpmpp_2m", PROCESS, 4)
    with pytest.raises(ValueError, match="rows of one state and one output"):
        guidance.cfg_pp(network, multistep, 0.6, NULL)
    assert gaussian_moments(tableau, 0.0, 1.0)[1] > 0
