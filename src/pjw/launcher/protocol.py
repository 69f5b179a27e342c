"""The messages between worker and launcher: bytes in, values out. No I/O.

One message is one datagram of a SOCK_SEQPACKET socket, a JSON object with exactly the keys
of its class in addition to `op` and `seq`. The kernel keeps the edges of datagrams, so there is no
framing to get wrong. docs/launcher-protocol.md says which message carries which descriptors.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, get_args

from pjw.errors import InvalidJobError, ProtocolError
from pjw.model import (
    DEFAULT_SHARE,
    NO_GPUS,
    NO_SUMS,
    OFFERED_MAX,
    GpuOffer,
    GroupUse,
    Limits,
    MountSource,
    Share,
    Sums,
    Usage,
)

MAX_DATAGRAM_BYTES: Final = 65_536
MAX_DESCRIPTORS: Final = 10
# So many jobs are measured for one request: the launcher does nothing else for 2 ms then.
MAX_MEASURED: Final = 16
# As many job ids as fit into a datagram at their longest.
MAX_JOB_IDS: Final = 2_000
# As many names as fit into a datagram, and all that a list of texts may have.
MAX_WORKSPACES: Final = 500
# A launch takes milliseconds. One that takes so long is stuck in its client's request, such as the exec of a
# file on a dead NFS server, or its limits are too tight. Then the launcher ends it.
LAUNCH_SECONDS: Final = 30.0
# So much longer may one take whose files are unpacked first.
UNPACK_SECONDS: Final = 600.0
# The most sessions of a job at once. The worker looks first, the launcher again.
SESSIONS_MAX: Final = 16
# Where the launcher adds the usage of an ended job to its status file: far behind all that init may write.
ACCOUNTS_OFFSET: Final = 1024


@dataclass(frozen=True, slots=True)
class Hello:
    """First and once, while the sender is still root: the policy for all that follows."""

    op: ClassVar = "hello"
    state_dir: str
    # 0: that of the state directory
    uid_first: int
    uid_count: int
    ceiling: Limits
    floor: Limits
    waiting_inits: int
    hidden_paths: tuple[str, ...]
    visible_paths: tuple[str, ...]
    operator_files: tuple[str, ...]
    sums: Sums = NO_SUMS
    # where scratch directories are made; empty: in the state directory
    scratch_dir: str = ""
    # the most that a job may have there, by a project quota; 0 is no limit
    scratch_bytes_max: int = 0
    scratch_inodes_max: int = 0
    # a file that the server appends to; empty: there is none
    audit_log: str = ""
    # the most that all workspaces of one client may have, by a project quota where there are some; 0 is no
    # limit
    workspace_bytes_max: int = 0
    # directories that jobs may be given by their names
    mounts: tuple[MountSource, ...] = ()
    # one of `operator_files`, from which `ReloadMounts` takes them anew; empty: there is none
    configuration: str = ""
    # the user of pjwd-egress; 0: there is none
    egress_uid: int = 0
    # the names on the network that jobs may reach, and ranges of addresses that are none of the internet's
    egress_hosts: tuple[str, ...] = ()
    egress_private: tuple[str, ...] = ()
    # the most connections of a job, and of all jobs
    egress_connections_max: int = 0
    egress_connections_total_max: int = 0
    # whose jobs may have GPUs, and where the files that describe them are
    gpus: GpuOffer = NO_GPUS


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a job. Its descriptors are `files`."""

    op: ClassVar = "launch"
    job_id: int
    uid: int
    limits: Limits
    split_stderr: bool = False
    input: bool = False
    share: Share = DEFAULT_SHARE
    # from SIGTERM to SIGKILL when a shutdown, or anything but the launcher, has init end the job
    grace_seconds: int = 10
    # whether its stdin, stdout and stderr are a terminal, whose size is in `control`
    terminal: bool = False
    # whether an archive is unpacked in the job's directory before the command is executed
    upload: bool = False
    # the name of a directory of the client's, made where it is missing; empty: none
    workspace: str = ""
    # whether the job's files that match `patterns` are packed into `artifacts` after its end
    artifacts: bool = False
    # whether the launcher's own program for archives is executed, whatever the first word of the command is
    archive: bool = False
    # the root of the job: the digest of an image of the operator's, or the key of one of the client's own;
    # empty: the host's
    image: str = ""
    read_only: bool = False
    # directories of the operator's, each as NAME:PATH
    mounts: tuple[str, ...] = ()
    # the client that must be offered them, and GPUs, and that wants names on the network, for the log; else
    # empty
    client_name: str = ""
    # the names on the network that it may reach (network.py)
    allow: tuple[str, ...] = ()
    # the network that it shares with other jobs of its user, by its name; empty: it has its own
    link: str = ""
    # GPUs by their names, as `GpuNames` has them
    gpus: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The descriptors in order: the command, files that init writes, those it reads for the command."""
        apart = ("stderr", "stderr_times") if self.split_stderr else ()
        told = ("control",) if self.terminal else ()
        own = (*(("input",) if self.input else ()), *(("artifacts",) if self.artifacts else ()))
        sent = (*(("upload",) if self.upload else ()), *(("patterns",) if self.artifacts else ()))
        return ("command", "output", "status", "times", *apart, *told, *own, *sent)

    @property
    def seconds_max(self) -> float:
        """The most seconds that it may take."""
        return LAUNCH_SECONDS + (UNPACK_SECONDS if self.upload else 0)


@dataclass(frozen=True, slots=True)
class Exec:
    """Start another command in a job that runs: a session. Its descriptors are `files`.

    It runs as the job's user, who must be *uid*, and within the job's limits.
    """

    op: ClassVar = "exec"
    job_id: int
    uid: int
    # of each of its outputs together; 0 is no limit
    output_max_bytes: int = 0
    split_stderr: bool = False
    input: bool = False
    # from SIGHUP to SIGKILL when it is hung up
    grace_seconds: int = 10
    terminal: bool = False
    # whether the launcher's own program for archives is executed, whatever the first word of the command is
    archive: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """The descriptors in order: as for a launch, and the one that controls the running session."""
        apart = ("stderr",) if self.split_stderr else ()
        return ("command", "output", "status", *apart, "control", *(("input",) if self.input else ()))


@dataclass(frozen=True, slots=True)
class Connect:
    """Connect to a port within a job that runs; the answer is `Opened`, with the socket.

    *uid* must be the job's user.
    """

    op: ClassVar = "connect"
    job_id: int
    uid: int
    port: int


@dataclass(frozen=True, slots=True)
class Adopt:
    """Hand over a job that may still run from before the launcher was started."""

    op: ClassVar = "adopt"
    job_id: int
    # as in Launch
    allow: tuple[str, ...] = ()
    client_name: str = ""
    link: str = ""
    # of *allow*: the names that the operator does not offer to the client any more
    withdrawn: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Egress:
    """Start pjwd-egress; once, and before jobs that reach names. It comes with a socket for its reports."""

    op: ClassVar = "egress"


@dataclass(frozen=True, slots=True)
class JobIds:
    """List the jobs that have a cgroup or a scratch directory, from the id behind `after` on."""

    op: ClassVar = "job_ids"
    after: int


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM, or another signal from 1 to 31, to every process of a job."""

    op: ClassVar = "terminate"
    job_id: int
    signal: int = 15


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL to every process of a job; with `init_too` also to its init: the last resort."""

    op: ClassVar = "kill"
    job_id: int
    init_too: bool


@dataclass(frozen=True, slots=True)
class Remains:
    """Ask which processes of a killed job are still there."""

    op: ClassVar = "remains"
    job_id: int


@dataclass(frozen=True, slots=True)
class Measure:
    """The usage of running jobs at this moment; at most MAX_MEASURED of them."""

    op: ClassVar = "measure"
    job_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Account:
    """The usage of an ended job."""

    op: ClassVar = "account"
    job_id: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove the cgroup and the scratch directory of an ended job."""

    op: ClassVar = "remove"
    job_id: int


@dataclass(frozen=True, slots=True)
class Departed:
    """Wait, however long, until nothing is left of a launch that was refused with `Refused.left`."""

    op: ClassVar = "departed"
    job_id: int


@dataclass(frozen=True, slots=True)
class SetShare:
    """Give a client another share. Does nothing for one without jobs: its next launch brings the share."""

    op: ClassVar = "set_share"
    uid: int
    share: Share


@dataclass(frozen=True, slots=True)
class MeasureClient:
    """The joint usage of a client's jobs at this moment."""

    op: ClassVar = "measure_client"
    uid: int


@dataclass(frozen=True, slots=True)
class ScratchUse:
    """Count each job's files in its scratch directory; the answer is `Opened`, with a pipe of the counts."""

    op: ClassVar = "scratch_use"


@dataclass(frozen=True, slots=True)
class WorkspaceNames:
    """List the workspaces, from that behind `after` on; as `WorkspacePage` has them."""

    op: ClassVar = "workspace_names"
    after: str


@dataclass(frozen=True, slots=True)
class WorkspaceUse:
    """Count the files of a workspace; the answer is `Opened`, with a pipe that gives bytes and inodes."""

    op: ClassVar = "workspace_use"
    uid: int
    name: str


@dataclass(frozen=True, slots=True)
class RemoveWorkspace:
    """Remove a workspace with all that is in it; answered when it is gone."""

    op: ClassVar = "remove_workspace"
    uid: int
    name: str


@dataclass(frozen=True, slots=True)
class ReloadMounts:
    """Take the operator's mounts from `Hello.configuration`, as it is now; for launches from now on."""

    op: ClassVar = "reload_mounts"


@dataclass(frozen=True, slots=True)
class Gpus:
    """List the machine's GPUs now, and the variables of a job that has those of these `names`."""

    op: ClassVar = "gpus"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenFile:
    """The operator's file at a place of `Hello.operator_files`, as it is now."""

    op: ClassVar = "open_file"
    place: int


@dataclass(frozen=True, slots=True)
class OpenAuditLog:
    """`Hello.audit_log` for appending, made where it is missing: the operator has moved the old one."""

    op: ClassVar = "open_audit_log"


@dataclass(frozen=True, slots=True)
class ImageTable:
    """The table of the operator's images, as it is now (image_store.py); the answer is `Opened`."""

    op: ClassVar = "image_table"


@dataclass(frozen=True, slots=True)
class Done:
    """It was done."""

    op: ClassVar = "done"


@dataclass(frozen=True, slots=True)
class Ready:
    """The launcher serves. `no_disk` is why it can set no limit of disk IO; empty when it can.

    `uid_first`: the first user id of jobs. `not_set`: wanted settings that failed (sums, a claim on the user
    ids), in words. Descriptor: the directory of scratch directories, for fstatvfs(3) and nothing else
    (O_PATH).
    """

    op: ClassVar = "ready"
    no_disk: str
    hint: str
    uid_first: int
    not_set: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Launched:
    """The command was executed at `started_ns` (CLOCK_REALTIME). Descriptor: pidfd of the job's init."""

    op: ClassVar = "launched"
    started_ns: int


@dataclass(frozen=True, slots=True)
class Entered:
    """The command of a session was executed at `started_ns` (CLOCK_REALTIME)."""

    op: ClassVar = "entered"
    started_ns: int


@dataclass(frozen=True, slots=True)
class Adopted:
    """Whether the job still runs (descriptor: pidfd of its init) and whether it has a cgroup."""

    op: ClassVar = "adopted"
    alive: bool
    known: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """The second answer to a launch or an adoption, when the job's init has ended: the job's usage.

    `known` is false when that cannot be read now. `removed`: nothing of the job is left, and its accounts are
    in its status file; else all is left as it is until `remove`.
    """

    op: ClassVar = "ended"
    known: bool
    usage: Usage
    removed: bool


@dataclass(frozen=True, slots=True)
class JobIdPage:
    """At most MAX_JOB_IDS ids, ascending; a full page may have another behind it."""

    op: ClassVar = "job_id_page"
    job_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GpuNames:
    """The names of all GPUs, and the requested variables, each as NAME=VALUE."""

    op: ClassVar = "gpu_names"
    names: tuple[str, ...]
    environment: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkspacePage:
    """At most MAX_WORKSPACES workspaces in their order: each the user id of its client, a slash and its name.

    A full page may have another behind it.
    """

    op: ClassVar = "workspace_page"
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Accounted:
    """The accounting of a job; `known` is false when it has no cgroup to ask."""

    op: ClassVar = "accounted"
    known: bool
    usage: Usage


@dataclass(frozen=True, slots=True)
class Measurement:
    """The usage of one job until `time_ns` (CLOCK_REALTIME): see model.UsageSample."""

    job_id: int
    time_ns: int
    cpu_usage_usec: int
    memory_bytes: int
    io_read_bytes: int
    io_write_bytes: int
    pids: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A measurement of each requested job that runs; others are left out."""

    op: ClassVar = "measured"
    jobs: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True)
class Remaining:
    """The processes of a job and the cause of each one's wait, as words; empty when it has none.

    `killed`: whether it has others than its init, and all of them have their SIGKILL, so init did its part.
    """

    op: ClassVar = "remaining"
    words: str
    killed: bool


@dataclass(frozen=True, slots=True)
class ShareSet:
    """The share is set, except the sums in `not_set`, in words."""

    op: ClassVar = "share_set"
    not_set: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClientMeasured:
    """The usage of a client's jobs: nothing where it has none."""

    op: ClassVar = "client_measured"
    use: GroupUse


@dataclass(frozen=True, slots=True)
class Opened:
    """Descriptor: the file, or the pipe, that was requested, for reading."""

    op: ClassVar = "opened"


@dataclass(frozen=True, slots=True)
class Refused:
    """The request was not carried out. `errno` is 0 when there is none.

    `kind`: exec, workdir (it cannot be entered), unpack (the upload cannot be), image (it has another entry
    where pjw mounts), setup (another step of init), late (the command was not executed in time: `operation`
    says in which), mount (that of the name in `subject` cannot be had, or without an errno is not offered),
    mount-at (not at its path), gpu (one cannot be had: `operation` says why), device-at (a file of one, not
    at its path), kernel, invalid, state or config. `left`: a part of the launch does not end; `Departed` is
    answered when it has ended.
    """

    op: ClassVar = "refused"
    kind: str
    operation: str
    subject: str
    errno: int
    hint: str
    left: bool = False


Request = (
    Hello
    | Launch
    | Exec
    | Connect
    | Adopt
    | JobIds
    | Terminate
    | Kill
    | Remains
    | Measure
    | Account
    | Remove
    | Departed
    | ScratchUse
    | WorkspaceNames
    | WorkspaceUse
    | RemoveWorkspace
    | ReloadMounts
    | Gpus
    | OpenFile
    | OpenAuditLog
    | Egress
    | SetShare
    | MeasureClient
    | ImageTable
)
Reply = (
    Done
    | Ready
    | Launched
    | Entered
    | Adopted
    | Ended
    | JobIdPage
    | WorkspacePage
    | GpuNames
    | Remaining
    | Measured
    | Accounted
    | Opened
    | ShareSet
    | ClientMeasured
    | Refused
)

# The requests about one job. Each has the job's id in `job_id`.
AboutJob = Launch | Exec | Connect | Adopt | Terminate | Kill | Remains | Account | Remove | Departed

REQUESTS: Final[dict[str, type[Request]]] = {c.op: c for c in get_args(Request)}
REPLIES: Final[dict[str, type[Reply]]] = {c.op: c for c in get_args(Reply)}


def descriptors_of(request: Request) -> int:
    """Return the number of descriptors that come with a request."""
    if isinstance(request, Egress):
        return 1
    return len(request.files) if isinstance(request, Launch | Exec) else 0


def encode(seq: int, message: Request | Reply) -> bytes:
    """Make a datagram. Raises ProtocolError if it would be too large."""
    data = _ENCODER.encode({"op": message.op, "seq": seq, **_members(message)}).encode()
    if len(data) > MAX_DATAGRAM_BYTES:
        raise ProtocolError(f"a message {message.op} of {len(data)} bytes is too large")
    return data


def _members(value: Any) -> dict[str, Any]:
    # not asdict(): its deep copies took half the time of an encoding
    return {name: getattr(value, name) for name in _TYPES[type(value)]}


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), default=_members)
# the members of each class, and the type that each is declared with
_TYPES: Final[dict[type, dict[str, Any]]] = {
    cls: {field.name: field.type for field in fields(cls)}
    for cls in (
        *(*REQUESTS.values(), *REPLIES.values()),
        *(Limits, Usage, Measurement, Share, Sums, GroupUse, MountSource, GpuOffer),
    )
}


def decode_request(data: bytes) -> tuple[int, Request]:
    """Read a request: its sequence number and its value. Raises only ProtocolError."""
    seq, message = _decode(data, REQUESTS)
    return seq, message


def decode_reply(data: bytes) -> tuple[int, Reply]:
    """Read a reply: its sequence number and its value. Raises only ProtocolError."""
    seq, message = _decode(data, REPLIES)
    return seq, message


def _decode(data: bytes, classes: dict[str, type[Any]]) -> tuple[int, Any]:
    if len(data) > MAX_DATAGRAM_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes is too large")
    try:
        # Not the bytes: json would take UTF-16 too, and import a module for it, as root and on a peer's word.
        message = json.loads(data.decode())
    # RecursionError: "[[[[…" nests deeper than the parser can
    except (ValueError, RecursionError):
        raise ProtocolError("a message is not JSON") from None
    if not isinstance(message, dict):
        raise ProtocolError("a message is not an object")
    op = message.pop("op", None)
    seq = _whole_number(message.pop("seq", None))
    if not isinstance(op, str) or op not in classes:
        raise ProtocolError("a message has no known op")
    return seq, _value(classes[op], message)


def _value(cls: type[Any], members: object) -> Any:
    if not isinstance(members, dict):
        raise ProtocolError(f"a {cls.__name__} is not an object")
    expected = _TYPES[cls]
    if members.keys() != expected.keys():
        raise ProtocolError(f"a {cls.__name__} has not exactly the members it should")
    try:
        return cls(**{name: _READERS[kind](members[name]) for name, kind in expected.items()})
    except InvalidJobError as error:
        raise ProtocolError(f"a {cls.__name__} is not possible: {error}") from None


def _whole_number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ProtocolError("a number is not a whole one from 0 to 2^63-1")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > 4096:
        raise ProtocolError("a text is not one, is too long, or has a NUL in it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ProtocolError("a text is not valid Unicode") from None
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ProtocolError("expected true or false")
    return value


def _items(read: Callable[[object], Any], most: int) -> Callable[[object], tuple[Any, ...]]:
    def items(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > most:
            raise ProtocolError(f"a list is not one, or has more than {most} items")
        return tuple(read(item) for item in value)

    return items


# by the type that a field is declared with
_READERS: Final[dict[Any, Callable[[object], Any]]] = {
    int: _whole_number,
    str: _text,
    bool: _truth,
    tuple[int, ...]: _items(_whole_number, MAX_JOB_IDS),
    tuple[str, ...]: _items(_text, MAX_WORKSPACES),
    tuple[MountSource, ...]: _items(lambda value: _value(MountSource, value), OFFERED_MAX),
    tuple[Measurement, ...]: _items(lambda value: _value(Measurement, value), MAX_MEASURED),
    Limits: lambda value: _value(Limits, value),
    Usage: lambda value: _value(Usage, value),
    Share: lambda value: _value(Share, value),
    Sums: lambda value: _value(Sums, value),
    GroupUse: lambda value: _value(GroupUse, value),
    GpuOffer: lambda value: _value(GpuOffer, value),
}
