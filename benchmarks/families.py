"""Error against NFE of every family of samplers: the plots of docs/ and one table.

    python benchmarks/families.py                # everything
    python benchmarks/families.py unipc restart  # some families, without the table

Two targets. An exact one, a skewed mixture of one dimension whose ODE is solved by quantiles, with
the linear VP process; and the bundled digits network. On both the log-SNR grid to sigma = 0.
Deterministic samplers: root-mean-square distance to the ODE's solution from the same noise.
Samplers with noise: distance of distributions, W2 on the mixture and Frechet (of pixels) to the
real digits; dashed is that of fresh data, or of the ODE's solutions for digits.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from _report import RESULTS, heading, table

import diffsamp as ds
from diffsamp import plot, schedules, solvers
from diffsamp.models import digits

PLOTS = Path(__file__).resolve().parent.parent / "docs" / "plots"
FEW, MANY = (4, 5, 6, 8, 10, 14, 20, 30), (6, 10, 20, 40)
# family -> names in the registry; one page of docs/ each
FAMILIES = {
    "ddim": ["ddim", "accelerated_ddim", "conjugate_ddim", "ddpm", "accelerated_ddpm"],
    "dpm_solver": [
        "ddim",
        "dpm_solver_2s",
        "dpm_solver_3s",
        "dpmpp_2s",
        "dpmpp_3s",
        "dpmpp_2m",
        "dpmpp_2m_heun",
        "dpmpp_3m",
        "res_2s",
        "res_3s",
        "dpmpp_2m_sde",
        "dpmpp_3m_sde",
        "dpmpp_sde",
    ],
    "deis": [
        "ddim",
        "deis_tab1",
        "deis_tab2",
        "deis_tab3",
        "deis_rhoab2",
        "deis_rhoab3",
        "deis_logrhoab1",
        "ipndm2",
        "ipndm3",
        "ipndm4",
        "pndm",
        "s_pndm",
    ],
    "edm": [
        "euler",
        "heun",
        "dpm2",
        "epd",
        "rho_midpoint2",
        "rho_kutta3",
        "rho_heun3",
        "rho_rk4",
        "dpm2_ancestral",
    ],
    "exponential": [
        "ddim",
        "abnorsett3",
        "abnorsett4",
        "etdrk2",
        "etdrk3",
        "etdrk4",
        "krogstad",
        "strehmel_weiner",
        "friedli",
        "hochbruck_ostermann",
        "lawson2",
        "lawson4",
    ],
    "lookahead": [
        "ddim",
        "gradient_estimation",
        "pfdiff1_1",
        "pfdiff2_1",
        "forward_ddim",
        "rx_ddim",
        "stork2",
        "stork4",
    ],
    "unipc": [
        "ddim",
        "unipc1",
        "unipc2",
        "unipc3",
        "unipc3_bh1",
        "unipc4",
        "unip3",
        "dual_solver",
        "dual_solver0",
    ],
    "momentum": ["ddim", "dpmpp_2m_hb", "ghvb1.8", "ghvb2.8", "ghvb3.8"],
    "inversion": ["ddim", "bdia", "belm"],
    "stochastic": [
        "ddpm",
        "sa_solver",
        "er_sde1",
        "er_sde2",
        "er_sde3",
        "seeds2",
        "seeds3",
        "interpolant_em",
        "interpolant_heun",
    ],
}
Curves = dict[str, list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A network with starts, and what its samples are compared with."""

    name: str
    score_fn: Any
    x_T: Any
    solution: Any
    cond: Any
    to_data: Callable[[Any], float]  # distance of samples to the data
    floor: float
    to_data_label: str

    def run(self, tableau: ds.Tableau) -> Any:
        return ds.search.run(
            self.score_fn,
            tableau,
            self.x_T,
            key=jax.random.key(1),
            cond=self.cond,
            batch=4096 if self.x_T.ndim == 2 else 128,
        )

    def distance(self, x: Any) -> float:
        return float(np.sqrt(np.mean((np.asarray(x, np.float64) - self.solution) ** 2)))


def mixture_target() -> Any:
    return ds.targets.gaussian_mixture([0.3, 0.5, 0.2], [[-1.0], [0.4], [1.5]], [0.04, 0.09, 0.25])


@functools.cache
def scenes(samples: int) -> list[Scene]:
    """The exact target and the digits."""
    target, process = mixture_target(), ds.processes.vp_linear()
    n = 16 * samples
    x_T = process.prior_sample(jax.random.key(0), (n, 1))
    fresh = [np.sort(np.asarray(target.sample(jax.random.key(k), n))[:, 0]) for k in (2, 3)]

    def w2(x: Any) -> float:  # in one dimension the sorted samples are the optimal pairing
        return float(np.sqrt(np.mean((np.sort(np.asarray(x)[:, 0]) - fresh[0]) ** 2)))

    exact = target.ode_solution(np.asarray(x_T, np.float64), process, process.t_max, 0.0)
    mixture = Scene(
        "exact mixture",
        target.score_fn(process),
        x_T,
        exact,
        None,
        w2,
        w2(fresh[1][:, None]),
        "W2 to the data",
    )
    network = digits.load_digits_model()
    images, labels = digits.load_data()
    x_T = network.process.prior_sample(jax.random.key(0), (samples, *digits.IMAGE_SHAPE))
    cond = {"label": jnp.asarray(labels[np.arange(samples) % len(labels)])}
    fine = ds.search.reference_tableau(network.process)
    solution = ds.search.run(network, fine, x_T, cond=cond, batch=128)

    def frechet(x: Any) -> float:
        return ds.metrics.frechet_distance(np.asarray(x), images)

    real = Scene(
        "digits network",
        network,
        x_T,
        np.asarray(solution),
        cond,
        frechet,
        frechet(solution),
        "Frechet distance to the data",
    )
    return [mixture, real]


def tableaux(solver: solvers.Solver, process: Any, budgets: tuple[int, ...]) -> list[ds.Tableau]:
    """One for every budget: of that many evaluations, or the next fewer it can make."""
    steps = []
    for budget in budgets:
        made = [solver.steps(nfe) for nfe in range(budget, max(budget - 3, 0), -1)]
        steps += [n for n in made if n is not None][:1]
    steps = list(dict.fromkeys(steps))
    return [solver(process, schedules.logsnr(process, n)) for n in steps]


def curves(scene: Scene, jobs: dict[str, list[ds.Tableau]], measure: Callable) -> Curves:
    """`measure` of the samples of each tableau, by label; one compiled program."""
    padded = iter(ds.Tableau.pad_together([t for group in jobs.values() for t in group]))
    return {
        label: [(t.nfe, measure(scene.run(next(padded)))) for t in group]
        for label, group in jobs.items()
    }


def by_family(name: str, samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """The panels of a family of the registry."""
    members = [solvers.get(member) for member in FAMILIES[name]]
    panels: list[tuple[str, str, Curves, float | None]] = []
    for noisy in (False, True):
        group = [s for s in members if s.stochastic == noisy]
        if not group:
            continue
        for scene in scenes(samples):
            process = scene.score_fn.process
            jobs = {s.name: tableaux(s, process, MANY if noisy else FEW) for s in group}
            if name == "momentum":
                jobs["heavy_ball(dpmpp_2m, 0.8)"] = [
                    solvers.heavy_ball(t, beta=0.8)
                    for t in tableaux(solvers.get("dpmpp_2m"), process, FEW)
                ]
            if noisy:
                panels.append(
                    (
                        scene.name,
                        scene.to_data_label,
                        curves(scene, jobs, scene.to_data),
                        scene.floor,
                    )
                )
            else:
                label = "RMSE to the ODE's solution"
                panels.append((scene.name, label, curves(scene, jobs, scene.distance), None))
    return panels


def restart(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """Heun with and without Restart, at equal NFE; on the mixture with an imperfect network."""
    panels = []
    for scene in scenes(samples):
        process, low, high = scene.score_fn.process, 0.3, 0.9
        if scene.x_T.ndim == 2:  # exact below rho = 1, off by a shift above
            exact = mixture_target().score_fn(process, "data")

            def apply(params: Any, x: Any, t: Any, exact: Any = exact) -> Any:
                noisy = exact.process.sigma(t) > exact.process.alpha(t)
                return exact.apply(params, x, t) + 0.25 * noisy.astype(x.dtype)[:, None]

            network = dataclasses.replace(exact, apply=apply)
            scene = dataclasses.replace(scene, score_fn=network, name="exact mixture, shifted")
        jobs = {"heun": tableaux(solvers.get("heun"), process, (9, 19, 39, 59, 79))}
        for count in (1, 2, 4):
            interval = solvers.RestartInterval(points=5, repeats=count, low=low, high=high)
            jobs[f"restart, K = {count}"] = [
                solvers.restart(process, schedules.logsnr(process, n), intervals=[interval])
                for n in (5, 10, 20)
            ]
        lines = curves(scene, jobs, scene.to_data)
        panels.append((scene.name, scene.to_data_label, lines, scene.floor))
    return panels


def inversion(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """What encoding and decoding with the same sampler returns."""
    panels = by_family("inversion", samples)
    for scene in scenes(samples):
        process, data = scene.score_fn.process, jnp.asarray(scene.solution, jnp.float32)
        result: Curves = {}
        for name in ("ddim", "dpmpp_2m", "bdia", "belm"):
            for n in (5, 10, 20, 40):
                times = schedules.logsnr(process, n, final="t_min")
                solver = solvers.get(name)
                tableau = solver(process, times)
                if name in ("bdia", "belm"):
                    noise = ds.inversion.encode(scene.score_fn, tableau, data, cond=scene.cond)
                    back = ds.resume(scene.score_fn, tableau, noise.state, cond=scene.cond).x
                else:
                    up = solver(process, times[::-1])
                    noise = ds.sample(scene.score_fn, up, data, cond=scene.cond)
                    back = ds.sample(scene.score_fn, tableau, noise, cond=scene.cond)
                result.setdefault(name, []).append((n, scene.distance(back)))
        panels.append((scene.name, "RMSE of encode, then decode", result, None))
    return panels


def time_shift(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """DDIM and DDIM with shifted times: a biased network on Gaussian data, and the digits."""
    process = ds.processes.vp_linear()

    def apply(params: Any, x: Any, t: Any) -> Any:
        alpha, sigma = process.alpha(t), process.sigma(t)
        return 0.95 * x * (sigma / (0.25 * alpha**2 + sigma**2))[:, None]

    network = ds.ScoreFn(apply, None, process, prediction="noise")
    x_T = process.prior_sample(jax.random.key(0), (samples, 256))
    gaussian = Scene(
        "N(0, 1/4) in 256 dimensions, biased",
        network,
        x_T,
        0.0,
        None,
        lambda x: abs(float(np.std(x)) - 0.5),
        0.0,
        "W2 per element",
    )
    panels = []
    for scene in (gaussian, scenes(samples)[1]):
        variance = 0.25 if scene is gaussian else float(np.var(digits.load_data()[0]))
        result: Curves = {}
        for label, options in {
            "base": {"window": 0.0, "cutoff": 1.0},
            "published default": dict(zip(("window", "cutoff"), (0.002, 0.3), strict=True)),
            "published ddim_adm-5": dict(zip(("window", "cutoff"), (0.08, 0.3), strict=True)),
            "with the data's variance": {"window": 0.3, "cutoff": 0.05, "data_variance": variance},
        }.items():
            shifted = dataclasses.replace(
                scene, score_fn=ds.time_shift.time_shift(scene.score_fn, **options)
            )
            # the linear process with uniform times, as published
            grid = schedules.uniform if scene is gaussian else schedules.logsnr
            times = [grid(scene.score_fn.process, n) for n in FEW]
            jobs = {label: [solvers.ddim(scene.score_fn.process, t) for t in times]}
            result |= curves(shifted, jobs, scene.to_data)
        floor = None if scene is gaussian else scene.floor
        panels.append((scene.name, scene.to_data_label, result, floor))
    return panels


def parallel(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """Sweeps that Picard takes, against the steps of the sequential sampler."""
    panels = []
    for scene in scenes(samples):
        process, result = scene.score_fn.process, Curves()
        x_T, cond = scene.x_T[:32], jax.tree.map(lambda v: v[:32], scene.cond)
        for name in ("ddim", "unipc2", "ddpm"):
            for n in (25, 50, 100):
                tableau = solvers.get(name)(process, schedules.logsnr(process, n))
                done = ds.parallel.sample_parallel(
                    scene.score_fn, tableau, x_T, key=jax.random.key(1), cond=cond, window=20
                )
                result.setdefault(name, []).append((n, float(np.mean(done.sweeps))))
        panels.append((scene.name, "sweeps, window 20, tolerance 1e-3", result, None))
    return panels


def adaptive(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """Step-size control against fixed grids at equal mean NFE, down to the last noisy time."""
    panels = []
    for scene in scenes(samples):
        process, cond = scene.score_fn.process, jax.tree.map(lambda v: v[:64], scene.cond)
        x_T, end = scene.x_T[:64], {"final": "t_min"}
        if scene.x_T.ndim == 2:
            start = np.asarray(x_T, np.float64)
            target = mixture_target()
            solution = target.ode_solution(start, process, process.t_max, process.t_min)
        else:
            fine = solvers.unipc(process, schedules.logsnr(process, 400, **end), order=3)
            solution = np.asarray(ds.sample(scene.score_fn, fine, x_T, cond=cond))
        scene = dataclasses.replace(scene, x_T=x_T, solution=solution, cond=cond)
        jobs = {
            "unipc3": [
                solvers.unipc(process, schedules.logsnr(process, n, **end), order=3)
                for n in (10, 20, 40, 60)
            ],
            "rho_midpoint2": [
                solvers.runge_kutta(
                    process, schedules.logsnr(process, n, **end), method="midpoint2"
                )
                for n in (5, 10, 20, 30)
            ],
        }
        result = curves(scene, jobs, scene.distance)
        for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
            done = ds.adaptive.ode_solution(
                scene.score_fn,
                x_T,
                process.t_max,
                process.t_min,
                cond=cond,
                rtol=tolerance,
                atol=tolerance,
            )
            point = (float(np.mean(done.nfe)), scene.distance(done.x))
            result.setdefault("adaptive Tsit5", []).append(point)
        panels.append((scene.name, "RMSE to the ODE's solution", result, None))
    return panels


def bridges(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """DBIM of several orders on a known bridge: Gaussian data, independent of the end."""
    base = ds.processes.vp_linear(0.1, 2.0)
    process = ds.bridges.Bridge(base)
    mean, variance = 0.5, 0.09

    def apply(params: Any, x: Any, t: Any, x_T: Any) -> Any:
        on_end, norm = process.numbers(t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        u = (x - on_end[:, None] * x_T) / jnp.maximum(norm, 1e-6)[:, None]
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return mean + gain[:, None] * (u - (alpha * mean)[:, None])

    network = ds.bridges.bridge(ds.ScoreFn(apply, None, base, prediction="data"))
    n = 4 * samples
    u_T = process.prior_sample(jax.random.key(0), (n, 1))
    cond = {"x_T": jax.random.normal(jax.random.key(1), (n, 1))}
    exact = mean + np.sqrt(variance) * np.asarray(u_T)
    scene = Scene("Gaussian bridge", network, u_T, exact, cond, float, 0.0, "")
    kinds = {
        "order 1": {},
        "order 2 (heun)": {"order": 2, "variant": "heun"},
        "order 3": {"order": 3},
    }
    jobs = {
        label: [
            solvers.dpmpp(process, ds.bridges.times(process, nfe), **options)
            if options
            else solvers.ddim(process, ds.bridges.times(process, nfe))
            for nfe in FEW
        ]
        for label, options in kinds.items()
    }
    return [(scene.name, "RMSE to the ODE's solution", curves(scene, jobs, scene.distance), None)]


def few_step(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """A perfect flow map against the perfect velocity, on data whose flow map is known."""
    process, mean, variance = ds.processes.flow(), 0.5, 0.3

    def velocity(params: Any, x: Any, t: Any, r: Any) -> Any:
        gap = t - r
        spread = [jnp.sqrt((1 - s) ** 2 * variance + s**2) for s in (t, r)]
        end = ((1 - r) * mean)[:, None] + (spread[1] / spread[0])[:, None] * (
            x - ((1 - t) * mean)[:, None]
        )
        return (x - end) / gap[:, None]

    network = ds.few_step.flow_map(ds.ScoreFn(velocity, None, process, prediction="velocity"))
    plain = ds.targets.gaussian([mean], variance).score_fn(process, "velocity")
    x_T = process.prior_sample(jax.random.key(0), (4 * samples, 1))
    exact = mean + np.sqrt(variance) * np.asarray(x_T)
    result: Curves = {}
    for label, score_fn in (("flow map", network), ("velocity, DDIM", plain)):
        scene = Scene("Gaussian flow", score_fn, x_T, exact, None, float, 0.0, "")
        jobs = {label: [ds.few_step.uniform_tableau(process, n) for n in (1, 2, 4, 8, 16, 32)]}
        result |= curves(scene, jobs, scene.distance)
    return [("Gaussian flow", "RMSE to the ODE's solution", result, None)]


def phase_space(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """PSLD's methods at equal NFE, on Gaussian data; the reference is Verlet of 3000 steps."""
    process, mean, variance = ds.phase_space.psld(), 0.7, 0.3

    def apply(params: Any, z: Any, t: Any) -> Any:  # eps = -L^T score
        xx, _, mx, _ = process.mean(t)
        s_xx, s_xm, s_mm = process.covariance(t)
        c = (s_xx + variance * xx * xx, s_xm + variance * xx * mx, s_mm + variance * mx * mx)
        dx, dm, det = z[:, 0] - xx * mean, z[:, 1] - mx * mean, c[0] * c[2] - c[1] ** 2
        score = (c[1] * dm - c[2] * dx) / det, (c[1] * dx - c[0] * dm) / det
        first = jnp.sqrt(s_xx)
        noise = first * score[0] + s_xm / first * score[1]
        return -jnp.stack([noise, jnp.sqrt(s_mm - s_xm**2 / s_xx) * score[1]], axis=1)

    network = ds.ScoreFn(apply, None, process, prediction="noise")
    z_T = process.prior_sample(jax.random.key(0), (samples, 2))

    def run(method: str, steps: int) -> tuple[int, Any]:
        times = schedules.quadratic(process, steps, final="t_min")
        made = ds.phase_space.sampler(network, times, method=method)
        x = ds.sample(made.network, made.tableau, z_T)[:, 0]
        return made.tableau.nfe, np.asarray(x, np.float64)

    fine, result = run("reduced_verlet", 3000)[1], Curves()
    costs = {"euler": 1, "conjugate": 1, "symplectic_euler": 2, "verlet": 3, "reduced_verlet": 2}
    for method, cost in costs.items():
        for budget in (24, 48, 96, 192):
            nfe, x = run(method, budget // cost)
            result.setdefault(method, []).append((nfe, float(np.sqrt(np.mean((x - fine) ** 2)))))
    return [("Gaussian data, PSLD", "RMSE of x to the ODE's solution", result, None)]


def joint(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """Two correlated leaves with laws of their own, and blurring diffusion of a Gaussian field."""
    laws = {"edges": ds.processes.ve(0.1, 3.0), "nodes": ds.processes.vp_linear(0.1, 6.0)}
    cov = np.array([[0.8, 0.5], [0.5, 0.6]])

    def both(f: str, t: Any) -> Any:
        return jnp.stack([getattr(law, f)(t) for law in laws.values()], axis=-1)

    def leaves(params: Any, x: Any, t: Any) -> Any:
        flat = jnp.concatenate([x["edges"], x["nodes"]], axis=1)
        alpha, sigma = both("alpha", t), both("sigma", t)
        total = alpha[:, :, None] * cov * alpha[:, None] + jax.vmap(jnp.diag)(sigma**2)
        noise = sigma * jnp.linalg.solve(total, flat[..., None])[..., 0]
        return {"edges": noise[:, :1], "nodes": noise[:, 1:]}

    network = ds.ScoreFn(leaves, None, laws["nodes"], prediction="noise")
    graph = ds.joint.per_leaf(network, laws, {"edges": (1,), "nodes": (1,)})

    shape = (16, 16, 1)
    kinds, index = ds.joint.blurring(16, 16, blur=20.0)
    i, j = np.meshgrid(np.arange(16), np.arange(16), indexing="ij")
    power = (1.0 / (1 + i**2 + j**2))[..., None]

    def levels(t: Any) -> Any:
        found = [np.array([getattr(k, f)(t) for k in kinds])[index] for f in ("alpha", "sigma")]
        return found[0], found[1], np.sqrt(found[0] ** 2 * power + found[1] ** 2)

    cosines, base = ds.joint.cosine_basis(16), ds.processes.vp_cosine()
    rates = jnp.asarray(np.array([law.rate for law in kinds])[index])

    def field(params: Any, x: Any, t: Any) -> Any:
        u = jnp.einsum("ki,lj,nijc->nklc", cosines, cosines, x)
        at = t[:, None, None, None]
        fade = (1 - 1e-3) * jnp.exp(-rates * jnp.sin(jnp.pi / 2 * at) ** 4) + 1e-3
        alpha, sigma = base.alpha(at) * fade, base.sigma(at)
        noise = sigma * u / (alpha**2 * power + sigma**2)
        return jnp.einsum("ki,lj,nklc->nijc", cosines, cosines, noise)

    blur = ds.joint.per_frequency(
        ds.ScoreFn(field, None, base, prediction="noise"), kinds, index, shape
    )
    panels = []
    for title, made, exact, begin, end in (
        ("two correlated leaves", graph, None, 1.0, 0.02),
        ("blurred Gaussian field", blur, levels, float(base.t_max), 0.01),
    ):
        x_T = made.prior_sample(jax.random.key(0), samples)

        def run(
            solver: str, nfe: int, made: Any = made, x_T: Any = x_T, ends: Any = (begin, end)
        ) -> Any:
            grid = np.linspace(ends[0] ** 0.5, ends[1] ** 0.5, nfe + 1) ** 2
            return np.asarray(ds.sample(*made.sampler(solver, grid), x_T), np.float64)

        right = run("unipc2", 1000) if exact is None else x_T * exact(end)[2] / exact(begin)[2]
        result: Curves = {}
        for solver in ("ddim", "dpmpp_2m", "deis_tab2", "unipc2"):
            for nfe in (5, 10, 20, 40):
                error = float(np.sqrt(np.mean((run(solver, nfe) - right) ** 2)))
                result.setdefault(solver, []).append((nfe, error))
        panels.append((title, "RMSE to the ODE's solution", result, None))
    return panels


def known_mean(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """OU-VE on Gaussian data given the mean: the ODE's map is known."""
    process, centre, spread = ds.processes.ouve(), 0.4, 0.3

    def apply(params: Any, x: Any, t: Any, mean: Any) -> Any:
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        away = x - (1 - alpha * (1 - centre)) * mean
        return -away / (alpha**2 * spread**2 + sigma**2)

    network = ds.known_mean.around(ds.ScoreFn(apply, None, process, prediction="score"))
    n = 4 * samples
    u_T, y = (
        process.prior_sample(jax.random.key(0), (n, 1)),
        jax.random.normal(jax.random.key(1), (n, 1)),
    )

    def law(t: float) -> tuple[Any, Any]:
        alpha, sigma = process.alpha(t), process.sigma(t)
        return alpha * (centre - 1) * np.asarray(y), np.sqrt(alpha**2 * spread**2 + sigma**2)

    (start, wide), (end, narrow) = law(1.0), law(0.03)
    exact = end + narrow / wide * (np.asarray(u_T) - start)
    scene = Scene("speech enhancement, Gaussian", network, u_T, exact, {"mean": y}, float, 0.0, "")
    jobs = {
        name: [solvers.get(name)(process, np.linspace(1.0, 0.03, n + 1)) for n in FEW]
        for name in ("ddim", "dpmpp_2m", "unipc2")
    }
    return [(scene.name, "RMSE to the ODE's solution", curves(scene, jobs, scene.distance), None)]


def kinetic_energy(process: ds.processes.Process, points: int = 80) -> float:
    """The mean of |velocity|^2 over times and states, for the mixture of `paths`."""
    weights, means, widths = (np.array(v) for v in ([0.7, 0.3], [-1.0, 1.5], [0.25, 0.5]))
    fine, x = (np.arange(points) + 0.5) / points, np.linspace(-6, 6, 241)
    alpha, sigma, da, db = (
        getattr(process, f)(fine)[:, None, None]
        for f in ("alpha", "sigma", "alpha_dot", "sigma_dot")
    )
    variance = alpha**2 * widths**2 + sigma**2
    away = x[None, :, None] - alpha * means
    density = weights * np.exp(-0.5 * away**2 / variance) / np.sqrt(2 * np.pi * variance)
    speed = da * (means + alpha * widths**2 * away / variance) + db * sigma * away / variance
    flux, total = (density * speed).sum(-1), density.sum(-1)
    return float(np.mean(np.sum(flux**2 / (total + 1e-300), axis=1)) * (x[1] - x[0]))


def least_kinetic(knots: int = 7) -> ds.processes.Table:
    """The path of least kinetic energy among tables of so many levels."""

    def path(numbers: Any) -> ds.processes.Table:
        steps = np.exp(numbers[: knots - 1])
        angle = np.append(0, np.cumsum(steps)) / steps.sum() * np.pi / 2
        size = np.exp(np.concatenate([[0], numbers[knots - 1 :], [0]]))
        alpha = np.append((size * np.cos(angle))[:-1], 0.0)
        return ds.processes.table(np.linspace(0, 1, knots), alpha, size * np.sin(angle))

    bounds = [(-1.5, 1.5)] * (knots - 1) + [(-1.0, 1.0)] * (knots - 2)
    found = scipy.optimize.minimize(
        lambda numbers: kinetic_energy(path(numbers)),
        np.zeros(2 * knots - 3),
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 30},
    )
    return path(found.x)


def paths(samples: int) -> list[tuple[str, str, Curves, float | None]]:
    """Straight, cosine and kinetic-optimal paths of one mixture, each to its ODE's solution."""
    target = ds.targets.gaussian_mixture([0.7, 0.3], [[-1.0], [1.5]], [0.25**2, 0.5**2])
    panels = []
    for solver in ("euler", "dpmpp_2m"):
        result: Curves = {}
        for label, process in (
            ("flow", ds.processes.flow()),
            ("cosine", ds.processes.trig()),
            ("least kinetic energy", least_kinetic()),
        ):
            network = target.score_fn(process, "velocity")
            x_T = process.prior_sample(jax.random.key(0), (4 * samples, 1))
            exact = target.ode_solution(x_T, process, float(process.t_max), 0.0)
            scene = Scene("", network, x_T, exact, None, float, 0.0, "")
            jobs = {label: [solvers.get(solver)(process, np.linspace(1, 0, n + 1)) for n in FEW]}
            result |= curves(scene, jobs, scene.distance)
        panels.append((f"paths, {solver}", "RMSE to the ODE's solution", result, None))
    return panels


SPECIAL = {
    "restart": restart,
    "inversion": inversion,
    "time_shift": time_shift,
    "parallel": parallel,
    "adaptive": adaptive,
    "bridges": bridges,
    "few_step": few_step,
    "phase_space": phase_space,
    "joint": joint,
    "known_mean": known_mean,
    "paths": paths,
}


def main() -> None:
    """Measure, draw, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = list(dict.fromkeys([*FAMILIES, *SPECIAL]))
    parser.add_argument("families", nargs="*", choices=[*every, []], help="default: all")
    parser.add_argument("--samples", type=int, default=512, help="digits; the mixture has 16 times")
    parser.add_argument("--plots", type=Path, default=PLOTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "families.md")
    arguments = parser.parse_args()
    rows: dict[str, list[Any]] = {}
    for name in arguments.families or every:
        make = SPECIAL.get(name) or functools.partial(by_family, name)
        panels = make(arguments.samples)
        arguments.plots.mkdir(parents=True, exist_ok=True)
        plot.save(plot.error_against_nfe(panels), arguments.plots / f"{name}.png")
        print(f"{name}: done", flush=True)
        if name in FAMILIES:
            for title, label, lines, _ in panels[:4]:
                for solver, points in lines.items():
                    if label.startswith("RMSE to") or "encode" not in label:
                        rows.setdefault(solver, {})[title, label] = dict(points)
    if not arguments.families:
        arguments.out.write_text(report(rows), encoding="utf-8")


def _at(points: dict[float, float], budget: int) -> str:
    """The error at a budget, or at the one or two evaluations fewer that the solver can make."""
    nfe = next((n for n in range(budget, budget - 3, -1) if n in points), None)
    return "" if nfe is None else f"{points[nfe]:.3g}" + (f" ({nfe})" if nfe < budget else "")


def report(rows: dict[str, Any]) -> str:
    """The table: every solver, its error at some budgets."""
    text = heading("Error against NFE of every solver")
    text += "\n".join(["", *__doc__.splitlines()[5:], ""])
    for noisy, budgets in ((False, (5, 6, 10, 20)), (True, (6, 10, 20, 40))):
        lines = []
        for solver, columns in rows.items():
            keys = [k for k in columns if k[1].startswith("RMSE") != noisy]
            if not keys:
                continue
            cells = [_at(columns[k], n) for k in keys for n in budgets]
            lines.append([f"`{solver}`", *cells])
        head = [f"{scene}, {n}" for scene in ("mixture", "digits") for n in budgets]
        title = "Samplers with noise: distance to the data" if noisy else "Deterministic: RMSE"
        text += f"\n## {title}\n\n" + table(["solver", *head], lines)
    return text


if __name__ == "__main__":
    main()
