"""Exit codes, and errors in words on stderr."""

import errno
import sys
from typing import Final

from pjw.cli.terminal import begin_line
from pjw.errors import (
    ConfigError,
    KernelError,
    LaunchError,
    PjwError,
    ProtocolError,
    ServerFailedError,
    ServerUnreachableError,
)

EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2
EXIT_FAILED: Final = 125
EXIT_NOT_EXECUTABLE: Final = 126
EXIT_NOT_FOUND: Final = 127
EXIT_INTERRUPTED: Final = 130


def exit_code_of(error: PjwError) -> int:
    """Return the exit code for an error."""
    match error:
        case LaunchError(errno=errno.ENOENT):
            return EXIT_NOT_FOUND
        case LaunchError():
            return EXIT_NOT_EXECUTABLE
        case ServerUnreachableError() | ServerFailedError() | KernelError() | ConfigError() | ProtocolError():
            return EXIT_FAILED
        case _:
            return EXIT_REFUSED


def complain(error: PjwError) -> int:
    """Print an error and its hint; return the exit code for it."""
    begin_line()
    print(f"pjw: error: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    say_notes(error)
    return exit_code_of(error)


def say(words: str) -> None:
    """Print a message that is no error."""
    begin_line()
    print(f"pjw: {words}", file=sys.stderr)


def say_notes(error: Exception) -> None:
    """Print the notes of an error about the job."""
    for note in getattr(error, "__notes__", ()):
        say(note)
