"""The output of a job as text for a screen: no byte that a job writes can steer the terminal."""

import codecs
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Final

from pjw.cli.render import printable
from pjw.client.requests import TimedOutput

TAB: Final = " " * 4
# A screen's widget keeps whole lines; a job that never ends one must not fill the memory.
LINE_MAX: Final = 4096


class PlainText:
    """Turns bytes into text piece by piece, without control characters; two pieces may share a character."""

    def __init__(self) -> None:
        self._decoder: Final = codecs.getincrementaldecoder("utf-8")("replace")
        self._column = 0

    def feed(self, data: bytes) -> str:
        """Return the text of the next bytes."""
        text = self._decoder.decode(data).replace("\r\n", "\n").replace("\t", TAB)
        pieces: list[str] = []
        for number, line in enumerate(text.split("\n")):
            if number:
                pieces.append("\n")
                self._column = 0
            shown = printable(line)
            while self._column + len(shown) > LINE_MAX:
                room = LINE_MAX - self._column
                pieces += (shown[:room], "\n")
                shown, self._column = shown[room:], 0
            pieces.append(shown)
            self._column += len(shown)
        return "".join(pieces)


# A job may set colours and other attributes (SGR in ECMA-48). All else that steers a terminal is shown:
# control characters except tab, newline and carriage return, and characters that turn the direction of text.
_COLOUR: Final = r"\x1b\[[0-9;:]{0,40}m"
_STEERING: Final = re.compile(
    rf"{_COLOUR}|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
# the possible beginning of a colour
_BEGUN: Final = re.compile(r"\x1b(?:\[[0-9;:]{0,40})?\Z")


def harmless(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a job's output for a terminal, piece by piece: colours stay, other control codes are shown.

    A character or an escape sequence may be cut between two pieces.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    held = ""
    for data in pieces:
        text = held + decoder.decode(data)
        begun = _BEGUN.search(text)
        text, held = (text[: begun.start()], begun[0]) if begun else (text, "")
        if text:
            yield _STEERING.sub(_shown, text).encode()
    if held := held + decoder.decode(b"", final=True):
        yield _STEERING.sub(_shown, held).encode()


def _shown(found: re.Match[str]) -> str:
    return found[0] if len(found[0]) > 1 else printable(found[0])


# Lines of output with the times at which they were written in front of them.


def stamped(pieces: Iterable[TimedOutput]) -> Iterator[bytes]:
    """Yield the output; before each line comes its first byte's time, as in RFC 3339, and a space."""
    begins = True
    for time, data in pieces:
        stamp = _stamp(time)
        # not splitlines(): a lone carriage return, of which a progress bar is full, ends no line
        *ended, rest = data.split(b"\n")
        lines = [line + b"\n" for line in ended]
        if rest:
            lines.append(rest)
        yield b"".join(stamp + line if number or begins else line for number, line in enumerate(lines))
        begins = not rest


def _stamp(time: datetime | None) -> bytes:
    """Format to the microsecond, always as wide; `-` for output whose time was not recorded."""
    return b"- " if time is None else time.strftime("%Y-%m-%dT%H:%M:%S.%fZ ").encode()
