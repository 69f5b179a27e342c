"""Refuse a request that asks for something this version does not know.

Protobuf ignores a field that only a newer client knows. A job without that setting would be another job: it
would run without a limit that its client set. Not part of convert.py, which each `pjw` imports.
"""

from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from pjw.errors import InvalidJobError


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
