"""pjwd serve, the part without privilege: the gRPC server from its first byte to its drain."""

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import grpc

from pjw.certs.files import ServerCredentials, ServerFiles
from pjw.certs.revocation import RevocationList
from pjw.certs.tls import probe_tls12
from pjw.errors import ConfigError
from pjw.server.accept import make_server
from pjw.server.audit import AuditLog
from pjw.server.config import ServerConfig
from pjw.server.guard import Guard
from pjw.server.reload import Reloader
from pjw.server.service import JobWorkerService
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


@dataclass(frozen=True, slots=True)
class Serving:
    """Where to listen, as whom, and for whom."""

    host: str
    port: int
    files: ServerFiles
    credentials: ServerCredentials
    revoked: RevocationList
    config: ServerConfig
    settings: WorkerSettings
    # the descriptor of the audit log, where there is one
    audit: int | None


def run(serving: Serving, state: StateDir, launcher: LauncherProcess) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises PjwError when it cannot listen."""
    return asyncio.run(_run(serving, state, launcher))


async def _run(serving: Serving, state: StateDir, launcher: LauncherProcess) -> int:
    host = serving.host
    async with Worker(state, launcher, serving.settings) as worker:
        await worker.adopt()
        audit = AuditLog(serving.audit) if serving.audit is not None else None
        guard = Guard(serving.config, audit, serving.revoked)
        reloader = Reloader(serving.files, serving.credentials, guard, worker)
        server = make_server(OPTIONS)
        server.add_generic_rpc_handlers((JobWorkerService(worker).handlers(guard),))
        port = _listen(server, host, serving.port, reloader.tls())
        await server.start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.ask)
        reloads = asyncio.ensure_future(reloader.run())
        try:
            await _refuse_tls12(host, port)
            print(f"pjwd: ready on {_address(host, port)}", file=sys.stderr, flush=True)
            _notify_systemd("READY=1")
            return await _until_end(worker)
        finally:
            _notify_systemd("STOPPING=1")
            # Followers are told first: stop() alone would let them run into its grace period.
            guard.drain()
            reloads.cancel()
            await server.stop(DRAIN_SECONDS)
            if audit is not None:
                audit.close()


def _listen(server: grpc.aio.Server, host: str, port: int, tls: grpc.ServerCredentials) -> int:
    try:
        return server.add_secure_port(_address(host, port), tls)
    except RuntimeError:
        # gRPC does not say why
        raise ConfigError(f"cannot listen on {_address(host, port)}: {_why_not(host, port)}") from None


def _why_not(host: str, port: int) -> str:
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "gRPC refuses the address, or the certificate"


async def _refuse_tls12(host: str, port: int) -> None:
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  the operator's choice
    if await asyncio.to_thread(probe_tls12, target, port):
        raise ConfigError(
            "this server would speak TLS 1.2, so it does not serve",
            hint="this build of gRPC ignores its cipher setting",
        )


async def _until_end(worker: Worker) -> int:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
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


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _notify_systemd(state: str) -> None:
    """Tell systemd, where it started us with Type=notify (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + path[1:] if path.startswith("@") else path)
        notify.send(state.encode())
