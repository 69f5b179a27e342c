"""What tests change in a pjwd before it starts: shorter times, and bugs.

Run as a program it is pjwd with such a change: the name of a function here, or "", and a directory that the
server may write to, or "". Their rest is pjwd's command line.
"""

import resource
import sys
from types import SimpleNamespace
from typing import Any


def let_write(directory: str) -> None:
    """Let the server write to a directory of ours (`make coverage`)."""
    from pjw.server import sandbox
    from pjw.server.landlock import OWN, Beneath

    of = sandbox.rules

    def rules(own_directory: int | None) -> list[Beneath]:
        return [*of(own_directory), Beneath(directory, OWN)]

    sandbox.rules = rules


def archive_again_soon() -> None:
    """Have a gateway try again after a second what it could not archive."""
    from pjw.gateway import archiving

    archiving.RETRY_SECONDS = 1  # type: ignore[misc]


def drain_for_long() -> None:
    """Let calls go on for two minutes at the end."""
    from pjw.server import serve

    serve.DRAIN_SECONDS = 120  # type: ignore[misc]


def few_descriptors() -> None:
    """Have as few descriptors as a process may have."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))


def drop_stalled_readers() -> None:
    """Wait a second for a reader, and not 900."""
    from pjw.server import calls

    calls.STALLED_WRITE_SECONDS = 1  # type: ignore[misc]


def short_leases() -> None:
    """Hang a session up two seconds after its client has gone."""
    from pjw.worker import sessions

    sessions.LEASE_SECONDS = 2  # type: ignore[misc]


def no_wait_for_job_ends() -> None:
    """Do not wait for the end of a job that may be the reason for that of its session."""
    from pjw.worker import sessions

    sessions._JOB_ENDS_SECONDS = 0.2  # type: ignore[misc]


# --- bugs, each in a task or thread that pjwd cannot do without


def bug_in_pruning() -> None:
    """The retention is gone when a job has ended."""
    from pjw.worker.retention import Pruner

    nothing: Any = SimpleNamespace(retention=None)
    Pruner.job_ended = lambda self: self.reconfigure(nothing)  # type: ignore[method-assign]


def bug_in_sampling() -> None:
    """Nothing can be measured."""
    from pjw.worker.launcher_client import LauncherClient

    LauncherClient.request_measure = None  # type: ignore[method-assign,assignment]


def bug_in_reloading() -> None:
    """A reload fails before it has begun."""
    from pjw.server.systemd import Notifier

    Notifier.reloading = None  # type: ignore[method-assign,assignment]


def bug_in_taking_calls() -> None:
    """The next call of no known method ends the task that takes them."""
    from pjw.server import accept

    real = accept._CoreServer._take

    async def take(self: Any, method: bytes | None) -> None:
        if method is None:
            await self._request_call()
            raise RuntimeError("a bug")
        await real(self, method)

    accept._CoreServer._take = take  # type: ignore[method-assign]


def bug_in_taking_lists() -> None:
    """The next call of List ends the task that takes them."""
    from pjw.server import accept

    real = accept._CoreServer._pass_gate

    def pass_gate(self: Any, method: bytes, *rest: Any) -> None:
        if method.endswith(b"/List"):
            raise RuntimeError("a bug")
        real(self, method, *rest)

    accept._CoreServer._pass_gate = pass_gate  # type: ignore[method-assign,assignment]


def bug_in_grpcs_log() -> None:
    """A line of gRPC's cannot be told."""
    from pjw.server import grpc_log

    grpc_log.tell = None  # type: ignore[assignment]


def bug_in_the_audit_log() -> None:
    """What is to be written is no line."""
    from pjw.server.audit import AuditLog

    real = AuditLog.append

    def append(self: AuditLog, line: bytes) -> None:
        nothing: Any = None
        real(self, nothing and line)

    AuditLog.append = append  # type: ignore[method-assign]


def bug_in_metrics() -> None:
    """A scrape cannot be answered."""
    from socketserver import ThreadingMixIn

    ThreadingMixIn.process_request = None  # type: ignore[method-assign,assignment]


def main() -> object:
    """Run pjwd, with a change as soon as the server's modules may be imported."""
    from pjw.server import boot
    from pjw.server import main as pjwd

    (name, directory), sys.argv[1:] = sys.argv[1:3], sys.argv[3:]
    original = boot.preload_modules

    def changed() -> None:
        if directory:
            let_write(directory)
        if name:
            globals()[name]()
        original()

    boot.preload_modules = changed
    return pjwd.main()


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[arg-type]
