"""GatewayBackend: answers clients from the gateway's table, and by the nodes that have the jobs.

The gateway commits a job before anybody hears of it. From then on it owns the job's id, name and end. `Start`
answers at once, with a job that is QUEUED: if its command cannot be executed, the job ends with a reason.
This is a `pjw.server.backend.Backend`.
"""

import asyncio
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from signal import SIGTERM
from typing import Final

from pjw.arrays import Element
from pjw.errors import (
    InvalidJobError,
    JobNotFoundError,
    JobStateError,
    LimitRangeError,
    LimitReachedError,
    PjwError,
)
from pjw.gateway import rows
from pjw.gateway.dial import Dial
from pjw.gateway.engine import Engine
from pjw.gateway.jobs import Placed, Placements, lost_words
from pjw.gateway.nodes import Node, Nodes
from pjw.gateway.pool import Pool
from pjw.gateway.proxy import NoReading, OnNode, ProxyReading
from pjw.gateway.refused import check_spec, not_yet
from pjw.gateway.state import GatewayState
from pjw.gateway.states import PlacementState
from pjw.gateway.stops import Stops
from pjw.gateway.usage import usage_now, with_usage
from pjw.model import (
    NO_SUMS,
    Archive,
    ClientQuota,
    GroupUse,
    Image,
    ImageConfig,
    Job,
    JobSpec,
    JobState,
    Limits,
    QueueSpec,
    Session,
    TerminalSize,
    UsageSample,
    Workspace,
)
from pjw.rpc.convert import sample_from_message
from pjw.server.backend import Reading, Written
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker import Part, WorkerSettings
from pjw.worker.background import Background
from pjw.worker.changes import Batch, Changes, Watched
from pjw.worker.egress import Connection
from pjw.worker.flag import Flag, first_of
from pjw.worker.numbers import ClientNumbers, WorkerNumbers
from pjw.worker.pages import ALL_JOBS, JobFilter, Page
from pjw.worker.retention import Pruner
from pjw.worker.worker import ALL_CHANGES, LOCAL_CLIENT, PAGE_MAX, SIGNAL_MAX

# A node removes so many jobs at a time that were removed here.
_REMOVED_AT_ONCE: Final = 20
_ALL_OUTPUT: Final = Part()


class GatewayBackend:
    """The jobs of a cluster."""

    def __init__(
        self,
        state: GatewayState,
        settings: WorkerSettings,
        nodes: Nodes,
        dial: Dial,
        background: Background,
        engine_of: Callable[[Nodes, Callable[[], int]], Engine] = Pool,
    ) -> None:
        """*engine_of* makes the engine, from the nodes and the most jobs that a client may have there."""
        self._state: Final = state
        self._store: Final = state.store
        self._settings = settings
        self._nodes: Final = nodes
        self._dial: Final = dial
        self._background: Final = background
        self.engine: Final = engine_of(nodes, lambda: self._settings.quotas.running_max)
        self.placements: Final = Placements(state.store, self.engine)
        self._stops: Final = Stops(dial, background)
        self._pruner: Final = Pruner(state, settings.retention)
        self._changes: Final = Changes(state.store, background, Flag(), self._shown)
        self._removing: Final[set[str]] = set()
        self.placements.ended.append(lambda _: self._pruner.job_ended())
        self._pruner.removed.append(self._remove_on_nodes)
        nodes.came = self._node_came
        nodes.went = self.engine.session_over
        nodes.was_lost = self._node_lost

    async def begin(self) -> None:
        """Take over the jobs and nodes that the gateway before us has left."""
        await self._nodes.begin()
        await self._store.forget_secrets()
        await self.placements.begin(self._nodes.known, new_uuid)
        self._background.keep("removal of ended jobs", self._pruner.run())

    # --- nodes

    def _node_came(self) -> None:
        self.engine.look()
        self._remove_on_nodes()

    def _node_lost(self, node: Node) -> None:
        self._background.spawn(self._lose(node))

    async def _lose(self, node: Node) -> None:
        await self._dial.drop(node)
        await self.placements.lose(node, lost_words(node))
        if node.session is not None:
            # the node came back meanwhile
            for each in await self._store.transact(rows.to_fence, node.row.name):
                node.session.fence(each)

    def run_here(self, placed: Placed, node: Node) -> None:
        """Tell a node that runs a job of a stop that it may not have heard of."""
        self._stops.tell(placed, node)

    def revoke(self, uuid: str) -> None:
        """Have a node stop a job whose place the engine took back, though the node may not know that."""
        placed = self.placements.of(uuid)
        node = self._nodes.known.get(placed.placement.node) if placed is not None else None
        if placed is not None and node is not None:
            self._stops.revoke(placed, node)

    # --- start

    async def start(self, spec: JobSpec, client_name: str = LOCAL_CLIENT) -> Job:
        """Commit a job, and return it while it waits for a node. Raises as `submit`."""
        [job] = await self.submit([spec], client_name)
        return job

    async def submit(self, specs: Sequence[JobSpec], client_name: str = LOCAL_CLIENT) -> Sequence[Job]:
        """Commit jobs, all or none; each gets a node when one has room.

        Raises InvalidJobError for a job that does not work through a gateway yet, NameTakenError and
        LimitReachedError.
        """
        for spec in specs:
            check_spec(spec)
        asked = [(replace(spec, queue=QueueSpec()), self._limits_of(spec)) for spec in specs]
        number, most = await self._store.client_number(client_name), self._nodes.uid_count
        if most and number >= most:
            raise LimitReachedError(
                f"all {most} user ids for clients are taken",
                hint="the operator can configure a larger range, the same on all nodes",
            )
        return await asyncio.shield(self._submit(asked, client_name))

    async def _submit(self, asked: Sequence[tuple[JobSpec, Limits]], client_name: str) -> Sequence[Job]:
        specs = [spec for spec, _ in asked]
        tokens = (
            await asyncio.to_thread(self._store.secrets.keep, specs)
            if any(spec.secrets for spec in specs)
            else {}
        )
        jobs, _ = await self._store.enqueue(client_name, asked, self._settings.quotas, tokens)
        await self._store.sync()
        for job in jobs:
            # a job of an earlier request may be anywhere by now
            if job.state is JobState.QUEUED:
                await self.placements.add(job, new_uuid())
        return [self._shown(job) for job in jobs]

    def _limits_of(self, spec: JobSpec) -> Limits:
        limits = self._settings.default_limits.with_overrides(spec.limits)
        if above := limits.first_above(self._settings.ceiling):
            most, value = getattr(self._settings.ceiling, above), getattr(limits, above)
            raise LimitRangeError(
                f"limit {above} must be at most {most} on this server, not {value or 'unlimited'}",
                limit=above,
                value=value,
                most=most,
            )
        return limits

    # --- look

    async def get(self, job_id: int | Element, owner: str | None = None) -> Job:
        """One job as it is now. Raises JobNotFoundError."""
        if isinstance(job_id, Element):
            raise JobNotFoundError(str(job_id))
        placed = self._live_of(job_id, owner)
        if placed is not None:
            return self._shown(placed.job)
        job = await self._store.get(job_id, owner) if 0 < job_id < 2**63 else None
        if job is None:
            raise JobNotFoundError(job_id)
        return job

    async def get_with_usage(self, job_id: int | Element, owner: str | None = None) -> Job:
        """One job as it is now, with its usage if its node answers at once."""
        job = await self.get(job_id, owner)
        placed = self.placements.live.get(job.id)
        if placed is None or placed.placement.state is not PlacementState.RUNNING:
            return job
        return await with_usage(self._dial, self._nodes, placed, job)

    async def page(
        self,
        owner: str | None = None,
        after: int = 0,
        count: int = PAGE_MAX,
        wanted: JobFilter = ALL_JOBS,
        *,
        newest_first: bool = False,
    ) -> Page:
        """Jobs behind id *after* that fit."""
        page = await self._store.page(owner, after, count, wanted, newest_first=newest_first)
        jobs = [self._shown(job) for job in page.jobs]
        if wanted.states:
            jobs = [job for job in jobs if job.state in wanted.states]
        return Page(jobs, page.next_after)

    def _live_of(self, job_id: int, owner: str | None) -> Placed | None:
        placed = self.placements.live.get(job_id)
        return placed if placed is not None and owner in (None, placed.job.client_name) else None

    def _shown(self, job: Job) -> Job:
        """A job of the table as it is now; if it waits, with the reason."""
        placed = self.placements.live.get(job.id)
        if placed is None:
            return job
        shown = placed.shown
        if shown.state is JobState.QUEUED:
            return replace(shown, detail=self.engine.why(placed.placement.uuid))
        node = self._nodes.known.get(placed.placement.node)
        if node is not None and node.session is None:
            return replace(shown, detail=f"node {node.row.name} is not connected now; the job goes on there")
        return shown

    # --- wait, stop, delete

    async def wait(self, job_id: int | Element, owner: str | None = None, *, or_stuck: bool = False) -> Job:
        """Wait until a job has ended; its final snapshot. Raises JobNotFoundError."""
        job = await self.get(job_id, owner)
        placed = self.placements.live.get(job.id)
        if placed is None:
            return await self.get(job_id, owner)
        await placed.ended.wait()
        return placed.job

    async def stop(
        self,
        job_id: int | Element,
        grace_seconds: float | None = None,
        owner: str | None = None,
        signal: int = SIGTERM,
    ) -> Job:
        """End a job; its final snapshot. A node that is not connected hears of the stop when it is back."""
        if not 1 <= signal <= SIGNAL_MAX:
            raise InvalidJobError(f"a job is stopped with a signal from 1 to {SIGNAL_MAX}, not {signal}")
        job = await self.get(job_id, owner)
        placed = self.placements.live.get(job.id)
        if placed is None:
            return await self.get(job_id, owner)
        if placed.placement.state is PlacementState.QUEUED:
            cancelled = await self.placements.cancel(placed)
            if cancelled is not None:
                return cancelled
        if not placed.ended.is_set():
            await self.placements.ask_stop(placed, signal, grace_seconds)
            if (node := self._nodes.known.get(placed.placement.node)) is not None:
                self._stops.tell(placed, node, again=True)
        await placed.ended.wait()
        return placed.job

    async def delete(self, job_id: int | Element, owner: str | None = None) -> None:
        """Forget an ended job; its node removes it when the node is connected."""
        job = await self.get(job_id, owner)
        if not job.state.final:
            raise JobStateError(f"cannot remove job {job_id}: it has not ended", hint=f"pjw stop {job_id}")
        await self._pruner.remove(job.id)

    def _remove_on_nodes(self) -> None:
        for node in self._nodes.known.values():
            if node.session is not None and node.row.name not in self._removing:
                self._removing.add(node.row.name)
                self._background.spawn(self._remove_on(node))

    async def _remove_on(self, node: Node) -> None:
        try:
            while node.session is not None:
                found = await self._store.transact(rows.to_remove, node.row.name, _REMOVED_AT_ONCE)
                if not found:
                    return
                await asyncio.gather(*(self._remove_copy(node, placement) for placement in found))
                await self._store.transact(rows.forget, [placement.job_id for placement in found])
        except PjwError:
            # we try again when the node is connected again
            return
        finally:
            self._removing.discard(node.row.name)

    async def _remove_copy(self, node: Node, placement: rows.Placement) -> None:
        if not placement.node_job_id:
            return
        request = pb.DeleteRequest(id=placement.node_job_id)
        try:
            await self._dial.call(node, "Delete", request, placement.client_name, 60)
        except (JobNotFoundError, JobStateError):
            # the node removed it before; or it is a copy that we gave up, and that has not ended
            return

    # --- output

    async def read_logs(
        self, job_id: int | Element, part: Part = _ALL_OUTPUT, owner: str | None = None
    ) -> Reading:
        """A part of a job's output, from its node."""
        if part.session:
            raise not_yet("a session")
        if part.artifacts:
            raise not_yet("an artifact")
        job = await self.get(job_id, owner)
        if part.stderr and not job.split_stderr:
            raise JobStateError(
                f"cannot read the stderr of job {job.id} alone: the job was started without keeping it apart,"
                " so it is in the output"
            )
        if job.state is JobState.QUEUED and not part.follow:
            return NoReading(part.offset)
        reading = ProxyReading(self._dial, lambda: self._where(job.id), part)
        await reading.seek()
        return reading

    async def _where(self, job_id: int) -> OnNode | None:
        """Where a job is, once a node runs it; None when it ended without that."""
        while (placed := self.placements.live.get(job_id)) is not None:
            placement = placed.placement
            node = self._nodes.known.get(placement.node)
            if node is not None and placement.node_job_id:
                return OnNode(placed.job, node, placement.node_job_id)
            await first_of(placed.changed, placed.ended)
        job = await self._store.get(job_id)
        placement_row = await self._store.transact(rows.find, job_id)
        if job is None or placement_row is None:
            raise JobNotFoundError(job_id)
        node = self._nodes.known.get(placement_row.node)
        if node is None or not placement_row.node_job_id:
            return None
        return OnNode(job, node, placement_row.node_job_id)

    # --- usage

    async def usage_history(self, job_id: int, owner: str | None = None) -> tuple[Job, Sequence[UsageSample]]:
        """A job, and from its node what the job had used at moments of its life."""
        job = await self.get(job_id, owner)
        if job.state is JobState.QUEUED:
            return job, ()
        there = await self._where(job.id)
        if there is None:
            return job, ()
        if there.node.session is None:
            raise JobStateError(
                f"node {there.node.row.name}, which has the usage of job {job.id}, is not connected"
            )
        request = pb.GetUsageHistoryRequest(id=there.node_job_id)
        answer = await self._dial.call(there.node, "GetUsageHistory", request, job.client_name, 60)
        return await self.get(job_id, owner), [sample_from_message(each) for each in answer.samples]

    async def usage_now(
        self, owner: str | None = None, fresh_seconds: float = 1, within_seconds: float = 1
    ) -> Sequence[tuple[Job, UsageSample | None]]:
        """The jobs that nodes have, and what each uses."""
        placed = [
            each
            for each in self.placements.live.values()
            if owner in (None, each.job.client_name) and each.placement.state is not PlacementState.QUEUED
        ]
        samples = await usage_now(self._dial, self._nodes, placed, within_seconds)
        return [(self._shown(each.job), samples.get(each.job.id)) for each in placed]

    async def queued_now(self, owner: str | None = None, most: int = PAGE_MAX) -> tuple[int, Sequence[Job]]:
        """How many jobs wait for a node, and the oldest of them."""
        by_client = await self._store.queued_of_clients()
        count = sum(by_client.values()) if owner is None else by_client.get(owner, 0)
        if not count:
            return 0, ()
        return count, (await self.page(owner, 0, most, JobFilter(frozenset({JobState.QUEUED})))).jobs

    def watch_jobs(
        self,
        owner: str | None = None,
        watched: Watched = ALL_CHANGES,
        since: int | None = None,
        *,
        snapshot: bool = True,
        follow: bool = True,
    ) -> AsyncGenerator[Batch, None]:
        """Changes of the states of jobs, as `Worker.watch_jobs`."""
        return self._changes.watch(owner, watched, since, snapshot=snapshot, follow=follow)

    async def quota(self, client_name: str = LOCAL_CLIENT) -> ClientQuota:
        """The limits and the jobs of a client, without their use, which only the nodes know."""
        settings = self._settings
        own = [
            placed
            for placed in self.placements.live.values()
            if placed.job.client_name == client_name and placed.placement.state is not PlacementState.QUEUED
        ]
        weight = settings.shares.of(client_name).weight
        return ClientQuota(
            client_name=client_name,
            defaults=settings.default_limits,
            ceilings=settings.ceiling,
            sums=NO_SUMS,
            weight=weight,
            total_weight=weight,
            running=len(own),
            running_max=settings.quotas.running_max,
            memory_promised_bytes=sum(placed.job.limits.memory_max_bytes for placed in own),
            memory_promised_max_bytes=0,
            stored_bytes=(await self._store.ended_bytes(client_name))[0],
            stored_bytes_max=0,
            use=GroupUse(),
            queued=(await self._store.queued_of_clients()).get(client_name, 0),
            queued_max=settings.quotas.queued_max,
        )

    # --- methods that do not work through a gateway yet

    async def hold(self, job_id: int | Element, owner: str | None = None) -> Job:
        """Refused."""
        raise not_yet("pjw hold")

    async def release(self, job_id: int | Element, owner: str | None = None) -> Job:
        """Refused."""
        raise not_yet("pjw release")

    def write_input(
        self, job_id: int, owner: str | None = None, session: int = 0
    ) -> AbstractAsyncContextManager[Written]:
        """Refused."""
        raise not_yet("input")

    def write_upload(
        self, name: str, client_name: str = LOCAL_CLIENT
    ) -> AbstractAsyncContextManager[Written]:
        """Refused."""
        raise not_yet("to send files")

    async def exec(
        self, job_id: int, spec: JobSpec, client_name: str = LOCAL_CLIENT, *, detached: bool = False
    ) -> Session:
        """Refused."""
        raise not_yet("pjw exec")

    async def archive(
        self, job_id: int, archive: Archive, client_name: str = LOCAL_CLIENT, *, request_id: str = ""
    ) -> Session:
        """Refused."""
        raise not_yet("pjw cp")

    async def resize(
        self, job_id: int, size: TerminalSize, owner: str | None = None, session: int = 0
    ) -> None:
        """Refused."""
        raise not_yet("a terminal")

    async def connect(self, job_id: int, port: int, client_name: str = LOCAL_CLIENT) -> socket.socket:
        """Refused."""
        raise not_yet("pjw forward")

    async def wait_session(self, job_id: int, number: int, owner: str | None = None) -> Session:
        """Refused."""
        raise not_yet("a session")

    async def stop_session(self, job_id: int, number: int, owner: str | None = None) -> Session:
        """Refused."""
        raise not_yet("a session")

    async def workspaces(
        self, owner: str | None = LOCAL_CLIENT, after: tuple[str, str] = ("", ""), count: int = -1
    ) -> Sequence[Workspace]:
        """None: they do not work through a gateway yet."""
        return ()

    async def remove_workspace(self, name: str, client_name: str = LOCAL_CLIENT) -> None:
        """Refused."""
        raise not_yet("a workspace")

    async def load_image(
        self,
        name: str,
        upload: str,
        config: ImageConfig | None = None,
        digest: str = "",
        client_name: str = LOCAL_CLIENT,
    ) -> Image:
        """Refused."""
        raise not_yet("an image")

    async def images(self, owner: str | None = LOCAL_CLIENT) -> Sequence[Image]:
        """None: they do not work through a gateway yet."""
        return ()

    async def remove_image(self, name: str, client_name: str = LOCAL_CLIENT) -> None:
        """Refused."""
        raise not_yet("an image")

    # --- of the server

    async def reload_mounts(self) -> None:
        """Nothing: a gateway mounts nothing."""

    def on_connection(self, tell: Callable[[Connection], None]) -> None:
        """Nothing: jobs connect on their nodes."""

    @property
    def live_count(self) -> int:
        """How many jobs have not ended."""
        return len(self.placements.live)

    async def numbers(self) -> WorkerNumbers:
        """How much of everything there is."""
        totals = {name: (jobs, stored) for name, jobs, stored in await self._store.totals()}
        jobs = [placed.shown for placed in self.placements.live.values()]
        begun = Counter(job.client_name for job in jobs if job.state is not JobState.QUEUED)
        queued = Counter(await self._store.waiting_of_clients())
        oldest_ns = await self._store.oldest_ready_ns()
        disk = os.fstatvfs(self._state.descriptor)
        return WorkerNumbers(
            live=Counter(job.state for job in jobs if job.state is not JobState.QUEUED),
            ends=dict(self.placements.by_reason),
            clients={
                name: ClientNumbers(begun[name], *totals.get(name, (0, 0)), queued[name])
                for name in sorted(totals.keys() | begun.keys())
            },
            disk_bytes=disk.f_frsize * disk.f_blocks,
            disk_free_bytes=disk.f_frsize * disk.f_bavail,
            output_held=0,
            launcher_up=True,
            oldest_queued_seconds=0.0 if oldest_ns is None else max(0.0, (time.time_ns() - oldest_ns) / 1e9),
        )

    async def answers(self) -> None:
        """Return at once: a gateway needs nobody else."""

    async def gone(self) -> None:
        """Never return: a gateway has no launcher."""
        await asyncio.Event().wait()

    async def failed(self) -> None:
        """Return when a bug has killed a task that the gateway needs all along."""
        await self._background.failed.wait()

    def reconfigure(self, settings: WorkerSettings) -> None:
        """Take other limits, retention and quotas."""
        self._settings = settings
        self._pruner.keep(settings.retention)
        self.engine.look()

    async def give_shares(self) -> Sequence[str]:
        """Nothing: the nodes give shares."""
        return ()

    async def open_operator_file(self, place: int) -> int:
        """One of the operator's files, which the gateway's own user can read."""
        return self._state.open_operator_file(place)

    async def open_audit_log(self) -> int:
        """The audit log, open for appending."""
        return self._state.open_audit_log()


def new_uuid() -> str:
    """A new name for a job, which no job of any cluster has."""
    return str(uuid.uuid4())
