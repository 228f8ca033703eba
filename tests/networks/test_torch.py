"""PyTorch modules under XLA: the same numbers, the same gradients, errors in words."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers_networks import (
    BATCH,
    CASES,
    DECODERS,
    apart,
    arrays,
    filled,
    normal,
    sd_unet,
    text,
)
from safetensors import numpy as safetensors
from torch import nn

import diffsamp as ds
from diffsamp.interop.torch import extract

FLOW, VP = ds.processes.flow(), ds.processes.vp_linear()
CLOSE = 1e-5  # float32 sums in another order


def made(name, **options):
    case = CASES[name]
    module = filled(case.make())
    score_fn = ds.from_torch(
        module,
        process=FLOW,
        prediction="velocity",
        arguments={"x": case.x, "t": case.t},
        fixed=case.fixed,
        **options,
    )
    return case, module, score_fn


def called(case, module, x, t):
    output = module(**{case.x: x, case.t: t}, **case.cond(), **case.fixed, return_dict=False)[0]
    return output[:, : x.shape[1]]  # without DiT's and PixArt's learned variance


@pytest.mark.parametrize("name", list(CASES))
def test_a_network_and_its_gradient_are_pytorchs(name):
    case, module, score_fn = made(name)
    x = normal(BATCH, *case.shape, seed=5).requires_grad_()
    t = torch.tensor([300.0, 701.0]) / (1000 if name == "Flux" else 1)
    want = called(case, module, x, t)
    weight = normal(*want.shape, seed=9)
    (slope,) = torch.autograd.grad((want * weight).sum(), x)

    @jax.jit
    def both(params, x, t, cond):
        def loss(x):
            output = score_fn.apply(params, x, t, **cond)
            return jnp.sum(output * arrays(weight)), output

        return jax.value_and_grad(loss, has_aux=True)(x)

    (_, got), gradient = both(score_fn.params, arrays(x), arrays(t), arrays(case.cond()))
    assert want.std() > 0.1, "a network that says nothing proves nothing"
    assert apart(got, want) < CLOSE
    assert apart(gradient, slope) < CLOSE


@pytest.mark.parametrize("name", list(DECODERS))
def test_a_decoder_and_its_gradient_are_pytorchs(name):
    make, shape, pixels = DECODERS[name]
    module = filled(make())
    decode, weights = extract(module, "decode")
    z = normal(BATCH, *shape, seed=5).requires_grad_()

    def own(dtype):
        start = z.detach().to(dtype).requires_grad_()
        image = module.to(dtype).decode(start, return_dict=False)[0]
        return image, torch.autograd.grad(image.square().sum(), start)[0]

    rounded, exact = own(torch.float32), own(torch.float64)
    assert rounded[0].shape == (BATCH, *pixels)

    @jax.jit
    def both(weights, z):
        def loss(z):
            image = decode(weights, {"z": z, "return_dict": False})
            return jnp.sum(image**2), image

        return jax.value_and_grad(loss, has_aux=True)(z)

    (_, got), gradient = both(weights, arrays(z))
    for ours, theirs, true in zip((got, gradient), rounded, exact, strict=True):
        # as exact as PyTorch's own float32, on any processor
        assert apart(ours, true) < max(CLOSE, 2 * apart(theirs.detach(), true))


class Small(nn.Module):
    """Everything that extraction must find: tied weights, a buffer, a loose tensor, dropout."""

    def __init__(self, heads=1):
        super().__init__()
        self.inner = nn.Conv1d(2, 2, 3, padding=1)
        self.outer = nn.Conv1d(2, 2 * heads, 3, padding=1)
        self.again = self.inner
        self.register_buffer("scale", torch.tensor([0.5, 2.0])[:, None], persistent=False)
        self.loose = torch.linspace(0, 1, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, t, shift=None):
        h = torch.tanh(self.inner(x) + torch.sin(t[:, None, None] * self.loose))
        h = self.again(self.drop(h)) * self.scale + torch.linspace(0, 1, h.shape[-1])
        return self.outer(h if shift is None else h + shift[:, None, None])


X, T = normal(3, 2, 4, seed=1), torch.tensor([0.2, 0.5, 0.9])


def small(heads=1, **options):
    torch.manual_seed(0)
    module = Small(heads)
    return module, ds.from_torch(module, process=VP, prediction="noise", **options)


def test_the_module_given_is_left_alone_and_not_needed():
    module, score_fn = small()
    assert module.training
    assert module.inner.weight.requires_grad
    names = {"inner.weight", "inner.bias", "outer.weight", "outer.bias", "scale", "loose"}
    assert set(score_fn.params) == names, "tied weights are one"
    want = module.eval()(X, T)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7.0)
    del module
    assert apart(score_fn.apply(score_fn.params, arrays(X), arrays(T)), want) < CLOSE
    # nothing of torch holds the values any more
    assert all(p.is_meta for p in score_fn.apply.function.module.parameters())


def test_weights_are_arguments_of_the_program():
    _, score_fn = small()
    jaxpr = jax.make_jaxpr(lambda s, x: s(x, 0.5))(score_fn, arrays(X))
    assert all(np.size(c) < 2 for c in jaxpr.consts)
    scan = jax.jit(lambda s, x: jax.lax.scan(lambda x, t: (s(x, t), ()), x, jnp.ones(3) / 2)[0])
    text = scan.lower(score_fn, arrays(X)).as_text()
    assert "tensor<2x2x3xf32>" in text
    assert "dense<[[[" not in text
    # and their gradient is there
    slope = jax.grad(lambda s: jnp.sum(s(arrays(X), 0.5) ** 2), allow_int=True)(score_fn)
    assert float(jnp.abs(slope.params["inner.weight"]).max()) > 0


def test_tensors_made_on_the_way_whatever_transformers_did(monkeypatch):
    """It exchanges torch.linspace for a while, and torch remembers which one it saw."""
    module, score_fn = small()
    real, constructors = torch.linspace, torch.utils._device._device_constructors
    constructors.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "linspace", lambda *a, **k: real(*a, **k))
        constructors()
    try:
        got = score_fn.apply(score_fn.params, arrays(X), arrays(T))
    finally:
        constructors.cache_clear()
    assert apart(got, module.eval()(X, T)) < CLOSE


def test_one_trace_for_many_samplers():
    calls = []

    class Counted(Small):
        def forward(self, x, t):
            calls.append(1)
            return super().forward(x, t)

    score_fn = ds.from_torch(Counted(), process=VP)
    for n in (2, 3):
        tableau = ds.solvers.ddim(VP, ds.schedules.logsnr(VP, n))
        assert np.isfinite(ds.sample(score_fn, tableau, arrays(X))).all()
    assert len(calls) == 1


def test_what_a_module_keeps_is_not_for_the_next_trace():
    class Keeps(nn.Module):
        kept = None

        def forward(self, x, t):
            if self.kept is None:
                self.kept = torch.cos(t[:, None, None])
            return x * self.kept

    score_fn = ds.from_torch(Keeps(), process=VP)
    for n in (2, 3):  # other shapes: traced again
        got = score_fn.apply(score_fn.params, arrays(X[:n]), arrays(T[:n]))
        assert apart(got, Keeps()(X[:n], T[:n])) < CLOSE


def test_channels_last():
    module, score_fn = small(layout="NHWC")
    got = score_fn.apply(score_fn.params, jnp.moveaxis(arrays(X), 1, -1), arrays(T))
    assert apart(jnp.moveaxis(got, -1, 1), module.eval()(X, T)) < CLOSE


def test_a_learned_variance_is_split_off_or_kept():
    module, dropped = small(heads=2)
    want = module.eval()(X, T)
    x, t = arrays(X), arrays(T)
    assert apart(dropped.apply(dropped.params, x, t), want[:, :2]) < CLOSE
    _, kept = small(heads=2, second_head="keep")
    first, second = kept.apply(kept.params, x, t)
    assert apart(first, want[:, :2]) < CLOSE
    assert apart(second, want[:, 2:]) < CLOSE
    table = ds.processes.vp_discrete("linear")
    module.eval()
    ranged = ds.from_torch(module, process=table, second_head="keep")
    tableau = ds.solvers.ddpm(table, ds.schedules.leading(table, 3), variance="learned")
    guided = ds.guidance.learned_range(ranged, tableau, key=jax.random.key(0))
    assert np.isfinite(ds.sample(guided, tableau, x)).all()
    _, single = small(second_head="keep")
    with pytest.raises(ValueError, match="no second head"):
        single.apply(single.params, x, t)


def test_bfloat16():
    case = CASES["SD"]
    module = filled(sd_unet())
    x, t = normal(BATCH, *case.shape, seed=5), torch.tensor([300.0, 701.0])
    want = module(x, t, **text(), return_dict=False)[0]
    score_fn = ds.from_torch(
        module.to(torch.bfloat16), process=FLOW, prediction="velocity", time="label"
    )
    assert score_fn.dtype == jnp.bfloat16
    assert score_fn.params["conv_in.weight"].dtype == jnp.bfloat16
    cond = {"encoder_hidden_states": arrays(text()["encoder_hidden_states"]).astype(jnp.bfloat16)}
    got = score_fn(arrays(x), arrays(t) / 1000, cond=cond)
    assert got.dtype == jnp.float32, "the state keeps its own precision"
    assert 1e-4 < apart(got, want) < 0.04, "bfloat16 has 8 bits"


def test_fixed_arguments_and_other_names():
    module, _ = small()
    shift = torch.tensor([1.0, -1.0, 2.0])
    want = module.eval()(X, T, shift)
    x, t = arrays(X), arrays(T)
    named = ds.from_torch(module, process=VP, arguments={"x": "x", "t": "t", "label": "shift"})
    assert apart(named.apply(named.params, x, t, label=arrays(shift)), want) < CLOSE
    fixed = ds.from_torch(module, process=VP, fixed={"shift": shift})
    assert "argument:shift" in fixed.params
    assert apart(fixed.apply(fixed.params, x, t), want) < CLOSE


def test_it_is_searched_and_distilled():
    """The module as a network like any other: a plan, without and with gradients."""
    _, score_fn = small()
    x_T = jnp.asarray(np.random.default_rng(0).normal(size=(24, 2, 4)), jnp.float32)
    plan = ds.search.regress(score_fn, x_T, nfe=2, key=jax.random.key(0))
    assert plan.tableau.nfe == 2
    start = ds.solvers.ddim(VP, ds.schedules.logsnr(VP, 2))
    plan = ds.search.distill(
        score_fn, x_T, start=start, key=jax.random.key(0), steps=3, batch=4, held_out=8
    )
    assert np.abs(plan.tableau.b - start.b).max() > 1e-4


@pytest.mark.parametrize("batch", [None, 2])
def test_exported_it_runs_without_torch(tmp_path, batch):
    """In a process where torch cannot be imported: samples and gradients."""
    case, _, score_fn = made("SD3", time="label")
    cond = arrays(case.cond())
    folder = tmp_path / "net"
    ds.export_network(
        score_fn, folder, shape=case.shape, cond=cond, batch=batch, platforms=("cpu",)
    )
    weights = safetensors.load_file(folder / "weights.safetensors")
    assert weights.keys() == score_fn.params.keys()
    x_T = arrays(normal(BATCH, *case.shape, seed=5))
    tableau = ds.solvers.dpmpp(FLOW, ds.schedules.uniform(FLOW, 3), order=2)
    want = ds.sample(score_fn, tableau, x_T, cond=cond)
    slope = jax.grad(lambda x: jnp.sum(score_fn(x, 0.3, cond=cond) ** 2))(x_T)
    tableau.save(tmp_path / "tableau.json")
    np.savez(tmp_path / "in.npz", x_T=x_T, **cond)
    code = """
import sys
class Gone:
    def find_spec(name, *_):
        if name.split(".")[0] in ("torch", "torchax", "diffusers", "flax"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone)
import jax, jax.numpy as jnp, numpy as np, diffsamp as ds
net, given = ds.load_network("net"), np.load("in.npz")
cond = {n: given[n] for n in ("encoder_hidden_states", "pooled_projections")}
x = ds.sample(net, ds.Tableau.load("tableau.json"), given["x_T"], cond=cond)
slope = jax.grad(lambda x: jnp.sum(net(x, 0.3, cond=cond) ** 2))(jnp.asarray(given["x_T"]))
plan = ds.search.refine(
    net, ds.solvers.ddim(net.process, ds.schedules.uniform(net.process, 2)),
    np.linspace(1, 1.5, 8, dtype=np.float32)[:, None, None, None]
    * np.tile(given["x_T"], (4, 1, 1, 1)),
    cond={k: np.tile(v, (4,) + (1,) * (v.ndim - 1)) for k, v in cond.items()},
    key=jax.random.key(0), iterations=1, held_out=2, batch=8,
    reference=ds.solvers.ddim(net.process, ds.schedules.uniform(net.process, 6)))
scores = plan.scores["psnr"]["fit"]
np.savez("out.npz", x=x, slope=slope, scores=[scores["start"], scores["found"]])
"""
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    out = np.load(tmp_path / "out.npz")
    assert out["scores"][1] > out["scores"][0], "and is searched"
    assert apart(out["x"], torch.tensor(np.asarray(want))) < CLOSE
    assert apart(out["slope"], torch.tensor(np.asarray(slope))) < CLOSE


# -- what cannot be ------------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x, t):
        return x if x.sum() > 0 else -x


class Number(nn.Module):
    def forward(self, x, t):
        return x * float(t[0])


class Masked(nn.Module):
    def forward(self, x, t):
        return x + x[x > 0].sum()


class Random(nn.Module):
    def forward(self, x, t):
        return x + torch.randn_like(x)


class NoLowering(nn.Module):
    def forward(self, x, t):
        return x * torch.special.airy_ai(x)


class Wider(nn.Module):
    def forward(self, x, t):
        return torch.cat([x, x, x], 1)


class Words(nn.Module):
    def forward(self, x, t):
        return "noise"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Branch, r"Branch cannot be extracted: .*aten._local_scalar_dense.*test_torch.py, line"),
        (Number, r"depends on the values .*test_torch.py, line"),
        (Masked, r"Masked cannot be extracted: .*__getitem__.*test_torch.py, line"),
        (Random, r"Random draws random numbers"),
        (NoLowering, r"NoLowering cannot be extracted: .*airy_ai"),
        (Wider, r"must have the shape of x, \(3, 2, 4\); got \(3, 6, 4\)"),
        (Words, r"must return a tensor"),
    ],
)
def test_a_module_that_cannot_be_extracted_says_why(kind, words):
    score_fn = ds.from_torch(kind(), process=VP)
    with pytest.raises(ValueError, match=words):
        score_fn(arrays(X), 0.5)


def test_names_and_shapes_in_words():
    module, score_fn = small()
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module; got function"):
        ds.from_torch(lambda x, t: x, process=VP)
    with pytest.raises(ValueError, match=r"Small has no argument 'sample'; it has x, t, shift"):
        ds.from_torch(module, process=VP, arguments={"x": "sample", "t": "t"})
    with pytest.raises(ValueError, match=r"Our names come first: \{'x': 'z'"):
        ds.from_torch(module, process=VP, arguments={"z": "x", "s": "t"})
    with pytest.raises(ValueError, match="for x and for t"):
        ds.from_torch(module, process=VP, arguments={"x": "x"})
    with pytest.raises(ValueError, match="given twice"):
        ds.from_torch(module, process=VP, arguments={"x": "x", "t": "x"})
    with pytest.raises(TypeError, match="must map our names"):
        ds.from_torch(module, process=VP, arguments="x t")
    with pytest.raises(ValueError, match="Small has no argument 'label'"):
        score_fn(arrays(X), 0.5, cond={"label": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"Small cannot be called .*'x': \(3, 5, 4\)"):
        score_fn(jnp.ones((3, 5, 4)), 0.5)
    with pytest.raises(ValueError, match="layout"):
        ds.from_torch(module, process=VP, layout="channels")
    with pytest.raises(ValueError, match="which argument of Linear is the time"):
        ds.from_torch(nn.Linear(2, 2), process=VP)
    with torch.device("meta"):
        bare = Small()
    with pytest.raises(ValueError, match="has no values"):
        ds.from_torch(bare, process=VP)
    sd = ds.from_torch(filled(sd_unet()), process=FLOW, prediction="velocity")
    with pytest.raises(ValueError, match="needs encoder_hidden_states: pass cond="):
        sd(jnp.ones((2, 4, 8, 8)), 0.5)


def test_the_users_rules_of_jax_do_not_reach_the_module():
    """conftest.py has strict dtypes and ranks on; the module mixes both."""
    assert jax.config.jax_numpy_dtype_promotion == "strict"

    class Mixed(nn.Module):
        def forward(self, x, t):
            return x * torch.arange(x.shape[-1]) + t.long()[:, None, None]

    score_fn = ds.from_torch(Mixed(), process=VP)
    got = score_fn.apply(score_fn.params, arrays(X), arrays(T))
    assert apart(got, Mixed()(X, T)) < CLOSE


# -- versions ------------------------------------------------------------------------------------


def python(code, cwd=None):
    path = {"PYTHONPATH": str(Path(ds.__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=cwd,
        env={**os.environ, **path},
    )


def test_the_shim_of_torchax_is_still_needed():
    done = python("import torchax; torchax.default_env()")
    assert done.returncode, "torchax imports by itself: interop/_torchax.py can be one line"
    assert "has no overload name" in done.stderr


def test_a_pair_that_does_not_work_is_refused_with_the_fix():
    code = """
import sys, types, torch
def broken(name, *_):
    if name == "torchax":
        raise AttributeError("module 'torch' has no attribute 'moved'")
class Finder:
    find_spec = staticmethod(broken)
sys.meta_path.insert(0, Finder())
import diffsamp as ds
ds.from_torch(torch.nn.Linear(2, 2), process=ds.processes.flow())
"""
    done = python(code)
    assert "ImportError: torchax 0.0.13 does not work with torch" in done.stderr
    assert 'pip install "diffsamp[torch]"' in done.stderr
    code = code.replace(
        "AttributeError(\"module 'torch' has no attribute 'moved'\")",
        "ModuleNotFoundError('none', name='torchax')",
    )
    done = python(code)
    assert 'from_torch needs torchax: pip install "diffsamp[torch]"' in done.stderr
