"""Copies the output of ended jobs from their nodes into the archive, a few jobs at a time.

The table says which jobs have no copy yet. So a gateway that was killed in mid-copy goes on where it was.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final, ParamSpec, TypeVar

import grpc

from pjw.cluster.v1 import cluster_pb2 as cpb
from pjw.errors import JobNotFoundError, OutputLostError, PjwError, ServerUnreachableError
from pjw.gateway import placement_rows
from pjw.gateway.archive import OutputArchive, StreamCopy
from pjw.gateway.dial import Dial, error_from
from pjw.gateway.nodes import Node
from pjw.gateway.placement_rows import Placement
from pjw.model import Job
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.state_dir import disk_error
from pjw.worker.store import JobStore
from pjw.worker.tasks import Background, log_bug

# So many copies at once, each from another node.
COPIES_MAX: Final = 4
_FOUND_AT_ONCE: Final = 20
# A node keeps so many ended jobs for us; it may drop others beyond them.
HELD_MAX: Final = 1000
# Nothing tells when a failing disk works again.
RETRY_SECONDS: Final = 60.0

_P = ParamSpec("_P")
_R = TypeVar("_R")

log: Final = logging.getLogger(__name__)


class Archiver:
    """Makes the copies."""

    def __init__(self, archive: OutputArchive, store: JobStore, dial: Dial, background: Background) -> None:
        self._archive: Final = archive
        self._store: Final = store
        self._dial: Final = dial
        self._background: Final = background
        self._turns: Final = asyncio.Semaphore(COPIES_MAX)
        # the nodes whose jobs are being copied; True: look again at the end
        self._busy: Final[dict[str, bool]] = {}
        # nodes that wait after a failure
        self._paused: Final[set[str]] = set()
        # The ends of jobs that nodes keep until they are copied, as nobody has acknowledged them: by nodes,
        # the uuids by the ids of the jobs.
        self._held: Final[defaultdict[str, dict[int, str]]] = defaultdict(dict)
        # how many copies were made, and how many failed
        self.made = 0
        self.failed = 0

    def holds(self, node: Node, job_id: int, uuid: str) -> bool:
        """Whether a node is to keep an ended job until it is copied; we acknowledge the end then."""
        held = self._held[node.row.name]
        if len(held) >= HELD_MAX:
            return False
        held[job_id] = uuid
        return True

    def let_go(self, node: Node, job_ids: Sequence[int]) -> None:
        """Note that these jobs were removed, some before their copy: a node has to keep none of them."""
        for job_id in job_ids:
            self._let_go(node, job_id)

    def _let_go(self, node: Node, job_id: int) -> None:
        uuid = self._held[node.row.name].pop(job_id, None)
        if uuid is not None and node.session is not None:
            node.session.say(cpb.SessionResponse(ack=cpb.Ack(uuid=uuid)))

    def look_at(self, node: Node) -> None:
        """Look for output to copy, since a job of this node has ended, or the node has come."""
        name = node.row.name
        if node.session is None or name in self._paused:
            return
        if name in self._busy:
            self._busy[name] = True
            return
        self._busy[name] = False
        self._background.spawn(self._copy_all(node))

    async def _copy_all(self, node: Node) -> None:
        name = node.row.name
        try:
            while node.session is not None:
                self._busy[name] = False
                found = await self._store.transact(placement_rows.to_archive, name, _FOUND_AT_ONCE)
                for placement, job in found:
                    async with self._turns:
                        await self._copy(node, placement, job)
                if not found and not self._busy[name]:
                    return
        except ServerUnreachableError:
            # we go on when the node is back
            return
        except PjwError as error:
            self.failed += 1
            log.error("cannot archive the output of jobs of node %s: %s", name, error)
            self._paused.add(name)
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._try_again, node)
        finally:
            del self._busy[name]

    def _try_again(self, node: Node) -> None:
        self._paused.discard(node.row.name)
        self.look_at(node)

    async def _copy(self, node: Node, placement: Placement, job: Job) -> None:
        streams: Sequence[StreamCopy] = ()
        try:
            if job.output_bytes:
                streams = await _to_end(self._archive.begin, job)
                for stream in streams:
                    await self.copy_stream(node, placement, stream, job.output_bytes)
                size = sum(stream.size for stream in streams)
                if size != job.output_bytes:
                    raise OutputLostError(f"the node has {size} of {job.output_bytes} bytes")
                await _to_end(self._archive.finish, job, streams)
        except OSError as error:
            await asyncio.to_thread(self._archive.abandon, job.id)
            raise disk_error("archive the output of", f"job {job.id}", error) from error
        except (JobNotFoundError, OutputLostError) as error:
            await asyncio.to_thread(self._archive.abandon, job.id)
            if await self._store.transact(placement_rows.never_archived, job.id):
                log.error("the output of job %d is not archived: %s", job.id, error)
            self._let_go(node, job.id)
            return
        except BaseException:
            await asyncio.to_thread(self._archive.abandon, job.id)
            raise
        finally:
            for stream in streams:
                stream.close()
        await asyncio.shield(self._commit(job))
        self._let_go(node, job.id)

    async def _commit(self, job: Job) -> None:
        # Nobody removes the job meanwhile: so no copy is left of a job that is not there.
        async with self._archive.turn:
            if await self._store.get(job.id) is None:
                await asyncio.to_thread(self._archive.abandon, job.id)
                return
            try:
                if job.output_bytes:
                    await asyncio.to_thread(self._archive.commit, job.id)
            except OSError as error:
                raise disk_error("archive the output of", f"job {job.id}", error) from error
            await self._store.transact(placement_rows.archived, job.id)
            await self._store.sync()
        self.made += 1

    async def copy_stream(self, node: Node, placement: Placement, stream: StreamCopy, bytes_max: int) -> None:
        """Copy one stream of a job's output. Raises OutputLostError beyond *bytes_max*."""
        request = pb.LogsRequest(
            id=placement.node_job_id,
            no_follow=True,
            timestamps=True,
            stream=pb.OUTPUT_STREAM_STDERR if stream.name == "stderr" else pb.OUTPUT_STREAM_UNSPECIFIED,
        )
        call: Any = self._dial.stream(node, "Logs", request, placement.client_name)
        try:
            async for message in call:
                response = pb.LogsResponse.FromString(message)
                time_ns = response.time.ToNanoseconds() if response.HasField("time") else None
                if stream.size + len(response.data) > bytes_max:
                    # whatever a node says, the archive is for all
                    raise OutputLostError(f"the node sends more than the {bytes_max} bytes that there are")
                if stream.add(response.data, time_ns):
                    await _to_end(stream.write)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, node) from None
        finally:
            call.cancel()


async def _to_end(function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call what waits for the disk; return or be cancelled when it is over, so that files can be closed."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        # nobody reads the archive's stream any more, so only a bug is worth a line
        log_bug(task)
        raise
