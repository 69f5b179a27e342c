"""Checks every request again, as if the worker were hostile."""

import fcntl
import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pjw.errors import ConfigError, GpuError, InvalidJobError, KernelError
from pjw.launcher.cdi import Edits
from pjw.launcher.protocol import Adopt, Connect, Exec, Hello, Launch, RemoveWorkspace, WorkspaceUse
from pjw.model import (
    GPUS_MAX,
    JOB_DIRECTORY,
    PORT_MAX,
    GpuOffer,
    Limits,
    MountSource,
    check_link,
    check_mounts,
    check_workspace,
    is_image_digest,
    is_image_key,
    lies_in,
)
from pjw.network import Allowed, check_allow, is_offered

# ids of jobs become names of directories: 2^53 is enough for a million jobs a second for 285 years
JOB_ID_MAX: Final = 2**53

# the last one before the real-time signals
SIGNAL_MAX: Final = 31

# files of a launch or of a session that init reads; it writes to all others
_READ: Final = ("command", "input", "control", "upload", "patterns")
# The variables that every job has, in addition to those that its client adds: neither the
# server's nor the launcher's ever reaches a job. docs/architecture.md lists them for users.
JOB_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": JOB_DIRECTORY,
    # on disk: /tmp is in memory, and holds at most half of the job's memory limit
    "TMPDIR": JOB_DIRECTORY,
    "SHELL": "/bin/sh",
    "LANG": "C.UTF-8",
}


@dataclass(frozen=True, slots=True)
class Policy:
    """The bounds of the launcher's work for its worker. Set once, by root."""

    uid_first: int
    uid_count: int
    ceiling: Limits
    floor: Limits
    waiting_inits: int
    hidden_paths: tuple[str, ...]
    visible_paths: tuple[str, ...]
    operator_files: tuple[str, ...]
    audit_log: str
    mounts: tuple[MountSource, ...]
    configuration: str
    gpus: GpuOffer
    # directories of pjw's own, which lie in no mount
    own_paths: tuple[str, ...]
    egress_uid: int
    egress_hosts: tuple[Allowed, ...]
    egress_private: tuple[str, ...]
    egress_connections_max: int
    egress_connections_total_max: int

    @classmethod
    def from_hello(cls, hello: Hello) -> "Policy":
        """Make the policy. Raises InvalidJobError for settings that nobody may have, as root as a user."""
        # a first one of 0 is replaced before anything is served (job_users.py)
        if hello.uid_count < 1 or hello.uid_first + hello.uid_count > 2**32 - 1:
            raise InvalidJobError("the range of user ids for jobs must lie between 1 and 2^32-2")
        own = (hello.state_dir, *((hello.scratch_dir,) if hello.scratch_dir else ()))
        files = (*hello.operator_files, *((hello.audit_log,) if hello.audit_log else ()))
        for path in (*own, *hello.hidden_paths, *hello.visible_paths, *files):
            if not os.path.isabs(path):
                raise InvalidJobError(f"{path!r} is not an absolute path")
        if hello.uid_first <= hello.egress_uid < hello.uid_first + hello.uid_count and hello.uid_first:
            raise InvalidJobError(f"the user id of pjwd-egress, {hello.egress_uid}, is one of those for jobs")
        if hello.configuration and hello.configuration not in hello.operator_files:
            raise InvalidJobError("the configuration is not among the operator's files")
        policy = cls(
            uid_first=hello.uid_first,
            uid_count=hello.uid_count,
            ceiling=hello.ceiling,
            floor=hello.floor,
            waiting_inits=hello.waiting_inits,
            hidden_paths=(*own, *hello.hidden_paths),
            visible_paths=hello.visible_paths,
            operator_files=hello.operator_files,
            audit_log=hello.audit_log,
            mounts=hello.mounts,
            configuration=hello.configuration,
            gpus=hello.gpus,
            own_paths=own,
            egress_uid=hello.egress_uid,
            egress_hosts=tuple(map(Allowed.of, hello.egress_hosts)),
            egress_private=hello.egress_private,
            egress_connections_max=hello.egress_connections_max,
            egress_connections_total_max=hello.egress_connections_total_max,
        )
        policy.check_sources(hello.mounts)
        return policy

    def check_sources(self, sources: Sequence[MountSource]) -> None:
        """Check that no mount shows a path that no job may see. Raises InvalidJobError."""
        if len({source.name for source in sources}) < len(sources):
            raise InvalidJobError("two mounts have one name")
        for source in sources:
            if within := self._hidden_in(source.path):
                raise InvalidJobError(
                    f"the mount {source.name} would show {within[0]}, which no job may see",
                    hint="offer another directory, or one that lies deeper",
                )

    def check_edits(self, edits: Edits) -> None:
        """Check the files of devices in the same way. Raises ConfigError."""
        for edit in edits.edits:
            if within := self._hidden_in(edit.host_path):
                raise ConfigError(
                    f"a CDI file has {edit.host_path}, which would show {within[0]}, which no job may see"
                )

    def _hidden_in(self, path: str) -> list[str]:
        """Return the paths hidden from jobs that a mount of *path* would show."""
        within = [hidden for hidden in self.hidden_paths if hidden != path and lies_in(hidden, path)]
        return within + [own for own in self.own_paths if lies_in(path, own)]

    def check_launch(self, request: Launch, descriptors: Sequence[int]) -> None:
        """Check the launch. Raises InvalidJobError if it is not allowed, KernelError if that is unknown."""
        check_job_id(request.job_id)
        self.check_uid(request.uid)
        self.check_network(request)
        if above := request.limits.first_above(self.ceiling):
            raise InvalidJobError(f"limit {above} is above its ceiling")
        if below := request.limits.first_below(self.floor):
            raise InvalidJobError(f"limit {below} is below its floor")
        if request.workspace:
            _check_directory(request.workspace)
        if request.image and not (is_image_key(request.image) or is_image_digest(request.image)):
            raise InvalidJobError("an image is named by its digest, or by a key")
        if request.archive and (request.terminal or request.upload or request.artifacts):
            raise InvalidJobError("a job of the program for archives has no other files, and no terminal")
        if check_mounts(request.mounts) != request.mounts:
            raise InvalidJobError("a mount of a launch is NAME:PATH")
        if request.gpus and not self.gpus.is_for(request.client_name):
            raise GpuError.not_offered()
        if len(set(request.gpus)) < len(request.gpus) or len(request.gpus) > GPUS_MAX:
            raise InvalidJobError("a GPU of a launch is named twice, or there are too many")
        _check_rest(request, descriptors)

    def check_network(self, request: Launch | Adopt) -> None:
        """Check names on the network, which some client must be offered, and the link.

        Raises InvalidJobError.
        """
        if request.allow and check_allow(request.allow) != request.allow:
            raise InvalidJobError("names on the network are not written as they are compared")
        for name in still_offered(request):
            if not is_offered(Allowed.of(name), self.egress_hosts):
                raise InvalidJobError(f"{name} is not offered to any client")
        if request.link:
            check_link(request.link)

    def check_exec(self, request: Exec, owner: int, descriptors: Sequence[int]) -> None:
        """Check a session in a job of the user *owner* likewise: it must be that user's, too."""
        self._check_owner(request, owner)
        most = self.ceiling.output_max_bytes
        if most and not 0 < request.output_max_bytes <= most:
            raise InvalidJobError("limit output_max_bytes is above its ceiling")
        if request.archive and request.terminal:
            raise InvalidJobError("an archive has no terminal")
        _check_rest(request, descriptors)

    def check_connect(self, request: Connect, owner: int) -> None:
        """Check that the job, which is *owner*'s, is the client's and the port is one.

        Raises InvalidJobError.
        """
        self._check_owner(request, owner)
        if not 1 <= request.port <= PORT_MAX:
            raise InvalidJobError(f"{request.port} is not a port from 1 to {PORT_MAX}")

    def _check_owner(self, request: Exec | Connect, owner: int) -> None:
        self.check_uid(request.uid)
        if request.uid != owner:
            raise InvalidJobError(f"job {request.job_id} is not one of user id {request.uid}")

    def check_workspace(self, request: WorkspaceUse | RemoveWorkspace) -> None:
        """Check that it is about a possible workspace. Raises InvalidJobError."""
        self.check_uid(request.uid)
        _check_directory(request.name)

    def check_uid(self, uid: int) -> None:
        """Check that a user id is one for clients. Raises InvalidJobError."""
        if not self.uid_first <= uid < self.uid_first + self.uid_count:
            raise InvalidJobError(f"user id {uid} is not one for jobs")

    def operator_file(self, place: int) -> str:
        """Return the path at that place. Raises InvalidJobError where there is none."""
        if not 0 <= place < len(self.operator_files):
            raise InvalidJobError(f"{place} is not the place of an operator's file")
        return self.operator_files[place]


def still_offered(request: Launch | Adopt) -> tuple[str, ...]:
    """Return the names a job may reach; for a job adopted from before, those that were not withdrawn."""
    withdrawn = request.withdrawn if isinstance(request, Adopt) else ()
    return tuple(name for name in request.allow if name not in withdrawn)


def _check_directory(name: str) -> None:
    """Check the name of a workspace, or the key of a client's image. Raises InvalidJobError."""
    if not is_image_key(name):
        check_workspace(name)


def _check_rest(request: Launch | Exec, descriptors: Sequence[int]) -> None:
    if not 1 <= request.grace_seconds < 2**31:
        raise InvalidJobError("the grace period must be from 1 to 2^31-1 seconds")
    if request.terminal and request.split_stderr:
        raise InvalidJobError("a terminal has one output")
    if len(descriptors) != len(request.files):
        raise InvalidJobError(f"this request needs {len(request.files)} descriptors: {request.files}")
    for name, descriptor in zip(request.files, descriptors, strict=True):
        _check_file(name, descriptor)


def _check_file(name: str, descriptor: int) -> None:
    """Check a file of a launch. Raises InvalidJobError, or KernelError when it cannot be looked at."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError as error:
        raise KernelError("look at", f"the {name} descriptor of a launch", error.errno or 0) from error
    # init writes to them as root: a descriptor of anything but a plain file (a device, a
    # socket, a directory) could make that do more than store bytes.
    if not stat.S_ISREG(mode):
        raise InvalidJobError("a descriptor of a launch is not a regular file")
    # Only files that the sender could open itself are read, written or touched for it.
    wrong, wanted = (os.O_WRONLY, "readable") if name in _READ else (os.O_RDONLY, "writable")
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == wrong:
        raise InvalidJobError(f"the {name} descriptor of a launch is not {wanted}")


def check_signal(number: int) -> None:
    """Check the number of a signal that can stop a job. Raises InvalidJobError."""
    if not 1 <= number <= SIGNAL_MAX:
        raise InvalidJobError(f"{number} is not a signal from 1 to {SIGNAL_MAX}")


def check_job_id(job_id: int) -> None:
    """Check that a number can be the id of a job. Raises InvalidJobError."""
    if not 1 <= job_id <= JOB_ID_MAX:
        raise InvalidJobError(f"{job_id} is not a job id")


def instance_name(state_dir: str) -> str:
    """Name the cgroups of one pjw, told apart from others on the host by its state directory."""
    return f"i-{hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:12]}"
