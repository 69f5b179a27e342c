"""Requests for many jobs: the filter and the pages of List, and the changes of WatchJobs."""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from pjw.errors import InvalidJobError, PageTokenError
from pjw.model import Workspace, check_labels, check_name, is_workspace
from pjw.rpc.convert import change_to_message, states_from_message
from pjw.server.backend import JobCalls
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.changes import Watched
from pjw.worker.pages import JobFilter

_TOKEN: Final = re.compile(r"([0-9]{1,18})((?:-[0-9a-f]{16})?)")


def filter_from_message(request: pb.ListRequest) -> JobFilter:
    """Make the filter of a request. Raises InvalidJobError for labels and names that no job can have."""
    check_name(request.name)
    labels = dict(request.labels)
    check_labels(labels)
    array_id = request.array_id if request.HasField("array_id") else None
    return JobFilter(states_from_message(request.states), labels, request.name, array_id)


def after_token(request: pb.ListRequest) -> int:
    """Return the id behind which the page begins. Raises PageTokenError for another list's token."""
    if not request.page_token:
        return 0
    token = _TOKEN.fullmatch(request.page_token)
    if token is None:
        raise PageTokenError("the page token is not one that this server gave")
    if token[2] != _mark_of(request):
        raise PageTokenError("the page token is of a list with other filters or another order")
    return int(token[1])


def token_after(request: pb.ListRequest, job_id: int) -> str:
    """Return the token of the page that begins behind a job."""
    return f"{job_id}{_mark_of(request)}"


def _mark_of(request: pb.ListRequest) -> str:
    # Behind which job one was means nothing in a list that leaves out others, or goes the other way.
    asked = pb.ListRequest(
        states=sorted(set(request.states)),
        labels=request.labels,
        name=request.name,
        newest_first=request.newest_first,
        array_id=request.array_id if request.HasField("array_id") else None,
    ).SerializeToString(deterministic=True)
    return f"-{hashlib.sha256(asked).hexdigest()[:16]}" if asked else ""


def after_workspace(request: pb.ListWorkspacesRequest) -> tuple[str, str]:
    """Return the client and name behind which the page begins. Raises PageTokenError for a bad token."""
    client_name, slash, name = request.page_token.partition("/")
    if request.page_token and not (slash and is_workspace(name)):
        raise PageTokenError("the page token is not one that this server gave")
    return client_name, name


def token_after_workspace(workspace: Workspace) -> str:
    """Return the token of the page that begins behind a workspace."""
    return f"{workspace.client_name}/{workspace.name}"


# WatchJobs: a client's request for changes of jobs, and the messages of the answer.

_IDS_MAX: Final = 500
# All watchers together may take a tenth of a processor for their messages: where many watch the same busy
# client, changes come in batches, further apart.
_SHARE: Final = 10


class JobWatchers:
    """The watchers of jobs on one server."""

    def __init__(self, worker: JobCalls) -> None:
        self._worker: Final = worker
        self._count = 0

    async def watch(
        self, request: pb.WatchJobsRequest, owner: str | None
    ) -> AsyncGenerator[pb.WatchJobsResponse, None]:
        """Yield changes of the jobs of *owner*, or of all clients. Raises InvalidJobError, SequenceError."""
        batches = self._worker.watch_jobs(
            owner,
            _watched(request),
            request.since if request.HasField("since") else None,
            snapshot=not request.no_snapshot,
            follow=not request.no_follow,
        )
        self._count += 1
        try:
            async with aclosing(batches):
                async for batch in batches:
                    began = time.thread_time()
                    response = pb.WatchJobsResponse(
                        changes=map(change_to_message, batch.changes), sequence=batch.sequence or 0
                    )
                    taken = time.thread_time() - began
                    yield response
                    await asyncio.sleep(taken * _SHARE * self._count)
        finally:
            self._count -= 1


def _watched(request: pb.WatchJobsRequest) -> Watched:
    check_name(request.name)
    labels = dict(request.labels)
    check_labels(labels)
    if len(request.ids) > _IDS_MAX:
        raise InvalidJobError(f"at most {_IDS_MAX} jobs are watched by their ids, not {len(request.ids)}")
    wanted = JobFilter(states_from_message(request.states), labels, request.name)
    return Watched(wanted, frozenset(request.ids))
