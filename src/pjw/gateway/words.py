"""The errors of nodes in the words of the gateway: with its own id of the job, and never the node's."""

import re
from typing import Final

from pjw.errors import JobNotFoundError, JobStateError, KernelError, PjwError

_A_JOB: Final = re.compile(r"\bjob ([0-9]+)\b")


def in_our_words(error: PjwError, node_name: str, node_job_id: int, job_id: int) -> PjwError:
    """What a node answered about a job, for the client. Ids of no other job are changed."""
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
