"""pjwd serve, the part without privilege: the gRPC server from first byte to drain, and signals."""

import asyncio
import logging
import resource
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import grpc

from pjw.certs.files import ServerCredentials, ServerFiles
from pjw.certs.profile import is_short_key_name
from pjw.certs.revocation import RevocationList
from pjw.certs.tls import probe_tls12
from pjw.errors import ConfigError
from pjw.server.accept import Port, make_server
from pjw.server.address import held_addresses, shown_address
from pjw.server.audit import AuditLog, connection_line
from pjw.server.backend import Backend
from pjw.server.backup_port import BackupPort
from pjw.server.config import ServerConfig
from pjw.server.connections import PortLimits
from pjw.server.drain_port import DrainPort
from pjw.server.guard import Guard
from pjw.server.health import HEALTH_NAME, Health
from pjw.server.log_setup import PLAIN, LogWriter
from pjw.server.reflection import reflection_handlers
from pjw.server.reload import Reloader, warn_each_day
from pjw.server.service import SERVICE_NAME, JobWorkerService
from pjw.server.systemd import Notifier
from pjw.worker import Worker, WorkerSettings
from pjw.worker.launcher_process import LauncherProcess
from pjw.worker.state_dir import StateDir
from pjw.worker.tasks import Background, log_failure

if TYPE_CHECKING:
    # nothing of a cluster is loaded by a pjwd that is none of its nodes
    from pjw.node.holds import Holds

import socket
from contextlib import suppress
from types import TracebackType
from typing import Self

# Signals for an event loop: each is acted on, however many come.

# more than enough bytes to read at a time; their values do not matter
_READ_BYTES: Final = 4096


class Signals:
    """Calls functions in the running loop after their signals; made and closed by the main thread.

    Not loop.add_signal_handler: it tells the loop which signal came by a byte in a socket, so that a signal
    is lost when others fill that socket first. Here the bytes only wake the loop, and Python itself remembers
    which signals came (signal(3): one of each kind, as the kernel does while they are pending).
    """

    def __init__(self) -> None:
        self._loop: Final = asyncio.get_running_loop()
        self._before: Final[dict[int, object]] = {}
        self._wake, self._write = socket.socketpair()

    def __enter__(self) -> Self:
        self._wake.setblocking(False)
        self._write.setblocking(False)
        self._loop.add_reader(self._wake, self._read)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]  # the value that signal() returned
        signal.set_wakeup_fd(-1)
        self._loop.remove_reader(self._wake)
        self._wake.close()
        self._write.close()

    def handle(self, number: int, act: Callable[[], None]) -> None:
        """Have *act* called, once or more, after each signal *number* from now on."""
        # a handler of Python's may come between any two steps of the loop: it only leaves word
        before = signal.signal(number, lambda *_: self._loop.call_soon_threadsafe(act))
        self._before.setdefault(number, before)

    def _read(self) -> None:
        # the handlers run by themselves as soon as the main thread does anything
        with suppress(BlockingIOError):
            self._wake.recv(_READ_BYTES)


# Seconds that running calls may take to end when the server drains; followers end at once.
DRAIN_SECONDS: Final = 5

# The names of threads that pjwd needs for as long as it runs begin with this.
OWN_THREADS: Final = "pjw-"

# gRPC's own defaults leave dead followers for two hours, reject bursts of streams at random,
# and let a second server bind the same port (docs/architecture.md, "Server options").
_OPTIONS: Final[list[tuple[str, int]]] = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 50_000),
    # By default gRPC widens the window of a fast client without end: one upload took 100 MB of the server's
    # memory. With this fixed window an upload reaches 20 MB/s over a network with a round trip of 50 ms.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1024**2),
    # A follower that is gone without a word is noticed after 20 + 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping every 10 s, with or without data under way.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]

# Connections may have this part of the descriptors: the rest is for output, starts and the table.
CONNECTIONS_SHARE: Final = 2

log: Final = logging.getLogger(__name__)
# The news that operators wait for when they start a service is logged at every level.
ready: Final = logging.getLogger("pjw.ready")
ready.setLevel(logging.INFO)


@dataclass(frozen=True, slots=True)
class Serving:
    """The settings of one service: its addresses, its credentials and its limits."""

    host: str
    port: int
    # where metrics can be had, if they can
    metrics: tuple[str, int] | None
    files: ServerFiles
    credentials: ServerCredentials
    revoked: RevocationList
    config: ServerConfig
    # the keys of it that the command line gave
    options: Mapping[str, object]
    settings: WorkerSettings
    # the descriptor of the audit log, where there is one
    audit: int | None
    log: LogWriter


@dataclass(frozen=True, slots=True)
class Served:
    """The jobs that are served: those of this machine, or those of a cluster."""

    backend: Backend
    # the clients that it has seen
    known: Sequence[str]
    # handlers besides those of clients, behind the guard or their own guard, and the names of their services
    more: Callable[[Guard], Sequence[grpc.GenericRpcHandler]] = lambda _: ()
    services: Sequence[str] = ()
    # called before the server drains
    draining: Callable[[], None] = lambda: None
    # Tasks that run as long as the server does, each named in words; made once it listens, with its address
    # and a function that returns the newest credentials.
    tasks: Callable[[str, Callable[[], ServerCredentials]], Mapping[str, Coroutine[Any, Any, object]]] = (
        field(default=lambda *_: {})
    )


def run(
    serving: Serving,
    state: StateDir,
    launcher: LauncherProcess,
    backups: BackupPort,
    drains: DrainPort,
    holds: "Holds | None" = None,
) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code. Raises PjwError when it cannot listen.

    *holds*: the places that Slurm gives, where this is a node of a cluster that takes them.
    """
    return asyncio.run(serve(serving, _of_this_machine(serving, state, launcher, backups, drains, holds)))


@asynccontextmanager
async def _of_this_machine(
    serving: Serving,
    state: StateDir,
    launcher: LauncherProcess,
    backups: BackupPort,
    drains: DrainPort,
    holds: "Holds | None",
) -> AsyncGenerator[Served, None]:
    async with AsyncExitStack() as stack:
        stack.callback(backups.close)
        stack.push_async_callback(drains.close)
        worker = await stack.enter_async_context(Worker(state, launcher, serving.settings))
        # before the queue starts any job
        worker.admission.set(drained=drains.was_drained)
        await worker.adopt()

        def tasks(
            address: str, credentials: Callable[[], ServerCredentials]
        ) -> dict[str, Coroutine[Any, Any, object]]:
            found: dict[str, Coroutine[Any, Any, object]] = {
                "copies for backups": backups.serve(lambda: worker.disk_marks),
                "word of `pjwd drain`": drains.serve(worker),
            }
            if serving.config.cluster.gateway is not None:
                # nothing of a cluster is loaded by a pjwd that is none of its nodes
                from pjw.server.as_node import node_of_config

                node = node_of_config(
                    serving.config, serving.settings, worker, state.store, address, credentials, holds
                )
                found["the session with the gateway"] = node.run()
                if node.holds is not None:
                    found["places of Slurm's"] = node.holds.serve()
            return found

        yield Served(worker, [name for name, _, _ in await state.store.totals()], tasks=tasks)


async def serve(serving: Serving, opened: AbstractAsyncContextManager[Served]) -> int:
    """Serve *opened* until SIGTERM or SIGINT; return the exit code. Raises PjwError if it cannot listen."""
    host = serving.host
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(Signals())
        served = await stack.enter_async_context(opened)
        worker = served.backend
        audit = AuditLog(serving.audit) if serving.audit is not None else None
        if audit is not None:
            stack.callback(audit.close)
            worker.on_connection(lambda each: audit.append(connection_line(each)))
        names = serving.config.name_rules(frozenset(filter(is_short_key_name, served.known)))
        port = Port(serving.config.port, serving.config.clients, names)
        metrics = None
        if serving.metrics is not None:
            from pjw.server.metrics import ServerMetrics

            metrics = ServerMetrics(worker, port.connections, serving.log)
        observers = [each for each in (audit, metrics) if each is not None]
        guard = Guard(serving.config, *observers, revoked=serving.revoked, port=port, names=names)
        health, notifier = Health(), Notifier()
        reloader = Reloader(
            serving.files,
            serving.credentials,
            serving.config,
            serving.options,
            serving.settings,
            guard,
            worker,
            notifier,
            port.connections.accepted,
            audit,
        )
        background = Background()
        stack.push_async_callback(background.close)
        stack.enter_context(_threads_watched(background))
        server = make_server(options_of(serving.config.port), port)
        server.add_generic_rpc_handlers(
            (
                JobWorkerService(worker).handlers(guard),
                health.handlers(guard),
                *served.more(guard),
                *reflection_handlers(guard, (SERVICE_NAME, HEALTH_NAME, *served.services)),
            )
        )
        addresses = _listen(server, host, serving.port, reloader.tls)
        number = addresses[0][1]
        port.connections.listens_on(number)
        address = shown_address(host, number)
        await server.start()
        # before clients know that we are ready, and send a signal
        asked = asyncio.Event()
        signals.handle(signal.SIGHUP, reloader.ask)
        for each in (signal.SIGTERM, signal.SIGINT):
            signals.handle(each, asked.set)
        try:
            await _refuse_tls12(addresses)
            if serving.metrics is not None and metrics is not None:
                stack.enter_context(metrics.serve(serving.metrics, reloader))
            background.keep("taking calls", server.wait_for_termination())
            background.keep("warnings of certificates", warn_each_day(lambda: reloader.credentials))
            for what, task in served.tasks(address, lambda: reloader.credentials).items():
                background.keep(what, task)
            background.keep("reloads", reloader.run(lambda: _status(address, worker)))
            ready.info("ready on %s", address, extra=PLAIN)
            notifier.ready(_status(address, worker))
            watch = notifier.watch(worker.answers, lambda: _status(address, worker))
            background.keep("word to the watchdog", watch)
            return await _until_end(worker, background, asked)
        finally:
            notifier.stopping()
            await health.drain()
            # Followers hear of it first: stop() alone would let them run into its grace period.
            guard.drain()
            served.draining()
            port.turns.open()
            await server.stop(DRAIN_SECONDS)


def options_of(limits: PortLimits) -> list[tuple[str, int]]:
    """Return the options of gRPC, which has no bounds of its own."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return [
        *_OPTIONS,
        ("grpc.server_handshake_timeout_ms", round(limits.handshake_seconds * 1000)),
        # beyond, a connection is closed as it is accepted
        (
            "grpc.max_allowed_incoming_connections",
            min(limits.connections_max, descriptors // CONNECTIONS_SHARE),
        ),
        ("grpc.max_concurrent_streams", limits.streams_per_connection_max),
    ]


def _status(address: str, backend: Backend) -> str:
    drained = "drained; " if backend.drained else ""
    return f"serving on {address}; {drained}jobs that have not ended: {backend.live_count}"


def _listen(
    server: grpc.aio.Server, host: str, port: int, tls: Callable[[], grpc.ServerCredentials]
) -> list[tuple[str, int]]:
    """Have the server listen on every address of a name, all at one port. Raises ConfigError."""
    with held_addresses(host, port) as addresses:
        for each in addresses:
            try:
                # One by one: of several addresses gRPC silently leaves out those that it cannot have.
                server.add_secure_port(shown_address(*each), tls())
            except RuntimeError:
                # gRPC does not say why
                raise ConfigError(
                    f"cannot listen on {shown_address(*each)}: gRPC refuses the address, or the certificate"
                ) from None
        return addresses


async def _refuse_tls12(addresses: Sequence[tuple[str, int]]) -> None:
    # We have bound these addresses, so no other process can be there. A name could lead to another host.
    for host, port in addresses:
        target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  the operator's choice
        if await asyncio.to_thread(probe_tls12, target, port):
            raise ConfigError(
                "this server would speak TLS 1.2, so it does not serve",
                hint="this build of gRPC ignores its cipher setting",
            )


@contextmanager
def _threads_watched(background: Background) -> Iterator[None]:
    """Have a thread of pjwd's own that dies by a bug end pjwd, as a task does."""
    loop = asyncio.get_running_loop()

    def on_death(death: threading.ExceptHookArgs) -> None:
        name = death.thread.name if death.thread is not None else "a thread"
        log.critical("%s has died", name, exc_info=death.exc_value)
        if name.startswith(OWN_THREADS):
            loop.call_soon_threadsafe(background.failed.set)

    before, threading.excepthook = threading.excepthook, on_death
    try:
        yield
    finally:
        threading.excepthook = before


async def _until_end(worker: Backend, background: Background, asked: asyncio.Event) -> int:
    ends = [
        asyncio.ensure_future(end)
        for end in (asked.wait(), worker.gone(), worker.failed(), background.failed.wait())
    ]
    _, gone, *_ = ends
    for end in ends:
        end.add_done_callback(log_failure)
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    has_gone = gone.done()
    for end in ends:
        end.cancel()
    if asked.is_set():
        log.info("stopping; %d jobs go on", worker.live_count)
        return 0
    if has_gone:
        log.error("the launcher has died; running jobs go on, start pjwd again to reach them")
    else:
        log.error("pjwd ends by a fault of its own; running jobs go on, start pjwd again to reach them")
    return 1
