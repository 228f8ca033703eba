"""The command line: `diffsamp sample`, `generate`, `compare`, `search`, `show`, ..."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `diffsamp` command; it names solvers, and so needs a JAX that works."""
    from diffsamp.cli import _parser

    return _parser.build_parser()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = build_parser()
    except Exception as error:  # whatever the import of an unfit pair of packages says
        if words == ["doctor"]:
            from diffsamp.cli._doctor import doctor

            return doctor()
        print(f"diffsamp cannot start: {error}\n`diffsamp doctor` says more.", file=sys.stderr)
        return 1
    arguments = parser.parse_args(words)
    try:
        return arguments.function(arguments)
    except (ModuleNotFoundError, OSError, TypeError, ValueError) as error:
        print(f"diffsamp {arguments.command}: {error}", file=sys.stderr)
        return 1
