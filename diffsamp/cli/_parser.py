"""The options of every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import diffsamp as ds
from diffsamp.cli import _commands as commands
from diffsamp.cli._demo import BUDGETS, demo
from diffsamp.cli._doctor import doctor

__all__ = ["build_parser"]

_NETWORKS = """
The network is --model module:name, a ScoreFn or a function that makes one (modules of the current
folder are found), or --pretrained FOLDER, a folder of diffusers (extra: pip install
"diffsamp[diffusers]").

examples:
"""
_EXAMPLES = {
    "sample": """
  diffsamp sample --model my_module:score_fn --shape 32,32,3 --plan plans/plan-6.json --out x.npy
  diffsamp sample --pretrained FOLDER --prompt "a cat" "a dog" --guidance 5 --nfe 20 --out x.png
""",
    "generate": """
  diffsamp generate --model my_module:score_fn --shape 32,32,3 --solver dpmpp_2m --nfe 10 \\
    --n 50000 --batch 500 --out samples
  diffsamp generate --pretrained FOLDER --label 0 1 2 --plan plan-6.json --n 3000 --out samples
""",
    "suggest": """
  diffsamp suggest --model my_module:score_fn --shape 32,32,3 --nfe 8
  diffsamp suggest --pretrained FOLDER --prompt "a cat" --guidance 5 --nfe 8 --out plan-8.json
""",
    "compare": """
  diffsamp compare --model my_module:score_fn --shape 32,32,3 --nfe 4,6,8
  diffsamp compare --pretrained FOLDER --prompt "a cat" --solver ddim,unipc3 --starts 16
""",
    "search": """
  diffsamp search --model my_module:score_fn --shape 32,32,3 --nfe 6 --out plans
  diffsamp search --pretrained FOLDER --prompt "a cat" "a dog" --guidance 5 --nfe 8 --starts 32
""",
    "check": """
  diffsamp check --model my_module:score_fn --shape 32,32,3 --data images.npy
  diffsamp check --pretrained FOLDER --data latents.npy --prompt "a cat"
""",
    "export": """
  diffsamp export --model my_module:score_fn --shape 32,32,3 --plan plan-6.json --out x.sampler
""",
    "show": """
examples:
  diffsamp show plans/plan-6.json --plot plan-6.png
  diffsamp show plans/plan-6.json --cite
""",
    "convert": """
examples:
  diffsamp convert plans/plan-6.json --out scheduler
  diffsamp convert tableau.json --prediction epsilon --out my-pipeline/scheduler
""",
}


def list_solvers(arguments: argparse.Namespace) -> int:
    """Print the registry."""
    del arguments
    for solver in ds.solvers.SOLVERS.values():
        kind = "stochastic" if solver.stochastic else "deterministic"
        start = f" and {solver.extra} to start" if solver.extra else ""
        aliases = f" (elsewhere: {', '.join(solver.aliases)})" if solver.aliases else ""
        print(
            f"{solver.name:16s} order {solver.order}, {solver.stages} evaluation"
            f"{'s' if solver.stages > 1 else ' '} a step{start}, {kind}; {solver.source}{aliases}"
        )
    for name, sampler in ds.discrete.SAMPLERS.items():
        words = (sampler.__doc__ or "").partition("\n")[0].rstrip(".")
        print(f"{name:16s} discrete (masked models and uniform noise): {words}")
    for name, text in _others():
        print(f"{name:16s} {text}")
    return 0


def _others() -> list[tuple[str, str]]:
    """Other kinds of model, processes and students, with what they say of themselves."""
    kinds = ("bridges", "few_step", "joint", "known_mean", "phase_space")
    made = ["edm", "flow", "ouve", "pfgmpp", "table", "trig", "ve"]
    made += ["vp_cosine", "vp_discrete", "vp_linear"]
    helpers = {"f_weight", "lognormal_times", "loss", "pseudo_huber", "squared_error", "Target"}
    taught = sorted(set(ds.students.__all__) - helpers)
    found: list[tuple[str, str, object]] = [
        *((name, f"kind of model (ds.{name})", getattr(ds, name)) for name in kinds),
        *((name, "process (ds.processes)", getattr(ds.processes, name)) for name in made),
        *((name, "training (ds.students)", getattr(ds.students, name)) for name in taught),
    ]
    return [
        (name, f"{what}: {(thing.__doc__ or '').partition(chr(10))[0].rstrip('.')}")
        for name, what, thing in found
    ]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _network_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_argument_group("network").add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="MODULE:NAME", help="a ScoreFn, or what makes one")
    which.add_argument("--pretrained", metavar="FOLDER", help="a folder of diffusers")
    add = parser.add_argument
    add("--shape", type=_numbers, help="shape of one sample, such as 32,32,3 (--model needs it)")
    add("--cond", metavar="MODULE:NAME", help="function n -> keyword arguments of a --model")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", nargs="+", help="texts for --pretrained, sample by sample")
    asked.add_argument("--label", nargs="+", type=int, help="class labels, likewise")
    add("--guidance", type=float, help="scale of classifier-free guidance (default: none)")
    add("--negative", help="negative prompt of the guidance")
    add("--seed", type=int, default=0, help="seed of everything that is drawn (default: 0)")


def _sampler_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--plan", metavar="FILE", help="a plan's or tableau's file; else a solver by name:")
    add("--solver", help="a name of `diffsamp list` (default: unipc3; the folder's own scheduler)")
    add("--schedule", help="a time grid, such as karras (default: the solver's)")
    add("--nfe", type=int, default=20, help="evaluations of the solver (default: 20)")


def _search_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--nfe", type=_numbers, default=(4, 6, 8), help="budgets (default: 4,6,8)")
    add("--starts", type=int, default=256, help="noises (default: 256)")
    add("--batch", type=int, default=64, help="samples of one candidate at a time")
    add("--together", type=int, default=1, help="candidates at a time; more fill a GPU")
    add("--solver", type=_words, help="names, such as ddim,unipc3 (default: all deterministic)")
    add("--schedule", type=_words, help="names, such as karras,logsnr (default: all that fit)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `diffsamp` command."""
    parser = argparse.ArgumentParser(prog="diffsamp", description=ds.__doc__)
    parser.add_argument("--version", action="version", version=f"diffsamp {ds.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, function: Callable[[argparse.Namespace], int], text: str, network: bool = True
    ) -> argparse.ArgumentParser:
        found = subparsers.add_parser(
            name,
            help=text,
            description=text[:1].upper() + text[1:] + ".",
            epilog=(_NETWORKS if network else "") + _EXAMPLES.get(name, "").strip("\n"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if network:
            _network_options(found)
        found.set_defaults(function=function)
        return found

    one = command("demo", demo, "sample the bundled model, compare solvers, search", False)
    one.add_argument("--out", default="out", help="folder for the results (default: out)")
    one.add_argument("--nfe", type=int, default=6, choices=BUDGETS, help="budget searched")
    one.add_argument("--seed", type=int, default=0, help="seed of all noise")
    one.add_argument("--samples", type=int, default=512, help="samples behind the table")
    one.add_argument("--steps", type=int, default=8, help="Gauss-Newton steps of the search")
    command("list", list_solvers, "the solvers there are", False)
    text = "versions, devices and switches, and what is wrong with them; 1 if anything is"
    command("doctor", lambda _: doctor(), text, False)

    two = command("sample", commands.sample, "draw some samples into one file")
    _sampler_options(two)
    two.add_argument("--n", type=int, default=16, help="samples (default: 16)")
    two.add_argument("--out", default="samples.npy", help=".npy, .npz or .png (a grid)")
    three = command("generate", commands.generate, "draw many samples into a folder, resumed")
    _sampler_options(three)
    three.add_argument("--n", type=int, required=True, help="samples")
    three.add_argument("--out", required=True, help="folder; the same command again goes on")
    three.add_argument("--batch", type=int, default=256, help="samples of one file (default: 256)")
    three.add_argument("--format", default="npz", choices=("npz", "safetensors"))

    ten = command("suggest", commands.suggest, "which solver and schedule to take, and why")
    ten.add_argument("--nfe", type=int, default=8, help="evaluations of the solver (default: 8)")
    ten.add_argument("--starts", type=int, default=4, help="noises (default: 4)")
    ten.add_argument("--evaluations", type=int, help="spend at most so many network evaluations")
    ten.add_argument("--out", metavar="FILE", help="also write it there, as a plan")
    four = command("compare", commands.compare, "measure solvers x schedules on a network")
    _search_options(four)
    four.add_argument("--rows", type=int, default=20, help="lines of the table (default: 20)")
    five = command("search", commands.search, "find the best sampler for a network and a budget")
    _search_options(five)
    add, stages = five.add_argument, ds.search.STAGES
    add("--stages", nargs="+", choices=stages, help="what to run (default: regress and refine)")
    add("--steps", type=int, default=400, help="gradient steps (default: 400)")
    add("--rounds", type=int, default=8, help="rounds of evolution (default: 8)")
    add("--seconds", type=float, help="begin no stage after this time")
    text = "folder of plans and state (default: plans); the same command again goes on"
    add("--out", default="plans", help=text)

    six = command("show", commands.show, "what a plan or a tableau does at each step", False)
    six.add_argument("path", help="a plan-<nfe>.json or a tableau's file")
    six.add_argument("--plot", help="also draw it into this PNG file")
    six.add_argument("--cite", action="store_true", help="and the BibTeX of what it is made of")
    seven = command("check", commands.check, "whether what was said of a network fits it")
    seven.add_argument("--data", required=True, help=".npy or .npz of a few data, (n, *shape)")
    eight = command("export", commands.export, "write network and sampler as one file")
    _sampler_options(eight)
    eight.add_argument("--out", required=True, help="the file; read it with ds.load_exported")
    eight.add_argument("--platforms", type=_words, default=("cpu", "cuda", "tpu"))
    nine = command("convert", commands.convert, "write a plan as a scheduler of diffusers", False)
    nine.add_argument("plan", help="a plan's or tableau's file")
    nine.add_argument("--prediction", help="of the network, if the file does not say it: epsilon")
    nine.add_argument("--out", default="scheduler", help="folder (default: scheduler)")
    return parser
