"""The terminal that pjw itself has: its size, its raw mode, and the keys that are meant for pjw."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from pjw.errors import TerminalError
from pjw.model import TERMINAL_MAXIMUM, TerminalSize

# for a terminal that does not know its own, such as a serial line
_DEFAULT_SIZE: Final = TerminalSize(24, 80)
# A process that waits beside us, so that also a kill of pjw leaves a terminal that works. It is a shell,
# which costs 2 ms. Its stdin ends with us; a line says that all is well. Without that line the terminal gets
# the text of `show_usual`, too: a program that has changed the terminal cannot undo that any more.
_GUARD: Final = 'read line || { stty "$1" && printf "%s" "$3"; } <>"$2" >&0'
# Settings that programs such as editors turn on and we may have left on: another screen, no cursor, the
# mouse, pasting in brackets, colours.
_USUAL: Final = b"\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1006l\x1b[?2004l\x1b[0m"


def require_terminal(hint: str = "without -t, -i passes on what is piped in") -> None:
    """Check that a user can type here. Raises TerminalError with that hint."""
    try:
        import termios  # noqa: F401
    except ImportError:
        raise TerminalError("cannot use this terminal: pjw cannot pass on its keys on this system") from None
    if sys.stdin is None or not sys.stdin.isatty() or not sys.stdout.isatty():
        raise TerminalError(
            "cannot use this terminal: stdin or stdout is no terminal",
            hint=hint,
        )


def size() -> TerminalSize:
    """Return the size of our terminal."""
    for stream in (sys.stdout, sys.stdin, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            found = os.get_terminal_size(stream.fileno())
            if 0 < found.lines <= TERMINAL_MAXIMUM and 0 < found.columns <= TERMINAL_MAXIMUM:
                return TerminalSize(found.lines, found.columns)
    return _DEFAULT_SIZE


@contextmanager
def raw() -> Iterator[None]:
    """Pass on every key as it is typed; at the end, or at ours, all is as it was."""
    # Windows has neither
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    with _guarded(descriptor):
        try:
            tty.setraw(descriptor, termios.TCSADRAIN)
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def show_usual() -> None:
    """Reset the terminal to the state that a shell expects: a program may have left it changed."""
    os.write(sys.stdout.fileno(), _USUAL)


@contextmanager
def _guarded(descriptor: int) -> Iterator[None]:
    try:
        command = ["stty", "-g"]
        saved = subprocess.run(command, stdin=descriptor, capture_output=True, check=True, text=True)
        guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "pjw", saved.stdout.strip(), os.ttyname(descriptor), _USUAL],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # nothing that ends the others at this terminal may end it
            start_new_session=True,
        )
    except (OSError, subprocess.SubprocessError):
        # without stty(1) only we ourselves put it right
        yield
        return
    assert guard.stdin is not None
    try:
        yield
    finally:
        with suppress(OSError):
            guard.stdin.write(b"\n")
            guard.stdin.close()
        guard.wait()


# Windows has none
RESIZED: Final = getattr(signal, "SIGWINCH", None)


# The input typed at a terminal, and the keys that are meant for pjw: only at the beginning of a line.

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
