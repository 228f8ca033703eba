"""diffusers in and out: its scheduler configs as samplers, plans as its schedulers.

`from_diffusers` reads a `scheduler_config.json`; `TableauScheduler` runs a plan inside diffusers'
own pipelines. The class is made when it is asked for, which imports torch and diffusers, and needs
no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsamp._core.types import Value
    from diffsamp.interop.diffusers._plans import scheduler_config
    from diffsamp.interop.diffusers._read import DiffusersSampler, from_diffusers

    TableauScheduler: Value

__all__ = ["DiffusersSampler", "from_diffusers", "scheduler_config"]


def __getattr__(name: str) -> object:
    """The readers, or the scheduler's class."""
    if name == "TableauScheduler":
        from diffsamp.interop.diffusers._scheduler import scheduler_class

        return scheduler_class()
    if name == "scheduler_config":
        from diffsamp.interop.diffusers._plans import scheduler_config

        return scheduler_config
    if name == "SchedulerMixin":  # by which a pipeline's folder knows what kind of part it loads
        from diffusers import SchedulerMixin

        return SchedulerMixin
    if name in __all__:
        from diffsamp.interop.diffusers import _read

        return getattr(_read, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "TableauScheduler"})
