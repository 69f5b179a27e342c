"""Answers the worker's requests: the conversation, the route table, and the requests about no one job.

One thread and one selector. The answers about jobs are in jobs.py, launches.py and sessions.py.
"""

import array
import errno
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from typing import Any, Final

from pjw.errors import ConfigError, InvalidJobError, JobStateError, KernelError, PjwError, ProtocolError
from pjw.launcher import protocol
from pjw.launcher.archive_program import ArchiveProgram
from pjw.launcher.cdi import edits_of, read_devices
from pjw.launcher.cgroup import disks_under, open_hierarchy
from pjw.launcher.departures import Departures
from pjw.launcher.egress import EgressProcess
from pjw.launcher.image_store import ImageStore
from pjw.launcher.images import Images
from pjw.launcher.inits import InitPool
from pjw.launcher.job_users import claim_users
from pjw.launcher.jobs import Jobs
from pjw.launcher.launches import Launches
from pjw.launcher.lock import hold_lock
from pjw.launcher.mounts import Mounts, read_mounts_of
from pjw.launcher.operator_files import open_audit_log, open_operator_file
from pjw.launcher.parts import Answer, Parts, Replies
from pjw.launcher.phases import Phases
from pjw.launcher.policy import Policy, check_job_id, instance_name
from pjw.launcher.processes import Watcher
from pjw.launcher.removals import Removals
from pjw.launcher.scratch import Scratch
from pjw.launcher.scratch_use import spawn_count
from pjw.launcher.sessions import Sessions
from pjw.launcher.spawn import Spawner
from pjw.launcher.visible import check_visible
from pjw.launcher.workspaces import Workspaces
from pjw.model import is_image_key
from pjw.process import OwnedFds

# Workspaces that are counted at once: the worker has two counted, but does not wait for each to the end.
COUNTED_AT_ONCE: Final = 4


class Phase(Enum):
    """The phase of the conversation with the worker."""

    GREETING = auto()
    SERVING = auto()


class Launcher:
    """One conversation with one worker."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests: Final = requests
        self._replies: Final = Replies(requests)
        self._watcher: Final = Watcher()
        self._phase = Phase.GREETING
        # these come with the greeting
        self.parts: Parts
        self.jobs: Jobs
        self._launches: Launches
        # the owner of the answers of each class in ROUTES
        self._rooms: Final[dict[type, object]] = {Launcher: self}
        # whether scratch directories are being counted
        self._counting = False
        # the number of workspaces that are being counted
        self._counting_workspaces = 0

    def run(self) -> None:
        """Answer until the other end closes. Raises ProtocolError for a broken or hostile peer.

        Launches in progress are left to themselves then: init goes on without us, and the
        next launcher finds the job by its cgroup.
        """
        self._watcher.watch(self._requests, self._on_request)
        try:
            while self._replies.are_wanted:
                seconds = self._launches.seconds_to_fill() if self._phase is Phase.SERVING else None
                if not self._watcher.run_once(seconds) and seconds == 0:
                    self.parts.pool.fill()
        finally:
            self.close()

    def close(self) -> None:
        """Close all but the jobs."""
        self._watcher.unwatch(self._requests)
        if self._phase is Phase.SERVING:
            parts = self.parts
            parts.mounts.close()
            parts.egress.close()
            parts.pool.close()
            parts.spawner.close()
            parts.hierarchy.release()
            parts.images.close()
            parts.scratch.close()
            parts.archive_program.close()
        self._watcher.close()

    def _on_request(self) -> None:
        # One request a turn, so that reports are not held up behind a burst of requests.
        room = array.array("i", [0] * protocol.MAX_DESCRIPTORS)
        try:
            data, ancillary, flags, _ = self._requests.recvmsg(
                protocol.MAX_DATAGRAM_BYTES + 1,
                socket.CMSG_LEN(len(room) * room.itemsize),
                socket.MSG_CMSG_CLOEXEC,
            )
        except ConnectionResetError:
            # the other end has closed with replies of ours unread
            self._replies.are_wanted = False
            return
        received = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
        # an answer takes the descriptors that it keeps
        with OwnedFds(received) as descriptors:
            # Zero bytes are the end of the conversation; an empty datagram looks the same and
            # ends it as well.
            if not data:
                self._replies.are_wanted = False
                return
            if flags & socket.MSG_TRUNC:
                raise ProtocolError("a request was cut short")
            seq, request = protocol.decode_request(data)
            route = ROUTES[request.op]
            if self._phase is not route.allowed_in:
                raise ProtocolError(f"a request {request.op} came out of phase")
            expected = protocol.descriptors_of(request)
            if flags & socket.MSG_CTRUNC and len(descriptors) < expected:
                # we had no room for those that are missing, which is no fault of the sender's
                subject = f"a request {request.op}"
                self._replies.send(seq, protocol.Refused("kernel", "receive", subject, errno.EMFILE, ""))
                return
            if flags & socket.MSG_CTRUNC or len(descriptors) != expected:
                raise ProtocolError(f"a request {request.op} came with {len(descriptors)} descriptors")
            self._answer(seq, route, request, descriptors)

    def _answer(self, seq: int, route: "Route", request: protocol.Request, descriptors: OwnedFds) -> None:
        try:
            if isinstance(request, protocol.AboutJob):
                check_job_id(request.job_id)
                self.jobs.note_end(request.job_id)
                self.parts.phases.require_permitted(request.op, request.job_id)
            answer = route.answer(self._rooms[route.room], seq, request, descriptors)
        except PjwError as error:
            self._replies.refuse(seq, error)
            return
        except OSError as error:
            # A process that was made and cannot be watched concerns more than one request, see main().
            if route.makes_processes:
                raise
            failed = KernelError("answer", f"a request {request.op}", error.errno or 0)
            self._replies.refuse(seq, failed)
            return
        if answer is not None:
            self._replies.send(seq, *answer)

    def answer_hello(self, _seq: int, request: protocol.Hello, _: OwnedFds) -> Answer:
        """Take the policy, the lock on the state directory and the cgroups; from here on serve."""
        Policy.from_hello(request)
        check_visible(request.visible_paths)
        hold_lock(request.state_dir)
        uid_first, not_claimed = claim_users(request.state_dir, request.uid_first, request.uid_count)
        # again, with the range that was found: its end may be beyond the last user id
        policy = Policy.from_hello(replace(request, uid_first=uid_first))
        scratch = Scratch(
            request.state_dir, request.scratch_dir, request.scratch_bytes_max, request.scratch_inodes_max
        )
        # Jobs read the host's root and write to their scratch directories and, by init, to the state
        # directory. Without io limits no disk need be there at all (directories on tmpfs or an overlay).
        disks, no_disk, hint = [], "", ""
        try:
            disks = disks_under(["/", request.state_dir, scratch.directory])
        except ConfigError as error:
            no_disk, hint = str(error), error.hint or ""
        instance = instance_name(request.state_dir)
        hierarchy = open_hierarchy(instance, io_devices=disks, supervisor_pids=(os.getpid(), os.getppid()))
        not_set = [*filter(None, [not_claimed]), *hierarchy.set_sums(request.sums)]
        image_store = ImageStore(request.state_dir, scratch.places)
        workspaces = Workspaces(request.state_dir, uid_first, request.workspace_bytes_max)
        images = Images(image_store, workspaces, scratch)
        watcher, phases, departures = self._watcher, Phases(), Departures(self._watcher)
        spawner = Spawner(watcher, policy, scratch.directory)
        self.parts = Parts(
            replies=self._replies,
            watcher=watcher,
            policy=policy,
            instance=instance,
            hierarchy=hierarchy,
            scratch=scratch,
            workspaces=workspaces,
            mounts=Mounts(watcher, policy.mounts),
            removals=Removals(watcher, scratch),
            image_store=image_store,
            images=images,
            phases=phases,
            departures=departures,
            spawner=spawner,
            pool=InitPool(watcher, policy, hierarchy, scratch, departures, images, phases, spawner),
            egress=EgressProcess(watcher, policy),
            archive_program=ArchiveProgram(),
        )
        self.jobs = Jobs(self.parts)
        self._launches = Launches(self.parts, self.jobs)
        sessions = Sessions(self.parts, self.jobs, self._launches)
        self._rooms.update({Jobs: self.jobs, Launches: self._launches, Sessions: sessions})
        scratch.left = self._on_image_left
        self._sweep_images()
        self._phase = Phase.SERVING
        return protocol.Ready(no_disk, hint, uid_first, tuple(not_set)), scratch.descriptor

    def answer_egress(self, seq: int, request: protocol.Egress, descriptors: OwnedFds) -> Answer:
        """Start the process that connects jobs to names on the network, and keep it going."""
        if not self.parts.policy.egress_hosts or not self.parts.policy.egress_uid:
            raise InvalidJobError("the operator offers no names on the network")
        if self.parts.egress.has_begun:
            raise JobStateError("pjwd-egress was started before")
        if not stat.S_ISSOCK(os.fstat(descriptors[0]).st_mode):
            raise InvalidJobError("what pjwd-egress is to tell of connections by is no socket")
        self.parts.egress.begin(descriptors.take())
        return (protocol.Done(),)

    def answer_set_share(self, seq: int, request: protocol.SetShare, _: OwnedFds) -> Answer:
        """Give a client another share of the host, even while it has jobs."""
        self.parts.policy.check_uid(request.uid)
        return (protocol.ShareSet(tuple(self.parts.pool.set_share(request.uid, request.share))),)

    def answer_measure_client(self, seq: int, request: protocol.MeasureClient, _: OwnedFds) -> Answer:
        """Read the joint usage of a client's jobs."""
        self.parts.policy.check_uid(request.uid)
        return (protocol.ClientMeasured(self.parts.hierarchy.use_of(request.uid)),)

    def answer_scratch_use(self, seq: int, request: protocol.ScratchUse, _: OwnedFds) -> Answer:
        """Have a process count the files in jobs' scratch directories; one at a time."""
        if self._counting:
            raise JobStateError("scratch directories are being counted")
        try:
            pid, words = spawn_count(self.parts.instance, self.parts.scratch.places)
        except OSError as error:
            raise KernelError("count", "scratch directories", error.errno or 0) from error
        self._counting = True
        self.parts.watcher.reap_helper(pid, self._on_counted)
        self.parts.replies.hand_out(seq, words)
        return None

    def _on_counted(self) -> None:
        self._counting = False

    def answer_workspace_names(self, seq: int, request: protocol.WorkspaceNames, _: OwnedFds) -> Answer:
        """List the directories of workspaces, a page at a time."""
        return (protocol.WorkspacePage(self.parts.workspaces.page(request.after)),)

    def answer_workspace_use(self, seq: int, request: protocol.WorkspaceUse, _: OwnedFds) -> Answer:
        """Have a process count a workspace; some at a time, as one may have told all."""
        self.parts.policy.check_workspace(request)
        if self._counting_workspaces >= COUNTED_AT_ONCE:
            raise JobStateError(f"{COUNTED_AT_ONCE} workspaces are being counted, the maximum")
        try:
            pid, words = self.parts.workspaces.spawn_count(request.uid, request.name)
        except OSError as error:
            raise KernelError("count", f"the workspace {request.name}", error.errno or 0) from error
        self._counting_workspaces += 1
        self.parts.watcher.reap_helper(pid, self._on_workspace_counted)
        self.parts.replies.hand_out(seq, words)
        return None

    def _on_workspace_counted(self) -> None:
        self._counting_workspaces -= 1

    def answer_remove_workspace(self, seq: int, request: protocol.RemoveWorkspace, _: OwnedFds) -> Answer:
        """Remove a workspace, in its turn among the remains of jobs; the worker knows which jobs use it."""
        self.parts.policy.check_workspace(request)
        uid, name = request.uid, request.name
        if (uid, name) not in self.parts.removals and self.parts.workspaces.remove_if_empty(uid, name):
            return (protocol.Done(),)

        def on_removed() -> None:
            if self.parts.workspaces.remove_if_empty(uid, name):
                self.parts.replies.send(seq, protocol.Done())
            else:
                path = self.parts.workspaces.path(uid, name)
                self.parts.replies.send(seq, protocol.Refused("kernel", "remove the workspace", path, 0, ""))

        spawn = partial(self.parts.workspaces.spawn_removal, uid, name)
        self.parts.removals.begin_workspace(uid, name, spawn, on_removed)
        return None

    def _on_image_left(self, image: str) -> None:
        # an operator may have removed it while the job ran; the worker removes the images that clients have
        # loaded
        with suppress(KernelError):
            if not is_image_key(image) and not self.parts.image_store.is_named(image):
                self._sweep_images()

    def _sweep_images(self) -> None:
        for pid, path in self.parts.images.sweep():
            self.parts.watcher.reap_helper(pid, partial(self.parts.images.removed, path))

    def answer_image_table(self, seq: int, request: protocol.ImageTable, _: OwnedFds) -> Answer:
        """Hand out the table of the operator's images: their names, and how jobs begin in each."""
        self.parts.replies.hand_out(seq, self.parts.image_store.open_table())
        return None

    def answer_reload_mounts(self, seq: int, request: protocol.ReloadMounts, _: OwnedFds) -> Answer:
        """Take the operator's mounts anew, from the file that root named in the greeting, and root owns."""
        path = self.parts.policy.configuration
        if not path:
            raise InvalidJobError("there is no configuration")
        sources = read_mounts_of(open_operator_file(path), path)
        self.parts.policy.check_sources(sources)
        self.parts.mounts.sources = sources
        return (protocol.Done(),)

    def answer_gpus(self, seq: int, request: protocol.Gpus, _: OwnedFds) -> Answer:
        """Return the GPUs of the machine, and the variables of some."""
        offer = self.parts.policy.gpus
        devices = read_devices(offer.kind, offer.cdi_dirs) if offer.kind else ()
        edits = edits_of(devices, request.names)
        self.parts.policy.check_edits(edits)
        return (protocol.GpuNames(tuple(device.name for device in devices), edits.environment),)

    def answer_open_file(self, seq: int, request: protocol.OpenFile, _: OwnedFds) -> Answer:
        """Hand out a certificate, a key or the like that the operator has replaced; never by a path."""
        self.parts.replies.hand_out(seq, open_operator_file(self.parts.policy.operator_file(request.place)))
        return None

    def answer_open_audit_log(self, seq: int, request: protocol.OpenAuditLog, _: OwnedFds) -> Answer:
        """Hand out the audit log for appending, after the operator has moved the old one."""
        if not self.parts.policy.audit_log:
            raise InvalidJobError("there is no audit log")
        self.parts.replies.hand_out(seq, open_audit_log(self.parts.policy.audit_log))
        return None


@dataclass(frozen=True, slots=True)
class Route:
    """A method that answers a request, its class, when the request may come, whether it makes processes."""

    room: type
    answer: Callable[[Any, int, Any, OwnedFds], Answer]
    allowed_in: Phase = Phase.SERVING
    makes_processes: bool = False


# The launcher's whole surface. Anything else, or anything early, ends it: such a peer is
# broken or hostile.
ROUTES: Final[dict[str, Route]] = {
    "hello": Route(Launcher, Launcher.answer_hello, allowed_in=Phase.GREETING),
    "launch": Route(Launches, Launches.answer_launch, makes_processes=True),
    "adopt": Route(Jobs, Jobs.answer_adopt),
    "job_ids": Route(Jobs, Jobs.answer_job_ids),
    "terminate": Route(Jobs, Jobs.answer_terminate),
    "kill": Route(Jobs, Jobs.answer_kill),
    "remains": Route(Jobs, Jobs.answer_remains),
    "measure": Route(Jobs, Jobs.answer_measure),
    "account": Route(Jobs, Jobs.answer_account),
    "remove": Route(Jobs, Jobs.answer_remove, makes_processes=True),
    "exec": Route(Sessions, Sessions.answer_exec, makes_processes=True),
    "connect": Route(Sessions, Sessions.answer_connect, makes_processes=True),
    "departed": Route(Launches, Launches.answer_departed),
    "scratch_use": Route(Launcher, Launcher.answer_scratch_use, makes_processes=True),
    "workspace_names": Route(Launcher, Launcher.answer_workspace_names),
    "workspace_use": Route(Launcher, Launcher.answer_workspace_use, makes_processes=True),
    "remove_workspace": Route(Launcher, Launcher.answer_remove_workspace, makes_processes=True),
    "image_table": Route(Launcher, Launcher.answer_image_table),
    "reload_mounts": Route(Launcher, Launcher.answer_reload_mounts),
    "gpus": Route(Launcher, Launcher.answer_gpus),
    "open_file": Route(Launcher, Launcher.answer_open_file),
    "open_audit_log": Route(Launcher, Launcher.answer_open_audit_log),
    "egress": Route(Launcher, Launcher.answer_egress, makes_processes=True),
    "set_share": Route(Launcher, Launcher.answer_set_share),
    "measure_client": Route(Launcher, Launcher.answer_measure_client),
}
