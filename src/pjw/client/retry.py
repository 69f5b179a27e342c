"""Failed calls: the error for the caller, and whether and when to call again. Neither calls nor sleeps.

Every call may be repeated: reading changes nothing, a job that has ended can be stopped again, and a Start
has a request id, by which the server knows it. A call that never reached a server is tried again only by a
client that has been answered before: for a new one "connection refused" is the answer. A Start alone waits
some seconds for a port on which no process listens: scripts start jobs also while pjwd restarts.

A client that pjwd has answered before also tries again when its calls come too fast for the operator's limits
(calls at once, starts a second). It reports every other limit (running jobs, bytes) at once.
"""

import os
import threading
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol

import grpc

from pjw import errors
from pjw.client.config import ClientSettings
from pjw.given import host_of
from pjw.rpc.status import ERROR_KEY, error_of

CALL_SECONDS: Final = 60
# The server went away: gRPC itself says CANCELLED of calls that reach one as it ends.
_GONE: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
NOT_FOUND: Final = grpc.StatusCode.NOT_FOUND
_LOST_WRITE: Final = "Internal error from Core"
# The limits of a client that soon allow the same call again.
_OF_A_MOMENT: Final = ("starts_per_second", "calls_max")
# How the core begins its words when a call never had a connection to go out on.
_NEVER_CONNECTED: Final = ("failed to connect to all addresses", "DNS resolution failed", "errors resolving")

# The errors that a caller gets for a failed call: pjw.errors, never grpc.RpcError.


def is_gone(error: grpc.RpcError) -> bool:
    """Return whether the call was lost with its connection."""
    # the word of grpc.aio for a request that it could not write any more
    lost_write = error.code() is grpc.StatusCode.INTERNAL and error.details() == _LOST_WRITE
    return error.code() in _GONE or lost_write


def never_connected(error: grpc.RpcError) -> bool:
    """Return whether the call cannot have reached a server."""
    text = error.details() or ""
    return error.code() is grpc.StatusCode.UNAVAILABLE and text.startswith(_NEVER_CONNECTED)


def is_refused(error: grpc.RpcError) -> bool:
    """Return whether the server's host refused the connection: it does so also while pjwd restarts."""
    return never_connected(error) and "Connection refused" in (error.details() or "")


def is_too_fast(error: grpc.RpcError) -> bool:
    """Return whether pjwd will take the same call after the client's other calls end, or a moment later."""
    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        return False
    refusal = error_of(error.code(), error.details() or "", _metadata(error), {})
    return isinstance(refusal, errors.LimitReachedError) and refusal.limit in _OF_A_MOMENT


def error_from(
    error: grpc.RpcError, settings: ClientSettings, asked: Mapping[str, object]
) -> errors.PjwError:
    """Return the pjw error for one of gRPC's; *asked* has the facts that the caller knows."""
    code, text, metadata = error.code(), error.details() or "", _metadata(error)
    gone = is_gone(error) or code is grpc.StatusCode.DEADLINE_EXCEEDED
    if gone and ERROR_KEY not in metadata:
        return _unreachable(settings, code, text)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.ServerFailedError(
            f"{settings.server} does not know this call: it is older than this client",
            hint="ask the operator to upgrade pjwd",
        )
    return error_of(code, text, metadata, asked)


def _metadata(error: grpc.RpcError) -> dict[str, str]:
    # keys and values, whatever type the stubs give them
    pairs: Any = error.trailing_metadata() or ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def _unreachable(settings: ClientSettings, code: grpc.StatusCode, text: str) -> errors.ServerUnreachableError:
    """Tell apart the many faults of a connection for which gRPC has one word."""
    server = settings.server
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.ServerUnreachableError(f"{server} did not answer within {CALL_SECONDS} s")
    if code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL):
        return errors.ServerUnreachableError(f"{server} went away before it had answered")
    if "Connection refused" in text:
        return errors.ServerUnreachableError(
            f"cannot connect to {server}: connection refused", hint="is pjwd running there?"
        )
    if "DNS" in text or "errors resolving" in text or "name resolution" in text.lower():
        return errors.ServerUnreachableError(
            f"cannot connect to {server}: no such host", hint="see --server and PJW_SERVER"
        )
    if "Hostname Verification Check failed" in text:
        return _another_name(settings)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return errors.ServerUnreachableError(
            f"the certificate of {server} has expired, or is not one of the authority in {settings.ca_crt}",
            hint="see --ca-crt and PJW_CA_CRT",
        )
    if "Socket closed" in text or "handshake" in text.lower() or "reset by peer" in text:
        # A server that refuses a certificate just hangs up: look at ours for the reason.
        from pjw.certs.credentials import diagnose_client

        reason = diagnose_client(settings.ca_crt, settings.client_crt, settings.client_key)
        return errors.ServerUnreachableError(
            f"{server} closed the connection" + (f": {reason}" if reason else " after the TLS handshake"),
            hint=None if reason else "does it accept client certificates of this authority, and is it pjwd?",
        )
    return errors.ServerUnreachableError(f"cannot reach {server}: {text}")


def _another_name(settings: ClientSettings) -> errors.ServerUnreachableError:
    from pjw.certs.files import load_client_credentials
    from pjw.certs.tls import names_of_server

    server, host = settings.server, host_of(settings.server)
    files = settings.ca_crt, settings.client_crt, settings.client_key
    ca_pem = load_client_credentials(*files).ca_pem.decode()
    names = names_of_server(host, int(server.rpartition(":")[2]), ca_pem)
    return errors.ServerUnreachableError(
        f"the certificate of {server} is for {', '.join(names) or 'another host name'}",
        hint=f"connect by a name that is in it, or have the operator make one with {host} in it"
        " (pjwd certs server DIR HOST...)",
    )


# Seconds to wait for a server that went away: a restart with room to spare.
RECONNECT_SECONDS: Final = 120
# Seconds that the first Start of a client waits for one: systemd starts pjwd again after a second.
RESTART_SECONDS: Final = 3
FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 1.0
# Calls that a client object makes at once; further calls wait. Two programs of one client together stay below
# pjwd's default (clients.calls_max, 256).
CALLS_AT_ONCE: Final = 120
# The same for calls that wait for the end of a job; pjwd's default is 1000 (clients.followers_max).
WAITS_AT_ONCE: Final = 900
# The same for stops, which last as long as their grace periods, or as a job that the kernel cannot end. Among
# the other calls they would take all turns of a client that stops many jobs.
STOPS_AT_ONCE: Final = 100
# Seconds for which other calls of the client may hold a call back before it fails.
TURN_SECONDS: Final = 60


class Contact:
    """The state of a client's connection to its server, shared by all of its calls."""

    def __init__(self, settings: ClientSettings, reconnect_seconds: float) -> None:
        self.settings: Final = settings
        self.reconnect_seconds: Final = reconnect_seconds
        self.answered = False
        self.closed: Final = threading.Event()


class CallFacts(Protocol):
    """The facts about a call that decide what happens when it fails."""

    @property
    def facts(self) -> Mapping[str, object]:
        """The facts that the caller knows of an error of the call: `job_id`, `program`, `workdir`."""

    @property
    def gone_is_done(self) -> bool:
        """Whether a call that was repeated and finds no job has succeeded."""

    @property
    def reached(self) -> tuple[str, str | None]:
        """The progress of the call, and a next step."""


class RetryState:
    """The failures of one call in a row."""

    def __init__(self, link: Contact, asked: CallFacts, *, outlasts_restart: bool = False) -> None:
        """Begin without failures; *outlasts_restart*: a client without answers waits for a restart, too."""
        self._outlasts_restart: Final = outlasts_restart
        self._link: Final = link
        self._asked: Final = asked
        self._until: float | None = None
        self._turn_until: float | None = None
        self._pause = FIRST_PAUSE_SECONDS
        self._began = time.monotonic()
        self._repeated = False

    def is_over(self) -> None:
        """Note that the server has answered: the next failure begins a new series."""
        self._link.answered = True
        self._until = self._turn_until = None
        self._pause = FIRST_PAUSE_SECONDS

    def is_done(self, error: grpc.RpcError) -> bool:
        """Return whether this refusal shows that an earlier attempt, whose answer was lost, did it all."""
        return self._repeated and self._asked.gone_is_done and error.code() is NOT_FOUND

    def after(self, error: grpc.RpcError) -> float:
        """Return the seconds to pause before the next attempt. Raises the final error if none is left."""
        link, now = self._link, time.monotonic()
        if is_too_fast(error) and link.answered and link.reconnect_seconds and not link.closed.is_set():
            if self._turn_until is None:
                self._turn_until = now + TURN_SECONDS
            if now < self._turn_until:
                return self._next_pause()
        if (
            is_refused(error)
            and self._outlasts_restart
            and not (link.answered or link.closed.is_set())
            and link.reconnect_seconds
            and now - self._began < RESTART_SECONDS
        ):
            return self._next_pause()
        may_return = is_gone(error) and not link.closed.is_set()
        if never_connected(error):
            may_return = may_return and link.answered
        else:
            link.answered = True
            self._repeated = True
        if not may_return or not link.reconnect_seconds:
            raise error_from(error, link.settings, self._asked.facts) from None
        if self._until is None or now - self._began > link.reconnect_seconds:
            # a call that was under way for long has had its connection all the while
            self._until = now + link.reconnect_seconds
        self._began = now
        pause = self._next_pause()
        if self._until <= now + pause:
            reached, hint = self._asked.reached
            raise errors.ServerUnreachableError(
                f"the connection to {link.settings.server} was lost{reached}, and did not come back"
                f" within {link.reconnect_seconds:g} s",
                hint=hint,
            ) from None
        return pause

    def _next_pause(self) -> float:
        # A server that is up and still refuses (it drains) must be asked neither in a tight loop nor by all
        # of its clients at once.
        pause = self._pause * (1 - os.urandom(1)[0] / 512)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return pause

    def closed(self) -> errors.ServerUnreachableError:
        """Return the error for a client that was closed during the pause."""
        return errors.ServerUnreachableError(
            f"the connection to {self._link.settings.server} was closed{self._asked.reached[0]}"
        )
