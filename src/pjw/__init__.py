"""pjw: run commands on a Linux machine, isolated and limited, with their output streamed.

The names below are loaded when first asked for. Importing the package itself must stay
free of cost and of dependencies: the privileged launcher imports it too.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pjw.model import Job, JobSpec, JobState, Limits
    from pjw.worker import Worker

__all__ = ["Job", "JobSpec", "JobState", "Limits", "Worker"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("pjw.worker" if name == "Worker" else "pjw.model"), name)
