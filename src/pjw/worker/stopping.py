"""The ways to end jobs: a signal, SIGKILL, a kill of init; and pjw's words when none of them helps."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from signal import SIGKILL
from typing import Final, TypeVar

from pjw.errors import LauncherGoneError, PjwError
from pjw.launcher.protocol import Remaining
from pjw.model import Job
from pjw.worker.job import LiveJob
from pjw.worker.launcher_client import LauncherClient
from pjw.worker.tasks import Background, Flag

# Seconds between SIGKILL to every process and the launcher's look at the rest: long, since only a job that
# the kernel cannot end, or whose init hangs, is there then.
LAST_RESORT_SECONDS: Final = 5
# Seconds after SIGKILL to init until pjw says that this does not help either.
INIT_ENDS_SECONDS: Final = 1
# Nothing tells when a process that is stuck begins to wait for something else.
_LOOK_AGAIN_SECONDS_MAX: Final = 60

_T = TypeVar("_T")

log: Final = logging.getLogger(__name__)


class Stopping:
    """Ends jobs, and knows of those that do not end."""

    def __init__(self, launcher: LauncherClient, background: Background, note: Callable[[Job], None]) -> None:
        """Begin without jobs; *note* is called with each job whose end is requested."""
        self._launcher: Final = launcher
        self._note: Final = note
        self._background: Final = background
        # jobs that have their SIGKILL, until they have ended or are not looked at any more
        self._being_killed: Final[set[int]] = set()

    def begin(self, live: LiveJob, grace_seconds: float, signal: int) -> None:
        """Send *signal* to every process of a job, and SIGKILL after the grace period."""
        if not live.job.state.final:
            live.stop_asked()
            self._note(live.job)
        self._background.spawn(self._escalate(live, grace_seconds, signal))

    def watch_time_limit(self, live: LiveJob) -> None:
        """Look after a job that its init is to kill at its limit of time."""
        self._background.spawn(self._after_time_limit(live))

    async def _escalate(self, live: LiveJob, grace_seconds: float, signal: int) -> None:
        if signal != SIGKILL:
            await self._try(live, "terminate", self._launcher.request_terminate(live.job.id, signal))
            if await within(grace_seconds, live.ended):
                return
        job_id = live.job.id
        if job_id in self._being_killed:
            # once is enough: a look at the rest of a job takes time of the launcher, which all clients share
            return
        self._being_killed.add(job_id)
        try:
            await self._kill(live)
            if not await within(LAST_RESORT_SECONDS, live.ended):
                await self._last_resort(live)
                await self._name_if_stuck(live)
        finally:
            self._being_killed.discard(job_id)

    async def _last_resort(self, live: LiveJob) -> None:
        """Kill the init of a job that has not killed the rest. With it goes the record of the end."""
        if live.init_killed:
            return
        # when the launcher cannot look at the job, its init may hang
        remaining = await self._look(live)
        if remaining is not None and remaining.killed:
            return
        live.init_killed = True
        await self._kill(live, init_too=True)
        await within(INIT_ENDS_SECONDS, live.ended)

    async def _after_time_limit(self, live: LiveJob) -> None:
        # as its init counts; where the clock was set meanwhile we look too early, and see nothing killed
        over = live.job.start.timestamp() + live.job.limits.time_max_seconds + LAST_RESORT_SECONDS
        if not await within(max(0.0, over - time.time()), live.ended):
            await self._name_if_stuck(live)

    async def _name_if_stuck(self, live: LiveJob) -> None:
        """Report the cause of a killed job's wait, and look again until its end, since that may change."""
        pause, first = LAST_RESORT_SECONDS, False
        while not live.ended.is_set():
            remaining = await self._look(live)
            if remaining is not None:
                was_killed = remaining.killed or live.init_killed
                if live.ended.is_set() or not remaining.words or not was_killed:
                    return
                if not live.stuck.is_set():
                    first = True
                    job = live.job
                    log.error("job %d of %s %s", job.id, job.client_name, _in_words(remaining.words))
                live.stuck_seen(_in_words(remaining.words))
                if not first:
                    # the task that saw it before us looks again
                    return
            await within(pause, live.ended)
            pause = min(2 * pause, _LOOK_AGAIN_SECONDS_MAX)

    async def _kill(self, live: LiveJob, *, init_too: bool = False) -> None:
        await self._try(live, "kill", self._launcher.request_kill(live.job.id, init_too=init_too))

    async def _look(self, live: LiveJob) -> Remaining | None:
        """Return the processes that are left of a job; None when the launcher cannot tell now."""
        return await self._try(live, "look at", self._launcher.request_remaining(live.job.id))

    @staticmethod
    async def _try(live: LiveJob, operation: str, request: Awaitable[_T]) -> _T | None:
        """Ask the launcher. When that fails, log it and return None, so that the next steps go on."""
        try:
            return await request
        except LauncherGoneError:
            raise
        except PjwError as error:
            log.error("cannot %s job %d: %s", operation, live.job.id, error)
            return None


def _in_words(processes: str) -> str:
    return f"was killed and does not end: {processes}"


async def within(seconds: float, flag: Flag) -> bool:
    """Return whether the flag is set in time."""
    try:
        async with asyncio.timeout(seconds):
            await flag.wait()
    except TimeoutError:
        return False
    return True
