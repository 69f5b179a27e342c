"""Errors of nodes in the gateway's own words, with its own id of the job; and features that it refuses."""

import re
from typing import Final

from pjw.errors import InvalidJobError, JobNotFoundError, JobStateError, KernelError, PjwError
from pjw.model import JobSpec

_A_JOB: Final = re.compile(r"\bjob ([0-9]+)\b")


def in_our_words(error: PjwError, node_name: str, node_job_id: int, job_id: int) -> PjwError:
    """Return what a node answered about a job, in words for the client. Ids of no other job are changed."""
    if isinstance(error, JobNotFoundError):
        return JobStateError(f"node {node_name} knows nothing of job {job_id} any more")
    if "program" in error.FACTS or "workdir" in error.FACTS:
        # no job is in these, but a path that the client has made up
        return error
    facts = {name: getattr(error, name, None) for name in error.FACTS}
    facts = {
        name: _renamed(value, node_job_id, job_id) if isinstance(value, str) else value
        for name, value in facts.items()
    }
    if facts.get("job_id") == node_job_id:
        facts["job_id"] = job_id
    hint = None if error.hint is None else _renamed(error.hint, node_job_id, job_id)
    told = type(error).restored(_renamed(str(error), node_job_id, job_id), hint, facts)
    if isinstance(told, KernelError):
        # the node has told us no other
        told.for_client = True
    return told


def _renamed(text: str, node_job_id: int, job_id: int) -> str:
    return _A_JOB.sub(
        lambda found: f"job {job_id}" if int(found[1]) == node_job_id else found[0],
        text,
    )


# Features that do not work through a gateway yet (docs/cluster.md): refused before anything is made.

HINT: Final = "docs/cluster.md has what works through a gateway"


def not_with(what: str, engine: str) -> InvalidJobError:
    """Return the error for a job that only another engine can give a node."""
    return InvalidJobError(f"{what} does not work with the engine {engine} yet", hint=HINT)


def not_yet(what: str) -> JobStateError:
    """Return the error for a call that works on one machine alone."""
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
