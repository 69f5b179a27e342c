"""The parts that all answers of a launcher share, and its way to answer the worker."""

import array
import os
import socket
from dataclasses import dataclass

from pjw.errors import (
    ConfigError,
    GpuError,
    InvalidJobError,
    JobStateError,
    KernelError,
    MountError,
    MountNotFoundError,
    PjwError,
)
from pjw.launcher import protocol
from pjw.launcher.archive_program import ArchiveProgram
from pjw.launcher.cgroup import Hierarchy
from pjw.launcher.departures import Departures
from pjw.launcher.egress import EgressProcess
from pjw.launcher.image_store import ImageStore
from pjw.launcher.images import Images
from pjw.launcher.inits import InitPool
from pjw.launcher.mounts import Mounts
from pjw.launcher.phases import Phases
from pjw.launcher.policy import Policy
from pjw.launcher.processes import Watcher
from pjw.launcher.removals import Removals
from pjw.launcher.scratch import Scratch
from pjw.launcher.spawn import Spawner
from pjw.launcher.workspaces import Workspaces

# A reply and the descriptor that goes with it; None for a request that is answered later.
Answer = tuple[protocol.Reply] | tuple[protocol.Reply, int] | None


class Replies:
    """The worker's end of the conversation."""

    def __init__(self, requests: socket.socket) -> None:
        """Reply by the socket that requests come from."""
        self._requests = requests
        # false once the worker has closed its end
        self.are_wanted = True

    def send(self, seq: int, reply: protocol.Reply, *descriptors: int) -> None:
        """Answer the request *seq*; the descriptors stay the caller's."""
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        try:
            self._requests.sendmsg([protocol.encode(seq, reply)], ancillary)
        except (BrokenPipeError, ConnectionResetError):
            self.are_wanted = False

    def refuse(self, seq: int, error: PjwError) -> None:
        """Answer the request *seq* with an error."""
        self.send(seq, refusal_of(error))

    def hand_out(self, seq: int, descriptor: int) -> None:
        """Answer the request *seq* with a descriptor, and close ours."""
        try:
            self.send(seq, protocol.Opened(), descriptor)
        finally:
            os.close(descriptor)


def refusal_of(error: PjwError) -> protocol.Refused:
    """Word an error as a reply, its facts as fields."""
    hint = error.hint or ""
    match error:
        case KernelError(operation=operation, subject=subject, errno=number):
            return protocol.Refused("kernel", operation, subject, number, hint)
        case MountError(mount=str(name), errno=int(number)):
            return protocol.Refused("mount", "", name, number, hint)
        case MountNotFoundError(mount=name):
            return protocol.Refused("mount", "", name, 0, hint)
        case GpuError(errno=number):
            return protocol.Refused("gpu", str(error), "", number or 0, hint)
        case InvalidJobError():
            return protocol.Refused("invalid", str(error), "", 0, hint)
        case JobStateError():
            return protocol.Refused("state", str(error), "", 0, hint)
        case ConfigError():
            return protocol.Refused("config", str(error), "", 0, hint)
        case _:
            raise error


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a launcher that has been greeted; each has one owner, the conversation."""

    replies: Replies
    watcher: Watcher
    policy: Policy
    # the name of our cgroups
    instance: str
    hierarchy: Hierarchy
    scratch: Scratch
    workspaces: Workspaces
    mounts: Mounts
    removals: Removals
    image_store: ImageStore
    images: Images
    phases: Phases
    departures: Departures
    spawner: Spawner
    pool: InitPool
    egress: EgressProcess
    archive_program: ArchiveProgram
