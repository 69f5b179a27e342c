"""The output of a job as text for a screen: whatever a job writes, it cannot steer the terminal."""

import codecs
from typing import Final

from pjw.cli.render import printable

TAB: Final = " " * 4
# A screen's widget keeps whole lines; a job that never ends one must not fill the memory.
LINE_MAX: Final = 4096


class PlainText:
    """Bytes as they come to text, without control characters; a character may be cut between two pieces."""

    def __init__(self) -> None:
        self._decoder: Final = codecs.getincrementaldecoder("utf-8")("replace")
        self._column = 0

    def feed(self, data: bytes) -> str:
        """The text of the next bytes."""
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
