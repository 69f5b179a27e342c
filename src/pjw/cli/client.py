"""Typed calls to the service; raises pjw.errors, never grpc.RpcError."""

import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC reads it once, when imported

import grpc

from pjw import errors
from pjw.certs.files import load_client_credentials
from pjw.cli.settings import ClientSettings
from pjw.model import Job, JobSpec
from pjw.rpc.convert import job_from_message, spec_to_message
from pjw.rpc.status import ADMITTED_KEY, ERRNO_KEY, HINT_KEY, error_of
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub

CALL_SECONDS: Final = 60
# How long `logs` waits for a server that went away in mid-stream: a restart with room to spare.
RECONNECT_SECONDS: Final = 120
RECONNECT_PAUSE_SECONDS: Final = 0.2

_OPTIONS: Final[list[tuple[str, Any]]] = [
    # A job id is not sent through somebody's web proxy, and loopback has no use for one.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    # a server that is gone without a word is noticed while we only listen
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
]
_LOOPBACK: Final = ("127.0.0.1:", "[::1]:")

# The server went away: gRPC itself says CANCELLED of calls that reach one as it ends.
_GONE: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

_T = TypeVar("_T")


class Client:
    """One connection. Use it as a context manager."""

    def __init__(self, settings: ClientSettings, *, all_clients: bool = False) -> None:
        """Raises ConfigError for files that cannot be read; the network is not touched yet.

        With *all_clients*, jobs that are named or listed may be anybody's, if our role allows it.
        """
        self._settings: Final = settings
        self._all_clients: Final = all_clients
        credentials = load_client_credentials(settings.ca_crt, settings.client_crt, settings.client_key)
        options = list(_OPTIONS)
        if settings.server.startswith(_LOOPBACK):
            # A loopback address is localhost by definition (RFC 6761, 6.3); the seed's recipe and
            # ours put that name, and not always the address, into a server's certificate.
            options.append(("grpc.ssl_target_name_override", "localhost"))
        self._channel: Final = grpc.secure_channel(
            settings.server,
            grpc.ssl_channel_credentials(credentials.ca_pem, credentials.key_pem, credentials.crt_pem),
            options,
        )
        self._stub: Final = JobWorkerServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def start(self, spec: JobSpec) -> Job:
        """Start a job."""
        request = spec_to_message(spec)
        try:
            return job_from_message(self._stub.Start(request, timeout=CALL_SECONDS).job)
        except grpc.RpcError as error:
            number = _metadata(error).get(ERRNO_KEY)
            if number is not None:
                raise errors.LaunchError(spec.argv[0], int(number)) from None
            self._raise(error)

    def get(self, job_id: int) -> Job:
        """One job."""
        request = pb.GetRequest(id=_wire_id(job_id), all_clients=self._all_clients)
        return job_from_message(self._call(lambda: self._stub.Get(request, timeout=CALL_SECONDS), job_id).job)

    def list(self) -> Iterator[Job]:
        """All of the caller's jobs, or everybody's, page by page."""
        token = ""
        while True:
            request = pb.ListRequest(page_token=token, all_clients=self._all_clients)
            page = self._call(lambda: self._stub.List(request, timeout=CALL_SECONDS))  # noqa: B023
            yield from map(job_from_message, page.jobs)
            token = page.next_page_token
            if not token:
                return

    def stop(self, job_id: int) -> Job:
        """Stop a job; its final state. Without a deadline: the job's grace period is the server's matter."""
        request = pb.StopRequest(id=_wire_id(job_id), all_clients=self._all_clients)
        return job_from_message(self._call(lambda: self._stub.Stop(request), job_id).job)

    def delete(self, job_id: int) -> None:
        """Forget an ended job, with its output."""
        request = pb.DeleteRequest(id=_wire_id(job_id), all_clients=self._all_clients)
        self._call(lambda: self._stub.Delete(request, timeout=CALL_SECONDS), job_id)

    def logs(self, job_id: int, offset: int = 0) -> Iterator[bytes]:
        """The output from *offset* on, to the end of the job.

        A connection lost in mid-stream is made again, and the stream goes on at the exact
        byte. Raises ServerUnreachableError when that does not succeed for RECONNECT_SECONDS.
        """
        admitted = False
        lost_at: float | None = None
        while True:
            request = pb.LogsRequest(id=_wire_id(job_id), offset=offset, all_clients=self._all_clients)
            call = self._stub.Logs(request)
            try:
                if ADMITTED_KEY in dict(call.initial_metadata() or ()):
                    admitted, lost_at = True, None
                for response in call:
                    offset += len(response.data)
                    yield response.data
                return
            except grpc.RpcError as error:
                # Only a stream that once began is taken up again: a first refusal is an answer.
                if not admitted or error.code() not in _GONE:
                    self._raise(error, job_id)
            finally:
                call.cancel()
            lost_at = lost_at or time.monotonic()
            self._reconnect(lost_at, offset)

    def _reconnect(self, lost_at: float, offset: int) -> None:
        # A server that is up and still refuses (it drains) must not be asked in a tight loop.
        time.sleep(RECONNECT_PAUSE_SECONDS)
        try:
            left = lost_at + RECONNECT_SECONDS - time.monotonic()
            grpc.channel_ready_future(self._channel).result(max(0.0, left))
        except grpc.FutureTimeoutError:
            raise errors.ServerUnreachableError(
                f"the connection to {self._settings.server} was lost after {offset} bytes of output,"
                f" and did not come back within {RECONNECT_SECONDS} s",
                hint="the job goes on without it; ask for its logs again later",
            ) from None

    def _call(self, call: Callable[[], _T], job_id: int = 0) -> _T:
        try:
            return call()
        except grpc.RpcError as error:
            self._raise(error, job_id)

    def _raise(self, error: grpc.RpcError, job_id: int = 0) -> NoReturn:
        code, text = error.code(), error.details() or ""
        if code in (*_GONE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise self._unreachable(code, text) from None
        raise error_of(code, text, _metadata(error).get(HINT_KEY), job_id) from None

    def _unreachable(self, code: grpc.StatusCode, text: str) -> errors.ServerUnreachableError:
        """gRPC's one word for everything that can be wrong with a connection, told apart."""
        server = self._settings.server
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.ServerUnreachableError(f"{server} did not answer within {CALL_SECONDS} s")
        if code is grpc.StatusCode.CANCELLED:
            return errors.ServerUnreachableError(f"{server} went away before it had answered")
        if "Connection refused" in text:
            return errors.ServerUnreachableError(
                f"cannot connect to {server}: connection refused", hint="is pjwd running there?"
            )
        if "DNS" in text or "errors resolving" in text or "name resolution" in text.lower():
            return errors.ServerUnreachableError(
                f"cannot connect to {server}: no such host", hint="see --server and PJW_SERVER"
            )
        if "is not in peer certificate" in text:
            return errors.ServerUnreachableError(
                f"the certificate of {server} is for another host name",
                hint="connect by a name that is in it (subjectAltName), for example localhost",
            )
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return errors.ServerUnreachableError(
                f"the certificate of {server} has expired, or is not one of the authority"
                f" in {self._settings.ca_crt}",
                hint="see --ca-crt and PJW_CA_CRT",
            )
        if "Socket closed" in text or "handshake" in text.lower() or "reset by peer" in text:
            # A server that refuses a certificate just hangs up: look at ours for the reason.
            from pjw.certs.credentials import diagnose_client

            settings = self._settings
            reason = diagnose_client(settings.ca_crt, settings.client_crt, settings.client_key)
            return errors.ServerUnreachableError(
                f"{server} closed the connection" + (f": {reason}" if reason else " after the TLS handshake"),
                hint=None
                if reason
                else "does it accept client certificates of this authority, and is it pjwd?",
            )
        return errors.ServerUnreachableError(f"cannot reach {server}: {text}")


def _metadata(error: grpc.RpcError) -> dict[str, str]:
    # keys and values, whatever the stubs make of it
    pairs: Any = error.trailing_metadata() or ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def _wire_id(job_id: int) -> int:
    """An id that fits into the message. Raises JobNotFoundError: one that does not is nobody's."""
    if not -(2**63) <= job_id < 2**63:
        raise errors.JobNotFoundError(job_id)
    return job_id
