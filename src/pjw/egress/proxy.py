"""Accepts jobs' connections, and connects to the hosts that they may reach: an HTTP proxy, and fixed ways.

h11 parses a job's requests to the proxy, with bounds on their size and time. The proxy does not look at the
bytes of a tunnel (relay.py).
"""

import asyncio
import errno
import http
import select
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import h11

from pjw.egress import relay
from pjw.egress.proxy_requests import Failure, Wanted, passed_on, request_for, wanted_of
from pjw.egress.targets import Targets
from pjw.network import Allowed

# the most bytes of a request or an answer without its body
HEAD_BYTES_MAX: Final = 16_384
HEAD_SECONDS: Final = 10.0
# Seconds that the proxy waits for the job to read an answer that refuses a request.
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 1 << 20
_RECEIVED_AT_ONCE: Final = 65_536
_RETRY_SECONDS: Final = 0.5
# The kernel's own limits would let it grow to megabytes each way.
_BUFFER_BYTES: Final = 1 << 18
# A job that has closed a connection looks like one that has sent all and still reads. The kernel forgets a
# closed one after a minute, and then answers a question of ours with a reset.
_KEEPALIVE_SECONDS: Final = 30
_ESTABLISHED: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"

# job, client, host, port, result
Report = Callable[[int, str, str, int, str], None]


@dataclass(slots=True, eq=False)
class ProxiedJob:
    """A job, the names that it may reach, its listeners and its connections."""

    id: int
    client: str
    allow: Sequence[Allowed]
    listeners: list[socket.socket] = field(default_factory=list)
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    def may_reach(self, wanted: Wanted) -> bool:
        """Return whether the job has asked for that host and port, and may reach them."""
        return any(each.has(wanted.host, wanted.port) for each in self.allow)


class Proxy:
    """All jobs with names on the network."""

    def __init__(self, targets: Targets, report: Report, connections_max: int, total_max: int) -> None:
        self._targets: Final = targets
        self._report: Final = report
        self._max: Final = connections_max
        self._total_max: Final = total_max
        self._jobs: Final[dict[int, ProxiedJob]] = {}
        self._of_client: Final[Counter[str]] = Counter()
        # of jobs' connections that no task reads, as their hosts have yet to answer; by descriptor
        self._errors: Final = select.epoll()
        self._tasks: Final[dict[int, asyncio.Task[None]]] = {}
        asyncio.get_running_loop().add_reader(self._errors, self._on_errors)

    def add(
        self,
        job_id: int,
        client: str,
        allow: Sequence[str],
        listeners: Sequence[tuple[socket.socket, str, int]],
    ) -> None:
        """Accept a job's connections: at its proxy (the listener without a host), and at the others."""
        self.remove(job_id)
        job = self._jobs[job_id] = ProxiedJob(job_id, client, [Allowed.of(each) for each in allow])
        for listener, host, port in listeners:
            job.listeners.append(listener)
            self._accept_from(job, listener, Wanted(host, port) if host else None)

    def remove(self, job_id: int) -> None:
        """Accept no more of a job that has ended, and end its connections."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        for listener in job.listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        for task in job.tasks:
            task.cancel()

    def _accept_from(self, job: ProxiedJob, listener: socket.socket, wanted: Wanted | None) -> None:
        if self._jobs.get(job.id) is job:
            accept = partial(self._accept, job, listener, wanted)
            asyncio.get_running_loop().add_reader(listener, accept)

    def _accept(self, job: ProxiedJob, listener: socket.socket, wanted: Wanted | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            peer, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                # nothing tells us when there is room again
                loop.remove_reader(listener)
                loop.call_later(_RETRY_SECONDS, self._accept_from, job, listener, wanted)
            return
        peer.setblocking(False)
        with suppress(OSError):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
            # bytes that wait here are no job's memory, and loopback is as fast with less
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                peer.setsockopt(socket.SOL_SOCKET, buffer, _BUFFER_BYTES)
        # One client may have half of all, and half of those that others leave: so there is room for another.
        free = self._total_max - self._of_client.total()
        has_room = len(job.tasks) < self._max and self._of_client[job.client] < free
        if not has_room:
            self._turn_away(job, peer, wanted)
            return
        self._of_client[job.client] += 1
        task = loop.create_task(self._serve(job, peer, wanted))
        job.tasks.add(task)
        number = peer.fileno()
        self._tasks[number] = task
        with suppress(OSError):
            # edges alone, since the end of both directions would be reported again and again
            self._errors.register(number, select.EPOLLET)
        task.add_done_callback(partial(self._over, job, number))

    def _on_errors(self) -> None:
        """End connections that jobs have reset, or closed some time ago."""
        for number, events in self._errors.poll(0):
            task = self._tasks.get(number)
            if events & select.EPOLLERR and task is not None:
                task.cancel()

    def _turn_away(self, job: ProxiedJob, peer: socket.socket, wanted: Wanted | None) -> None:
        with peer, suppress(OSError):
            if wanted is None:
                peer.send(_answer(503, "too many connections"))
                peer.shutdown(socket.SHUT_WR)
        self._report(job.id, job.client, wanted.host if wanted else "", wanted.port if wanted else 0, "busy")

    def _over(self, job: ProxiedJob, number: int, task: "asyncio.Task[None]") -> None:
        job.tasks.discard(task)
        if self._tasks.get(number) is task:
            del self._tasks[number]
        self._of_client[job.client] -= 1
        if not self._of_client[job.client]:
            del self._of_client[job.client]
        # a bug: the loop's handler logs it, and it ends this connection alone
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"a connection of job {job.id} ends", "exception": error}
            )

    async def _serve(self, job: ProxiedJob, peer: socket.socket, wanted: Wanted | None) -> None:
        with peer, suppress(OSError, h11.ProtocolError):
            try:
                if wanted is not None:
                    with await self._connect(job, wanted) as upstream:
                        await relay.relay(peer, upstream)
                else:
                    await self._serve_http(job, peer)
            except Failure as failure:
                if wanted is None:
                    await _say(peer, failure)

    async def _connect(self, job: ProxiedJob, wanted: Wanted) -> socket.socket:
        """Connect to a host, and report the result. Raises Failure."""
        result = "connected"
        try:
            if not job.may_reach(wanted):
                name = Allowed(wanted.host, wanted.port)
                words = (
                    f"this job may not reach {name}; start it with --allow {name}, if your operator offers it"
                )
                raise Failure("not_allowed", 403, words)
            return await self._targets.connect(wanted.host, wanted.port, job.client)
        except Failure as failure:
            result = failure.result
            raise
        except asyncio.CancelledError:
            result = "unreachable"
            raise
        finally:
            self._report(job.id, job.client, wanted.host, wanted.port, result)

    async def _serve_http(self, job: ProxiedJob, peer: socket.socket) -> None:
        """Serve one request. Raises Failure.

        There is no second one: a tunnel has none, and otherwise the proxy tells the other side to close.
        """
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                request = await _next_event(connection, peer, HEAD_BYTES_MAX)
            if not isinstance(request, h11.Request):
                # the job opened and closed the connection without a word
                return
            wanted = wanted_of(request)
            if not wanted.path and not isinstance(connection.next_event(), h11.EndOfMessage):
                raise Failure("invalid", 400, "CONNECT has no body")
        except TimeoutError:
            self._refused(job, "slow")
            raise Failure("slow", 408, f"no whole request within {HEAD_SECONDS:.0f} s") from None
        except h11.RemoteProtocolError as error:
            self._refused(job, "invalid")
            raise Failure("invalid", error.error_status_hint, f"this is no request: {error}") from None
        except Failure as failure:
            self._refused(job, failure.result)
            raise
        with await self._connect(job, wanted) as upstream:
            loop = asyncio.get_running_loop()
            if wanted.path:
                await _pass_on(connection, request, wanted, peer, upstream)
                await _linger(peer)
                return
            await loop.sock_sendall(peer, _ESTABLISHED)
            if early := connection.trailing_data[0]:
                await loop.sock_sendall(upstream, early)
            await relay.relay(peer, upstream)

    def _refused(self, job: ProxiedJob, result: str) -> None:
        self._report(job.id, job.client, "", 0, result)


async def _next_event(
    connection: h11.Connection, source: socket.socket, size: int = _RECEIVED_AT_ONCE
) -> object:
    """Return the next event of a connection. Raises h11.RemoteProtocolError and OSError."""
    loop = asyncio.get_running_loop()
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await loop.sock_recv(source, size))
    return event


async def _pass_on(
    ours: h11.Connection, request: h11.Request, wanted: Wanted, peer: socket.socket, upstream: socket.socket
) -> None:
    """Send a request and its body, and the answer back. Raises Failure if the answer has not begun."""
    loop = asyncio.get_running_loop()
    theirs = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def send(connection: h11.Connection, sink: socket.socket, event: h11.Event) -> None:
        if data := connection.send(event):
            await loop.sock_sendall(sink, data)

    async def upload() -> None:
        while True:
            event = await _next_event(ours, peer)
            if isinstance(event, h11.Data):
                await send(theirs, upstream, h11.Data(data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                # the proxy drops trailers, too
                await send(theirs, upstream, h11.EndOfMessage())
                return
            else:
                raise ConnectionAbortedError("the job has hung up")

    await send(theirs, upstream, request_for(request, wanted))
    uploading = asyncio.ensure_future(upload())
    is_answered = False
    try:
        while True:
            event = await _next_event(theirs, upstream)
            match event:
                case h11.InformationalResponse() if event.status_code != http.HTTPStatus.SWITCHING_PROTOCOLS:
                    await send(ours, peer, _informational(event))
                case h11.Response():
                    is_answered = True
                    await send(ours, peer, _response(event))
                case h11.Data():
                    await send(ours, peer, h11.Data(data=event.data))
                case h11.EndOfMessage():
                    await send(ours, peer, h11.EndOfMessage())
                    return
                case _:
                    raise h11.RemoteProtocolError("an answer that nobody asked for")
    except (h11.RemoteProtocolError, OSError):
        if is_answered:
            raise
        raise Failure("unreachable", 502, f"{wanted.host} did not answer in HTTP/1.1") from None
    finally:
        uploading.cancel()
        [failed] = await asyncio.gather(uploading, return_exceptions=True)
        # a job that hung up, or no HTTP: the other direction shows it; all else is a bug
        if isinstance(failed, Exception) and not isinstance(failed, OSError | h11.ProtocolError):
            raise failed


def _informational(event: h11.InformationalResponse) -> h11.InformationalResponse:
    return h11.InformationalResponse(
        status_code=event.status_code, headers=list(event.headers), reason=event.reason
    )


def _response(event: h11.Response) -> h11.Response:
    headers = passed_on(event.headers)
    return h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)


def _answer(status: int, words: str) -> bytes:
    body = f"pjw: {words}\n".encode()
    head = (
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _say(peer: socket.socket, failure: Failure) -> None:
    """Answer with a failure."""
    with suppress(OSError):
        async with asyncio.timeout(LINGER_SECONDS):
            await asyncio.get_running_loop().sock_sendall(peer, _answer(failure.status, str(failure)))
        await _linger(peer)


async def _linger(peer: socket.socket) -> None:
    """Let the job read the answer: a close with unread bytes of the job would discard the answer."""
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        peer.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LINGER_SECONDS):
            left = LINGER_BYTES
            while left > 0 and (data := await loop.sock_recv(peer, _RECEIVED_AT_ONCE)):
                left -= len(data)


def descriptors_for(total_max: int) -> int:
    """Return the descriptors that all connections take, without jobs' listeners."""
    return (2 + relay.DESCRIPTORS) * total_max
