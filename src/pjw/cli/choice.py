"""The jobs that a command selects by filters: those of `list`, `stop`, `rm` and `prune`."""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Final

from pjw.cli.connection import JobName
from pjw.cli.render import is_failure
from pjw.model import Job, JobState

if TYPE_CHECKING:
    from pjw.client.sync import Client

# How many of the newest jobs `list` shows at a terminal, in addition to those that run: they fit on a screen.
RECENT_MAX: Final = 20
ALIVE: Final = (JobState.STARTING, JobState.RUNNING, JobState.STOPPING)
STOPPABLE: Final = (JobState.QUEUED, *ALIVE)
ENDED: Final = (JobState.EXITED, JobState.LOST)


def listed(client: "Client", arguments: Namespace) -> Iterable[Job]:
    """Yield the jobs for `list`, in the order of their ids."""
    limit = None if arguments.limit == "all" else arguments.limit
    if limit is None and arguments.since is None:
        return _fitting(client, arguments, arguments.state, newest_first=False)
    return reversed(list(_newest(client, arguments, limit)))


def recent(client: "Client", arguments: Namespace) -> tuple[Sequence[Job], bool]:
    """Return the newest jobs for `list`, with all unfinished ones, and whether there are others."""
    newest = list(_newest(client, arguments, RECENT_MAX + 1))
    if len(newest) <= RECENT_MAX:
        return newest[::-1], False
    newest.pop()
    alive = [state for state in ALIVE if state in arguments.state or not arguments.state]
    before = _fitting(client, arguments, alive, newest_first=True) if alive else iter(())
    found = newest + [job for job in before if job.id < newest[-1].id]
    return found[::-1], True


def named_or_fitting(client: "Client", arguments: Namespace, states: Sequence[JobState]) -> Sequence[JobName]:
    """Return the jobs a command names, or all in one of *states* that fit its --label and --state."""
    if arguments.jobs:
        return list(arguments.jobs)
    wanted = [state for state in states if state in arguments.state or not arguments.state]
    jobs = client.list(states=wanted, labels=dict(arguments.label))
    return [job.id for job in (elements_first(jobs) if states == ENDED else jobs)]


def elements_first(jobs: Iterable[Job]) -> Sequence[Job]:
    """Sort jobs to be forgotten: elements before their arrays, which would take them along."""
    return sorted(jobs, key=lambda job: job.array_id is None)


def confirmed(question: str) -> bool:
    """Ask the user at the terminal; return whether the answer is yes."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _newest(client: "Client", arguments: Namespace, limit: int | None) -> Iterator[Job]:
    # the server cannot filter by reason or failure, so it must not count either
    asked = None if arguments.failed or arguments.reason else limit
    jobs = _fitting(client, arguments, arguments.state, newest_first=True, limit=asked)
    if arguments.since is not None:
        jobs = takewhile(lambda job: job.asked >= arguments.since, jobs)
    return islice(jobs, limit)


def _fitting(
    client: "Client",
    arguments: Namespace,
    states: Sequence[str],
    *,
    newest_first: bool,
    limit: int | None = None,
) -> Iterator[Job]:
    for job in client.list(
        states=states,
        labels=dict(arguments.label),
        name=arguments.name or "",
        newest_first=newest_first,
        limit=limit,
        array_id=arguments.array,
    ):
        if arguments.failed and not is_failure(job):
            continue
        if arguments.reason and job.reason not in arguments.reason:
            continue
        yield job
