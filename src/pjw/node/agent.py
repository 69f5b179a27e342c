"""Keeps a session with the gateway, even if the node or the gateway goes away meanwhile.

A node that cannot reach the gateway does not end its jobs: they go on, and the node tells their ends later.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import grpc

from pjw.certs.files import Credentials
from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.cluster.v1.cluster_pb2_grpc import NodeServiceStub
from pjw.errors import PjwError, ServerUnreachableError
from pjw.node import cluster_rows
from pjw.node.claims import Claim, Jobs, Said
from pjw.node.holds import Holds
from pjw.worker import Worker
from pjw.worker.host import Admission
from pjw.worker.metrics import Series
from pjw.worker.store import JobStore
from pjw.worker.tasks import side_by_side
from pjw.worker.worker import Offers

FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 2.0
# Until the gateway has said how long it waits for us.
_WELCOME_SECONDS: Final = 30.0
_CLAIM_SECONDS: Final = 60.0
_OPTIONS: Final = [
    ("grpc.enable_http_proxy", 0),
    # each session has its own connection, so that it does not inherit the backoff of the one before
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # After an outage TCP waits for up to as long again before it sends. So an unanswered ping ends the
    # connection, and the node makes a new one.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A fixed window: what the gateway sends of an upload waits there while our disk takes its time.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024**2),
]
_LOOPBACK: Final = ("127.0.0.1:", "[::1]:")

log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """The name of a node, the address of its gateway, and what its jobs may have."""

    name: str
    gateway: str
    # where the gateway reaches this node
    address: str
    version: str
    boot_id: str
    cpu_max_millicores: int
    memory_max_bytes: int
    uid_first: int
    uid_count: int
    # what the gateway may call here
    methods: Sequence[str]


class NodeAgent:
    """Keeps a session with the gateway, one after the other."""

    def __init__(
        self,
        worker: Worker,
        store: JobStore,
        settings: NodeSettings,
        credentials: Callable[[], Credentials],
        holds: Holds | None = None,
    ) -> None:
        """Begin without a session; *holds*: places that an engine gives to the gateway here, if any."""
        self._settings: Final = settings
        # called for each session: a reload may have brought other credentials
        self._credentials: Final = credentials
        self._worker: Final = worker
        self.holds: Final = holds
        self._store: Final = store
        self._jobs: Final = Jobs(worker, store, holds)
        self._admission: Final = worker.admission
        self._pause = FIRST_PAUSE_SECONDS
        self._told = ""
        self._is_connected = False
        self._sessions = 0
        worker.more_numbers = self._numbers

    def _numbers(self) -> Sequence[Series]:
        return (
            Series(
                "pjw_gateway_connected",
                "Whether there is a session with the gateway.",
                "gateway",
                {self._settings.gateway: self._is_connected},
            ),
            Series(
                "pjw_gateway_sessions", "Sessions with the gateway that have begun.", total=self._sessions
            ),
        )

    async def run(self) -> None:
        """Keep a session for ever."""
        try:
            while True:
                try:
                    await self._session()
                    self._say("the gateway has ended the session")
                except grpc.aio.AioRpcError as error:
                    self._say(f"{error.code().name}: {error.details()}")
                except PjwError as error:
                    self._say(str(error))
                # all nodes must not dial a restarted gateway at the same moment
                await asyncio.sleep(self._pause * (1 - os.urandom(1)[0] / 512))
                self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        finally:
            await self._jobs.close()

    def _say(self, words: str) -> None:
        # say the same once, and not at each attempt
        if words != self._told:
            log.warning("no session with the gateway %s, trying again: %s", self._settings.gateway, words)
            self._told = words

    async def _session(self) -> None:
        target, credentials = self._settings.gateway, self._credentials()
        options: list[tuple[str, int | str]] = list(_OPTIONS)
        if target.startswith(_LOOPBACK):
            # this is localhost by definition, and every server certificate of pjw names localhost
            options.append(("grpc.ssl_target_name_override", "localhost"))
        tls = grpc.ssl_channel_credentials(credentials.ca_pem, credentials.key_pem, credentials.crt_pem)
        async with grpc.aio.secure_channel(target, tls, options) as channel:
            # the stubs know only the blocking class
            stub: Any = NodeServiceStub(channel)
            said = Said(os.urandom(16).hex(), stub.FetchUpload)
            offers = await self._worker.offers()
            table_id = await self._store.transact(cluster_rows.table_id)
            call = stub.Session(said.messages(self._hello(said.session, offers, table_id)))
            try:
                await self._heard(call.__aiter__(), partial(stub.Claim, timeout=_CLAIM_SECONDS), said, offers)
            finally:
                said.close()
                self._jobs.session_ended()
                call.cancel()

    async def _heard(
        self, answers: AsyncIterator[pb.SessionResponse], claim: Claim, said: Said, offers: Offers
    ) -> None:
        first = await _next(answers, _WELCOME_SECONDS)
        if first is None:
            return
        if not first.HasField("welcome"):
            raise ServerUnreachableError("the gateway did not say welcome")
        heartbeat, lost_after = first.welcome.heartbeat_ms / 1000, first.welcome.lost_after_ms / 1000
        log.info("session with the gateway %s", self._settings.gateway)
        self._pause, self._told = FIRST_PAUSE_SECONDS, ""
        if self.holds is not None:
            self.holds.say = said.say
            self.holds.announce()
        self._is_connected, self._sessions = True, self._sessions + 1
        try:
            await side_by_side(
                _beat(said, heartbeat, self._admission),
                self._jobs.tell_ends(said),
                self._hear_all(answers, claim, said, lost_after),
                self._offers_change(offers, heartbeat),
                until=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._is_connected = False

    async def _offers_change(self, offers: Offers, seconds: float) -> None:
        """Return when the operator offers other things than in our Hello: the next session says so."""
        while await self._worker.offers() == offers:  # noqa: ASYNC110  an operator's table has no event
            await asyncio.sleep(seconds)
        log.info("other mounts, images, GPUs or names are offered: a new session tells the gateway")

    async def _hear_all(
        self, answers: AsyncIterator[pb.SessionResponse], claim: Claim, said: Said, lost_after: float
    ) -> None:
        # after this silence the gateway takes the node for lost
        while (response := await _next(answers, lost_after)) is not None:
            self._jobs.hear(response, claim, said)

    def _hello(self, session: str, offers: Offers, table_id: str) -> pb.SessionRequest:
        settings = self._settings
        return pb.SessionRequest(
            hello=pb.Hello(
                node=settings.name,
                session=session,
                boot_id=settings.boot_id,
                version=settings.version,
                address=settings.address,
                cpu_max_millicores=settings.cpu_max_millicores,
                memory_max_bytes=settings.memory_max_bytes,
                uid_first=settings.uid_first,
                uid_count=settings.uid_count,
                gpus=offers.gpus,
                mounts=offers.mounts,
                images=offers.images,
                names=offers.names,
                methods=settings.methods,
                table_id=table_id,
                drained=self._admission.drained,
            )
        )


async def _beat(said: Said, seconds: float, admission: Admission) -> None:
    changed = asyncio.Event()
    admission.changed.append(changed.set)
    try:
        while True:
            # at once, too: it may have changed since Hello
            said.say(pb.SessionRequest(heartbeat=pb.Heartbeat(drained=admission.drained)))
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await changed.wait()
            changed.clear()
    finally:
        admission.changed.remove(changed.set)


async def _next(answers: AsyncIterator[pb.SessionResponse], seconds: float) -> pb.SessionResponse | None:
    try:
        async with asyncio.timeout(seconds):
            return await anext(answers, None)
    except TimeoutError:
        raise ServerUnreachableError(f"nothing was heard of the gateway for {seconds:g} s") from None
