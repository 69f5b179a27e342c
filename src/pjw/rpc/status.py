"""Errors to gRPC status and back: one table for both directions.

A status has a code and a message. The trailing metadata `pjw-error` adds which error of pjw.errors it is, and
its facts, so that no program must parse messages. A client that does not know this key, or does not get it,
uses the code.

gRPC itself never produces INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION,
OUT_OF_RANGE or DATA_LOSS: a client that sees one knows that we said it (grpc.io/docs/guides/status-codes).
"""

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from pjw import errors
from pjw.errors import InvalidJobError


class ErrorRow(NamedTuple):
    """An error, its gRPC code, and its name on the wire, which never changes."""

    kind: type[errors.PjwError]
    code: grpc.StatusCode
    reason: str


# The first row of a code is the error for that code without metadata.
TABLE: Final = (
    ErrorRow(errors.InvalidJobError, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_JOB"),
    ErrorRow(errors.LimitRangeError, grpc.StatusCode.INVALID_ARGUMENT, "LIMIT_RANGE"),
    ErrorRow(errors.JobNotFoundError, grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND"),
    ErrorRow(errors.SessionNotFoundError, grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND"),
    ErrorRow(errors.WorkspaceNotFoundError, grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND"),
    ErrorRow(errors.NodeNotFoundError, grpc.StatusCode.NOT_FOUND, "NODE_NOT_FOUND"),
    ErrorRow(errors.ImageNotFoundError, grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND"),
    ErrorRow(errors.MountNotFoundError, grpc.StatusCode.NOT_FOUND, "MOUNT_NOT_FOUND"),
    ErrorRow(errors.UnknownServiceError, grpc.StatusCode.NOT_FOUND, "UNKNOWN_SERVICE"),
    ErrorRow(errors.NameTakenError, grpc.StatusCode.ALREADY_EXISTS, "NAME_TAKEN"),
    ErrorRow(errors.JobStateError, grpc.StatusCode.FAILED_PRECONDITION, "JOB_STATE"),
    ErrorRow(errors.WorkspaceBusyError, grpc.StatusCode.FAILED_PRECONDITION, "WORKSPACE_BUSY"),
    ErrorRow(errors.MountError, grpc.StatusCode.FAILED_PRECONDITION, "MOUNT"),
    ErrorRow(errors.GpuError, grpc.StatusCode.FAILED_PRECONDITION, "GPU"),
    ErrorRow(errors.LaunchError, grpc.StatusCode.FAILED_PRECONDITION, "LAUNCH"),
    ErrorRow(errors.WorkdirError, grpc.StatusCode.FAILED_PRECONDITION, "WORKDIR"),
    ErrorRow(errors.CopyError, grpc.StatusCode.FAILED_PRECONDITION, "COPY"),
    ErrorRow(errors.OffsetError, grpc.StatusCode.OUT_OF_RANGE, "OFFSET"),
    ErrorRow(errors.SequenceError, grpc.StatusCode.OUT_OF_RANGE, "SEQUENCE"),
    ErrorRow(errors.OutputLostError, grpc.StatusCode.DATA_LOSS, "OUTPUT_LOST"),
    ErrorRow(errors.LimitReachedError, grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED"),
    ErrorRow(errors.NotAuthenticatedError, grpc.StatusCode.UNAUTHENTICATED, "NOT_AUTHENTICATED"),
    ErrorRow(errors.NotAllowedError, grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED"),
    ErrorRow(errors.ServerUnreachableError, grpc.StatusCode.UNAVAILABLE, "SERVER_UNREACHABLE"),
    ErrorRow(errors.LauncherGoneError, grpc.StatusCode.UNAVAILABLE, "LAUNCHER_GONE"),
    ErrorRow(errors.ServerFailedError, grpc.StatusCode.INTERNAL, "SERVER_FAILED"),
    ErrorRow(errors.KernelError, grpc.StatusCode.INTERNAL, "KERNEL"),
    ErrorRow(errors.ProtocolError, grpc.StatusCode.INTERNAL, "PROTOCOL"),
    ErrorRow(errors.ConfigError, grpc.StatusCode.INTERNAL, "CONFIG"),
)
# Narrower names for errors that travel as their base, so that the wire stays as it was.
NARROWER: Final[tuple[type[errors.PjwError], ...]] = (
    errors.PageTokenError,
    errors.ServerDrainingError,
    errors.WorkerClosedError,
    errors.JobTableError,
    errors.TerminalError,
)
_BY_KIND: Final = {row.kind: row for row in TABLE} | {
    kind: row for kind in NARROWER for row in TABLE if row.kind in kind.__bases__
}
_BY_REASON: Final = {row.reason: row for row in TABLE}
_BY_CODE: Final = {row.code: row for row in reversed(TABLE)}
# Details of internal failures are for our log; their words may hold paths of the host.
INTERNAL_TEXT: Final = "internal error; the server's log has the details"
# Initial metadata of a stream whose caller was let in: from then on it is worth resuming.
ADMITTED_KEY: Final = "pjw-admitted"
# Metadata of a call of a gateway's: the client that it calls for.
FOR_CLIENT_KEY: Final = "pjw-for-client"
# Trailing metadata: JSON in ASCII, an object: `reason` as in the table, `hint`, and the error's facts.
ERROR_KEY: Final = "pjw-error"
# For clients older than ERROR_KEY, and for clients that read no JSON: the hint, and errno when exec failed.
HINT_KEY: Final = "pjw-hint"
ERRNO_KEY: Final = "pjw-exec-errno"
# A header must be small, so longer facts are cut. The caller knows the full text of its own request.
_FACT_CHARACTERS_MAX: Final = 512


def status_of(error: Exception) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Return a client's view of an error: code, text, trailing metadata."""
    row = _BY_KIND.get(type(error)) if isinstance(error, errors.PjwError) else None
    of_the_inside = row is None or row.code is grpc.StatusCode.INTERNAL
    if of_the_inside and not (isinstance(error, errors.KernelError) and error.for_client):
        return grpc.StatusCode.INTERNAL, INTERNAL_TEXT, ()
    assert row is not None
    assert isinstance(error, errors.PjwError)
    # the hint of an internal error is for the operator, and the log has it
    hint = None if of_the_inside else error.hint
    told: dict[str, object] = {"reason": row.reason}
    if hint:
        told["hint"] = hint
    for name in error.FACTS:
        value = getattr(error, name)
        if value is not None:
            told[name] = value[:_FACT_CHARACTERS_MAX] if isinstance(value, str) else value
    metadata = [(ERROR_KEY, json.dumps(told))]
    # HTTP/2 header values are ASCII
    if hint and hint.isascii():
        metadata.append((HINT_KEY, hint))
    if isinstance(error, errors.LaunchError):
        metadata.append((ERRNO_KEY, str(error.errno)))
    return row.code, str(error), tuple(metadata)


def error_of(
    code: grpc.StatusCode, text: str, metadata: Mapping[str, str], asked: Mapping[str, object]
) -> errors.PjwError:
    """Return the error that a client raises for a status: the server's own, if the metadata names it.

    *asked* has the facts that the caller knows: `job_id`, and for a start `program` and `workdir`.
    """
    told = _told(metadata)
    hint = told.get("hint", metadata.get(HINT_KEY))
    row = _BY_REASON.get(str(told.get("reason")))
    if row is None and ERRNO_KEY in metadata and "program" in asked:
        # a server older than ERROR_KEY
        row, told = _BY_KIND[errors.LaunchError], {"errno": int(metadata[ERRNO_KEY])}
    if row is None or row.code is not code:
        row = _BY_CODE.get(code)
    if row is None or row.kind is errors.ServerFailedError:
        return errors.ServerFailedError(f"the server failed: {text} ({code.name})")
    facts = {**told, **asked}
    # compare types exactly: in Python a bool is an int, too
    sound = {name: facts[name] for name, kind in row.kind.FACTS.items() if type(facts.get(name)) is kind}
    return row.kind.restored(text, hint if isinstance(hint, str) else None, sound)


def _told(metadata: Mapping[str, str]) -> dict[str, object]:
    """Return the metadata of the error; empty if there is none, or if it is not a JSON object."""
    try:
        told = json.loads(metadata.get(ERROR_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


# Refuse a request that asks for something this version does not know.
#
# Protobuf ignores a field that only a newer client knows. A job without that setting would be another job: it
# would run without a limit that its client set.


def require_known(request: Message) -> None:
    """Check *request* and the messages within it for unknown fields. Raises InvalidJobError."""
    unknown = UnknownFieldSet(request)
    if len(unknown):
        raise InvalidJobError(
            f"this server does not know field {unknown[0].field_number} of {request.DESCRIPTOR.name}",
            hint="the client is newer than the server: leave out its newest options, or have pjwd upgraded",
        )
    for field, value in request.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        messages: list[Any] = [value] if isinstance(value, Message) else list(value)
        for message in messages:
            require_known(message)
