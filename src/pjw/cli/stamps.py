"""Lines of output with the times at which they were written in front of them."""

from collections.abc import Iterable, Iterator
from datetime import datetime

from pjw.client.requests import TimedOutput


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
