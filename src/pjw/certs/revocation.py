"""The list of client certificates that are not let in any more. Standard library only.

A text file that `openssl x509 -serial` or `-fingerprint -sha256` can append to. A line that cannot be read is
an error, never skipped: it may be the one that was meant to shut a client out.
"""

import re
from dataclasses import dataclass
from typing import Final

from pjw.certs.files import Read, read_path
from pjw.certs.profile import quoted
from pjw.errors import ConfigError

# RFC 5280: at most 20 octets. So a serial number is never taken for a fingerprint.
SERIAL_MAX_DIGITS: Final = 40
FINGERPRINT_DIGITS: Final = 64

_LINE: Final = re.compile(
    r"(?:(?P<serial>serial=)|(?P<fingerprint>sha256 fingerprint=))?"
    r"(?P<hex>[0-9a-f]+|[0-9a-f]{2}(?::[0-9a-f]{2})+)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class RevocationList:
    """Certificates by serial number, whichever CA issued them, and by SHA-256 of the certificate."""

    serials: frozenset[int] = frozenset()
    fingerprints: frozenset[bytes] = frozenset()

    def revokes(self, serial: int, fingerprint: bytes) -> bool:
        """Return whether a certificate is in the list, by either."""
        return serial in self.serials or fingerprint in self.fingerprints

    def __len__(self) -> int:
        return len(self.serials) + len(self.fingerprints)


NOBODY_REVOKED: Final = RevocationList()


def load_revocation_list(path: str, read: Read = read_path) -> RevocationList:
    """Read a list. Raises ConfigError, which names the file and the line."""
    return parse_revocation_list(read(path, "revocation list"), path)


def parse_revocation_list(data: bytes, path: str) -> RevocationList:
    """Parse a list with one entry a line, where `#` begins a comment. Raises ConfigError."""
    serials: set[int] = set()
    fingerprints: set[bytes] = set()
    for number, line in enumerate(data.split(b"\n"), 1):
        entry = line.partition(b"#")[0].strip().decode("utf-8", "backslashreplace")
        if not entry:
            continue
        match = _LINE.fullmatch(entry)
        digits = match["hex"].replace(":", "") if match else ""
        if match and len(digits) == FINGERPRINT_DIGITS and not match["serial"]:
            fingerprints.add(bytes.fromhex(digits))
        elif match and len(digits.lstrip("0")) <= SERIAL_MAX_DIGITS and not match["fingerprint"]:
            serials.add(int(digits, 16))
        else:
            raise ConfigError(
                f"cannot read revocation list {path}: line {number}: {quoted(entry)} is neither a serial"
                " number nor a SHA-256 fingerprint",
                hint="openssl x509 -in FILE -noout -serial prints a line as it should be",
            )
    return RevocationList(frozenset(serials), frozenset(fingerprints))
