"""Changes of jobs as a client gets them: its position, and the request that goes on from there."""

from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping
from typing import Final, Self

from pjw import errors
from pjw.client.requests import JobId, Reached, checked_labels, not_understood, wire_id, wire_states
from pjw.model import Job, JobChange, JobState
from pjw.rpc.convert import change_from_message
from pjw.v1 import job_worker_pb2 as pb


class WatchPosition:
    """The position of a watch of jobs: `sequence` is the number to resume behind, None before the first."""

    method: Final = "WatchJobs"
    facts: Final[Mapping[str, object]] = {}
    gone_is_done: Final = False

    def __init__(
        self,
        since: int | None,
        ids: Iterable[JobId],
        states: Iterable[JobState | str],
        labels: Mapping[str, str] | None,
        name: str,
        *,
        snapshot: bool,
        follow: bool,
        all_clients: bool,
    ) -> None:
        if since is not None and (type(since) is not int or not 0 <= since < 2**63):
            raise errors.InvalidJobError(f"the number of a change is a whole number, not {since!r:.80}")
        self.sequence = since
        self.request: Final = pb.WatchJobsRequest(
            all_clients=all_clients,
            since=since,
            no_snapshot=not snapshot,
            no_follow=not follow,
            ids=map(wire_id, ids),
            states=wire_states(states),
            labels=checked_labels(labels),
            name=name,
        )
        # The jobs of the snapshot received so far, until it is complete: after a lost connection it comes
        # anew.
        self._first: dict[int, Job] = {}
        self._again: dict[int, Job] | None = None

    def take(self, answer: pb.WatchJobsResponse) -> list[JobChange]:
        """Return the new changes of an answer; the next request begins behind them."""
        try:
            changes = list(map(change_from_message, answer.changes))
        except ValueError as error:
            raise not_understood(error) from error
        if not self.request.HasField("since"):
            changes = self._of_beginning(changes)
            if answer.sequence:
                changes += self._removed()
        if answer.sequence:
            self.request.since = answer.sequence
        return changes

    def lost(self) -> None:
        """Note that the connection was lost: the jobs of the snapshot come again."""
        if not self.request.HasField("since"):
            self._again = {**(self._again or {}), **self._first}
            self._first = {}

    def _of_beginning(self, changes: list[JobChange]) -> list[JobChange]:
        fresh = []
        for change in changes:
            job = change.job
            self._first[job.id] = job
            before = self._again.pop(job.id, None) if self._again else None
            if before is None or before.state is not job.state:
                fresh.append(change)
        return fresh

    def _removed(self) -> list[JobChange]:
        """Return changes for jobs that were reported before the connection was lost, and are gone now."""
        gone, self._again, self._first = self._again or {}, None, {}
        return [JobChange(job, removed=True) for job in gone.values()]

    @property
    def reached(self) -> Reached:
        """The progress of the watch, and the next step when it gets no further."""
        if self.sequence is None:
            return "", None
        return f" after change {self.sequence}", f"go on with pjw events --since {self.sequence}"


class _Given:
    """Changes that were received and not given out yet."""

    def __init__(self, position: WatchPosition) -> None:
        self._position: Final = position
        self._left: Iterator[JobChange] = iter(())

    @property
    def sequence(self) -> int | None:
        """The number to resume behind, with all that was given out until now; None before there is one."""
        return self._position.sequence

    def _next(self) -> JobChange | None:
        change = next(self._left, None)
        if change is None:
            # all of the answer was dealt with
            if self._position.request.HasField("since"):
                self._position.sequence = self._position.request.since
        elif change.sequence is not None:
            self._position.sequence = change.sequence
        return change


class JobWatch(_Given):
    """An iterator over changes; `sequence` is where it is."""

    def __init__(self, position: WatchPosition, answers: Generator[list[JobChange], None, None]) -> None:
        super().__init__(position)
        self._answers: Final = answers

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> JobChange:
        while (change := self._next()) is None:
            self._left = iter(next(self._answers))
        return change

    def close(self) -> None:
        """End the call."""
        self._answers.close()


class AsyncJobWatch(_Given):
    """The same for asyncio."""

    def __init__(self, position: WatchPosition, answers: AsyncGenerator[list[JobChange], None]) -> None:
        super().__init__(position)
        self._answers: Final = answers

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> JobChange:
        while (change := self._next()) is None:
            self._left = iter(await anext(self._answers))
        return change

    async def aclose(self) -> None:
        """End the call."""
        await self._answers.aclose()
