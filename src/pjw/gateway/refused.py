"""Features that do not work through a gateway yet (docs/cluster.md): refused before anything is made."""

from typing import Final

from pjw.errors import InvalidJobError, JobStateError
from pjw.model import JobSpec

HINT: Final = "docs/cluster.md has what works through a gateway"


def not_yet(what: str) -> JobStateError:
    """The error for a call that works on one machine alone."""
    return JobStateError(_words(what), hint=HINT)


def _words(what: str) -> str:
    return f"{what} does not work through a gateway yet"


def check_spec(spec: JobSpec) -> None:
    """Raise InvalidJobError for a job that needs a feature that a gateway does not have yet."""
    queue = spec.queue
    asked = {
        "a workspace": bool(spec.workspace),
        "an image": bool(spec.image) or spec.read_only,
        "a mount of the operator's": bool(spec.mounts),
        "a name on the network": bool(spec.allow),
        "a network that jobs share": bool(spec.link),
        "a GPU": bool(spec.gpus),
        "a priority": queue is not None and bool(queue.priority),
        "a time before which a job is not started": queue is not None and queue.not_before is not None,
        "a held job": queue is not None and queue.held,
        "a job that waits for others": queue is not None and bool(queue.after),
        "a job that is tried again": queue is not None and queue.retry is not None,
        "an array": queue is not None and bool(queue.array),
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise InvalidJobError(_words(what), hint=HINT)
