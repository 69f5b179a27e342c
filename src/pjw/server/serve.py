"""pjwd serve, the part without privilege: the gRPC server from its first byte to its drain."""

import asyncio
import logging
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

import grpc

from pjw.certs.files import ServerCredentials, ServerFiles
from pjw.certs.revocation import RevocationList
from pjw.certs.tls import probe_tls12
from pjw.errors import ConfigError
from pjw.server.accept import make_server
from pjw.server.address import fault_of_address, shown_address
from pjw.server.audit import AuditLog
from pjw.server.config import ServerConfig
from pjw.server.guard import Guard
from pjw.server.health import HEALTH_NAME, Health
from pjw.server.logs import PLAIN
from pjw.server.notify import Notifier
from pjw.server.reflection import reflection_handlers
from pjw.server.reload import Reloader
from pjw.server.service import SERVICE_NAME, JobWorkerService
from pjw.server.signals import Signals
from pjw.worker import Worker, WorkerSettings
from pjw.worker.launcher_process import LauncherProcess
from pjw.worker.state_dir import StateDir

# How long running calls may take to end when the server drains; followers end at once.
DRAIN_SECONDS: Final = 5

# gRPC's own defaults leave dead followers for two hours, reject bursts of streams at random,
# and let a second server bind the same port (docs/architecture.md, "Server options").
OPTIONS: Final[list[tuple[str, int]]] = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.max_concurrent_streams", 1000),
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 50_000),
    # A follower that is gone without a word is noticed after 20 + 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping every 10 s, with or without data under way.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]

log: Final = logging.getLogger(__name__)
# What everybody waits for who starts a service is told at every level.
ready: Final = logging.getLogger("pjw.ready")
ready.setLevel(logging.INFO)


@dataclass(frozen=True, slots=True)
class Serving:
    """Where to listen, as whom, and for whom."""

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


def run(serving: Serving, state: StateDir, launcher: LauncherProcess) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises PjwError when it cannot listen."""
    return asyncio.run(_run(serving, state, launcher))


async def _run(serving: Serving, state: StateDir, launcher: LauncherProcess) -> int:
    host = serving.host
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(Signals())
        worker = await stack.enter_async_context(Worker(state, launcher, serving.settings))
        await worker.adopt()
        audit = AuditLog(serving.audit) if serving.audit is not None else None
        if audit is not None:
            stack.callback(audit.close)
        metrics = None
        if serving.metrics is not None:
            from pjw.server.metrics import ServerMetrics

            metrics = ServerMetrics(worker)
        traces = None
        if (endpoint := serving.config.traces.endpoint) is not None:
            from pjw.server.traces import Traces

            traces = Traces(endpoint)
            stack.callback(traces.close)
        observers = [each for each in (audit, metrics, traces) if each is not None]
        guard = Guard(serving.config, *observers, revoked=serving.revoked)
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
        )
        server = make_server(OPTIONS)
        server.add_generic_rpc_handlers(
            (
                JobWorkerService(worker).handlers(guard),
                health.handlers(guard),
                *reflection_handlers(guard, (SERVICE_NAME, HEALTH_NAME)),
            )
        )
        port = _listen(server, host, serving.port, reloader.tls())
        address = shown_address(host, port)
        await server.start()
        # before anybody is told that we are ready, and sends one
        asked = asyncio.Event()
        signals.handle(signal.SIGHUP, reloader.ask)
        for number in (signal.SIGTERM, signal.SIGINT):
            signals.handle(number, asked.set)
        try:
            await _refuse_tls12(host, port)
            if serving.metrics is not None and metrics is not None:
                stack.enter_context(metrics.serve(serving.metrics, reloader))
            stack.callback(asyncio.ensure_future(reloader.run(lambda: _status(address, worker))).cancel)
            ready.info("ready on %s", address, extra=PLAIN)
            notifier.ready(_status(address, worker))
            watch = notifier.watch(worker.launcher_answers, lambda: _status(address, worker))
            stack.callback(asyncio.ensure_future(watch).cancel)
            return await _until_end(worker, asked)
        finally:
            notifier.stopping()
            await health.drain()
            # Followers are told first: stop() alone would let them run into its grace period.
            guard.drain()
            await server.stop(DRAIN_SECONDS)


def _status(address: str, worker: Worker) -> str:
    return f"serving on {address}; jobs that have not ended: {worker.live_count}"


def _listen(server: grpc.aio.Server, host: str, port: int, tls: grpc.ServerCredentials) -> int:
    address = shown_address(host, port)
    try:
        return server.add_secure_port(address, tls)
    except RuntimeError:
        # gRPC does not say why
        why = fault_of_address(host, port) or "gRPC refuses the address, or the certificate"
        raise ConfigError(f"cannot listen on {address}: {why}") from None


async def _refuse_tls12(host: str, port: int) -> None:
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  the operator's choice
    if await asyncio.to_thread(probe_tls12, target, port):
        raise ConfigError(
            "this server would speak TLS 1.2, so it does not serve",
            hint="this build of gRPC ignores its cipher setting",
        )


async def _until_end(worker: Worker, asked: asyncio.Event) -> int:
    end = asyncio.ensure_future(asked.wait())
    gone = asyncio.ensure_future(worker.launcher_gone())
    await asyncio.wait({end, gone}, return_when=asyncio.FIRST_COMPLETED)
    end.cancel()
    gone.cancel()
    if not asked.is_set():
        log.error("the launcher has died; running jobs go on, start pjwd again to reach them")
        return 1
    log.info("stopping; %d jobs go on", worker.live_count)
    return 0
