"""PEM (RFC 7468), read in one place. Standard library only.

Readers of PEM differ in what they accept: text before a block, ends of lines, a byte order mark. So this
module alone reads a file, and encodes anew what it understood. Then our checks (`cryptography`) and the
handshake (gRPC's BoringSSL) understand the same.
"""

import binascii
import re
from collections.abc import Iterator, Sequence
from typing import Final

CERTIFICATES: Final = ("CERTIFICATE",)
KEYS: Final = ("PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY")
ENCRYPTED: Final = (b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b"Proc-Type: 4,ENCRYPTED")

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_BEGIN: Final = re.compile(rb"^[ \t]*-----BEGIN ([A-Z0-9 ]+)-----[ \t]*$", re.MULTILINE)
_SPACE: Final = re.compile(rb"\s+")
_LINE_CHARACTERS: Final = 64


def blocks(data: bytes, labels: Sequence[str]) -> list[bytes]:
    """Return each block with one of these labels, in order, encoded anew; ignore text between blocks.

    Raises ValueError for a block that has no end, or is not base64.
    """
    return [_encoded(label, body) for label, body in _found(data) if label in labels]


def _found(data: bytes) -> Iterator[tuple[str, bytes]]:
    data = data.removeprefix(_BYTE_ORDER_MARK).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    place = 0
    while (begin := _BEGIN.search(data, place)) is not None:
        label = begin[1].decode()
        place = data.find(b"-----END " + begin[1] + b"-----", begin.end())
        if place < 0:
            raise ValueError(f"it is cut short: its {label} has no end")
        yield label, data[begin.end() : place]


def _encoded(label: str, body: bytes) -> bytes:
    try:
        der = binascii.a2b_base64(_SPACE.sub(b"", body), strict_mode=True)
    except binascii.Error:
        raise ValueError(f"what is in its {label} is not base64") from None
    text = binascii.b2a_base64(der, newline=False)
    lines = [text[start : start + _LINE_CHARACTERS] for start in range(0, len(text), _LINE_CHARACTERS)]
    name = label.encode()
    return b"\n".join((b"-----BEGIN " + name + b"-----", *lines, b"-----END " + name + b"-----", b""))
