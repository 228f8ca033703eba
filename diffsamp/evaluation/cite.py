"""`cite`: the papers that a sampler comes from, as BibTeX."""

from __future__ import annotations

import functools
import importlib.resources
import re

from diffsamp import solvers
from diffsamp._core.types import Value
from diffsamp.tableau import Tableau

__all__ = ["cite"]

_ID = re.compile(r"\d{4}\.\d{5}")


def cite(sampler: Tableau | Value) -> str:
    """BibTeX entries of what a sampler is made of, and of this library.

    Examples:
      >>> import diffsamp as ds
      >>> print(ds.cite("unipc2").splitlines()[0])
      @misc{zhao2023unipc,

    Args:
      sampler: a `Tableau`, a `search.Plan`, or the name of a registered solver. Of a plan also the
        solver that its search began from.

    Returns:
      The entries, a blank line between them, in the order in which `source` names them.

    Raises:
      TypeError: something else.
      ValueError: an unknown name.
    """
    if isinstance(sampler, str):
        text = solvers.get(sampler).source
    elif isinstance(sampler, Tableau):
        text = sampler.source
    elif isinstance(getattr(sampler, "tableau", None), Tableau):
        named = [solvers.SOLVERS[word] for word in _words(sampler.start)]
        text = "; ".join([sampler.tableau.source, *(solver.source for solver in named)])
    else:
        raise TypeError(
            f"`cite` takes a Tableau, a Plan or the name of a solver; got {type(sampler).__name__}."
        )
    found = [_entries().get(number, _unknown(number)) for number in _ID.findall(text)]
    return "\n".join(dict.fromkeys([*found, _entries()["diffsamp"]]))


def _words(text: str) -> list[str]:
    """The registered names in a text such as "unipc3 on logsnr"."""
    return [word for word in re.split(r"[\s,;()|]+", text) if word in solvers.SOLVERS]


@functools.cache
def _entries() -> dict[str, str]:
    """The entries of references.bib, by their arXiv number, or key without one."""
    file = importlib.resources.files("diffsamp.evaluation") / "references.bib"
    parts = re.split(r"\n(?=@)", file.read_text(encoding="utf-8"))[1:]
    entries = {}
    for part in parts:
        number = re.search(r"eprint = \{(.*?)\}", part)
        key = re.match(r"@\w+\{(.*?),", part)
        assert key is not None
        entries[number.group(1) if number else key.group(1)] = part.strip() + "\n"
    return entries


def _unknown(number: str) -> str:
    """An entry for a paper of which only the number is known here."""
    return (
        f"@misc{{arxiv{number},\n  title = {{arXiv:{number}}},\n  eprint = {{{number}}},\n"
        "  archivePrefix = {arXiv},\n}\n"
    )
