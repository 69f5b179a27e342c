"""The errors that a caller gets for a failed call: pjw.errors, never grpc.RpcError."""

from collections.abc import Mapping
from typing import Any, Final

import grpc

from pjw import errors
from pjw.certs.address import host_of
from pjw.client.settings import ClientSettings
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
