"""What can be done with the bundled digits network by steering it: numbers, and a picture.

    python benchmarks/control.py

Writes `results/control.md` and `docs/plots/control.png`. Measurements are of images of the data
that the network was trained on. PSNR counts all pixels, in dB over the range [-1, 1]. The class of
a sample is that of the nearest image of the data, which no method here was told; the classifier of
the gradient-guided rows is another network. Evaluations and products are per sample.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import unet
from _report import RESULTS, heading, table
from classifier import Classifier

import diffsamp as ds
from diffsamp import guidance, inverse, plot, steering
from diffsamp.models import digits

COUNT, ROWS = 64, 30
IMAGES, LABELS = digits.load_data()
NETWORK = digits.load_digits_model()
PROCESS = NETWORK.process
TIMES = ds.schedules.logsnr(PROCESS, ROWS)
DDPM = ds.solvers.ddpm(PROCESS, TIMES)
DDIM = ds.solvers.ddim(PROCESS, TIMES)
ODE = ds.solvers.unipc(PROCESS, ds.schedules.logsnr(PROCESS, 12), order=2)
X_T = PROCESS.prior_sample(jax.random.key(0), (COUNT, *digits.IMAGE_SHAPE))
KEY = jax.random.key(1)
NULL = {"label": digits.NUM_CLASSES}
CLASSES = jnp.arange(COUNT, dtype=jnp.int32) % 10


def psnr(x: Any, truth: Any) -> float:
    """Of a batch, in dB."""
    return float(10 * np.log10(4 / np.mean((np.asarray(x) - np.asarray(truth)) ** 2)))


def classes(x: Any) -> np.ndarray:
    """The class of the nearest image of the data."""
    flat = np.asarray(x).reshape(len(x), 1, -1)
    return LABELS[np.argmin(((flat - IMAGES.reshape(1, len(IMAGES), -1)) ** 2).sum(-1), axis=1)]


def inverse_problems(truth: Any) -> tuple[list[list[str]], list[tuple[str, Any]]]:
    """Inpainting and super-resolution: rows of the table, and pictures."""
    keep = np.ones((8, 8, 1))
    keep[2:6, 2:6] = 0
    rows, pictures = [], []
    for name, operator in (
        ("inpainting", inverse.mask(keep)),
        ("2x resolution", inverse.downsample(2)),
    ):
        y = operator(truth)
        filled = (
            operator.pinv(y) + (1 - keep) * IMAGES.mean()
            if name == "inpainting"
            else operator.pinv(y)
        )
        rows.append([name, "pseudo-inverse", "0", "0", f"{psnr(filled, truth):.1f}"])
        pictures.append((f"{name}: seen", operator.pinv(y)))
        made: list[tuple[str, Any, ds.Tableau]] = [
            ("ddnm, noise kept", guidance.ddnm(NETWORK, operator, y, DDPM), DDPM),
            ("ddnm, noise derived", guidance.ddnm(NETWORK, operator, y), DDPM),
            ("ddnm, share 0.85", *inverse.ddnm(NETWORK, operator, y, TIMES)),
            ("ddnm_plus", *inverse.ddnm_plus(NETWORK, operator, y, 0.05, TIMES, KEY)),
            ("ddrm", *inverse.ddrm(NETWORK, operator, y, 0.05, TIMES, KEY)),
            ("diffpir", *inverse.diffpir(NETWORK, operator, y, 0.05, TIMES)),
            (
                "measurement, scalar",
                guidance.measurement(NETWORK, operator, y, 0.05, covariance="scalar", spread=0.75),
                DDPM,
            ),
            (
                "measurement, isotropic",
                guidance.measurement(
                    NETWORK, operator, y, 0.05, covariance="isotropic", spread=0.75
                ),
                DDPM,
            ),
            ("measurement, jacobian", guidance.measurement(NETWORK, operator, y, 0.05), DDPM),
        ]
        found = strengths(operator)
        best = f"tfg, rho {found.best.rho:g}, mu {found.best.mu:g}, N {found.best.repeats}"
        made.insert(-1, (best, found.transform, found.tableau))  # the last one is drawn
        for label, transform, tableau in made:
            own = {"y": y} if label.startswith("tfg") else None
            x = ds.sample(transform, tableau, X_T, key=KEY, cond=own)
            counts = [str(transform.nfe(tableau)), str(transform.gradients(tableau))]
            rows.append([name, label, *counts, f"{psnr(x, truth):.1f}"])
        pictures.append((f"{name}: sample", x))
        levels = TIMES[TIMES > 0.05]
        x = inverse.daps(
            NETWORK,
            operator,
            y,
            0.05,
            X_T,
            levels,
            key=KEY,
            ode_steps=2,
            chain=60,
            spread=lambda level: 0.3 * level.sigma / np.hypot(level.sigma, 0.75),
        )
        rows.append([name, "daps", str(2 * (len(levels) - 1)), "0", f"{psnr(x, truth):.1f}"])
    return rows, pictures


def strengths(operator: Any) -> ds.search.TrainingFree:
    """Training-free guidance whose strengths were searched on other images than the table's."""
    other = jnp.asarray(IMAGES[np.linspace(7, len(IMAGES) - 9, 32).astype(int)])

    def misfit(data: Any, level: Any, cond: Any) -> Any:
        away = operator(data) - cond["y"]
        return 0.5 * jnp.sum(away.reshape(len(away), -1) ** 2, axis=1)

    return ds.search.tfg(
        NETWORK,
        misfit,
        DDIM,
        PROCESS.prior_sample(jax.random.key(5), other.shape),
        objective=lambda x, truth: float(np.mean((np.asarray(x) - np.asarray(truth)) ** 2)),
        key=jax.random.key(6),
        reference=other,
        cond={"y": operator(other)},
        names=["y"],
        steps=2,
        rounds=4,
    )


def class_guidance() -> tuple[list[list[str]], list[tuple[str, Any]]]:
    """A class by condition, by guidance and by a classifier's gradient."""
    params = digits.load_params(unet.WEIGHTS / "classifier_digits.safetensors")

    def surprise(data: Any, level: Any, cond: Any) -> Any:
        logits = jnp.asarray(Classifier().apply({"params": params}, data)[0])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), cond["class"][:, None], 1)[:, 0]

    def guided(scale: float) -> Any:
        return guidance.loss(NETWORK, surprise, scale, names=["class"])

    freely = guidance.freedom(NETWORK, surprise, 0.3, names=["class"])
    rows, pictures = [], []
    cond = {"label": CLASSES}
    free = {"class": CLASSES}
    unfolded, which = guidance.unfold(ODE, lambda v: np.where(v.sigma < 3, 2.0, 1.0))
    made: list[tuple[str, Any, ds.Tableau, Any]] = [
        ("unconditional network", NETWORK, ODE, None),
        ("conditional network", NETWORK, ODE, cond),
        ("cfg, scale 2", guidance.cfg(NETWORK, 2.0, NULL), ODE, cond),
        ("unfold, scale 2 below sigma 3", guidance.select(NETWORK, NULL, which), unfolded, cond),
        ("apg, scale 2", guidance.apg(NETWORK, 2.0, NULL), ODE, cond),
        ("classifier through D, scale 1", guided(1.0), ODE, free),
        ("classifier through D, scale 4", guided(4.0), ODE, free),
        ("classifier, FreeDoM 0.3", freely, ODE, free),
    ]
    for label, transform, tableau, given in made:
        x = ds.sample(transform, tableau, X_T, cond=given)
        gradients = getattr(transform, "gradients", lambda _: 0)(tableau)
        share = np.mean(classes(x) == np.asarray(CLASSES))
        rows.append([label, str(transform.nfe(tableau)), str(gradients), f"{share:.0%}"])
        if "scale 4" in label:
            pictures.append(("classes by a classifier's gradient", x))
    return rows, pictures


def rewards() -> tuple[list[list[str]], list[tuple[str, Any]]]:
    """More ink, without a gradient."""

    def ink(x_0: Any, level: Any = None, cond: Any = None) -> Any:
        return x_0.mean((1, 2, 3))

    plain = ds.sample(NETWORK, DDPM, X_T, key=KEY)
    rows = [["plain", str(ROWS), f"{float(ink(plain).mean()):.3f}"]]
    starts = PROCESS.prior_sample(jax.random.key(2), (COUNT * 16, *digits.IMAGE_SHAPE))
    starts = starts.reshape(COUNT, 16, *digits.IMAGE_SHAPE)
    best, _ = steering.best_of(NETWORK, DDPM, starts, reward=ink, key=KEY)
    rows.append(["best of 16", str(16 * ROWS), f"{float(ink(best).mean()):.3f}"])
    for temperature in (0.1, 0.02):
        result = steering.sample(
            NETWORK,
            DDPM,
            starts,
            key=KEY,
            particles=16,
            potential=steering.reward(ink, temperature),
        )
        weights = np.exp(result.log_weights)
        value = ink(result.x.reshape(-1, *digits.IMAGE_SHAPE)).reshape(COUNT, 16)
        rows.append(
            [
                f"16 particles, temperature {temperature}",
                str(16 * ROWS),
                f"{float((weights * value).sum(1).mean()):.3f}",
            ]
        )
    first = np.argmax(result.log_weights, axis=1)
    return rows, [("plain", plain), ("more ink, by particles", result.x[np.arange(COUNT), first])]


def embedded(params: Any, x: Any, t: Any, embedding: Any) -> Any:
    """The network with its label's embedding as the condition."""

    def one(x: Any, t: Any, e: Any) -> Any:
        table_ = jnp.broadcast_to(e[None], params["label_embedding"].shape)
        zero = jnp.zeros(1, jnp.int32)
        return digits.apply({**params, "label_embedding": table_}, x[None], t[None], zero)[0]

    return jax.vmap(one)(x, t, embedding)


def diversity() -> tuple[list[list[str]], list[tuple[str, Any]]]:
    """CADS: how far apart samples of one class are, and whether they still are of the class."""
    weights = NETWORK.params["label_embedding"]
    network = ds.ScoreFn(
        embedded, NETWORK.params, PROCESS, prediction="edm_f", sigma_data=digits.SIGMA_DATA
    )
    guided = guidance.cfg(network, 4.0, {"embedding": weights[10]})
    cond = {"embedding": weights[CLASSES]}
    rows, pictures = [], []
    made = [("cfg, scale 4", guided)]
    for scale in (0.1, 0.5, 1.0):
        annealed = guidance.anneal_condition(
            guided, "embedding", jax.random.key(3), tau=(0.005, 0.2), scale=scale, mix=1.0
        )
        made.append((f"with anneal_condition, scale {scale}", annealed))
    for label, transform in made:
        images = np.asarray(ds.sample(transform, ODE, X_T, cond=cond))
        order = np.argsort(np.asarray(CLASSES), kind="stable")
        pictures.append((f"of the classes 0 and 1: {label}", images[order]))
        x = images.reshape(COUNT, -1)
        apart = [
            np.linalg.norm(x[i] - x[j])
            for i in range(COUNT)
            for j in range(i)
            if CLASSES[i] == CLASSES[j]
        ]
        share = np.mean(classes(x) == np.asarray(CLASSES))
        rows.append([label, f"{np.mean(apart):.2f}", f"{share:.0%}"])
    return rows, [pictures[0], pictures[-1]]


def composition() -> tuple[list[list[str]], list[tuple[str, Any]]]:
    """Two classes at once: E_0 + w (E_a - E_0) + w (E_b - E_0)."""
    first, second = CLASSES, (CLASSES + 5) % 10
    rows, pictures = [], []
    for w in (1.0, 2.0):
        terms = [(NETWORK, NULL), (NETWORK, {"label": first}), (NETWORK, {"label": second})]
        both = guidance.combine(terms, [1 - 2 * w, w, w])
        x = ds.sample(both, ODE, X_T, cond={"label": first})
        found = classes(x)
        either = np.mean((found == np.asarray(first)) | (found == np.asarray(second)))
        rows.append([f"w = {w:g}", str(both.nfe(ODE)), f"{either:.0%}"])
        pictures.append((f"two classes, w = {w:g}", x))
    return rows, pictures


def main() -> None:
    truth = jnp.asarray(IMAGES[np.linspace(0, len(IMAGES) - 1, COUNT).astype(int)])
    parts, pictures = [heading("Control of the digits network", "flax")], [("data", truth)]
    rows, more = inverse_problems(truth)
    pictures += more
    parts += [
        "## Inverse problems\n",
        table(["problem", "method", "evaluations", "products", "PSNR"], rows),
    ]
    rows, more = class_guidance()
    pictures += more
    parts += ["## A class\n", table(["method", "evaluations", "products", "of the class"], rows)]
    rows, more = composition()
    pictures += more
    parts += ["## Two classes\n", table(["weights", "evaluations", "of either class"], rows)]
    rows, more = rewards()
    pictures += more
    parts += ["## A reward: mean ink\n", table(["method", "evaluations", "ink"], rows)]
    rows, more = diversity()
    pictures += more
    parts += [
        "## Diversity\n",
        table(["method", "distance within a class", "of the class"], rows),
    ]
    (RESULTS / "control.md").write_text("\n".join(parts), encoding="utf-8")
    rows = [(label, np.asarray(x)[:10]) for label, x in pictures]
    plot.save(plot.image_grid(rows), RESULTS.parent.parent / "docs" / "plots" / "control.png")


if __name__ == "__main__":
    main()
