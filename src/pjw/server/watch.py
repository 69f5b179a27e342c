"""WatchJobs: a client's request for changes of jobs, and the messages of the answer."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from pjw.errors import InvalidJobError
from pjw.model import check_labels, check_name
from pjw.rpc.convert import change_to_message, states_from_message
from pjw.server.backend import Jobs
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.changes import Watched
from pjw.worker.pages import JobFilter

_IDS_MAX: Final = 500
# All watchers together may take a tenth of a processor for their messages: where many watch the same busy
# client, changes come in batches, further apart.
_SHARE: Final = 10


class JobWatchers:
    """The watchers of jobs on one server."""

    def __init__(self, worker: Jobs) -> None:
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
