"""The input typed at a terminal, and the keys that are meant for pjw: only at the beginning of a line."""

from typing import Final

ESCAPE: Final = "~"
HELP: Final = """
{0}.  leave; what runs there goes on
{0}?  show this
{0}{0}  type {0}
(only at the beginning of a line)
"""
_LINE_ENDS: Final = b"\r\n"


class Keys:
    """Sorts keys: those for the other end, and those for us. No other key is ever held back."""

    def __init__(self, escape: str | None = ESCAPE) -> None:
        """Begin at a line's start; *escape* is one character of ASCII, and None turns it off."""
        self._escape: Final = escape.encode() if escape is not None else b""
        self._at_beginning = True
        self._held = False
        # requests of the user
        self.left = False
        self.wants_help = False

    def take(self, typed: bytes) -> bytes:
        """Return the part of *typed* for the other end; see `left` and `wants_help` then."""
        passed = bytearray()
        for number in typed:
            key = bytes([number])
            if self._held:
                self._held = False
                if key == b".":
                    self.left = True
                    break
                if key == b"?":
                    self.wants_help = True
                    continue
                passed += self._escape if key == self._escape else self._escape + key
                self._at_beginning = key in (b"\r", b"\n")
            elif self._at_beginning and key == self._escape:
                self._held = True
            else:
                passed += key
                self._at_beginning = number in _LINE_ENDS
        return bytes(passed)
