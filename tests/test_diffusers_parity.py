"""Every published config of fixtures/schedulers ends where diffusers does, at 1 to 50 steps.

`fixtures/diffusers.json` holds the last states of diffusers' own code in float64, made by
`fixtures/make_diffusers.py`. EXACT is a few thousand roundings, of what the grids amplify; the
exceptions say why they are larger. Tests marked `peers` run diffusers itself.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from cases import skewed_mixture, twin

import diffsamp as ds
from diffsamp.interop.diffusers import _fields as fields

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = json.loads((FIXTURES / "diffusers.json").read_text(encoding="utf-8"))
START = np.array(json.loads((FIXTURES / "peers.json").read_text(encoding="utf-8"))["start"])
POSTERIOR = skewed_mixture().posterior
EXACT = 1e-9
# its scheduler holds the angles in float32, whatever the default
LOOSE = {"sana-sprint": 1e-6}
# steps of no length at all: the start comes back
NO_STEP = {("cosmos-1", "1"), ("cosmos-2", "1")}
MU = 0.9


def noise_of(call):
    return np.random.default_rng(1000 + call).normal(size=START.size)[:, None]


def tableau_of(name, n, **options):
    sampler = ds.from_diffusers(FIXTURES / "schedulers" / f"{name}.json")
    config = json.loads((FIXTURES / "schedulers" / f"{name}.json").read_text(encoding="utf-8"))
    if config.get("use_dynamic_shifting"):
        options.setdefault("mu", MU)
    # diffusers' linspace DDIM steps over other intervals than those between its evaluations
    compatible = {"compatible": True} if name == "animatediff" else {}
    return sampler, sampler.solver(sampler.process, sampler.times(n, **options), **compatible)


def last_state(sampler, tableau):
    """u_N from diffusers' start, in diffusers' units."""
    calls = np.cumsum(tableau.evaluates) - 1
    noises = [noise_of(calls[k]) for k in range(tableau.rows) if tableau.c[k] != 0]
    scale = sampler.process.prior_std
    if isinstance(sampler.process, ds.processes.EDM):
        scale = tableau.sigma[0]
    return twin(tableau, POSTERIOR, START[:, None] * scale, noises=noises)[:, 0]


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_published_config_ends_where_diffusers_does(name):
    for n, want in GOLDEN[name].items():
        if want is None:
            continue
        if (name, n) in NO_STEP:
            with pytest.raises(ValueError, match="takes no step at all"):
                tableau_of(name, int(n))
            continue
        sampler, tableau = tableau_of(name, int(n))
        got = last_state(sampler, tableau)
        scale = max(1.0, np.abs(want).max())
        apart = np.abs(got - want).max() / scale
        assert apart < LOOSE.get(name, EXACT), (name, n, apart)


# -- live -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker():
    """make_diffusers.py, with the installed diffusers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("torch", "diffusers"):
            pytest.importorskip(package, reason="make test-peers installs it")
    spec = importlib.util.spec_from_file_location("make_diffusers", FIXTURES / "make_diffusers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.peers
def test_the_golden_file_is_what_the_installed_diffusers_does(maker):
    live = maker.make()
    assert set(live) == set(GOLDEN)
    for name, by_n in live.items():
        for n, last in by_n.items():
            want = GOLDEN[name][n]
            assert (last is None) == (want is None), (name, n)
            if want is not None:
                np.testing.assert_allclose(last, want, 1e-9, 1e-9, err_msg=f"{name} {n}")


@pytest.mark.peers
def test_every_scheduler_of_the_installed_diffusers_is_read_or_refused(maker):
    import diffusers.schedulers

    exported = {
        name.removesuffix("Scheduler")
        for name in dir(diffusers.schedulers)
        if name.endswith("Scheduler") and not name.startswith("Flax")
    }
    assert exported == {*fields.CLASSES, *fields.REFUSED}
    assert not set(fields.CLASSES) & set(fields.REFUSED)


@pytest.mark.peers
def test_the_fields_and_defaults_are_those_of_the_installed_classes(maker):
    import diffusers

    kin = {"snr_shift_scale", "sigma_min", "sigma_max", "invert_sigmas", "final_sigmas_type"}
    kin |= {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"}
    # read from the config by FlowMatchEuler, which LTX makes inside
    ltx = {*fields.CLASSES["FlowMatchEulerDiscrete"][0].split()}
    for name, (read, fixed, own) in fields.CLASSES.items():
        parameters = inspect.signature(getattr(diffusers, f"{name}Scheduler").__init__).parameters
        named = {*read.split(), *fixed.split()}
        extra = named - set(parameters) - kin - (ltx if name.startswith("LTX") else set())
        assert not extra, (name, extra)
        known = named | fields.IDLE | {"time_shift_type", "use_dynamic_shifting"}
        missing = set(parameters) - {"self", "kwargs"} - known
        assert not missing, (name, missing)
        defaults = {**fields.DEFAULTS, **own}
        for field in named & set(parameters):
            want, got = parameters[field].default, defaults[field]
            if want is inspect.Parameter.empty:
                continue
            assert got == want or (got in ((), None) and not want), (name, field, got, want)


@pytest.mark.peers
def test_the_network_is_told_what_diffusers_tells_it(maker):
    """Labels, to their rounding there where a class rounds them."""
    rounded = ("DPMSolver", "UniPC", "DEIS", "SASolver", "KDPM2")  # to integers, or cut off
    for name, config in maker.configs().items():
        if name in ("cosmos-2", "cosmos-1"):  # converted by the pipeline; its own last call is idle
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            labels = np.array(maker.run(config, 4)["labels"])
        sampler, tableau = tableau_of(name, 4)
        score_fn = sampler.score_fn(lambda params, x, t: x, ())
        rows = np.flatnonzero(tableau.evaluates)
        level = ds.predictions.Level(
            *(v[:-1][rows] for v in (tableau.times, tableau.alpha, tableau.sigma))
        )
        told = np.asarray(score_fn.bind(level, (np.ones(len(rows)), np.zeros(len(rows)))).label)
        scale = max(1.0, np.abs(labels).max())
        coarse = config["_class_name"].startswith(rounded)
        tolerance = 1.0 if coarse else 1e-3 if config.get("use_karras_sigmas") else 2e-6
        if "Discrete" in config["_class_name"] and "beta_start" in config:
            tolerance = max(tolerance, 1e-3)  # between two levels log-SNR is linear, not sigma
        assert np.abs(told - labels).max() < tolerance * (1 if coarse else scale), name


@pytest.mark.peers
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("sdxl", {"timesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]}),
        ("sdxl", {"sigmas": [14.6, 6.3, 3.8, 2.2, 1.3, 0.8, 0.5, 0.3, 0.1, 0.0]}),
        ("svd", {"sigmas": [700.0, 54.5, 15.9, 7.98, 4.25, 2.0, 0.9, 0.3, 0.04, 0.0]}),
        ("pixart", {"timesteps": [999, 845, 730, 587, 443, 310]}),
        ("sd1-dpm-noise", {"timesteps": [999, 845, 730, 587, 443, 310]}),
        ("sd1-singlestep", {"timesteps": [999, 845, 730, 587, 443, 310]}),
        ("kandinsky-2.2", {"timesteps": [999, 845, 730, 587, 443, 310]}),
        ("lcm", {"timesteps": [999, 759, 499, 259]}),
        ("tcd", {"timesteps": [999, 759, 499, 259]}),
        ("lcm", {"original_inference_steps": 100}),
        ("sd3", {"sigmas": [1.0, 0.8, 0.4, 0.1]}),
        ("flux-dev", {"sigmas": [1.0, 0.8, 0.4, 0.1], "mu": 1.15}),
        ("qwen-image", {"sigmas": [1.0, 0.8, 0.4, 0.1], "mu": 1.15}),
        ("chroma", {"sigmas": [1.0, 0.8, 0.4, 0.1]}),
        ("omnigen", {"sigmas": [1.0, 0.8, 0.4, 0.1]}),
        ("wan-2.1", {"sigmas": np.array([0.99, 0.8, 0.4, 0.1])}),
        ("ltx-ancestral", {"sigmas": [1.0, 0.8, 0.4, 0.1, 0.0]}),
        ("minimax-h3", {"sigmas": [1.0, 0.8, 0.4, 0.1, 0.0]}),
        ("consistency-imagenet64", {"timesteps": [39, 17, 0]}),
        ("wuerstchen", {"timesteps": [1.0, 0.7, 0.3, 0.0]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_times_of_ones_own_live(maker, config, options):
    given = {} if "original_inference_steps" not in options else {"n": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = maker.run(maker.configs()[config], given.get("n", 0), **options)["last"]
    sampler, tableau = tableau_of(config, given.get("n"), **options)
    got = last_state(sampler, tableau)
    assert np.abs(got - want).max() < 1e-6 * max(1.0, np.abs(want).max())


def pipeline_function(path, name):
    """A function of one of diffusers' pipelines, without importing what the pipeline needs."""
    root = Path(importlib.util.find_spec("diffusers").origin).parent / "pipelines"
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    space = {"np": np}
    exec(compile(ast.Module(wanted, []), path, "exec"), space)
    return space[name]


@pytest.mark.peers
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6000])
@pytest.mark.parametrize("n", [4, 28])
def test_the_shift_of_every_pipeline(maker, n, tokens):
    """mu by the pipelines' own functions, and the grids that their schedulers make of it."""
    import diffusers

    line = pipeline_function("flux/pipeline_flux.py", "calculate_shift")
    flux2 = pipeline_function("flux2/pipeline_flux2.py", "compute_empirical_mu")
    root = pipeline_function("cogview4/pipeline_cogview4.py", "calculate_shift")
    inverse = np.linspace(1, 1 / n, n)
    whole = np.linspace(1000, 1, n).astype(np.int64) / 1000
    cases = [
        ("flux-dev", "FluxPipeline", line(tokens, 256, 4096, 0.5, 1.15), inverse),
        ("flux2", "Flux2Pipeline", flux2(tokens, n), inverse),
        ("qwen-image", "QwenImagePipeline", line(tokens, 256, 8192, 0.5, 0.9), inverse),
        ("ltx", "LTXPipeline", line(tokens, 1024, 4096, 0.95, 2.05), inverse),
        ("cogview4", "CogView4Pipeline", root(tokens, 256, 0.25, 0.75), whole),
        ("flux-dev", "StableDiffusion3Pipeline", line(tokens, 256, 4096, 0.5, 1.15), None),
    ]
    for name, pipeline, mu, sigmas in cases:
        config = maker.configs()[name]
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        own = {"sigmas": sigmas} if sigmas is not None else {"num_inference_steps": n}
        scheduler.set_timesteps(**own, mu=mu)
        got = ds.from_diffusers(config, pipeline=pipeline).times(n, image_seq_len=tokens)
        np.testing.assert_allclose(got, scheduler.sigmas.numpy(), atol=3e-7, err_msg=pipeline)
    if n > 1:
        mochi = pipeline_function("mochi/pipeline_mochi.py", "linear_quadratic_schedule")
        got = ds.from_diffusers(maker.configs()["mochi"], pipeline="MochiPipeline").times(n)
        np.testing.assert_allclose(got[:-1], mochi(n, 0.025), atol=1e-12)
