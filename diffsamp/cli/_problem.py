"""What the commands' options name: a network, its conditions, a sampler for it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import diffsamp as ds
from diffsamp._core.types import Conditions, Network, PyTree, Value

__all__ = ["Problem", "load_plan", "tableau_of"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, as the options of a command say it.

    Attributes:
      score_fn: the network, guided if that was asked for.
      shape: of one sample.
      cond: n -> the conditions of samples 0 .. n - 1, or None.
      name: of the weights, for people.
      pretrained: the folder read by `ds.from_pretrained`, or None.
    """

    score_fn: Network
    shape: tuple[int, ...]
    cond: Callable[[int], Conditions] | None
    name: str
    pretrained: Value = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Problem:
        """The network that the options name.

        Raises:
          ValueError: options that do not go together, or name nothing.
          FileNotFoundError: no such folder.
          ModuleNotFoundError: an extra is missing; the message says how to install it.
        """
        if arguments.pretrained is not None:
            return _pretrained(arguments)
        for option in ("prompt", "label", "guidance", "negative"):
            if getattr(arguments, option) is not None:
                raise ValueError(
                    f"--{option} belongs to --pretrained; a --model takes its conditions from "
                    "--cond and brings its guidance."
                )
        score_fn = _entry(arguments.model, "--model")
        if callable(score_fn) and not hasattr(score_fn, "process"):
            score_fn = score_fn()
        if not hasattr(score_fn, "process"):
            raise ValueError(
                f"--model {arguments.model} must be a ScoreFn, or a function without arguments "
                f"that returns one; got {type(score_fn).__name__}."
            )
        if arguments.shape is None:
            raise ValueError("--model needs --shape, that of one sample, such as 32,32,3.")
        cond = None if arguments.cond is None else _entry(arguments.cond, "--cond")
        return cls(score_fn, arguments.shape, cond, arguments.model)

    def conditions(self, n: int) -> Conditions | None:
        """Those of samples 0 .. n - 1."""
        return None if self.cond is None else self.cond(n)

    def starts(self, seed: int, n: int) -> jax.Array:
        """Draws of the prior, (n, *shape)."""
        key = jax.random.fold_in(jax.random.key(seed), 0)
        return self.score_fn.process.prior_sample(key, (n, *self.shape))

    def finish(self, x: PyTree) -> PyTree:
        """Samples as pictures, where there is a decoder."""
        return x if self.pretrained is None else self.pretrained.decode(x)


def _pretrained(arguments: argparse.Namespace) -> Problem:
    if arguments.cond is not None:
        raise ValueError("--cond belongs to --model; a --pretrained network takes --prompt.")
    api: Value = ds
    folder = api.from_pretrained(arguments.pretrained)
    score_fn, cond = folder.score_fn, None
    asked = arguments.prompt if arguments.label is None else arguments.label
    scale, negative = arguments.guidance, arguments.negative
    if scale is not None and asked is None:
        raise ValueError("--guidance needs a --prompt or a --label to guide to.")
    if negative is not None and (scale is None or folder.has_guidance_inside):
        raise ValueError(
            "--negative: this network has its guidance inside and takes no negative prompt."
            if folder.has_guidance_inside
            else "--negative needs --guidance, such as --guidance 5."
        )
    inside = scale is not None and folder.has_guidance_inside
    if asked is not None:
        options = {"guidance_scale": scale} if inside else {}
        cond = _in_turn(folder.conditions(asked, **options), len(asked))
    if scale is not None and not inside:
        null = folder.null() if negative is None else folder.null(negative)
        score_fn = ds.guidance.cfg(score_fn, scale, null=null)
    shape = folder.shape if arguments.shape is None else arguments.shape
    return Problem(score_fn, tuple(shape), cond, str(arguments.pretrained), folder)


def _in_turn(conditions: Conditions, count: int) -> Callable[[int], Conditions]:
    """Sample i has prompt i modulo their number; they are encoded once."""
    return lambda n: jax.tree.map(lambda v: v[np.arange(n) % count], dict(conditions))


def _entry(name: str, option: str) -> Value:
    """What "module:name" stands for; modules of the current folder are found."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{option} must look like module:name; got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise
        raise ValueError(f"{option}: there is no module {module!r}.") from error
    if not hasattr(found, attribute):
        raise ValueError(f"{option}: module {module!r} has no {attribute!r}.")
    return getattr(found, attribute)


def load_plan(path: str | os.PathLike[str]) -> ds.search.Plan | ds.Tableau:
    """A plan's or a tableau's file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is neither.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no plan {os.fspath(path)}.")
    try:
        kind = json.loads(Path(path).read_text(encoding="utf-8")).get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)} is neither a plan nor a tableau: {error}.") from error
    return ds.search.Plan.load(path) if kind == "diffsamp.plan" else ds.Tableau.load(path)


def tableau_of(arguments: argparse.Namespace, problem: Problem) -> ds.Tableau:
    """The sampler that the options name: a plan's, a solver's, or the folder's own.

    Raises:
      ValueError: options that do not go together, or a plan for another process.
    """
    if arguments.plan is not None:
        if arguments.solver is not None or arguments.schedule is not None:
            raise ValueError("give --plan, or --solver and --nfe; not both.")
        found = load_plan(arguments.plan)
        if isinstance(found, ds.Tableau):
            return ds.search.Plan.of(found, problem.score_fn).tableau  # which checks that it fits
        own = found.for_network(problem.score_fn).network["checkpoint"]["fingerprint"]
        other = found.network.get("checkpoint", {}).get("fingerprint")
        if other not in (None, own):
            print(f"note: {arguments.plan} was made for other weights.", file=sys.stderr)
        return found.tableau
    if arguments.solver is None and problem.pretrained is not None:
        return problem.pretrained.sampler(arguments.nfe).tableau
    solver = arguments.solver or "unipc3"
    made = ds.sampler(problem.score_fn, solver, nfe=arguments.nfe, schedule=arguments.schedule)
    return made.tableau
