"""Any conversation at all with a launcher that is root: it answers or it ends, and nothing else happens.

Requests are well formed, forged, played again, out of phase, overlapping, with any descriptors, or none at
all; their kinds and what comes along are taken from the protocol's tables. `make fuzz` plays for longer.
"""

import ctypes
import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pjw.errors import ProtocolError
from pjw.launcher import protocol
from pjw.launcher.dispatch import ROUTES, Phase
from pjw.launcher.policy import JOB_ID_MAX
from pjw.launcher.protocol import (
    REQUESTS,
    Adopt,
    Adopted,
    Ended,
    Entered,
    Exec,
    Hello,
    JobIdPage,
    JobIds,
    Kill,
    Launch,
    Launched,
    Remove,
    Request,
)
from pjw.model import MountSource, Share
from tests.property.test_protocol import BY_TYPE, limits
from tests.root.test_launcher_hostile import BAD, Peer
from tests.support.init_harness import command_file
from tests.support.service import wait_for
from tests.support.worker_harness import DEADLINE_SECONDS, MIB, NO_LIMITS, Bench, status_words

CONVERSATIONS: Final = 40
SECONDS: Final = float(os.environ.get("PJW_FUZZ_SECONDS", "0"))
UIDS: Final = 10
CEILING: Final = NO_LIMITS.with_overrides(
    {"cpu_max_millicores": 500, "memory_max_bytes": 64 * MIB, "pids_max": 32, "time_max_seconds": 60}
)
# not a range of numbers, whose ends hypothesis likes best
SELDOM: Final = (False, False, False, False, False, True)
MOUNTS: Final = (
    MountSource("data", "/usr/share", clients=("alice",)),
    MountSource("gone", "/usr/share/nowhere"),
)
ODD_MOUNTS: Final = ("data", "canaries:/mnt/x", "data:/mnt/../x", "data:/", "data:/proc", "/etc:/mnt/x")
ODD_WORKSPACES: Final = ("..", ".", "/etc", "../../canaries", "1/work", "canaries/1", "a\n")
ODD_IMAGES: Final = ("@0123456789abcdef", "@..", f"sha256-{'0' * 64}", "sha256-../..", "table")
ODD_IDS: Final = (0, JOB_ID_MAX, JOB_ID_MAX + 1, 2**63 - 1)
PR_SET_CHILD_SUBREAPER: Final = 36


@dataclass(frozen=True)
class Step:
    """A datagram, the kinds of its descriptors, and whether all answers are waited for before the next."""

    data: bytes
    descriptors: tuple[str, ...] = ()
    command: bytes = b"\0\0true\0"
    wait: bool = False

    def request(self) -> Request | None:
        """What the launcher must answer; None when it must end instead."""
        try:
            _, request = protocol.decode_request(self.data)
        except ProtocolError:
            return None
        expected = protocol.descriptors_of(request)
        fits = ROUTES[request.op].allowed_in is Phase.SERVING and expected == len(self.descriptors)
        return request if fits else None

    def greets(self) -> bool:
        """Whether it is a policy, which comes from root: who may send one is trusted with it."""
        try:
            return protocol.decode_request(self.data)[1].op == Hello.op and not self.descriptors
        except ProtocolError:
            return False


class Surroundings:
    """What no request may change: files beside and behind links, processes of others, cgroups of others."""

    def __init__(self, bench: Bench, stack: ExitStack) -> None:
        self._bench: Final = bench
        self.launched = 0
        self.entered = 0
        self.canaries: Final = bench.directory / "canaries"
        self.theirs: Final = bench.directory / "theirs"
        (self.canaries / "1").mkdir(parents=True)
        self.theirs.mkdir()
        for name in ("file", "output", "status", "1/file"):
            (self.canaries / name).write_text("canary")
        # what the server's user may write is its jobs directory: it is full of links
        jobs = bench.state / "jobs"
        (jobs / "2").mkdir(parents=True)
        for name in ("1", "scratch", "job-1", "2/scratch"):
            (jobs / name).symlink_to(self.canaries)
        for name in ("output", "status"):
            (jobs / "2" / name).symlink_to(self.canaries / name)
        self._kept: Final = (self.canaries, jobs)
        self._bystanders: Final = [stack.enter_context(bystander(uid)) for uid in (0, 65_534)]
        # these, and what earlier tests have started: the service of the session, for one
        self._others: Final = frozenset(children(os.getpid()))
        self._files: Final = self._look()
        self._cgroups: Final = set(self._foreign_cgroups())

    def check(self, launched: set[int], parent: int) -> None:
        """Nothing of it has changed, and what was made is of the jobs that were launched."""
        assert self._look() == self._files
        assert set(self._foreign_cgroups()) <= self._cgroups
        for pid in self._bystanders:
            status = status_words(pid)
            pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
            assert (status["State"][0], pending) == ("S", 0), status
        names = {f"job-{job_id}" for job_id in launched}
        assert {path.name for path in self._bench.cgroups()} <= names
        first = self._bench.settings.uid_first
        for scratch in self._bench.scratch():
            assert int(scratch.name) in launched
            assert not scratch.is_symlink()
            assert first <= scratch.lstat().st_uid < first + UIDS
        for pid in descendants(parent, self._others):
            # not in the moment in which it is about to become the program that it was spawned for
            wait_for(lambda: program_of(pid) != program_of(parent))  # noqa: B023  called at once
            status, program = status_words(pid), program_of(pid)
            if program is None or not status:
                continue  # it has just ended
            uids = {int(uid) for uid in status["Uid"].split()[:3]}
            if uids == {0} and (launched or is_spawner(pid)):
                assert program.endswith("/pjw/launcher/pjw-init"), (pid, program)
            else:
                assert all(first <= uid < first + UIDS for uid in uids), (pid, program, uids)

    def _look(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for top in self._kept:
            for path in sorted([top, *top.rglob("*")]):
                status = path.lstat()
                content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
                found[str(path)] = (
                    status.st_mode,
                    status.st_uid,
                    status.st_mtime_ns,
                    status.st_ctime_ns,
                    content,
                )
        return found

    def _foreign_cgroups(self) -> Iterator[str]:
        for directory, names, _ in os.walk("/sys/fs/cgroup"):
            # the parent of all instances comes and goes with them; whoever else makes cgroups on this machine
            # makes none there, nor of such a name
            path = Path(directory)
            if path.name.startswith("job-") or path.parent.name == "pjw":
                yield directory
            # those of other tests that run on this machine, and our own, which are looked at by name
            names[:] = [name for name in names if not name.startswith(("i-", "test-"))]


@contextmanager
def bystander(uid: int) -> Iterator[int]:
    """A process of somebody, which blocks every signal, so that each one that it is sent can be seen."""
    argv = ["setpriv", "--reuid", str(uid), "--clear-groups", "sleep", "infinity"]
    pid = os.posix_spawnp("setpriv", argv, os.environ, setsigmask=signal.valid_signals())
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while status_words(pid)["Name"] != "sleep" or status_words(pid)["State"][0] != "S":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def program_of(pid: int) -> str | None:
    """What a process runs; None when it is ending or gone."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except (FileNotFoundError, ProcessLookupError):
        return None


def is_spawner(pid: int) -> bool:
    """Whether it is the process that clones inits, which stays also when no job has come of it."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"pjw-init: spawner\0")


def children(pid: int) -> list[int]:
    """Of all threads of a process."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        lists = [Path(f"/proc/{pid}/task/{task}/children").read_text().split() for task in tasks]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for found in lists for child in found]


def descendants(pid: int, but: frozenset[int]) -> list[int]:
    """Children, their children, and so on, but for some children with all of theirs."""
    found = [child for child in children(pid) if child not in but]
    for child in found:
        found.extend(children(child))
    return found


# --- conversations


@st.composite
def launches(draw: st.DrawFn, bench: Bench) -> Launch:
    """One of three jobs, as it should be, or with one thing that it may not have."""
    first = bench.settings.uid_first
    uid = draw(st.just(first) | st.integers(first, first + UIDS - 1))
    launch = Launch(
        draw(st.integers(1, 3)),
        uid,
        CEILING,
        draw(st.booleans()),
        share=draw(BY_TYPE[Share]),
        workspace=draw(st.sampled_from(["", "", "work", "other"])),
        read_only=draw(st.booleans()),
        mounts=draw(st.sampled_from([(), (), ("data:/mnt/data",), ("gone:/mnt/x",)])),
        client_name=draw(st.sampled_from(["alice", "bob"])),
        gpus=draw(st.sampled_from([(), (), (), ("0",), ("/dev/mem",), ("0", "0")])),
    )
    match draw(st.sampled_from(["", "", "", "id", "uid", "limits", "workspace", "image", "mounts"])):
        case "id":
            return replace(launch, job_id=draw(st.sampled_from(ODD_IDS)))
        case "uid":
            return replace(launch, uid=draw(st.sampled_from([0, 1, first - 1, first + UIDS, 2**32 + first])))
        case "limits":
            return replace(launch, limits=draw(st.just(NO_LIMITS) | limits))
        case "mounts":
            return replace(launch, mounts=(draw(st.sampled_from(ODD_MOUNTS)),))
        case "workspace":
            return replace(launch, workspace=draw(st.sampled_from(ODD_WORKSPACES)))
        case "image":
            return replace(launch, image=draw(st.sampled_from([*ODD_WORKSPACES, *ODD_IMAGES])))
        case _:
            return launch


def requests(bench: Bench) -> st.SearchStrategy[Request]:
    """Any request but the greeting: mostly of the same three jobs, so that they meet."""
    ids = st.sampled_from([1, 2, 3]) | st.sampled_from([1, 2, 3, *ODD_IDS])
    paths = [
        "",
        "work",
        "other",
        ".",
        "..",
        "/",
        "/etc/passwd",
        "../canaries/file",
        "output",
        "1",
        "1/output",
    ]
    by_type = {**BY_TYPE, int: ids, str: st.sampled_from(paths) | BY_TYPE[str]}
    others = st.one_of(
        *(
            st.builds(cls, **{f.name: by_type[f.type] for f in fields(cls)})
            for cls in REQUESTS.values()
            if cls not in (Hello, Launch, Exec)
        )
    )
    first = bench.settings.uid_first
    # the user of most jobs, and others
    uids = st.just(first) | st.sampled_from([*range(first, first + UIDS), 0, first - 1])
    flags = {name: st.booleans() for name in ("split_stderr", "input", "terminal")}
    sessions = st.builds(Exec, st.integers(1, 3), uids, st.just(0), grace_seconds=st.integers(1, 10), **flags)
    return st.integers(0, 4).flatmap(lambda n: launches(bench) if n < 2 else sessions if n == 2 else others)


def commands(surroundings: Surroundings) -> st.SearchStrategy[bytes]:
    """Commands that end, stay, attack, or are none."""
    attack = (
        f"kill -9 -1; ln -s {surroundings.canaries} link; mkdir d; ln -s {surroundings.canaries}/file d/x;"
        f" echo x >{surroundings.canaries}/file; rm -rf {surroundings.canaries}"
    )
    known = [
        command_file(["true"]),
        command_file(["sleep", "60"], {"PATH": "/usr/bin:/bin", "A": "b"}, "/tmp"),
        command_file(["sh", "-c", attack]),
    ]
    nowhere = [command_file(["/nonexistent"]), command_file(["true"], workdir="/nonexistent")]
    odd = st.sampled_from([*nowhere, b"", b"\0", b"no end"]) | st.binary(max_size=20)
    return st.sampled_from(SELDOM).flatmap(lambda seldom: odd if seldom else st.sampled_from(known))


@st.composite
def steps(draw: st.DrawFn, requests: st.SearchStrategy[Request], commands: st.SearchStrategy[bytes]) -> Step:
    """A request as it should be, except for what it asks; seldom with descriptors that it should not have."""
    request = draw(requests)
    kinds = ["right"] * protocol.descriptors_of(request)
    if kinds and draw(st.sampled_from(SELDOM)):
        kinds[draw(st.integers(0, len(kinds) - 1))] = draw(st.sampled_from(sorted(BAD)))
    data = protocol.encode(draw(st.integers(0, 5)), request)
    return Step(data, tuple(kinds), draw(commands), draw(st.booleans()))


@st.composite
def forgeries(draw: st.DrawFn, bench: Bench, steps: st.SearchStrategy[Step]) -> Step:
    """What most often is no request: changed, cut, too long, too late, with too much, or anything."""
    step = draw(steps)
    data, kinds = bytearray(step.data), step.descriptors
    match draw(st.integers(0, 6)):
        case 0:
            data = bytearray(draw(st.binary(min_size=1, max_size=300)))
        case 1:
            data = data[: draw(st.integers(1, len(data)))]
        case 2:
            data = data.ljust(draw(st.sampled_from([65_536, 65_537, 150_000])))
        case 3:
            hello = {f.name: BY_TYPE[f.type] for f in fields(Hello)} | {
                "state_dir": st.just(str(bench.state))
            }
            data = bytearray(protocol.encode(1, draw(st.builds(Hello, **hello))))
        case 4:
            kinds = tuple(draw(st.lists(st.sampled_from(["right", *BAD]), max_size=5)))
        case _:
            for _ in range(draw(st.integers(1, 4))):
                data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return Step(bytes(data), kinds, step.command)


@st.composite
def conversations(draw: st.DrawFn, bench: Bench, surroundings: Surroundings) -> tuple[bool, list[Step]]:
    """Whether it begins with a greeting, and its steps: some once more, and at its end anything."""
    well_formed = steps(requests(bench), commands(surroundings))
    # hypothesis likes short lists, in which nothing meets
    played = draw(st.lists(well_formed, min_size=6, max_size=20))
    played += draw(st.lists(st.sampled_from(played), max_size=5))
    played += draw(st.lists(forgeries(bench, well_formed), max_size=3))
    return not draw(st.sampled_from(SELDOM)), played


# --- played


class Conversation:
    """One of them, with a launcher of its own."""

    def __init__(self, bench: Bench, surroundings: Surroundings, *, greet: bool) -> None:
        self._bench: Final = bench
        self._surroundings: Final = surroundings
        self._greeted: Final = greet
        self._peer: Final = Peer(bench, greet=greet, ceiling=CEILING, uid_count=UIDS, mounts=MOUNTS)
        # a number, and what it may begin, if anything
        self._unanswered: Final[list[tuple[int, str]]] = []
        # the users who may have a job of this id
        self._uids: Final[dict[int, set[int]]] = {}
        # the numbers of launches and adoptions, by which ends are told
        self._running: Final[set[int]] = set()
        self.launched: Final[set[int]] = set()

    def play(self, steps: list[Step]) -> None:
        """Say it all. The launcher answers all of it, or ends at the first thing that is no request."""
        for step in steps:
            request = step.request() if self._greeted else None
            if not self._greeted and step.greets():
                continue
            with ExitStack() as stack:
                self._peer.send(step.data, self._descriptors(step, stack))
            if request is None:
                self._must_have_ended()
                return
            seq, _ = protocol.decode_request(step.data)
            allowed = isinstance(request, Launch | Exec) and self._allowed(request, step)
            if isinstance(request, Launch) and allowed:
                self.launched.add(request.job_id)
                self._uids.setdefault(request.job_id, set()).add(request.uid)
            self._unanswered.append((seq, request.op if allowed else ""))
            if step.wait:
                self._hear_all()
        self._hear_all()
        self._surroundings.check(self.launched, self._peer.pid)

    def close(self) -> None:
        """Hang up; then a launcher that behaves ends what was launched, and nothing is left."""
        self._peer.close()
        self._surroundings.check(self.launched, os.getpid())

    def _must_have_ended(self) -> None:
        while True:  # what was asked before may still be answered
            data, received, _, _ = socket.recv_fds(self._peer.socket, protocol.MAX_DATAGRAM_BYTES, 3)
            for descriptor in received:
                os.close(descriptor)
            if not data:
                break
        self._peer.ended_by_us()

    def _hear_all(self) -> None:
        while self._unanswered:
            data, received, _, _ = socket.recv_fds(self._peer.socket, protocol.MAX_DATAGRAM_BYTES, 3)
            for descriptor in received:
                os.close(descriptor)
            assert data, self._peer.words()
            seq, reply = protocol.decode_reply(data)
            if isinstance(reply, Ended):
                assert seq in self._running, reply
                continue
            if isinstance(reply, Launched) or (isinstance(reply, Adopted) and reply.alive):
                self._running.add(seq)
            # with one seq on several requests, one that may succeed is the one that did
            found = sorted(entry for entry in self._unanswered if entry[0] == seq)
            assert found, reply
            if isinstance(reply, Launched | Entered):
                began = (seq, Launch.op if isinstance(reply, Launched) else Exec.op)
                assert began in found, reply
                self._surroundings.launched += isinstance(reply, Launched)
                self._surroundings.entered += isinstance(reply, Entered)
                self._unanswered.remove(began)
            else:
                self._unanswered.remove(found[0])

    def _allowed(self, request: Launch | Exec, step: Step) -> bool:
        if isinstance(request, Exec):
            # what comes behind status is another file than in a launch
            first_three = enumerate(step.descriptors[:3])
            return request.uid in self._uids.get(request.job_id, ()) and all(
                kind == "right" or place not in BAD[kind][0] for place, kind in first_three
            )
        first = self._bench.settings.uid_first
        return (
            first <= request.uid < first + UIDS
            and 1 <= request.job_id <= JOB_ID_MAX
            and request.limits.first_above(CEILING) is None
            and all(
                kind == "right" or place not in BAD[kind][0] for place, kind in enumerate(step.descriptors)
            )
        )

    def _descriptors(self, step: Step, stack: ExitStack) -> list[int]:
        files = self._peer.descriptors(stack, step.command, count=protocol.MAX_DESCRIPTORS)
        right = itertools.cycle(files)
        made = [(next(right), kind) for kind in step.descriptors]
        return [
            fd if kind == "right" else BAD[kind][1](stack, self._surroundings.theirs) for fd, kind in made
        ]


def clean_up(bench: Bench) -> None:
    """Adopt, kill and remove every job, as the next worker would; then wait until no process is left."""
    heir = Peer(bench, ceiling=CEILING, uid_count=UIDS)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        page = heir.ask(JobIds(0))
        assert isinstance(page, JobIdPage)
        for job_id in page.job_ids:
            for request in (Adopt(job_id), Kill(job_id, init_too=True), Remove(job_id)):
                heir.ask(request)
        # ours since their launcher has ended
        inits = [pid for pid in children(os.getpid()) if status_words(pid).get("Name") == "pjw-init"]
        for pid in inits:
            os.waitpid(pid, os.WNOHANG)
        if not page.job_ids and not inits:
            break
        assert time.monotonic() < deadline, bench.remains()
    heir.close()
    assert bench.remains() == []


@pytest.fixture
def _orphans_are_ours() -> Iterator[None]:
    """What a launcher leaves is adopted by this process, which so sees all that a launcher ever started."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = set(children(os.getpid()))
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
    yield
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0) == 0
    # a launcher's helpers, which remove or count scratch directories, end by themselves
    for pid in set(children(os.getpid())) - before:
        os.waitpid(pid, 0)


@pytest.mark.usefixtures("_orphans_are_ours")
def test_any_conversation(bench: Bench) -> None:
    """Whatever is said, only jobs that the policy allows are started, and nothing else is touched."""
    with ExitStack() as stack:
        surroundings = Surroundings(bench, stack)

        @settings(max_examples=CONVERSATIONS, deadline=None, suppress_health_check=list(HealthCheck))
        @given(conversations(bench, surroundings))
        def play(conversation: tuple[bool, list[Step]]) -> None:
            greet, played = conversation
            talk = Conversation(bench, surroundings, greet=greet)
            try:
                talk.play(played)
            finally:
                talk.close()
                clean_up(bench)

        count, deadline = 0, time.monotonic() + SECONDS
        while count == 0 or time.monotonic() < deadline:
            play()
            count += CONVERSATIONS
        print(f"{count} conversations, {surroundings.launched} launches, {surroundings.entered} sessions")
        assert surroundings.launched
        # a session takes a job that runs just then: one round may have none
        assert surroundings.entered or count == CONVERSATIONS
