"""The engine `slurm`: Slurm gives places on nodes, and this fills them with jobs.

A place is a job of Slurm's that runs pjw-hold on a node. Slurm owns the place and nothing else: it gets a
uuid, a size, and perhaps a partition and a feature. The job that goes there, its output and its end are
pjw's. A place whose job has ended stays warm for a while, and takes the next job of the same kind: that costs
a tenth of what a new one costs.

The pjwd of the node tells us of places that come and go. Slurm itself sends no events: so one sampler asks it
for a snapshot, every two seconds while there is something to see. What it finds decides only about waiting,
and about places that no node can tell us of any more.
"""

import asyncio
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.errors import NotAllowedError, PjwError
from pjw.gateway.answers import not_with
from pjw.gateway.nodes import Node, Nodes, Shape
from pjw.gateway.pool import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS
from pjw.gateway.slurm_port import SlurmPort
from pjw.model import JobSpec, are_for
from pjw.server.config import GatewaySlurm
from pjw.worker.tasks import Background

# So many places of one kind are asked for at a time. The rest of the jobs wait for them, and for warm ones.
SUBMITTED_AT_ONCE: Final = 16
SAMPLE_SECONDS: Final = 2.0
# Slurm says that a place has begun, and its pjwd does not say so: after this time we ask for another.
_ARRIVAL_SECONDS: Final = 10.0
_MIB: Final = 1024**2
# what pjw-hold itself needs
_OWN_MEGABYTES: Final = 16
_ID: Final = re.compile(r"[1-9][0-9]{0,18}")
_WAITING: Final = frozenset({"PENDING", "CONFIGURING"})
# of nodes to which Slurm gives no jobs
_AWAY: Final = ("drain", "down", "fail", "maint", "not_responding", "unk", "inval")

log: Final = logging.getLogger(__name__)


class Kind(NamedTuple):
    """A request to Slurm; places of one kind can take each other's jobs. 0 leaves it to Slurm."""

    cpus: int
    megabytes: int
    minutes: int
    partition: str
    account: str
    constraint: str = ""

    @property
    def words(self) -> str:
        """The same as one word, for Slurm and pjw-hold to carry.

        Without a constraint they are those of a gateway that knew none: each takes the places of the other.
        """
        words = f"{self.cpus}:{self.megabytes}:{self.minutes}:{self.partition}:{self.account}"
        return f"{words}:{self.constraint}" if self.constraint else words


_KIND: Final = re.compile(
    r"(\d{1,9}):(\d{1,12}):(\d{1,9}):([A-Za-z0-9_.-]*):([A-Za-z0-9_.-]*)(?::([A-Za-z0-9_.-]+))?"
)


def kind_of(words: str) -> Kind | None:
    """Return the kind that has these words; None when there is no such kind."""
    found = _KIND.fullmatch(words)
    if found is None:
        return None
    return Kind(int(found[1]), int(found[2]), int(found[3]), found[4], found[5], found[6] or "")


class _Line(NamedTuple):
    """Jobs that stand in line for the same places: those for other nodes do not wait behind them."""

    kind: Kind
    needs: frozenset[str]
    node: str


class _Waiting(NamedTuple):
    client_name: str
    shape: Shape
    kind: Kind

    @property
    def line(self) -> _Line:
        """Where it stands."""
        return _Line(self.kind, self.shape.needs, self.shape.node)


@dataclass(slots=True)
class _Place:
    """A job that a node has, or may claim, and the hold that it is in."""

    client_name: str
    node: Node
    shape: Shape
    hold: str
    since: int
    claimed: bool = False


@dataclass(slots=True)
class _Hold:
    """A place that a node has told us of."""

    id: str
    node: Node
    kind: Kind
    # by the loop's clock: from then on it gets no more jobs
    last: float
    job: str = ""
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Submitted:
    """A place that Slurm was asked for, and that is not here yet."""

    uuid: str
    line: _Line
    since: int
    state: str = "PENDING"
    reason: str = ""
    # when Slurm first said that it has begun
    begun: float | None = None

    @property
    def kind(self) -> Kind:
        """A request that Slurm has."""
        return self.line.kind


@dataclass(slots=True)
class _Pause:
    """After a failure nothing is submitted for a while; each further failure doubles the pause."""

    until: float = 0.0
    seconds: float = 0.0
    words: str = ""


_NO_PAUSE: Final = _Pause()


class Slurm:
    """The jobs that wait, the places that Slurm was asked for, and those that it gave."""

    def __init__(
        self,
        nodes: Nodes,
        running_max: Callable[[], int],
        port: SlurmPort,
        settings: GatewaySlurm,
        background: Background,
    ) -> None:
        self._nodes: Final = nodes
        # how many jobs of a client may be on nodes at once; 0: any number
        self._running_max: Final = running_max
        self._port: Final = port
        self._settings: Final = settings
        self._background: Final = background
        self._waiting: Final[dict[str, _Waiting]] = {}
        self._placed: Final[dict[str, _Place]] = {}
        self._of_client: Final[Counter[str]] = Counter()
        self._holds: Final[dict[str, _Hold]] = {}
        self._submitted: Final[dict[str, _Submitted]] = {}
        # of jobs of the queue that are about to be submitted
        self._reserved: Final[dict[int, _Line]] = {}
        # jobs for which sbatch runs now
        self._submitting: Final[dict[str, _Line]] = {}
        self._pause: Final = _Pause()
        # of kinds that Slurm has refused: a job that Slurm never takes holds up no job of another kind
        self._pauses: Final[dict[Kind, _Pause]] = {}
        # why there was no last snapshot; empty when there was
        self._silent = ""
        # how many snapshots have begun: one knows nothing of what is younger
        self._samples = 0
        # none has been seen yet: places may wait in Slurm that an earlier gateway asked for
        self._is_new = True
        self._slurm_nodes: dict[str, tuple[str, str]] = {}
        self._to_see: Final = asyncio.Event()
        # called with the uuid of a job whose place Slurm has given away
        self.revoked: Callable[[str], None] = lambda _: None
        # see `Engine`
        self.freed: Callable[[], None] = lambda: None

    # --- Engine

    def has_room(self, shape: Shape) -> bool:
        """See `Engine`: of one kind no more jobs wait here than places are asked for at a time."""
        line = self._line(shape)
        waiting = sum(each.line == line for each in self._waiting.values())
        return waiting + sum(each == line for each in self._reserved.values()) < SUBMITTED_AT_ONCE

    def check(self, spec: JobSpec) -> None:
        """See `Engine`."""
        for what, is_asked in {
            "a GPU": bool(spec.gpus),
            "a network that jobs share": bool(spec.link),
        }.items():
            if is_asked:
                raise not_with(what, "slurm")
        for what, asked, allowed in (
            ("partition", spec.partition, self._settings.partitions),
            ("constraint", spec.constraint, self._settings.constraints),
        ):
            if asked and not are_for(allowed, asked):
                raise NotAllowedError(
                    f"no job may name the {what} {asked}",
                    hint=f"the operator can allow it with gateway.slurm.{what}s",
                )

    def passed_over(self, shape: Shape) -> str:
        """See `Engine`: Slurm may have room for another kind."""
        return (
            "" if self.has_room(shape) else "waits: Slurm has as many jobs of its kind as it gets at a time"
        )

    def reserve(self, job_id: int, client_name: str, shape: Shape) -> None:
        """See `Engine`."""
        del client_name
        self._reserved[job_id] = self._line(shape)

    def unreserve(self, job_id: int) -> None:
        """See `Engine`."""
        self._reserved.pop(job_id, None)

    def submit(self, uuid: str, client_name: str, shape: Shape) -> None:
        """See `Engine`."""
        self._release(uuid)
        self._waiting[uuid] = _Waiting(client_name, shape, self._kind(shape))
        self.look()

    def cancel(self, uuid: str) -> None:
        """See `Engine`."""
        if self._waiting.pop(uuid, None) is not None:
            self.freed()
        if self._release(uuid):
            self.look()

    def claimed(self, uuid: str, client_name: str, node: Node, shape: Shape, hold: str = "") -> None:
        """See `Engine`."""
        self._waiting.pop(uuid, None)
        place = self._placed.get(uuid)
        if place is not None and (place.node is not node or place.hold != hold):
            # its session was over during the claim, and the job got another place: that one is free
            self._release(uuid)
        if uuid not in self._placed:
            self._take(uuid, client_name, node, shape, hold)
        self._placed[uuid].claimed = True
        self._to_see.set()

    def may_claim(self, uuid: str, node: Node, hold: str = "") -> bool:
        """See `Engine`."""
        place = self._placed.get(uuid)
        return place is not None and place.node is node and bool(hold) and place.hold == hold

    def started(self, node: Node) -> None:
        """See `Engine`."""
        self._pause.seconds = 0.0

    def refused(self, uuid: str, node: Node) -> None:
        """See `Engine`."""
        place = self._placed.get(uuid)
        if place is not None and (hold := self._holds.get(place.hold)) is not None:
            self._let_go(hold, "the node could not start a job there")
        self._wait_a_while(f"node {node.row.name} could not start a job")

    def why(self, uuid: str) -> str:
        """See `Engine`."""
        if uuid in self._placed:
            return f"node {self._placed[uuid].node.row.name} is about to start it"
        waiting = self._waiting.get(uuid)
        most = self._running_max()
        if waiting is None:
            return ""
        if most and self._of_client[waiting.client_name] >= most:
            return f"waits: {waiting.client_name} has reached the maximum of jobs on nodes, {most}"
        parts = []
        if words := self._silent or self._pause.words or self._pause_of(waiting.kind).words:
            parts.append(words)
        elif reason := self._reason(uuid, waiting.kind):
            parts.append(f"Slurm says {reason}")
        else:
            parts.append("Slurm was asked for a place")
        if away := self._away():
            parts.append(away)
        return f"waits: {'; '.join(parts)}"

    def session_over(self, node: Node) -> None:
        """See `Engine`."""
        for hold in [each for each in self._holds.values() if each.node is node]:
            # the node tells us of it again when it is back
            self._forget(hold)
        back: dict[str, _Waiting] = {}
        for uuid in list(node.jobs):
            place = self._placed[uuid]
            if not place.claimed:
                back[uuid] = _Waiting(place.client_name, place.shape, self._kind(place.shape))
                self._release(uuid)
        # these jobs are older than those that have come since
        rest = dict(self._waiting)
        self._waiting.clear()
        self._waiting.update(back | rest)
        self.look()

    def hold_here(self, node: Node, hold: pb.Hold) -> None:
        """See `Engine`."""
        kind = kind_of(hold.shape)
        known = self._holds.get(hold.id)
        if kind is None or not _ID.fullmatch(hold.id) or (known is not None and known.node is not node):
            log.warning("node %s has a place %r that is not to be used", node.row.name, hold.id)
            self._say_release(node, hold.id, "the gateway knows nothing of this place, or has it elsewhere")
            return
        self._submitted.pop(hold.id, None)
        if known is not None:
            # its pjwd was restarted, and we have not seen the end of the session before
            self._forget(known)
        now = asyncio.get_running_loop().time()
        here = _Hold(hold.id, node, kind, now + self._settings.hold_max_seconds - hold.age_seconds)
        self._holds[hold.id] = here
        place = self._placed.get(hold.job)
        if place is not None and place.node is node and (place.claimed or place.hold == hold.id):
            # it got this job before a restart of the gateway or of its own
            here.job, place.hold = hold.job, hold.id
        self._to_see.set()
        self.look()
        self._keep_warm(here)

    def hold_gone(self, node: Node, hold: str) -> None:
        """See `Engine`."""
        gone = self._holds.get(hold)
        if gone is None or gone.node is not node:
            return
        self._forget(gone)
        place = self._placed.get(gone.job)
        if place is not None and not place.claimed:
            self.submit(gone.job, place.client_name, place.shape)
        self.look()

    def look(self) -> None:
        """See `Engine`."""
        for hold in [each for each in self._holds.values() if not each.job and not each.node.gets_jobs]:
            self._let_go(hold, "the node gets no more jobs from its gateway")
        most = self._running_max()
        free: dict[Kind, list[_Hold]] = {}
        now = asyncio.get_running_loop().time()
        for hold in self._holds.values():
            if not hold.job and now < hold.last:
                free.setdefault(hold.kind, []).append(hold)
        more: dict[_Line, list[str]] = {}
        of_client = Counter(self._of_client)
        for uuid, waiting in list(self._waiting.items()):
            if most and of_client[waiting.client_name] >= most:
                continue
            of_client[waiting.client_name] += 1
            places = free.get(waiting.kind, [])
            place = next((each for each in places if each.node.could_have(waiting.shape)), None)
            if place is not None:
                places.remove(place)
                self._assign(uuid, waiting, place)
            else:
                more.setdefault(waiting.line, []).append(uuid)
        for line, uuids in more.items():
            self._submit_some(line, uuids)

    # --- jobs and places

    def _kind(self, shape: Shape) -> Kind:
        settings = self._settings
        return Kind(
            math.ceil(shape.millicores / 1000),
            math.ceil(shape.memory / _MIB) + _OWN_MEGABYTES if shape.memory else 0,
            # with the time in which its place may take further jobs
            math.ceil((shape.seconds + settings.hold_max_seconds) / 60) + 1 if shape.seconds else 0,
            shape.partition or settings.partition or "",
            settings.account or "",
            shape.constraint,
        )

    def _line(self, shape: Shape) -> _Line:
        return _Line(self._kind(shape), shape.needs, shape.node)

    def _assign(self, uuid: str, waiting: _Waiting, hold: _Hold) -> None:
        del self._waiting[uuid]
        self.freed()
        self._take(uuid, waiting.client_name, hold.node, waiting.shape, hold.id)
        hold.job = uuid
        if hold.timer is not None:
            hold.timer.cancel()
            hold.timer = None
        assert hold.node.session is not None
        hold.node.session.say(pb.SessionResponse(assign=pb.Assign(uuid=uuid, hold=hold.id)))

    def _take(self, uuid: str, client_name: str, node: Node, shape: Shape, hold: str) -> None:
        self._placed[uuid] = _Place(client_name, node, shape, hold, self._samples)
        self._of_client[client_name] += 1
        node.take(uuid, shape)

    def _release(self, uuid: str) -> bool:
        place = self._placed.pop(uuid, None)
        if place is None:
            return False
        place.node.give_back(uuid)
        self._of_client[place.client_name] -= 1
        if not self._of_client[place.client_name]:
            del self._of_client[place.client_name]
        hold = self._holds.get(place.hold)
        if hold is not None and hold.job == uuid:
            hold.job = ""
            # in a moment: the caller may have the next job for it
            asyncio.get_running_loop().call_soon(self._keep_warm, hold)
        return True

    def _keep_warm(self, hold: _Hold) -> None:
        """Have a place without a job wait for one, for as long as it may."""
        if hold.job or hold.timer is not None or self._holds.get(hold.id) is not hold:
            return
        loop = asyncio.get_running_loop()
        until = min(loop.time() + self._settings.warm_seconds, hold.last)
        hold.timer = loop.call_at(until, self._let_go, hold, "")

    def _let_go(self, hold: _Hold, refused: str) -> None:
        self._say_release(hold.node, hold.id, refused)
        self._forget(hold)

    def _forget(self, hold: _Hold) -> None:
        if self._holds.get(hold.id) is hold:
            del self._holds[hold.id]
        if hold.timer is not None:
            hold.timer.cancel()

    @staticmethod
    def _say_release(node: Node, hold: str, refused: str) -> None:
        if node.session is not None:
            node.session.say(pb.SessionResponse(release=pb.Release(hold=hold, refused=refused)))

    # --- Slurm

    def _submit_some(self, line: _Line, uuids: list[str]) -> None:
        self._to_see.set()
        loop = asyncio.get_running_loop()
        if self._is_new or loop.time() < max(self._pause.until, self._pause_of(line.kind).until):
            return
        coming = [each for each in self._submitted.values() if self._will_come(each)]
        named = {each.uuid for each in coming} | self._submitting.keys()
        under_way = sum(each.line == line for each in coming)
        under_way += sum(each == line for each in self._submitting.values())
        for uuid in uuids:
            if under_way >= min(len(uuids), SUBMITTED_AT_ONCE):
                return
            if uuid not in named:
                under_way += 1
                self._submitting[uuid] = line
                self._background.spawn(self._submit(uuid, line))

    @staticmethod
    def _will_come(submitted: _Submitted) -> bool:
        begun = submitted.begun
        return begun is None or asyncio.get_running_loop().time() < begun + _ARRIVAL_SECONDS

    async def _submit(self, uuid: str, line: _Line) -> None:
        kind = line.kind
        waiting = self._waiting.get(uuid)
        # those that are drained here, or lack what the job needs
        others = [
            name
            for name, node in self._nodes.known.items()
            if name in self._slurm_nodes
            and (node.is_drained or (waiting is not None and not node.could_have(waiting.shape)))
        ]
        try:
            number = await self._port.submit(
                uuid,
                kind.words,
                kind.cpus,
                kind.megabytes,
                kind.minutes,
                others,
                kind.partition,
                kind.constraint,
            )
        except PjwError as error:
            self._wait_a_while(f"Slurm does not take it: {error}", kind)
            return
        finally:
            del self._submitting[uuid]
        self._pauses.pop(kind, None)
        # it may have begun before we heard of it
        if number not in self._holds:
            self._submitted[number] = _Submitted(uuid, line, self._samples)
            # its job may have been cancelled meanwhile: then it is taken back
            self._to_see.set()

    def _pause_of(self, kind: Kind) -> _Pause:
        return self._pauses.get(kind, _NO_PAUSE)

    def _wait_a_while(self, words: str, kind: Kind | None = None) -> None:
        """Submit nothing for a while, or nothing of one kind."""
        pause = self._pause if kind is None else self._pauses.setdefault(kind, _Pause())
        loop = asyncio.get_running_loop()
        if words != pause.words:
            log.warning("%s", words)
        pause.words = words
        if loop.time() < pause.until:
            # one of several that failed together
            return
        pause.seconds = min(2 * pause.seconds or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
        pause.until = loop.time() + pause.seconds
        loop.call_later(pause.seconds, self._go_on, pause)

    def _go_on(self, pause: _Pause | None = None) -> None:
        (pause or self._pause).words = ""
        waiting = {each.kind for each in self._waiting.values()}
        for kind in self._pauses.keys() - waiting:
            del self._pauses[kind]
        self.look()

    async def run(self) -> None:
        """Sample Slurm for ever, while there is something to see."""
        while True:
            if not (self._is_new or self._waiting or self._placed or self._submitted or self._holds):
                self._to_see.clear()
                await self._to_see.wait()
            await self.sample()
            await asyncio.sleep(SAMPLE_SECONDS)

    async def sample(self) -> None:
        """Ask Slurm for a snapshot, and act on it."""
        self._samples += 1
        try:
            jobs = await self._port.jobs()
            if self._waiting or self._is_new:
                self._slurm_nodes = await self._port.nodes()
        except PjwError as error:
            words = f"Slurm does not answer: {error}"
            if words != self._silent:
                log.warning("%s", words)
            self._silent = words
        else:
            if self._silent:
                log.info("Slurm answers again")
            self._silent = ""
            self._is_new = False
            await self._seen({each["id"]: each for each in jobs})

    async def _seen(self, jobs: dict[str, dict[str, str]]) -> None:
        gone = [
            number
            for number, each in self._submitted.items()
            if each.since < self._samples and number not in jobs
        ]
        for number in gone:
            log.warning("Slurm's job %s is gone, and no place has come of it", number)
            del self._submitted[number]
        if gone:
            self._wait_a_while("Slurm gave no place, or one on a node without a pjwd of this gateway")
        for number, job in jobs.items():
            self._see(number, job)
        for uuid, place in list(self._placed.items()):
            # if its node says that the place is there, then it is, whatever Slurm has forgotten
            is_gone = place.hold not in jobs and place.hold not in self._holds
            if is_gone and place.hold and place.claimed and place.since < self._samples:
                self.revoked(uuid)
        await self._take_back()
        self.look()

    def _see(self, number: str, job: dict[str, str]) -> None:
        kind = kind_of(job["shape"])
        if kind is None or number in self._holds or job["state"] == "COMPLETING":
            return
        if any(place.hold == number for place in self._placed.values()):
            # its node is away, and has a job there
            return
        known = self._submitted.get(number)
        if known is None:
            # an earlier gateway asked for it, or this one did and has not heard the answer yet
            waiting = self._waiting.get(job["uuid"])
            line = _Line(kind, frozenset(), "") if waiting is None else waiting.line
            known = self._submitted[number] = _Submitted(job["uuid"], line, self._samples)
        known.state, known.reason = job["state"], job["reason"]
        if job["state"] not in _WAITING and known.begun is None:
            known.begun = asyncio.get_running_loop().time()

    async def _take_back(self) -> None:
        """Take back what was asked for and is not needed any more, since warm places took the jobs."""
        wanted = Counter(each.kind for each in self._waiting.values())
        surplus: list[str] = []
        for number, each in reversed(self._submitted.items()):
            waiting = sum(other.kind == each.kind for other in self._submitted.values())
            taken = sum(self._submitted[other].kind == each.kind for other in surplus)
            if each.state == "PENDING" and waiting - taken > wanted[each.kind]:
                surplus.append(number)
        if not surplus:
            return
        try:
            await self._port.cancel(surplus)
        except PjwError as error:
            log.warning("cannot take %d jobs of Slurm's back: %s", len(surplus), error)
            return
        for number in surplus:
            self._submitted.pop(number, None)

    def _reason(self, uuid: str, kind: Kind) -> str:
        def reasons(submitted: Iterable[_Submitted]) -> str:
            return next((each.reason for each in submitted if each.reason), "")

        own = reasons(each for each in self._submitted.values() if each.uuid == uuid)
        return own or reasons(each for each in self._submitted.values() if each.kind == kind)

    def _away(self) -> str:
        """Tell to which nodes Slurm gives no jobs, with the reasons."""
        reasons: dict[str, list[str]] = {}
        for name, (state, why) in sorted(self._slurm_nodes.items()):
            if state.lower().startswith(_AWAY):
                reasons.setdefault(f"{state}: {why}" if why else state, []).append(name)
        drained = sorted(name for name, node in self._nodes.known.items() if node.is_drained)
        if drained:
            reasons["drained here"] = drained
        return "; ".join(f"{', '.join(names)} {words}" for words, names in reasons.items())
