"""Training of diffusion networks, with EDM's objective or another, for the scripts `train_*.py`.

EDM's objective is that of Karras et al. 2022 (arXiv:2206.00364): the denoiser is

    D(x; sigma) = c_skip x + c_out F(c_in x, log(sigma) / 4)

and the loss is weighted so that the target of the network F has unit variance at each sigma,
which makes it the plain mean squared error of F. A tenth of the images (at most 2000) is held out,
to see over-fitting; the log has both losses, of the averaged weights for the held-out images.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffsamp.models.digits import save_params

_SIGMA_MIN = 0.002
_SIGMA_MAX = 80.0
_LOG_STEPS = 100

Params = Any
State = tuple[Params, Params, Any]
RESULTS = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a network is trained for.

    Attributes:
        levels: (key, batch, arguments, held_out) -> (batch,) noise levels, in what `loss` takes.
        loss: (network, params, images, labels, levels, noise) -> (batch,) losses.
    """

    levels: Callable[[jax.Array, int, argparse.Namespace, bool], jax.Array]
    loss: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Network:
    """What is trained: `apply(params, x, t, labels)` is the network, under EDM the raw output F.

    Attributes:
        init: key to parameters.
        apply: the network.
        sigma_data: standard deviation of the data.
        num_classes: its label itself means "no label".
        steps_per_call: steps in one compiled loop. A small network needs many, to hide dispatch; on
            CPU the gradient of a convolution is many times slower inside a loop.
        objective: None: EDM's.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    sigma_data: float
    num_classes: int
    steps_per_call: int = 50
    objective: Objective | None = None


def edm_loss(
    network: Network,
    params: Params,
    images: jax.Array,
    labels: jax.Array,
    sigma: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """Mean squared error of the network output F against its EDM target.

    Args:
        network: What is trained.
        params: Its nested parameters.
        images: Clean images, (batch, height, width, channels).
        labels: Classes, `num_classes` for none, (batch,).
        sigma: Noise levels, (batch,).
        noise: Standard normal noise of the shape of `images`.

    Returns:
        The loss of each image, (batch,).
    """
    data = network.sigma_data
    level = sigma[:, None, None, None]
    total = jnp.square(level) + data**2
    noisy = images + level * noise
    # (images - c_skip noisy) / c_out, multiplied out so that it stays accurate at small sigma,
    # where the numerator is a small difference and c_out is small as well.
    target = (level * images - data**2 * noise) / (data * jnp.sqrt(total))
    output = network.apply(params, noisy / jnp.sqrt(total), jnp.log(sigma) / 4.0, labels)
    return jnp.mean(jnp.square(output - target), axis=(1, 2, 3))


def sample_sigma(
    key: jax.Array, batch: int, p_mean: float, p_std: float, uniform_share: float
) -> jax.Array:
    """Noise levels: log-normal, and for a share of the batch log-uniform in [0.002, 80].

    The log-normal part is where learning matters most; it has almost nothing above sigma = 20,
    where a sampler starts, hence the log-uniform part. Both are stratified over the batch,
    which lowers the variance of the gradient.
    """
    num_uniform = round(batch * uniform_share)
    num_normal = batch - num_uniform
    jitter = jax.random.uniform(key, (batch,), minval=1e-6, maxval=1.0)
    normal_quantile = (jnp.arange(num_normal) + jitter[:num_normal]) / num_normal
    log_normal = p_mean + p_std * jax.scipy.stats.norm.ppf(normal_quantile)
    log_sigma = jnp.clip(log_normal, math.log(_SIGMA_MIN), math.log(_SIGMA_MAX))
    if num_uniform:
        uniform_quantile = (jnp.arange(num_uniform) + jitter[num_normal:]) / num_uniform
        low, high = math.log(_SIGMA_MIN), math.log(_SIGMA_MAX)
        log_sigma = jnp.concatenate([log_sigma, low + (high - low) * uniform_quantile])
    return jnp.exp(log_sigma)


def _edm_levels(key: jax.Array, batch: int, args: argparse.Namespace, held_out: bool) -> jax.Array:
    """As `sample_sigma`; held out they are log-normal only, whatever the share of the others."""
    share = 0.0 if held_out else args.uniform_share
    return sample_sigma(key, batch, args.p_mean, args.p_std, share)


EDM = Objective(_edm_levels, edm_loss)


def make_optimizer(
    steps: int, learning_rate: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW with gradient clipping, linear warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(200, steps // 4),
        decay_steps=steps,
        end_value=0.01 * learning_rate,
    )
    # Only matrices decay: decay of biases and of the embeddings' rows serves no purpose.
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.99,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def train(
    network: Network, images: np.ndarray, labels: np.ndarray, args: argparse.Namespace
) -> None:
    """Trains, logs, and writes the averaged weights.

    Args:
        network: What is trained.
        images: float32 (n, height, width, channels) in [-1, 1].
        labels: int32 (n,).
        args: What `parser` read.
    """
    started = time.perf_counter()
    objective = EDM if network.objective is None else network.objective
    order = np.random.default_rng(args.seed).permutation(len(images))
    num_heldout = min(len(images) // 10, 2000)
    heldout, fitted = order[:num_heldout], order[num_heldout:]
    train_images, train_labels = jnp.asarray(images[fitted]), jnp.asarray(labels[fitted])

    key = jax.random.key(args.seed)
    key_init, key_train, key_heldout = jax.random.split(key, 3)
    params = network.init(key_init)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    optimizer = make_optimizer(args.steps, args.learning_rate, args.weight_decay)

    # The held-out loss always sees the same noise, 4 draws an image, so that its changes are
    # those of the weights.
    repeats = 4
    heldout_images = jnp.asarray(np.tile(images[heldout], (repeats, 1, 1, 1)))
    heldout_labels = jnp.asarray(np.tile(labels[heldout], repeats))
    key_sigma, key_order, key_noise = jax.random.split(key_heldout, 3)
    heldout_sigma = jax.random.permutation(
        key_order, objective.levels(key_sigma, len(heldout_images), args, True)
    )
    heldout_noise = jax.random.normal(key_noise, heldout_images.shape)

    @jax.jit
    def heldout_loss(params: Params, *batch: jax.Array) -> jax.Array:
        return jnp.mean(objective.loss(network, params, *batch))

    # arrays are arguments, not constants: XLA would spend minutes folding those
    heldout_batch = (heldout_images, heldout_labels, heldout_sigma, heldout_noise)
    fitted_data = (train_images, train_labels)

    def one_step(
        data: Any, state: State, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[State, jax.Array]:
        params, average, optimizer_state = state
        step, key = inputs
        key_index, key_label, key_sigma, key_noise = jax.random.split(key, 4)
        train_images, train_labels = data
        index = jax.random.randint(key_index, (args.batch,), 0, len(train_images))
        batch_images = train_images[index]
        dropped = jax.random.bernoulli(key_label, 0.1, (args.batch,))
        batch_labels = jnp.where(dropped, network.num_classes, train_labels[index])
        sigma = objective.levels(key_sigma, args.batch, args, False)
        noise = jax.random.normal(key_noise, batch_images.shape)

        def mean_loss(params: Params) -> jax.Array:
            losses = objective.loss(network, params, batch_images, batch_labels, sigma, noise)
            return jnp.mean(losses)

        loss, gradient = jax.value_and_grad(mean_loss)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        # The average is short at first, so that it does not remember the initial weights.
        decay = jnp.minimum(args.ema, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, average, params)
        return (params, average, optimizer_state), loss

    # Many steps in one call: a step takes less than a tenth of a second, and dispatch and
    # donation then cost nothing.
    @functools.partial(jax.jit, donate_argnums=1)
    def many_steps(
        data: Any, state: State, first: jax.Array, keys: jax.Array
    ) -> tuple[State, jax.Array]:
        steps = first + jnp.arange(len(keys), dtype=jnp.float32)
        if len(keys) == 1:  # a loop of one would still be compiled as a loop
            state, loss = one_step(data, state, (steps[0], keys[0]))
            return state, loss[None]
        return jax.lax.scan(functools.partial(one_step, data), state, (steps, keys))

    state: State = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    args.log.parent.mkdir(parents=True, exist_ok=True)
    # The log of an earlier run stays whole until this one ends.
    partial_log = args.log.with_name(args.log.name + ".partial")
    with partial_log.open("w", encoding="utf-8") as log:

        def write(record: dict[str, Any]) -> None:
            log.write(json.dumps(record) + "\n")
            log.flush()
            print(json.dumps(record), flush=True)

        write(
            {
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "python": platform.python_version(),
                "versions": {
                    name: importlib.metadata.version(name)
                    for name in ("jax", "jaxlib", "flax", "optax", "numpy")
                },
                "backend": jax.default_backend(),
                "cores": os.cpu_count(),
                "parameters": num_parameters,
                "image_shape": list(images.shape[1:]),
                "images": len(fitted),
                "heldout_images": len(heldout),
                "steps": args.steps,
                "batch": args.batch,
                "seed": args.seed,
                "learning_rate": args.learning_rate,
                "weight_decay": args.weight_decay,
                "ema": args.ema,
                "p_mean": args.p_mean,
                "p_std": args.p_std,
                "uniform_share": args.uniform_share,
            }
        )
        losses: list[float] = []
        step = 0
        while step < args.steps:
            count = min(network.steps_per_call, args.steps - step)
            keys = jax.vmap(functools.partial(jax.random.fold_in, key_train))(
                jnp.arange(step, step + count)
            )
            state, chunk = many_steps(fitted_data, state, jnp.float32(step), keys)
            losses.extend(np.asarray(chunk).tolist())
            step += count
            if step % _LOG_STEPS == 0 or step == args.steps:
                write(
                    {
                        "step": step,
                        "loss": round(float(np.mean(losses)), 5),
                        "heldout_loss": round(float(heldout_loss(state[1], *heldout_batch)), 5),
                        "seconds": round(time.perf_counter() - started, 1),
                    }
                )
                losses.clear()
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state[1])):
        raise RuntimeError("training diverged: the weights are not finite; nothing was written")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_params(args.out, state[1])
    os.replace(partial_log, args.log)
    print(f"wrote {args.out.name}: {args.out.stat().st_size} bytes, {num_parameters} parameters")


def parser(doc: str, name: str, out: Path, *, steps: int, **defaults: float) -> Any:
    """The command line of a training script.

    Args:
        doc: the script's docstring.
        name: the log is `results/<name>.jsonl`.
        out: where the weights go.
        steps: default number of steps.
        **defaults: others.
    """
    made = argparse.ArgumentParser(
        description=doc.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    made.add_argument("--batch", type=int, default=256, help="images a step")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate")
    made.add_argument("--weight-decay", type=float, default=0.01)
    made.add_argument("--ema", type=float, default=0.999, help="decay of the weights' average")
    made.add_argument("--p-mean", type=float, default=-0.8, help="mean of log sigma")
    made.add_argument("--p-std", type=float, default=1.2, help="deviation of log sigma")
    made.add_argument(
        "--uniform-share", type=float, default=0.15, help="share of log-uniform noise levels"
    )
    made.add_argument("--out", type=Path, default=out, help="weights to write")
    made.add_argument("--log", type=Path, default=RESULTS / f"{name}.jsonl", help="log to write")
    made.set_defaults(**defaults)
    return made


def parse(made: Any) -> argparse.Namespace:
    """The arguments, checked."""
    args = made.parse_args()
    if args.steps < 1 or args.batch < 1:
        made.error("--steps and --batch must be positive")
    return args
