"""diffsamp: samplers for pretrained diffusion and flow models in JAX.

Three things a user does: wrap a pretrained network in a `ScoreFn`, run a solver's `Tableau` on it
with `sample`, and `search` for the best tableau under a budget of network evaluations (NFE).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PARTS = {path.name.removesuffix(".py") for path in Path(__file__).parent.iterdir()}

if TYPE_CHECKING:
    from diffsamp._api import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """A module, or a name of `diffsamp._api`; nothing is imported before it is asked for.

        A reader of plans (`diffsamp.interop.numpy`) therefore runs where there is no JAX.
        """
        if name in _PARTS:
            return importlib.import_module(f"diffsamp.{name}")
        api = None
        if name == "__all__" or not name.startswith("__"):  # what Python asks of every module
            api = importlib.import_module("diffsamp._api")
        if not hasattr(api, name):
            raise AttributeError(f"module 'diffsamp' has no attribute {name!r}")
        globals()[name] = getattr(api, name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *importlib.import_module("diffsamp._api").__all__})
