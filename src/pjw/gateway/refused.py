"""Features that do not work through a gateway yet (docs/cluster.md): refused before anything is made."""

from typing import Final

from pjw.errors import InvalidJobError, JobStateError
from pjw.model import JobSpec

HINT: Final = "docs/cluster.md has what works through a gateway"


def not_with(what: str, engine: str) -> InvalidJobError:
    """The error for a job that only another engine can give a node."""
    return InvalidJobError(f"{what} does not work with the engine {engine} yet", hint=HINT)


def not_yet(what: str) -> JobStateError:
    """The error for a call that works on one machine alone."""
    return JobStateError(_words(what), hint=HINT)


def _words(what: str) -> str:
    return f"{what} does not work through a gateway yet"


def check_spec(spec: JobSpec) -> None:
    """Raise InvalidJobError for a job that needs a feature that a gateway does not have yet."""
    asked = {
        "a workspace": bool(spec.workspace),
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise InvalidJobError(_words(what), hint=HINT)
