"""pjw: run commands on a Linux machine, isolated and limited, with their output streamed.

The names below are loaded when first asked for. Importing the package itself must stay
free of cost and of dependencies: the privileged launcher imports it too. `Worker` is in the
wheel pjw, all else in pjw-client.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pjw.client.aio import AsyncClient
    from pjw.client.sync import Client
    from pjw.model import Job, JobSpec, JobState, Limits, QueueSpec, TerminalSize
    from pjw.worker import Worker

__all__ = [
    "AsyncClient",
    "Client",
    "Job",
    "JobSpec",
    "JobState",
    "Limits",
    "QueueSpec",
    "TerminalSize",
    "Worker",
]
_MODULES = {"AsyncClient": "pjw.client.aio", "Client": "pjw.client.sync", "Worker": "pjw.worker"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_MODULES.get(name, "pjw.model")), name)
    except ModuleNotFoundError as error:
        if error.name != "pjw.worker":
            raise
        raise ImportError("pjw.Worker needs the package pjw: pip install pjw", name=error.name) from None
