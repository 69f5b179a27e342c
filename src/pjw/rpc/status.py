"""Errors to gRPC status and back: one table for both directions.

gRPC itself never produces INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION,
OUT_OF_RANGE or DATA_LOSS: a client that sees one knows that we said it (grpc.io/docs/guides/status-codes).
"""

from typing import Final

import grpc

from pjw import errors

CODES: Final[dict[type[errors.PjwError], grpc.StatusCode]] = {
    errors.InvalidJobError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.JobNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.UnknownServiceError: grpc.StatusCode.NOT_FOUND,
    errors.JobStateError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NameTakenError: grpc.StatusCode.ALREADY_EXISTS,
    errors.LaunchError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WorkdirError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OffsetError: grpc.StatusCode.OUT_OF_RANGE,
    errors.OutputLostError: grpc.StatusCode.DATA_LOSS,
    errors.LimitReachedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotAuthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.NotAllowedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.LauncherGoneError: grpc.StatusCode.UNAVAILABLE,
    errors.KernelError: grpc.StatusCode.INTERNAL,
    errors.ProtocolError: grpc.StatusCode.INTERNAL,
    errors.ConfigError: grpc.StatusCode.INTERNAL,
    errors.ServerUnreachableError: grpc.StatusCode.UNAVAILABLE,
    errors.ServerFailedError: grpc.StatusCode.INTERNAL,
}
# The way back, for what a client can tell apart.
_ERRORS: Final[dict[grpc.StatusCode, type[errors.PjwError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidJobError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.JobStateError,
    grpc.StatusCode.ALREADY_EXISTS: errors.NameTakenError,
    grpc.StatusCode.OUT_OF_RANGE: errors.OffsetError,
    grpc.StatusCode.DATA_LOSS: errors.OutputLostError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.LimitReachedError,
    grpc.StatusCode.UNAUTHENTICATED: errors.NotAuthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.NotAllowedError,
    grpc.StatusCode.UNAVAILABLE: errors.ServerUnreachableError,
}
# What goes wrong inside is for our log; its words may hold paths of the host.
INTERNAL_TEXT: Final = "internal error; the server's log has the details"
# Initial metadata of a stream whose caller was let in: from then on it is worth resuming.
ADMITTED_KEY: Final = "pjw-admitted"
# Trailing metadata: the hint, and errno where exec failed.
HINT_KEY: Final = "pjw-hint"
ERRNO_KEY: Final = "pjw-exec-errno"


def status_of(error: Exception) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """What a client is told of an error: code, text, trailing metadata."""
    code = CODES.get(type(error), grpc.StatusCode.INTERNAL) if isinstance(error, errors.PjwError) else None
    if code is None or code is grpc.StatusCode.INTERNAL:
        return grpc.StatusCode.INTERNAL, INTERNAL_TEXT, ()
    assert isinstance(error, errors.PjwError)
    metadata = []
    # HTTP/2 header values are ASCII
    if error.hint and error.hint.isascii():
        metadata.append((HINT_KEY, error.hint))
    if isinstance(error, errors.LaunchError):
        metadata.append((ERRNO_KEY, str(error.errno)))
    return code, str(error), tuple(metadata)


def error_of(code: grpc.StatusCode, text: str, hint: str | None, job_id: int) -> errors.PjwError:
    """What a client raises for a status; *job_id* is what was asked for."""
    if code is grpc.StatusCode.NOT_FOUND:
        return errors.JobNotFoundError(job_id)
    if code in _ERRORS:
        return _ERRORS[code](text, hint=hint)
    return errors.ServerFailedError(f"the server failed: {text} ({code.name})")
