"""Metrics for a Prometheus, by HTTP on an address of their own: docs/monitoring.md has them all.

Calls are counted when they begin and end, on the event loop; nothing is done for a byte or a message. All
else is looked up at a scrape. Each scrape has a thread, of which there are few, and a deadline: a scraper
that does not read its answer keeps nothing else waiting.
"""

import asyncio
import logging
import socket
import sys
import threading
from collections import Counter as Tally
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from socketserver import TCPServer, ThreadingMixIn
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from pjw.certs.checks import first_end
from pjw.errors import (
    ConfigError,
    InvalidJobError,
    LauncherGoneError,
    LaunchError,
    LimitReachedError,
    NotAllowedError,
    NotAuthenticatedError,
    PageTokenError,
    PjwError,
    ServerDrainingError,
    WorkerClosedError,
    describe_errno,
)
from pjw.model import KNOWN_STATES, EndReason, JobState
from pjw.server.address import held_addresses, shown_address
from pjw.server.audit import CANCELLED, CallRecord
from pjw.server.backend import Backend
from pjw.server.connections import ConnectionNumbers, Connections
from pjw.server.log_setup import PLAIN, LogWriter
from pjw.server.quota import ClientLimits, NamedClient
from pjw.server.reload import Reloader
from pjw.worker.egress import RESULTS
from pjw.worker.metrics import ClientNumbers, WorkerNumbers

# looked up when this is imported, while root: an installation may lie where no other user may look
_VERSION: Final = version("pjw")
SCRAPES_MAX: Final = 8
SCRAPE_SECONDS: Final = 10
# To ask, to wait for the answer and to read it.
CONNECTION_SECONDS: Final = SCRAPE_SECONDS + 5
# Nothing tells when a descriptor is free again.
_RETRY_SECONDS: Final = 1
# The busiest clients, which have their own metrics. Each is four series that Prometheus keeps.
CLIENTS_SHOWN: Final = 100
# The name that stands for the clients beyond the busiest: no client can have it.
OTHERS: Final = "(other)"
# These take as long as their callers like, which says nothing of us.
LASTING: Final = frozenset(
    {"Logs", "Wait", "WriteInput", "Forward", "WatchUsage", "WatchJobs", "HealthWatch", "Reflect"}
)
# From a cached answer to a stop with a long grace period.
CALL_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
START_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
INTERNAL: Final = grpc.StatusCode.INTERNAL.name
_REJECTIONS: Final[dict[type[Exception], str]] = {
    NotAuthenticatedError: "not_authenticated",
    NotAllowedError: "not_allowed",
    LauncherGoneError: "unavailable",
    ServerDrainingError: "unavailable",
    WorkerClosedError: "unavailable",
    InvalidJobError: "invalid",
    PageTokenError: "invalid",
    LimitReachedError: "no_resources",
}

_NUMBERS: Final = [name for name in ClientLimits.__struct_fields__ if name != "by_name"]
# pjwd holds calls beyond their rate, and a share refuses nothing.
_NOT_REFUSED: Final = {"calls_per_second", *NamedClient.__struct_fields__}
_LIMITS: Final = [*(name for name in _NUMBERS if name not in _NOT_REFUSED), "memory_overcommit"]

_Request = socket.socket | tuple[bytes, socket.socket]

log: Final = logging.getLogger(__name__)
# the logger whose records are written at every level, see serve.py
ready: Final = logging.getLogger("pjw.ready")


class ServerMetrics:
    """Counts calls as the guard reports them, and serves the counts."""

    def __init__(self, worker: Backend, connections: Connections, log_writer: LogWriter) -> None:
        self._worker: Final = worker
        self._connections: Final = connections
        self.log_writer: Final = log_writer
        self._loop: Final = asyncio.get_running_loop()
        self._under_way: Final[set[CallRecord]] = set()
        # when a counter began is no news: that is when pjwd did
        disable_created_metrics()  # type: ignore[no-untyped-call]
        # by method: output that was sent, input that came
        self._bytes: Final[Tally[str]] = Tally()
        self.registry: Final = CollectorRegistry(auto_describe=False)
        self._calls: Final = Counter(
            "pjw_calls", "Calls that have ended.", ["method", "code"], registry=self.registry
        )
        self._seconds: Final = Histogram(
            "pjw_call_duration_seconds",
            "How long calls with one answer took.",
            ["method"],
            buckets=CALL_BUCKETS,
            registry=self.registry,
        )
        self._rejected: Final = Counter(
            "pjw_calls_rejected",
            "Calls that were refused; reason is a limit that was reached, or what was wrong.",
            ["reason"],
            registry=self.registry,
        )
        self._starts: Final = Counter(
            "pjw_starts", "Starts by their result.", ["result"], registry=self.registry
        )
        self._start_seconds: Final = Histogram(
            "pjw_start_duration_seconds",
            "From the call to a command that was executed.",
            buckets=START_BUCKETS,
            registry=self.registry,
        )
        # Every possible series exists from the start: a counter that begins at 1 shows no increase. Not so
        # for each method with each code, of which there are hundreds.
        for result in ("started", "refused", "not_executable", "cancelled", "failed"):
            self._starts.labels(result)
        for reason in (*_LIMITS, *_REJECTIONS.values()):
            self._rejected.labels(reason)
        ProcessCollector(registry=self.registry)

    def call_began(self, record: CallRecord) -> None:
        """Count a call as under way."""
        self._under_way.add(record)

    def call_ended(self, record: CallRecord) -> None:
        """Count a call that is over."""
        self._under_way.discard(record)
        self._bytes[record.method] += record.bytes
        self._calls.labels(record.method, record.code).inc()
        if record.method not in LASTING:
            self._seconds.labels(record.method).observe(record.seconds())
        reason = _rejection(record.error)
        if reason is not None:
            self._rejected.labels(reason).inc()
        if record.method == "Start":
            self._starts.labels(_result(record)).inc()
            if record.code == "OK":
                self._start_seconds.observe(record.seconds())

    @contextmanager
    def serve(self, address: tuple[str, int], reloader: Reloader) -> Iterator[None]:
        """Answer at *address* until the end of the block. Raises ConfigError."""
        self.registry.register(StateCollector(self, reloader))
        with ExitStack() as stack:
            with held_addresses(*address, " for metrics") as addresses:
                servers = [stack.enter_context(_serving(each, self.registry)) for each in addresses]
            # when the operator asks for any free port, say at every level which one it is
            asked = ready.info if address[1] == 0 else log.info
            asked("metrics on %s", shown_address(address[0], servers[0].server_port), extra=PLAIN)
            yield

    def numbers(self) -> tuple[WorkerNumbers, dict[str, int], Tally[str]]:
        """Return the worker's numbers, calls under way and bytes, by method; call it from any thread."""
        return asyncio.run_coroutine_threadsafe(self._look(), self._loop).result(SCRAPE_SECONDS)

    def connections(self) -> ConnectionNumbers:
        """Return the numbers of the connections to the port; call it from any thread."""
        return asyncio.run_coroutine_threadsafe(self._look_at_port(), self._loop).result(SCRAPE_SECONDS)

    async def _look_at_port(self) -> ConnectionNumbers:
        return self._connections.numbers()

    async def _look(self) -> tuple[WorkerNumbers, dict[str, int], Tally[str]]:
        numbers = await self._worker.numbers()
        under_way: dict[str, int] = {"Logs": 0}
        streamed = self._bytes.copy()
        for record in self._under_way:
            under_way[record.method] = under_way.get(record.method, 0) + 1
            streamed[record.method] += record.bytes
        return numbers, under_way, streamed


@contextmanager
def _serving(address: tuple[str, int], registry: CollectorRegistry) -> Iterator["_Server"]:
    try:
        server = _Server(address)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot listen on {shown_address(*address)} for metrics: {why}") from error
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.run, name="pjw-metrics", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.end()
        thread.join()
        server.server_close()


class StateCollector(Collector):
    """The numbers that are looked up at a scrape."""

    def __init__(self, metrics: ServerMetrics, reloader: Reloader) -> None:
        self._metrics: Final = metrics
        self._reloader: Final = reloader

    def collect(self) -> Iterator[Metric]:
        """Yield the series; those that need the worker are left out while it does not answer."""
        yield InfoMetricFamily("pjw", "The version of pjwd.", {"version": _VERSION})
        yield from self._operator()
        try:
            yield from _port(self._metrics.connections())
            numbers, under_way, streamed = self._metrics.numbers()
        except (PjwError, TimeoutError, CancelledError) as error:
            # the numbers that are known without the worker are served all the same
            log.error("cannot look up metrics: %r", error)
            return
        yield from _jobs(numbers)
        yield _one("pjw_followers", "Outputs that are being followed.", under_way["Logs"])
        yield _by(
            "pjw_calls_under_way", "Calls that have not ended, streams included.", "method", under_way.items()
        )
        yield _total("pjw_output_streamed_bytes", "Bytes of output that clients were sent.", streamed["Logs"])
        yield _total("pjw_input_received_bytes", "Bytes of input that clients sent.", streamed["WriteInput"])
        yield from of_clients(numbers)
        yield _one("pjw_disk_size_bytes", "The file system of the state directory.", numbers.disk_bytes)
        yield _one("pjw_disk_free_bytes", "The part of it that is free.", numbers.disk_free_bytes)
        waiting = sum(client.queued for client in numbers.clients.values())
        yield _one("pjw_queue_jobs", "Jobs that wait in the queue, or are being started from it.", waiting)
        yield _one(
            "pjw_queue_oldest_seconds",
            "How long the job has waited that waits longest for nothing but its turn; 0 when none does.",
            numbers.oldest_queued_seconds,
        )
        yield _total("pjw_queue_admissions", "Jobs that were started from the queue.", numbers.admissions)
        made = CounterMetricFamily(
            "pjw_egress_connections", "Connections of jobs to names on the network.", labels=("result",)
        )
        for result in RESULTS:
            made.add_metric((result,), numbers.connections.get(result, 0))
        yield made
        yield _one("pjw_launcher_up", "Whether the launcher lives.", numbers.launcher_up)
        yield _one("pjw_drained", "Whether the operator has drained the machine.", numbers.drained)
        for each in numbers.more:
            if each.label:
                yield _by(each.name, each.text, each.label, each.values.items())
            else:
                yield _total(each.name, each.text, each.total)

    def _operator(self) -> Iterator[Metric]:
        lost = self._metrics.log_writer.lost_lines
        yield _total("pjw_log_lost_lines", "Lines of the log that nothing read in time.", lost)
        quotas = self._reloader.config.clients
        yield _by(
            "pjw_limit",
            "The bound in the configuration, below [clients]; 0 is no limit.",
            "limit",
            [(name, float(getattr(quotas, name))) for name in _NUMBERS],
        )
        reloads = CounterMetricFamily("pjw_reloads", "Reloads of files.", labels=("files", "result"))
        for (what, result), count in sorted(self._reloader.counts.items()):
            reloads.add_metric((what, result), count)
        yield reloads
        credentials = self._reloader.credentials
        ends = [("server", credentials.crt_pem), ("ca", credentials.ca_pem)]
        yield _by(
            "pjw_certificate_expiry_timestamp_seconds",
            "When the first certificate of a file expires.",
            "certificate",
            [(name, first_end(pem).timestamp()) for name, pem in ends],
        )


def _port(numbers: ConnectionNumbers) -> Iterator[Metric]:
    yield _total("pjw_connections_accepted", "Handshakes that were begun at the port.", numbers.accepted)
    yield _by(
        "pjw_connections",
        "Connections to the port, by whether a call has come over them.",
        "state",
        [("called", numbers.open - numbers.unproven), ("unproven", numbers.unproven)],
    )
    closed = CounterMetricFamily(
        "pjw_connections_closed", "Connections that pjwd has closed, by why.", labels=("reason",)
    )
    for cause, count in numbers.closed.items():
        closed.add_metric((cause,), count)
    yield closed


def _jobs(numbers: WorkerNumbers) -> Iterator[Metric]:
    clients = numbers.clients.values()
    # waiting jobs are apart: a sum over states is of running jobs
    running = [state for state in KNOWN_STATES if not state.final and state is not JobState.QUEUED]
    live = [(state.value, numbers.live.get(state, 0)) for state in running]
    stored = sum(client.stored_jobs for client in clients)
    yield _by(
        "pjw_jobs", "Jobs by state; ended ones are those that are kept.", "state", [*live, ("ended", stored)]
    )
    yield _one(
        "pjw_stored_bytes",
        "Output of the ended jobs that are kept.",
        sum(each.stored_bytes for each in clients),
    )
    yield _one("pjw_jobs_output_held", "Jobs whose output waits for the disk.", numbers.output_held)
    ends = CounterMetricFamily("pjw_jobs_ended", "Jobs that have ended, by reason.", labels=("reason",))
    for reason in EndReason:
        ends.add_metric((reason.value,), numbers.ends.get(reason, 0))
    yield ends


def of_clients(numbers: WorkerNumbers) -> Iterator[Metric]:
    """Yield the series of each of the busiest clients, and of all others together."""
    ranked = sorted(
        numbers.clients.items(),
        key=lambda item: (item[1].running, item[1].queued, item[1].stored_bytes),
        reverse=True,
    )
    shown = ranked[:CLIENTS_SHOWN]
    if rest := [client for _, client in ranked[CLIENTS_SHOWN:]]:
        together = ClientNumbers(
            sum(client.running for client in rest),
            sum(client.stored_jobs for client in rest),
            sum(client.stored_bytes for client in rest),
            sum(client.queued for client in rest),
        )
        shown = [*shown, (OTHERS, together)]
    for name, member, text in (
        ("pjw_client_running_jobs", "running", "Jobs of a client that have not ended."),
        ("pjw_client_stored_jobs", "stored_jobs", "Ended jobs of a client that are kept."),
        ("pjw_client_stored_bytes", "stored_bytes", "Output of those."),
        ("pjw_client_queued_jobs", "queued", "Jobs of a client in the queue."),
    ):
        yield _by(name, text, "client", [(who, getattr(client, member)) for who, client in shown])


def _one(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


def _total(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value)


def _by(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for key, value in values:
        family.add_metric((key,), value)
    return family


def _rejection(error: Exception | None) -> str | None:
    if isinstance(error, LimitReachedError) and error.limit is not None:
        return error.limit
    return None if error is None else _REJECTIONS.get(type(error))


def _result(record: CallRecord) -> str:
    if record.error is None:
        return "cancelled" if record.code == CANCELLED else "started"
    if isinstance(record.error, LaunchError):
        return "not_executable"
    # the one code of errors that are our own fault
    return "failed" if record.code == INTERNAL else "refused"


class _Handler(WSGIRequestHandler):
    # a client that is slow to ask or to read is dropped (socketserver)
    timeout = SCRAPE_SECONDS

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base's name
        """Log nothing: a scraper would write into our log."""

    def log_error(self, format: str, *args: object) -> None:  # noqa: A002  the base's name
        """Log nothing, for the same reason."""


def _hang_up(request: _Request) -> None:
    # not closed: its descriptor is the thread's, which hears of it
    with suppress(OSError):
        if isinstance(request, socket.socket):
            request.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int]) -> None:
        self._free: Final = threading.BoundedSemaphore(SCRAPES_MAX)
        self._ending: Final = threading.Event()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def run(self) -> None:
        """Answer until `end`. Not serve_forever(), which spins when descriptors are out, and ends late."""
        while not self._ending.is_set():
            try:
                request, client_address = self.get_request()
            except OSError as error:
                if not self._ending.wait(_RETRY_SECONDS):
                    log.warning("cannot take who asks for metrics: %s", describe_errno(error.errno or 0))
                continue
            self.process_request(request, client_address)

    def end(self) -> None:
        """Have `run` return."""
        self._ending.set()
        # wakes accept(2)
        self.socket.shutdown(socket.SHUT_RDWR)

    def server_bind(self) -> None:
        # not HTTPServer's, which asks the resolver for our name
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "pjwd", self.server_address[1]
        self.setup_environ()

    def process_request(self, request: _Request, client_address: object) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:
            # there is no thread for it
            log.warning("cannot answer who asks for metrics: %s", error)
            self._free.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: _Request, client_address: object) -> None:
        # the timeout of the handler is for one read or write, and a byte now and then is not late for it
        deadline = threading.Timer(CONNECTION_SECONDS, _hang_up, (request,))
        deadline.daemon = True
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("a scrape failed: %s", sys.exception())
