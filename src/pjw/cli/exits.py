"""Exit codes, and errors and ends of jobs in words."""

import errno
import sys
from typing import TYPE_CHECKING, Final

from pjw.cli.terminal import begin_line
from pjw.errors import (
    ConfigError,
    JobStateError,
    KernelError,
    LaunchError,
    PjwError,
    ProtocolError,
    ServerFailedError,
    ServerUnreachableError,
)

if TYPE_CHECKING:
    from pjw.model import Job, Session

EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2
EXIT_FAILED: Final = 125
EXIT_NOT_EXECUTABLE: Final = 126
EXIT_NOT_FOUND: Final = 127
EXIT_INTERRUPTED: Final = 130
# how to install what an optional part of pjw needs
INSTALL_TOP: Final = "pip install 'pjw-client[top]'"
INSTALL_MCP: Final = "pip install 'pjw-client[mcp]'"


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


# The exit code, 128 + the signal, does not tell these ends apart, so words do.
_KILLED: Final = {
    "timed_out": "it reached its limit of time",
    "output_limit": "it reached its limit of output",
    "oom_killed": "it reached its limit of memory",
    "disk_limit": "the disk was about to be full, and it was your largest job there",
    "output_failed": "its output cannot be written where pjwd keeps it",
}


def why_ended(job: "Job") -> str | None:
    """Explain a job's end in a line; None when its command ended by itself, or the cause is unknown."""
    if job.reason in _KILLED:
        return f"job {job.ref} was killed: {_KILLED[job.reason]}"
    if job.array is not None and job.array.succeeded < job.array.count and job.was_started:
        failed, cancelled = job.array.failed, job.array.cancelled
        return (
            f"of the {job.array.count} elements of array {job.id} {failed} failed, {cancelled} were cancelled"
        )
    if job.reason == "artifacts_missing" and job.artifacts is not None:
        return f"job {job.ref} has no artifacts, as it must: {job.artifacts.detail}"
    if job.reason == "stopped":
        return f"job {job.ref} was stopped"
    if job.exit_status is not None and (number := job.exit_status.signal) is not None:
        import signal

        name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""
        return f"job {job.ref} was ended by signal {number}{name}"
    return None


def exit_code_of_job(job: "Job") -> int:
    """Return a job's exit code as a shell would. Raises ServerFailedError when it is unknown.

    Raises JobStateError when there is none, as the job was not started.
    """
    status = job.exit_status
    if status is None and not job.was_started:
        raise JobStateError(f"job {job.ref} was never started: {job.detail}")
    if status is None:
        raise ServerFailedError(f"nobody knows how job {job.ref} ended: {job.reason}")
    # its command has done its part, and yet it has not succeeded
    return EXIT_REFUSED if job.reason == "artifacts_missing" else status.code


def exit_code_of_session(session: "Session") -> int:
    """Return the exit code as a shell would. Raises ServerFailedError when it is unknown."""
    status = session.exit_status
    if status is None or session.state != "exited":
        raise ServerFailedError(
            f"nobody knows how session {session.number} of job {session.job_id} ended: {session.reason}"
        )
    return status.code


def why_session_ended(session: "Session") -> str | None:
    """Explain a session's end in a line; None when its command ended by itself."""
    what = f"session {session.number} of job {session.job_id}"
    if session.reason == "output_limit":
        return f"{what} was killed: it reached the job's limit of output"
    if session.reason == "stopped":
        return f"{what} was ended, by the end of its job or a hang-up"
    return None
