"""Which faults the default tests catch: each is put into a copy of the library, and tests are run.

A row of the table is one change of one line. The tests beside it run until the first one fails.
A change that no test notices is a hole in the suite; the script then ends with status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ("diffsamp", "tests", "benchmarks", "docs", "README.md", "pyproject.toml")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """`old`, which stands once in `path`, becomes `new`; `tests` are to fail."""

    what: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


SAMPLING = "diffsamp/sampling.py"
EXECUTOR = ("tests/test_sampling.py",)
SEARCH = ("tests/search/test_evolve.py", "tests/search/test_best.py")

MUTATIONS = [
    Mutation(
        "executor: coefficients x 1.01",
        SAMPLING,
        "weights = jnp.asarray(weights, dtype)\n",
        "weights = 1.01 * jnp.asarray(weights, dtype)\n",
        EXECUTOR,
    ),
    Mutation(
        "executor: noise dropped",
        SAMPLING,
        "v + scale_rows(row.c, v) * z.astype(v.dtype)",
        "v + 0 * z.astype(v.dtype)",
        EXECUTOR,
    ),
    Mutation(
        "executor: noise x 1.05",
        SAMPLING,
        "v + scale_rows(row.c, v) * z",
        "v + 1.05 * scale_rows(row.c, v) * z",
        EXECUTOR,
    ),
    Mutation(
        "executor: ring order reversed",
        SAMPLING,
        "(row - xp.arange(size)[None]) % size",
        "(row + xp.arange(size)[None]) % size",
        EXECUTOR,
    ),
    Mutation(
        "executor: padding ignored",
        SAMPLING,
        "lax.cond(jnp.any(row.evaluates), call, nothing)",
        "call()",
        EXECUTOR,
    ),
    Mutation(
        "executor: a finished sample sees the network",
        SAMPLING,
        "if row.evaluates.ndim == 0:",
        "if True:",
        (*EXECUTOR, "tests/search/test_compare.py"),
    ),
    Mutation(
        "executor: condition dropped",
        SAMPLING,
        "output = predict(x, row.bound, cond)",
        "output = predict(x, row.bound, None)",
        EXECUTOR,
    ),
    Mutation(
        "executor: one key for all rows",
        SAMPLING,
        "random.normal_like(state.keys, n, x)",
        "random.normal_like(state.keys, 0 * n, x)",
        EXECUTOR,
    ),
    Mutation(
        "executor: a missing key passes in silence",
        SAMPLING,
        "spoiled = jnp.any(rows.c != 0)",
        "spoiled = jnp.any(rows.c != rows.c)",
        EXECUTOR,
    ),
    Mutation(
        "builder: conversion to data with the wrong sign",
        "diffsamp/solvers/_builder.py",
        "w1 * current - point.sigma * said",
        "w1 * current + point.sigma * said",
        ("tests/test_tableau.py", "tests/test_contract.py"),
    ),
    Mutation(
        "builder: noise x 1.05",
        "diffsamp/solvers/_builder.py",
        'Combination({("z", self._noises): 1.0})',
        'Combination({("z", self._noises): 1.05})',
        ("tests/test_tableau.py", "tests/test_contract.py"),
    ),
    Mutation(
        "builder: levels of rows off by 1 %",
        "diffsamp/solvers/_builder.py",
        "float(self.process.sigma(t)),",
        "1.01 * float(self.process.sigma(t)),",
        ("tests/test_tableau.py", "tests/test_contract.py"),
    ),
    Mutation(
        "guidance x 1.01",
        "diffsamp/guidance/linear.py",
        "terms = [scale_rows(w, m) * m",
        "terms = [1.01 * scale_rows(w, m) * m",
        ("tests/test_guidance.py",),
    ),
    Mutation(
        "thresholding: not scaled back",
        "diffsamp/guidance/data.py",
        "jnp.clip(leaf, -size, size) * (high / size)",
        "jnp.clip(leaf, -size, size)",
        ("tests/test_guidance.py",),
    ),
    Mutation(
        "thresholding: state's share x 1.01",
        "diffsamp/guidance/data.py",
        "scale_rows(bound.r, new) * wide_state",
        "1.01 * scale_rows(bound.r, new) * wide_state",
        ("tests/test_guidance.py",),
    ),
    Mutation(
        "learned range: noise repeated in every batch",
        "diffsamp/guidance/learned_range.py",
        "return dataclasses.replace(self, key=keys)",
        "return self",
        ("tests/test_generate.py",),
    ),
    Mutation(
        "learned range: half of the share",
        "diffsamp/guidance/learned_range.py",
        "(v.astype(working_dtype(m.dtype)) + 1) / 2",
        "(v.astype(working_dtype(m.dtype)) + 1) / 4",
        ("tests/test_guidance.py",),
    ),
    Mutation(
        "metrics: error x 1.01",
        "diffsamp/evaluation/metrics.py",
        "return jnp.mean(jnp.square(x - reference)",
        "return 1.01 * jnp.mean(jnp.square(x - reference)",
        ("tests/test_metrics.py",),
    ),
    Mutation(
        "objective: without its logarithm",
        "diffsamp/search/objective.py",
        "return _log(metrics.mean_squared_error(x, reference))",
        "return metrics.mean_squared_error(x, reference)",
        ("tests/search/test_distill.py", *SEARCH),
    ),
    Mutation(
        "compare: samples of another tableau",
        "diffsamp/search/running.py",
        "for place, i in enumerate(group):",
        "for place, i in enumerate(group[::-1]):",
        ("tests/search/test_compare.py",),
    ),
    Mutation(
        "distill: one noise for all steps",
        "diffsamp/search/_descent.py",
        "jax.random.fold_in(fresh, step)",
        "fresh",
        ("tests/search/test_strategy.py",),
    ),
    Mutation(
        "evolution strategy: one noise for all rounds",
        "diffsamp/search/strategy.py",
        "jax.vmap(lambda k: jax.random.fold_in(k, seed))(starts.noise[: starts.fit])",
        "starts.noise[: starts.fit]",
        ("tests/search/test_strategy.py",),
    ),
    Mutation(
        "distill: times do not move",
        "diffsamp/search/_gradient.py",
        "value + scale[name] * moved[name] if name in moved",
        'value + scale[name] * moved[name] if name in moved and name != "log_snr"',
        ("tests/search/test_distill.py",),
    ),
    Mutation(
        "distill: relaxed starts move twice as far",
        "diffsamp/search/_gradient.py",
        "jnp.minimum(1, largest / norm(away))",
        "jnp.minimum(2, largest / norm(away))",
        ("tests/search/test_distill.py",),
    ),
    Mutation(
        "evolve: state of another network",
        "diffsamp/search/evolve.py",
        '"network": state and fingerprint(score_fn)',
        '"network": None',
        ("tests/search/test_evolve.py",),
    ),
    Mutation(
        "evolve: the predictor ranks backwards",
        "diffsamp/search/evolve.py",
        "net.apply(params, better) - net.apply(params, worse)",
        "net.apply(params, worse) - net.apply(params, better)",
        ("tests/search/test_evolve.py",),
    ),
    Mutation(
        "best: state of another network",
        "diffsamp/search/best.py",
        'job["network"] = fingerprint(score_fn)',
        'job["network"] = None',
        ("tests/search/test_best.py",),
    ),
    Mutation(
        "generate: network not compared",
        "diffsamp/jobs/generate.py",
        '"network": fingerprint(score_fn)',
        '"network": None',
        ("tests/test_generate.py",),
    ),
    Mutation(
        "generate: tableau not compared",
        "diffsamp/jobs/generate.py",
        '"tableau": digest(tableau)',
        '"tableau": None',
        ("tests/test_generate.py",),
    ),
    Mutation(
        "export: weights in another order",
        "diffsamp/jobs/export.py",
        "for i, leaf in enumerate(weights)\n",
        "for i, leaf in enumerate(weights[::-1])\n",
        ("tests/test_export.py",),
    ),
    Mutation(
        "export: condition dropped",
        "diffsamp/jobs/export.py",
        "cond=cond or None)\n",
        "cond=None)\n",
        ("tests/test_export.py",),
    ),
    Mutation(
        "conditioning times ignored",
        "diffsamp/score.py",
        "level if level.asked is None else",
        "level if True else",
        ("tests/search/test_labels.py",),
    ),
    Mutation(
        "first answer: the network is asked all the same",
        "diffsamp/guidance/first_answer.py",
        "return t >= as_float(self.above, t) * (1 - 1e-6)",
        "return t >= 2 * as_float(self.above, t)",
        ("tests/guidance/test_first_answer.py",),
    ),
    Mutation(
        "first answer: its share x 1.02",
        "diffsamp/guidance/first_answer.py",
        "on_data = bound.w0 - on_x * alpha",
        "on_data = 1.02 * (bound.w0 - on_x * alpha)",
        ("tests/guidance/test_first_answer.py",),
    ),
    Mutation(
        "unfold: the null row's weight with the wrong sign",
        "diffsamp/guidance/unfolded.py",
        "running = given[n] - free[n] + momentum",
        "running = given[n] + free[n] + momentum",
        ("tests/guidance/test_unfold.py",),
    ),
    Mutation(
        "langevin: noise x 1.02",
        "diffsamp/solvers/langevin.py",
        "c=sigma * np.sqrt(1 - kappa**2),",
        "c=1.02 * sigma * np.sqrt(1 - kappa**2),",
        ("tests/guidance/test_langevin.py", "tests/test_contract.py"),
    ),
    Mutation(
        "measurement: its noise left out",
        "diffsamp/guidance/measurements.py",
        "v + _like(self.noise, w) ** 2 * w",
        "v + 0 * w",
        ("tests/guidance/test_measurement.py",),
    ),
    Mutation(
        "steering: a resampled weight is kept",
        "diffsamp/steering/_weights.py",
        "log_w = jnp.where(low[:, None], 0, log_w)",
        "log_w = log_w",
        ("tests/steering/test_steering.py",),
    ),
    Mutation(
        "steering: the proposal's correction halved",
        "diffsamp/steering/particles.py",
        "z.astype(dtype) * delta + 0.5 * delta * delta",
        "z.astype(dtype) * delta + 0.25 * delta * delta",
        ("tests/steering/test_replay.py",),
    ),
    Mutation(
        "phase space: the coupling of SSCS not turned round",
        "diffsamp/kinds/_phase_steps.py",
        "[[1, -1], [-1, 1]]",
        "[[1, 1], [1, 1]]",
        ("tests/test_phase_space.py",),
    ),
    Mutation(
        "2M-HB: its two terms exchanged",
        "diffsamp/solvers/dpmpp.py",
        "(1 - beta) * before + beta * direction",
        "beta * before + (1 - beta) * direction",
        ("tests/solvers",),
    ),
    Mutation(
        "DC cascade: steps out of one more",
        "diffsamp/search/fit.py",
        "of_step = np.vander(i / nfe, 4)",
        "of_step = np.vander(i / (nfe + 1), 4)",
        ("tests/search/test_fit.py",),
    ),
    Mutation(
        "refine: steps uphill",
        "diffsamp/search/refine.py",
        "return -scale * np.linalg.solve",
        "return scale * np.linalg.solve",
        ("tests/search/test_regress.py",),
    ),
    Mutation(
        "refine: a moved weight leaves the state that its row reaches",
        "diffsamp/search/_tails.py",
        "same[1:] &= np.all(one.weights[:-1] == other.weights[:-1], axis=1)",
        "pass",
        ("tests/search/test_tails.py",),
    ),
    Mutation(
        "refine: what is taken over is counted as asked",
        "diffsamp/search/_tails.py",
        "rest[live[known:]] = True",
        "rest[live] = True",
        ("tests/search/test_tails.py",),
    ),
    Mutation(
        "refine: labels may move as far as they like",
        "diffsamp/search/refine.py",
        '"labels": _FARTHEST}',
        '"labels": np.inf}',
        ("tests/search/test_labels.py",),
    ),
    Mutation(
        "the reference begins where schedules do",
        "diffsamp/search/objective.py",
        "if times[0] < first * (1 - 1e-12):",
        "if False:",
        ("tests/search/test_tails.py",),
    ),
    Mutation(
        "regress: the state's own share forgotten",
        "diffsamp/search/regress.py",
        "base = ratio * x + kappa * latest",
        "base = x + kappa * latest",
        ("tests/search/test_regress.py",),
    ),
    Mutation(
        "regress: evaluations not counted",
        "diffsamp/search/regress.py",
        "self.starts.spent += self.fit * self.costs[i]",
        "self.starts.spent += 0",
        ("tests/search/test_regress.py",),
    ),
    Mutation(
        "convolution: groups of the batch in the wrong order",
        "diffsamp/_core/convolution.py",
        "batch // groups, *space, channels), 0, -2)",
        "batch // groups, *space, channels), 1, -2)",
        ("tests/test_convolution.py",),
    ),
    Mutation(
        "discrete: coins x 1.05",
        "diffsamp/discrete/executor.py",
        "coin[:, 0] < row.unmask",
        "coin[:, 0] < 1.05 * row.unmask",
        ("tests/test_discrete.py",),
    ),
    Mutation(
        "discrete: a prompt is masked again",
        "diffsamp/discrete/executor.py",
        "earlier = ~masked & ~prompt & inside",
        "earlier = ~masked & inside",
        ("tests/test_discrete.py",),
    ),
    Mutation(
        "students: MeanFlow's slope x 1.02",
        "diffsamp/students/flow_maps.py",
        "w - scale_rows(t - r, w) * d",
        "w - 1.02 * scale_rows(t - r, w) * d",
        ("tests/test_students.py",),
    ),
    Mutation(
        "students: the weight of iCT inverted",
        "diffsamp/students/consistency.py",
        "weight = 1 / (_rho(process, t) - _rho(process, r))",
        "weight = _rho(process, t) - _rho(process, r)",
        ("tests/test_students.py",),
    ),
    Mutation(
        "tfg: steps of the data x 1.02",
        "diffsamp/guidance/losses.py",
        "lambda v, g: v - scale_rows(length, g) * g",
        "lambda v, g: v - 1.02 * scale_rows(length, g) * g",
        ("tests/guidance/test_tfg.py",),
    ),
    Mutation(
        "travel: noise of the way back x 1.02",
        "diffsamp/solvers/restart.py",
        "c=mixed(tableau.c, np.sqrt(",
        "c=mixed(tableau.c, 1.02 * np.sqrt(",
        ("tests/guidance/test_tfg.py",),
    ),
    Mutation(
        "steering: the correctors' step x 1.02",
        "diffsamp/steering/potentials.py",
        "return step * self._gap",
        "return 1.02 * step * self._gap",
        ("tests/steering/test_replay.py",),
    ),
    Mutation(
        "steering: weight of a shifted proposal x 1.02",
        "diffsamp/steering/particles.py",
        "delta = scale_rows(row.b[0] / c, q)",
        "delta = 1.02 * scale_rows(row.b[0] / c, q)",
        ("tests/steering/test_replay.py",),
    ),
    Mutation(
        "red_diff: the network's term x 1.02",
        "diffsamp/inverse/loops.py",
        "g + scale_rows(weight * sigma / alpha, g)",
        "g + 1.02 * scale_rows(weight * sigma / alpha, g)",
        ("tests/inverse/test_loops.py",),
    ),
    Mutation(
        "daps: temperature of the guess x 1.02",
        "diffsamp/inverse/loops.py",
        "misfit / noise**2 + away / r**2",
        "misfit / noise**2 + 1.02 * away / r**2",
        ("tests/inverse/test_loops.py",),
    ),
    Mutation(
        "repaint: noise of what is known x 1.02",
        "diffsamp/inverse/loops.py",
        "scale_rows(alpha, x) * value + scale_rows(sigma, x) * e",
        "scale_rows(alpha, x) * value + 1.02 * scale_rows(sigma, x) * e",
        ("tests/inverse/test_loops.py",),
    ),
]


def faulty(mutation: Mutation, folder: Path = ROOT) -> str:
    """The text of its file with the fault; it must still fit the code."""
    text = (folder / mutation.path).read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.what}: {mutation.old!r} is not once in {mutation.path}.")
    return text.replace(mutation.old, mutation.new)


def apply(mutation: Mutation, folder: Path) -> None:
    """Write the fault into the copy."""
    path, text = folder / mutation.path, faulty(mutation, folder)
    path.write_text(text, encoding="utf-8")


def caught_by(mutation: Mutation) -> str | None:
    """The first test that fails, in a copy of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        apply(mutation, folder)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-n0",
                "--no-header",
                "--tb=no",
                *mutation.tests,
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or (done.returncode and failed is None):
        raise RuntimeError(f"{mutation.what}: pytest said {done.stdout[-2000:]}{done.stderr}")
    return failed[1] if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="those whose description holds this")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "mutations.md"))
    arguments = parser.parse_args()
    rows, missed = [], 0
    for mutation in MUTATIONS:
        if arguments.only not in mutation.what:
            continue
        began = time.perf_counter()
        test = caught_by(mutation)
        missed += test is None
        rows.append(f"| {mutation.what} | {f'`{test}`' if test else '**missed**'} |")
        print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
        head = "# Faults and the test that catches each\n\nMade by `make mutations`.\n\n"
        table = "| fault | first test that fails |\n|---|---|\n" + "\n".join(rows) + "\n"
        Path(arguments.out).write_text(head + table, encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
