"""The queue: jobs that wait for their turn, and what has them started then.

It rests on the job table and on a `Starter`, which starts a job and tells of its end; how that is done it
does not know. The table has every job that waits, in its order. Here is only what must not be looked up each
time: which clients have such jobs, what runs out of the queue, and why the next one cannot be started now.

Nothing here looks again and again. A look at whose turn it is follows what may have changed that: a new job,
a release, a time that has come, the end of a job, a reload.
"""

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol
from weakref import WeakValueDictionary

from pjw.arrays import Element
from pjw.errors import (
    InvalidJobError,
    JobNotFoundError,
    JobStateError,
    KernelError,
    LauncherGoneError,
    LimitReachedError,
    PjwError,
    WorkspaceBusyError,
)
from pjw.model import GPUS_MAX, EndReason, Job, JobState
from pjw.worker.host import DRAINED
from pjw.worker.job_rows import to_ns
from pjw.worker.queue_rows import SERVER_FAILED, STOPPED_BEFORE_START, Head, WaitingJob
from pjw.worker.settings import WorkerSettings
from pjw.worker.slots import Slots
from pjw.worker.store import JobStore, NotQueuedError
from pjw.worker.tasks import Background, Flag
from pjw.worker.workspace_rows import NOTHING_BUSY, is_free

# Enough to keep launcher and processors busy: a start waits for the disk, then for a turn to launch.
STARTS_PER_CLIENT: Final = 8
# Each holds what it is to execute in memory, up to a megabyte.
STARTS_AT_ONCE: Final = 64
# When the host cannot start a job, nothing tells when it can: the next attempt comes after a pause, and each
# further pause is twice as long.
FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 60.0
# So often the kernel may refuse to make what one job needs, until we believe that it always will.
ATTEMPTS_MAX: Final = 3
# limits that hold up only the client that has reached them
_OF_A_CLIENT: Final = ("running_max", "stored_bytes_max", "workspaces_max", "workspace_bytes_max")
# When others pass so many jobs of a client, its further ones wait for these: a look must not read them all.
PASSED_MAX: Final = 100
# so many of the jobs that a job waits for are named
_NAMED_MAX: Final = 5
# Python 3.11 gets no event when the clock is set.
_CLOCK_SECONDS: Final = 60.0
# what NTP does to it bit by bit is less
_CLOCK_SET_NS: Final = 10**9

log: Final = logging.getLogger(__name__)


def _clock_ns() -> int:
    """How far the clock is ahead of the time since the boot: it changes when the clock is set."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Starter(Protocol):
    """The starter of jobs below the queue."""

    async def start_queued(self, waiting: WaitingJob) -> Job:
        """Start a job of the queue; the job, which runs, or has ended because it could not be executed.

        Raises NotQueuedError; LimitReachedError and KernelError when it cannot be started now, and
        InvalidJobError when it never can: in each case it was not executed, and is in the queue.
        """

    async def ended(self, job_id: int) -> bool:
        """Return when a job has ended, though there be another attempt; or, and that is true, waits again."""


class Queue:
    """The jobs that wait, of all clients."""

    def __init__(
        self,
        store: JobStore,
        backend: Starter,
        background: Background,
        settings: WorkerSettings,
        slots: Slots | None = None,
    ) -> None:
        """*slots* are those of a cluster; without them this machine's."""
        self._store: Final = store
        self._backend: Final = backend
        self._background: Final = background
        self._slots: Final = Slots(settings) if slots is None else slots
        # clients that may have a job that waits for its turn alone, each with the first one once it is known
        self._heads: Final[dict[str, Head | None]] = {}
        # the elements of each array that are being started or run, and the arrays of each client of which no
        # further one can be started now: so many run, or those that wait cannot be started yet
        self._drawn: Final[defaultdict[int, set[int]]] = defaultdict(set)
        self._shut: Final[defaultdict[str, set[int]]] = defaultdict(set)
        # jobs of each client that others may pass, as not every room is for them
        self._passed: Final[defaultdict[str, dict[int, Head]]] = defaultdict(dict)
        # arrays that a caller waits for, and of which an element has ended, maybe the last one
        self._maybe_over: Final[set[int]] = set()
        # the jobs of each client that are being started, by their ids
        self._starting: Final[defaultdict[str, dict[int, Head]]] = defaultdict(dict)
        # clients without a job that can start until another job ends, and whether that holds for all
        self._held_up: Final[set[str]] = set()
        self._all_held_up = False
        # why, in words, for as long as no other attempt has succeeded
        self._refused: Final[dict[str, str]] = {}
        self._all_refused = ""
        # when the host was not able to start a job: until when we wait, by the loop's clock, and how long
        self._paused_until = 0.0
        self._pause = 0.0
        self._attempts: Final[defaultdict[int, int]] = defaultdict(int)
        # the jobs whose ends others wait for, and those of them that have ended without an effect until now
        self._awaited: Final[set[int]] = set()
        self._ended: Final[deque[int]] = deque()
        # when the first job with a time before which it is not started is due
        self._due_ns: int | None = None
        self._clock_ns = _clock_ns()
        self._look: Final = asyncio.Event()
        # set when a job has left the queue, or was put back; held by those who wait for that
        self._changes: Final[WeakValueDictionary[int | Element, Flag]] = WeakValueDictionary()
        # The job that is next to have GPUs, of which too few are free: others with GPUs are not before it,
        # else those that need few would keep it waiting for ever. And the clients that may have such others.
        self._next_with_gpus: Head | None = None
        self._is_short = False
        self._behind_it: Final[set[str]] = set()
        # how many are free; where that is unknown, the start of a job refuses it
        self.free_gpus: Callable[[], int] = lambda: GPUS_MAX
        # whether jobs are started at all, and what to call when a start is over
        self.admits: Callable[[], bool] = lambda: True
        self.settled: Callable[[], None] = lambda: None
        # jobs of the queue that were admitted: how many
        self.admissions = 0
        # the workspaces of a client that jobs use, each with whether one is alone there; and such a job
        self.busy: Callable[[str], Mapping[str, bool]] = lambda _: NOTHING_BUSY
        self.holder: Callable[[str, str], int | None] = lambda _client, _workspace: None

    # --- what happens

    async def begin(self, running: Sequence[Job]) -> None:
        """Take over what waits, and count the jobs out of the queue that run. Raises as the table does."""
        for job in running:
            if job.queued is not None:
                self._draw(job.id, job.array_id)
                self._slots.take(job)
                self._background.spawn(self._until_end(job))
        for array_id in await self._store.being_stopped():
            await self.cancel_array(array_id)
        self._heads.update(dict.fromkeys(await self._store.queued_of_clients()))
        # whatever waits for a time is looked at once
        self._due_ns = await self._store.shift_pauses(0, time.time_ns())
        awaited = await self._store.awaited()
        self._awaited.update(awaited)
        self._ended.extend(job_id for job_id, has_ended in awaited.items() if has_ended)

    def added(self, jobs: Sequence[Job]) -> None:
        """Jobs were put into the queue, or released."""
        for job in jobs:
            if job.not_before is not None:
                due_ns = to_ns(job.not_before)
                self._due_ns = due_ns if self._due_ns is None else min(self._due_ns, due_ns)
            self._open(job.client_name, job.array_id or job.id)
            if job.gpus:
                self.gpus_freed()
        self._look.set()

    def awaits(self, job_ids: Iterable[int]) -> None:
        """Jobs wait for the ends of these; to hear of it when that was written down, before anything else."""
        self._awaited.update(job_ids)

    def job_ended(self, job: Job) -> None:
        """Note that a job has ended, whether it came out of the queue or not."""
        self._note_end(job.id)
        self.room_was_made()

    def retried(self, job: Job, following: Job) -> None:
        """Let what waited for a job that has ended wait for its next attempt, which is in the queue."""
        if job.id in self._awaited:
            self._awaited.discard(job.id)
            self._awaited.add(following.id)
        self.added([following])

    def _note_end(self, job_id: int) -> None:
        if job_id in self._awaited:
            self._ended.append(job_id)
            self._look.set()

    async def settle(self, job_id: int) -> None:
        """Have the end of a job, which is about to be forgotten, its effect."""
        while job_id in self._awaited and await self._take_effect(job_id):
            pass

    def room_was_made(self) -> None:
        """Look again at what was refused: a job has ended or was removed, or the settings are new."""
        self._held_up.clear()
        self._all_held_up = False
        self.gpus_freed()
        self._look_at_passed()
        if self._heads:
            self._look.set()

    def _look_at_passed(self) -> None:
        """Let those that were passed be next again, where they have room, or may not be passed any more."""
        for client_name, passed in list(self._passed.items()):
            for job in list(passed.values()):
                if (
                    self._slots.has_room(job)
                    or not self._slots.passed_over(job)
                    or (self._lacks_gpus(job) and not self._slots.is_hopeless(job))
                ):
                    del passed[job.id]
                    self._heads[client_name] = None
            if len(passed) >= PASSED_MAX:
                self._held_up.add(client_name)
            elif not passed:
                del self._passed[client_name]

    def _pass_no_more(self, client_name: str, job_id: int) -> None:
        """Let one more job of a client be passed: one that was has left the queue, or may be next."""
        passed = self._passed.get(client_name, {})
        if passed.pop(job_id, None) is not None and len(passed) == PASSED_MAX - 1:
            self._held_up.discard(client_name)
            self._heads[client_name] = None

    def _lacks_gpus(self, job: Head) -> bool:
        return job.gpus > self.free_gpus()

    def gpus_freed(self) -> None:
        """Jobs have fewer GPUs, or the one that is next to have some may wait no more: look again who is."""
        if self._is_short:
            self._is_short = False
            self._heads.update(dict.fromkeys(self._behind_it))
            self._behind_it.clear()
            self._look.set()

    def workspace_freed(self, client_name: str) -> None:
        """See who is next in a workspace of a client, which a job has left or has not come to be in.

        What was refused at a limit stays so: else two clients whose starts are refused would for ever let
        each other try again.
        """
        self._heads[client_name] = None
        self._look.set()

    def reconfigure(self, settings: WorkerSettings) -> None:
        """From now on these slots and weights; what runs goes on."""
        self._slots.settings = settings
        self.room_was_made()

    async def cancel(self, job_id: int, detail: str = STOPPED_BEFORE_START) -> Job | None:
        """End a job that waits; None when it does not wait any more."""
        job = await self._store.end_without_start(job_id, EndReason.CANCELLED, detail)
        if job is not None:
            self._left(job.id, job.client_name)
            self._element_left(job.array_id)
        return job

    async def cancel_array(self, array_id: int) -> None:
        """End all elements of an array that wait, and start none any more."""
        while cancelled := await self._store.cancel_array(array_id, STOPPED_BEFORE_START):
            for job_id in cancelled:
                self._note_end(job_id)
                self._changed(job_id)
        self._wake_waiting_elements(array_id)
        self.gpus_freed()
        await self._see_if_over(array_id)

    async def cancel_element(self, element: Element) -> Job | None:
        """End an element that had no turn yet; None when it does not wait like that any more.

        Raises LimitReachedError when too many were ended one by one.
        """
        job = await self._store.cancel_element(element, STOPPED_BEFORE_START)
        if job is not None:
            self._changed(element)
            self._element_left(job.array_id)
        return job

    async def hold_element(self, element: Element) -> Job | None:
        """Keep an element that had no turn yet from being started; None when it does not wait like that.

        Raises LimitReachedError when too many were held one by one, or the queue takes no more.
        """
        job = await self._store.hold_element(element, self._slots.settings.quotas)
        if job is not None:
            self._changed(element)
        return job

    def elements(self, array_id: int) -> Sequence[int]:
        """Return the elements of an array that are being started or run."""
        return tuple(self._drawn.get(array_id, ()))

    def _element_left(self, array_id: int | None) -> None:
        if array_id is not None and (array_id in self._awaited or array_id in self._changes):
            self._maybe_over.add(array_id)
            self._look.set()

    def _wake_waiting_elements(self, array_id: int) -> None:
        for key in list(self._changes):
            if isinstance(key, Element) and key.array_id == array_id:
                self._changed(key)

    async def _see_if_over(self, array_id: int) -> None:
        job = await self._store.get(array_id)
        if job is None or job.state.final:
            self._left(array_id, "" if job is None else job.client_name)

    async def hold(self, job_id: int) -> Job:
        """Keep a job from being started. Raises JobStateError when it does not wait any more."""
        return await self._set_held(job_id, held=True)

    async def release(self, job_id: int) -> Job:
        """Let a job be started again. Raises JobStateError when it does not wait any more."""
        return await self._set_held(job_id, held=False)

    async def _set_held(self, job_id: int, *, held: bool) -> Job:
        job = await self._store.set_held(job_id, held=held)
        if job is None:
            verb = "hold" if held else "release"
            raise JobStateError(f"cannot {verb} job {job_id}: it does not wait in the queue (any more)")
        self.added([job])
        return job

    def change_of(self, job_id: int | Element) -> Flag:
        """Return a flag for when a job has left the queue, or was put back. Call it before a look at the job.

        The flag of an array is set when its last element has ended, the flag of an element without an id when
        it has got one, or will get none.
        """
        event = self._changes.get(job_id)
        if event is None:
            event = self._changes[job_id] = Flag()
        return event

    @property
    def starting(self) -> int:
        """How many jobs are on their way from the queue to their commands."""
        return sum(map(len, self._starting.values()))

    def is_starting(self, job: Job) -> bool:
        """Whether a job is on its way from the queue to its command."""
        return job.id in self._starting.get(job.client_name, ())

    def _changed(self, job_id: int | Element) -> None:
        if (event := self._changes.pop(job_id, None)) is not None:
            event.set()

    def _left(self, job_id: int, client_name: str) -> None:
        self._attempts.pop(job_id, None)
        self._pass_no_more(client_name, job_id)
        self._note_end(job_id)
        head = self._heads.get(client_name)
        if head is not None and head.id == job_id:
            self._heads[client_name] = None
        self.gpus_freed()
        self._changed(job_id)
        self._look.set()

    # --- who is next

    async def run(self) -> None:
        """Start jobs for ever, each when its turn has come."""
        while True:
            self._look.clear()
            try:
                while self._maybe_over:
                    await self._see_if_over(self._maybe_over.pop())
                await self._take_effects()
                await self._let_due()
                while await self._start_next():
                    pass
            except LauncherGoneError:
                raise
            except PjwError as error:
                log.error("cannot look at the queue: %s", error)
                self._wait_for_host()
            try:
                async with asyncio.timeout(self._seconds_to_look()):
                    await self._look.wait()
            except TimeoutError:
                continue

    def _seconds_to_look(self) -> float | None:
        """How long until something happens that nobody tells of; None: there is nothing like that."""
        seconds = []
        if self._due_ns is not None:
            seconds.append(min(max(0.0, self._due_ns / 1e9 - time.time()), _CLOCK_SECONDS))
        if self._heads and (left := self._paused_until - asyncio.get_running_loop().time()) > 0:
            seconds.append(left)
        return min(seconds, default=None)

    async def _take_effects(self) -> None:
        while self._ended:
            if not await self._take_effect(self._ended[0]):
                self._ended.popleft()

    async def _take_effect(self, job_id: int) -> bool:
        """Have an end its effect on some of the jobs that wait for it; whether there are more of them."""
        effects = await self._store.take_effect(job_id)
        for cancelled_id, client_name in effects.cancelled:
            # the end of this one has effects, too
            self._left(cancelled_id, client_name)
            self._wake_waiting_elements(cancelled_id)
        self._heads.update(dict.fromkeys(effects.clients))
        self._look.set()
        if not effects.left:
            self._awaited.discard(job_id)
        return effects.left

    async def _let_due(self) -> None:
        shift_ns = _clock_ns() - self._clock_ns
        if abs(shift_ns) >= _CLOCK_SET_NS:
            self._clock_ns += shift_ns
            if self._due_ns is not None:
                self._due_ns = await self._store.shift_pauses(shift_ns, time.time_ns())
        while self._due_ns is not None and self._due_ns <= time.time_ns():
            clients, self._due_ns = await self._store.let_due(time.time_ns())
            for client_name in clients:
                self._heads[client_name] = None
                self._shut.pop(client_name, None)

    async def _start_next(self) -> bool:
        """Begin the start of the job whose turn it is; whether there was one, and room for it."""
        if not self.admits() or self._all_held_up:
            return False
        if asyncio.get_running_loop().time() < self._paused_until:
            return False
        if self.starting >= STARTS_AT_ONCE:
            return False
        job = await self._whose_turn()
        if job is None:
            return False
        if self._lacks_gpus(job) and not self._slots.is_hopeless(job):
            self._next_with_gpus, self._is_short = job, True
            for client_name, head in self._heads.items():
                if head is not None and head.gpus:
                    self._heads[client_name] = None
            return True
        if not self._slots.has_room(job):
            # Freed room is for this one: else jobs that need less would always be first.
            return self._pass_over(job)
        if job.at_once is not None:
            element = await self._element_of(job)
            if element is None:
                # of another one, perhaps
                return True
            job = element
        self._heads[job.client_name] = None
        if self._slots.has(job.id):
            # it waits again, and `_until_end` is just about to hear of that
            return False
        self._starting[job.client_name][job.id] = job
        self._slots.take(job)
        self._slots.reserve(job)
        self._background.spawn(self._start(job))
        return True

    def _pass_over(self, job: Head) -> bool:
        """Let others start before a job that has no room, if they can do so without harm to it."""
        if not self._slots.passed_over(job):
            return False
        passed = self._passed[job.client_name]
        passed[job.id] = job
        self._heads[job.client_name] = None
        if len(passed) >= PASSED_MAX:
            self._held_up.add(job.client_name)
        return True

    async def _element_of(self, array: Head) -> Head | None:
        """Return the element of an array whose turn it is; None when none of them can be started now."""
        found = None
        if not array.at_once or len(self._drawn.get(array.id, ())) < array.at_once:
            found = await self._store.draw(array.id, tuple(self._starting.get(array.client_name, ())))
        if found is None:
            self._shut[array.client_name].add(array.id)
            self._heads[array.client_name] = None
            return None
        job_id, index = found
        self._draw(job_id, array.id)
        self._changed(Element(array.id, index))
        return array._replace(id=job_id, at_once=None, array_id=array.id)

    def _draw(self, job_id: int, array_id: int | None) -> None:
        if array_id is not None:
            self._drawn[array_id].add(job_id)

    def _give_back(self, job_id: int, client_name: str, array_id: int | None) -> None:
        """Free the slot of a job, and its place in its array: the job has ended, or waits again."""
        self._slots.give_back(job_id)
        # the end of the job was reported before its slot was free
        self._look_at_passed()
        if array_id is not None:
            self._drawn[array_id].discard(job_id)
            if not self._drawn[array_id]:
                del self._drawn[array_id]
            self._open(client_name, array_id)
            self._element_left(array_id)

    def _open(self, client_name: str, job_id: int) -> None:
        """Note that a job, or an element of an array, may be the next one of its client."""
        self._heads[client_name] = None
        self._pass_no_more(client_name, job_id)
        self._shut[client_name].discard(job_id)
        if not self._shut[client_name]:
            del self._shut[client_name]

    async def _whose_turn(self) -> Head | None:
        """Return the first job of the client that has least of the slots by its weight, if any."""
        best: Head | None = None
        for client_name in list(self._heads):
            if client_name in self._held_up or len(self._starting.get(client_name, ())) >= STARTS_PER_CLIENT:
                continue
            head = await self._head_of(client_name)
            if head is None or not self._slots.has_room_of_own(client_name, head.limits):
                continue
            if best is None or self._rank(head) < self._rank(best):
                best = head
        return best

    def _rank(self, job: Head) -> tuple[bool, float, int, int]:
        awaited = self._next_with_gpus is not None and self._next_with_gpus.id == job.id
        return not awaited, self._slots.share(job.client_name), -job.priority, job.id

    async def _head_of(self, client_name: str) -> Head | None:
        head = self._heads.get(client_name)
        if head is not None and not self._is_free(head):
            head = None
        if head is None:
            # taken out before the look: a job that is added during the look puts it in again
            self._heads.pop(client_name, None)
            passed_over = (
                *self._starting.get(client_name, ()),
                *self._shut.get(client_name, ()),
                *self._passed.get(client_name, ()),
            )
            if self._is_short:
                self._behind_it.add(client_name)
            head = await self._store.first_ready(
                client_name, passed_over, self._busy(client_name), without_gpus=self._is_short
            )
            if head is not None:
                self._heads[client_name] = head
        return head

    def _is_free(self, job: Head | Job) -> bool:
        """Whether a job may be in its workspace, if it has one, together with those that use it."""
        return not job.workspace or is_free(
            self._busy(job.client_name), job.workspace, exclusive=job.exclusive
        )

    def _busy(self, client_name: str) -> Mapping[str, bool]:
        """Return the workspaces of a client that jobs use, or are about to; True: one job is alone there."""
        begun = [job for job in self._starting.get(client_name, {}).values() if job.workspace]
        used = self.busy(client_name)
        return {**used, **{job.workspace: job.exclusive or used.get(job.workspace, False) for job in begun}}

    # --- a start, and an end

    async def _start(self, job: Head) -> None:
        is_running = False
        try:
            started = await self._backend.start_queued(await self._store.waiting(job.id))
            is_running = not started.state.final
            self._started(started)
            if is_running:
                self._background.spawn(self._until_end(started))
            else:
                self._note_end(started.id)
        except (NotQueuedError, WorkspaceBusyError):
            # the second: another start was first, and its end is reported
            pass
        except InvalidJobError as error:
            await self._give_up(job, str(error))
        except LimitReachedError as error:
            self._put_off(job, error)
        except KernelError as error:
            await self._fail(job, error)
        finally:
            if not is_running:
                self._give_back(job.id, job.client_name, job.array_id)
            del self._starting[job.client_name][job.id]
            if not self._starting[job.client_name]:
                del self._starting[job.client_name]
            self.settled()
            # whatever has become of it, there may be more; and where it was put back, it is the first again
            self._heads[job.client_name] = None
            self._changed(job.id)
            self._look.set()

    def _started(self, job: Job) -> None:
        self.admissions += 1
        if self._next_with_gpus is not None and self._next_with_gpus.id in (job.id, job.array_id):
            self._next_with_gpus = None
        self._attempts.pop(job.id, None)
        self._refused.pop(job.client_name, None)
        self._all_refused = ""
        self._pause = 0.0

    def _put_off(self, job: Head, error: LimitReachedError) -> None:
        """Note why a job cannot be started, and until when that is so: another end, or the next attempt."""
        if error.limit == "gpus":
            # a job that was started at once has them: the next look sees that
            return
        if error.limit is None:
            log.warning("cannot start job %d of the queue now: %s", job.id, error)
            self._wait_for_host()
        elif error.limit in _OF_A_CLIENT or (error.limit == "memory_overcommit" and error.most is not None):
            self._held_up.add(job.client_name)
            self._refused[job.client_name] = str(error)
        else:
            self._all_held_up = True
            self._all_refused = str(error)
            self._refused.pop(job.client_name, None)

    async def _fail(self, job: Head, error: KernelError) -> None:
        log.error("cannot start job %d of the queue: %s", job.id, error)
        self._attempts[job.id] += 1
        if self._attempts[job.id] < ATTEMPTS_MAX:
            self._wait_for_host()
        else:
            await self._give_up(job, SERVER_FAILED)

    async def _give_up(self, job: Head, detail: str) -> None:
        self._attempts.pop(job.id, None)
        await self._store.end_without_start(job.id, EndReason.START_FAILED, detail)
        self._note_end(job.id)

    def _wait_for_host(self) -> None:
        if asyncio.get_running_loop().time() < self._paused_until:
            # of several starts at once only the first one counts
            return
        self._pause = min(2 * self._pause or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        self._paused_until = asyncio.get_running_loop().time() + self._pause

    async def _until_end(self, job: Job) -> None:
        """Give the slot of a running job back when it has ended."""
        waits_again = False
        try:
            waits_again = await self._backend.ended(job.id)
        except LauncherGoneError:
            raise
        except JobNotFoundError:
            # it has ended, and was forgotten at once
            pass
        except PjwError as error:
            # one that runs needs no look into the table, so it has ended
            log.error("cannot look at job %d, which came out of the queue: %s", job.id, error)
        self._give_back(job.id, job.client_name, job.array_id)
        if waits_again:
            self._heads[job.client_name] = None
        if self._heads:
            self._look.set()

    # --- messages

    def shown(self, job: Job) -> Job:
        """Return a job as it is shown: one that waits says why."""
        return replace(job, detail=self._why(job)) if job.state is JobState.QUEUED else job

    def _why(self, job: Job) -> str:
        client_name = job.client_name
        if job.held:
            return "waits until it is released"
        if job.array is not None and job.array.waiting < job.array.count:
            return f"{job.array.waiting} of its {job.array.count} elements wait"
        if job.not_before is not None:
            return f"waits until {job.not_before:%Y-%m-%d %H:%M:%S} UTC"
        awaited = [str(each.job_id) for each in job.after if each.job_id in self._awaited]
        if len(awaited) < job.unmet:
            # a further attempt is awaited instead of a job that is named here
            awaited = [str(each.job_id) for each in job.after]
        if job.unmet and awaited:
            more = f" and {len(awaited) - _NAMED_MAX} more" if len(awaited) > _NAMED_MAX else ""
            return f"waits for the end of job {', '.join(awaited[:_NAMED_MAX])}{more}"
        if not self.admits() and not self.is_starting(job):
            return f"waits: {DRAINED}"
        if not self.is_starting(job) and not self._is_free(job):
            holder = self.holder(client_name, job.workspace)
            user = f"job {holder}" if holder else "a job that is being started"
            return f"waits for the workspace {job.workspace}, which {user} uses"
        if asyncio.get_running_loop().time() < self._paused_until:
            return "waits: the server cannot start a job now, and tries again soon"
        if words := self._refused.get(client_name) or self._all_refused:
            return f"waits: {words}"
        if (job.array_id or job.id) in self._passed.get(client_name, ()) and (
            words := self._slots.passed_over(job)
        ):
            return words
        if self._is_short and job.gpus and self._next_with_gpus is not None:
            is_next = self._next_with_gpus.id in (job.id, job.array_id)
            free = f"{job.gpus} free GPU{'s' * (job.gpus > 1)}"
            return f"is next: waits for {free}" if is_next else "waits for its turn to have GPUs"
        head = self._heads.get(client_name)
        first = head is not None and head.id == job.id
        if first and not self._slots.has_room_of_own(client_name, job.limits):
            return f"waits: jobs of {client_name} have all of its slots"
        if first and not self._slots.has_room(job):
            return self._slots.why_no_room()
        if job.array_id is not None:
            return f"waits for its turn in array {job.array_id}"
        return "waits for its turn"
