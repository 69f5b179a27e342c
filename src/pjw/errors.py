"""Every error that pjw raises on purpose, on one page.

One class for each different thing that a caller can do about it. Facts travel as attributes, so that no
caller has to parse text. Messages say *what we were doing, to what: why*.
"""

import errno as errno_names
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Final, Self

# Resources that the host lacks now and may have later: the same request may work then.
RESOURCE_ERRNOS: Final = frozenset(
    {
        errno_names.ENOSPC,
        errno_names.EDQUOT,
        errno_names.EAGAIN,
        errno_names.EMFILE,
        errno_names.ENFILE,
        errno_names.ENOMEM,
    }
)
SHOWN_CHARACTERS: Final = 200


class PjwError(Exception):
    """The root of the tree. `hint` is a next step for a person, where there is one."""

    # the attributes that hold the facts of the message, with their types; each may be None
    FACTS: ClassVar[Mapping[str, type]] = MappingProxyType({})

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint: Final = hint

    @classmethod
    def restored(cls, message: str, hint: str | None, facts: Mapping[str, object]) -> Self:
        """Make again an error that the server raised, with its message, its hint and its facts."""
        error = cls.__new__(cls)
        PjwError.__init__(error, message, hint=hint)
        for name in cls.FACTS:
            setattr(error, name, facts.get(name))
        return error


class InvalidJobError(PjwError):
    """The caller's fault: the request can never work (empty command, impossible limit)."""


class LimitRangeError(InvalidJobError):
    """The requested `value` of a limit is not between `least` and `most`; None: no bound on that side.

    When `least` is larger than any limit can be, the limit can only be 0, "no limit".
    """

    FACTS = MappingProxyType({"limit": str, "value": int, "least": int, "most": int})

    def __init__(
        self, message: str, *, limit: str, value: int, least: int | None = None, most: int | None = None
    ) -> None:
        super().__init__(message)
        self.limit: Final = limit
        self.value: Final = value
        self.least: Final = least
        self.most: Final = most


class PageTokenError(InvalidJobError):
    """The page token of a list is not one that this server gave, or belongs to a list with other filters."""


class JobNotFoundError(PjwError):
    """No such job, by id or name, or none that this caller may know of: the two are never told apart."""

    FACTS = MappingProxyType({"job_id": int})

    def __init__(self, job_id: int | str) -> None:
        super().__init__(f"no job {job_id}")
        self.job_id: Final = job_id


class SessionNotFoundError(PjwError):
    """No such session of a job, or none any more, or none that this caller may know of."""

    FACTS = MappingProxyType({"job_id": int, "session": int})

    def __init__(self, job_id: int, session: int) -> None:
        super().__init__(
            f"no session {session} of job {job_id}", hint="one that has ended is forgotten after two minutes"
        )
        self.job_id: Final = job_id
        self.session: Final = session


class UnknownServiceError(PjwError):
    """A health check asked for a service that this server does not have."""


class JobStateError(PjwError):
    """A real job at the wrong moment."""


class CopyError(PjwError):
    """Files could not be copied into or out of a job: its files, or the data it sent, do not allow it."""


class WorkspaceBusyError(PjwError):
    """A workspace is used by `holder`, another job (None: one that is being started), or is being removed."""

    FACTS = MappingProxyType({"workspace": str, "holder": int})

    def __init__(
        self, message: str, *, hint: str | None = None, workspace: str, holder: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.workspace: Final = workspace
        self.holder: Final = holder


class WorkspaceNotFoundError(PjwError):
    """The caller has no such workspace."""

    FACTS = MappingProxyType({"workspace": str})

    def __init__(self, workspace: str) -> None:
        super().__init__(f"no workspace {_shown(workspace)}", hint="pjw workspace ls")
        self.workspace: Final = workspace


class NodeNotFoundError(PjwError):
    """The gateway of a cluster knows no such node."""

    FACTS = MappingProxyType({"node": str})

    def __init__(self, node: str) -> None:
        super().__init__(f"no node {_shown(node)}", hint="pjw nodes")
        self.node: Final = node


class ImageNotFoundError(PjwError):
    """The caller has no such image, and the operator offers none by this name."""

    FACTS = MappingProxyType({"image": str})

    def __init__(self, image: str) -> None:
        super().__init__(f"no image {_shown(image)}", hint="pjw image ls")
        self.image: Final = image


class MountNotFoundError(PjwError):
    """The operator offers the caller no mount of this name: there is none, or it is for others."""

    FACTS = MappingProxyType({"mount": str})

    def __init__(self, mount: str) -> None:
        super().__init__(f"no mount {_shown(mount)}", hint="`pjw quota` shows what your operator offers you")
        self.mount: Final = mount


class MountError(PjwError):
    """A mount that the operator offers cannot be had now, or not at the requested path."""

    FACTS = MappingProxyType({"mount": str, "errno": int})

    def __init__(
        self, message: str, *, hint: str | None = None, mount: str | None = None, errno: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.mount: Final = mount
        self.errno: Final = errno

    @classmethod
    def of_source(cls, mount: str, error: int) -> "MountError":
        """Make the error for an operator's directory that cannot be mounted; its path is not told."""
        return cls(
            f"cannot mount {_shown(mount)}: the operator's directory: {describe_errno(error)}",
            hint="tell your operator, whom `pjwd check` tells more",
            mount=mount,
            errno=error,
        )


class GpuError(PjwError):
    """GPUs that cannot be had: the operator offers the caller none, the machine has fewer, or one fails."""

    FACTS = MappingProxyType({"errno": int})

    def __init__(self, message: str, *, hint: str | None = None, errno: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.errno: Final = errno

    @classmethod
    def not_offered(cls) -> "GpuError":
        """Make the error for a client that may have no GPUs, whether or not the machine has some."""
        return cls("your operator offers you no GPUs", hint="`pjw quota` shows what your operator offers you")

    @classmethod
    def gone(cls, name: str) -> "GpuError":
        """Make the error for a GPU that the operator's CDI files had, and have no more."""
        return cls(f"the machine has no GPU {_shown(name)} any more", hint="start the job again")

    @classmethod
    def unknown(cls) -> "GpuError":
        """Make the error for CDI files that cannot be read; the reason is for the log only."""
        return cls(
            "the operator's GPUs cannot be had now", hint="tell your operator, whom pjwd's log tells more"
        )

    @classmethod
    def of_edit(cls, path: str, error: int) -> "GpuError":
        """Make the error for a file at *path* that the job's GPUs need, and that it cannot have."""
        return cls(
            f"cannot give the job {_shown(path)}, which its GPUs come with: {describe_errno(error)}",
            hint="tell your operator, whose CDI file names it",
            errno=error,
        )


class NameTakenError(PjwError):
    """Another job of the caller's, `holder`, has the name and has not ended."""

    FACTS = MappingProxyType({"holder": int})

    def __init__(self, message: str, *, hint: str | None = None, holder: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.holder: Final = holder


class LaunchError(PjwError):
    """The command could not be executed: missing, or not executable. Carries errno."""

    FACTS = MappingProxyType({"program": str, "errno": int})

    def __init__(self, program: str, error: int) -> None:
        super().__init__(f"cannot execute {_shown(program)}: {describe_errno(error)}")
        self.program: Final = program
        self.errno: Final = error


class WorkdirError(PjwError):
    """The command's working directory cannot be entered, by its user and as a job sees it. Carries errno."""

    FACTS = MappingProxyType({"workdir": str, "errno": int})

    def __init__(self, workdir: str, error: int) -> None:
        super().__init__(f"cannot enter the working directory {_shown(workdir)}: {describe_errno(error)}")
        self.workdir: Final = workdir
        self.errno: Final = error


class OffsetError(PjwError):
    """The requested offset is beyond the end of the output or input, which has `size` bytes."""

    FACTS = MappingProxyType({"size": int})

    def __init__(self, message: str, *, hint: str | None = None, size: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.size: Final = size


class SequenceError(PjwError):
    """Changes of jobs are not available from that number on: those up to `oldest` are not kept any more."""

    FACTS = MappingProxyType({"oldest": int})

    def __init__(self, message: str, *, hint: str | None = None, oldest: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.oldest: Final = oldest


class OutputLostError(PjwError):
    """A part of a job's output is gone: the host went down before the disk had it, or its file was cut."""


class LimitReachedError(PjwError):
    """A count has reached its limit, or space has run out: the same request may work later.

    `limit` is the key of pjwd's configuration, if there is one; `most` is the number that it allows.
    """

    FACTS = MappingProxyType({"limit": str, "most": int})

    def __init__(
        self, message: str, *, hint: str | None = None, limit: str | None = None, most: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.limit: Final = limit
        self.most: Final = most


class NotAuthenticatedError(PjwError):
    """The caller's identity is unknown, or its certificate is not acceptable."""


class NotAllowedError(PjwError):
    """The caller is known, but its role lacks the method."""


class ServerUnreachableError(PjwError):
    """No server answered, or the server closed the connection. The same call may work later."""


class LauncherGoneError(ServerUnreachableError):
    """The launcher has died, and nothing can be started or stopped; running jobs go on.

    A client also gets this error from a server that ends.
    """


class ServerDrainingError(LauncherGoneError):
    """The server ends, and takes no more calls; running jobs go on."""


class WorkerClosedError(LauncherGoneError):
    """The worker was closed during the call; running jobs go on."""


class KernelError(PjwError):
    """The kernel refused a step of a set-up. Names the operation, its subject and errno (0: none).

    `for_client`: a client's own job could see the same, so the client gets its words.
    """

    FACTS = MappingProxyType({"operation": str, "subject": str, "errno": int})

    for_client: bool = False

    def __init__(
        self, operation: str, subject: str, error: int, *, hint: str | None = None, for_client: bool = False
    ) -> None:
        why = f": {describe_errno(error)}" if error else ""
        super().__init__(f"cannot {operation} {subject}{why}", hint=hint)
        self.operation: Final = operation
        self.subject: Final = subject
        self.errno: Final = error
        self.for_client = for_client


class JobTableError(KernelError):
    """SQLite cannot read, write or copy the table of jobs. The message has its reason, and `errno` is 0."""

    def __init__(self, operation: str, path: str, why: Exception) -> None:
        super().__init__(operation, f"{path} ({why})", 0)


class ProtocolError(PjwError):
    """Worker and launcher disagree about their messages: a bug, or a hostile peer."""


class ConfigError(PjwError):
    """The operator's fault: a setting, a file or this host does not allow the request."""


class TerminalError(ConfigError):
    """A command needs a terminal and has none, or cannot write to the terminal that it has."""


class ServerFailedError(PjwError):
    """Seen by a client: the server failed in a way that is its own fault."""


def _shown(text: str) -> str:
    # it travels as a header of HTTP/2, which is small, and ends on a terminal
    shown = text if text.isprintable() else ascii(text)
    return f"{shown[:SHOWN_CHARACTERS]}..." if len(shown) > SHOWN_CHARACTERS else shown


def describe_errno(error: int) -> str:
    """Word an errno as in `no such file or directory (ENOENT)`."""
    name = errno_names.errorcode.get(error, str(error))
    return f"{os.strerror(error).lower()} ({name})"
