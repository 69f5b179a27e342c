"""kill -9 of each process at each step of a start, of a stop and of an end; and each step of a start refused.

Where inits wait for the next jobs (pool.py) a start has few steps, and the others come when nobody waits.
So all of them are gone through with none that wait, and those of a start that takes one beside that.

A step is a system call that others can notice (tests/support/tracer.py). Nothing new lies between two. Where
each takes a new pjwd, a sample of the steps is gone through; with -m slow a larger one, with -m long all.
"""

import errno
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Final

import grpc
import pytest

from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.settings import WAITING_INITS
from tests.support.scene import OTHERS_SECONDS, Scene, config_of
from tests.support.service import Service, wait_for, waiting_inits
from tests.support.tracer import SUPPORTED, WHY_NOT, Tracer
from tests.support.worker_harness import uid_range

# What the launcher cannot do without once init was spawned.
FATAL: Final = ("pidfd_open", "epoll_ctl")
# What the server does for a job; what it does for its readers meanwhile is endless.
SERVER_CALLS: Final = (
    *(
        "mkdir",
        "mkdirat",
        "openat",
        "fallocate",
        "pwrite64",
        "memfd_create",
        "dup",
        "close",
        "unlink",
        "rmdir",
    ),
    *("ftruncate", "fdatasync", "unlinkat"),
)
# One of so many of these steps is gone through. 5 and 13 have no common factor: the samples share few steps.
SOME_STEPS: Final = pytest.mark.slow
EVERY_STEP: Final = (pytest.mark.long, pytest.mark.timeout(1200))
SAMPLED: Final = pytest.mark.parametrize(
    "stride", [13, pytest.param(5, marks=SOME_STEPS), pytest.param(1, marks=EVERY_STEP)]
)
SPAWNER, INIT, COMMAND = 0, 1, 2  # generations from the spawner on
# the same of a session: two processes in between (init/session.c), what waits for its command, and that
SESSION: Final = {"spawner": 0, "first between": 1, "second between": 2, "session": 3, "command": 4}
LAUNCHER: Final = -1

pytestmark = pytest.mark.skipif(not SUPPORTED, reason=WHY_NOT)

# What fails for want of memory, of space, of descriptors.
WANTS: Final = {
    errno.ENOMEM: (
        *("openat", "mkdir", "mkdirat", "write", "socketpair", "pidfd_open", "clone", "vfork", "clone3"),
        "epoll_ctl",
        *("execve", "unshare", "mount", "open_tree", "move_mount", "mount_setattr", "socket", "pipe2"),
        *("mknod", "symlink", "signalfd4", "timerfd_create", "capset", "setresuid"),
    ),
    errno.ENOSPC: (
        *("openat", "mkdir", "mkdirat", "write", "mount", "mknod", "symlink", "epoll_ctl", "pwrite64"),
    ),
    errno.EMFILE: (
        *("openat", "socketpair", "pidfd_open", "pipe2", "socket", "signalfd4", "timerfd_create", "dup2"),
        *("open_tree", "clone3"),
    ),
}


@pytest.fixture
def cold(make_service: Callable[..., Service]) -> Iterator[Scene]:
    """A scene with a launcher that makes an init when its job is started."""
    uid_first = uid_range()
    scene = Scene(make_service(config=config_of(uid_first, waiting_inits=0)).start(), uid_first)
    yield scene
    scene.close()


def spawner(scene: Scene) -> int:
    """The pid of the spawner; one that was killed has a successor once an init is wanted."""
    while (pid := scene.service.spawner_pid()) is None:
        start(scene, "true")
    return pid


def start(scene: Scene, command: str) -> pb.Job | grpc.StatusCode:
    """Start a job as alice, or give the code of the refusal."""
    try:
        return scene.stub("alice").Start(pb.StartRequest(command=command), timeout=OTHERS_SECONDS).job
    except grpc.RpcError as error:
        return answered(error)


def stop(scene: Scene, job_id: int) -> pb.Job | grpc.StatusCode:
    """Stop a job of alice's, or give the code of the refusal."""
    try:
        return scene.stub("alice").Stop(pb.StopRequest(id=job_id), timeout=OTHERS_SECONDS).job
    except grpc.RpcError as error:
        return answered(error)


def answered(error: grpc.RpcError) -> grpc.StatusCode:
    """The code of a refusal, which must come in time."""
    code: grpc.StatusCode = error.code()
    assert code is not grpc.StatusCode.DEADLINE_EXCEEDED
    return code


def settle(scene: Scene) -> None:
    """Stop all but the steady jobs; nothing of them may be left, and no end may be a guess."""
    for job_id in scene.jobs_of("alice"):
        if job_id != scene.job:
            ended = stop(scene, job_id)
            assert isinstance(ended, pb.Job)
            known = ended.HasField("exit_code") or ended.HasField("signal")
            assert known == (ended.state == pb.JOB_STATE_EXITED)
            assert known != (ended.state == pb.JOB_STATE_LOST)
    wait_for(lambda: scene.remains_of_others() == [])


def finish(scene: Scene) -> None:
    """After all steps: every promise."""
    scene.goes_on()
    scene.others_unharmed()
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()


@pytest.mark.parametrize("generation", [SPAWNER, INIT, COMMAND])
def test_init_killed_at_each_step_of_a_start(cold: Scene, generation: int) -> None:
    """The spawner, init, the command before its exec: the start is refused, or the job has an end."""

    def trace(step: int) -> Tracer:
        return Tracer(spawner(cold), step, "kill", generation=generation)

    # a command that was killed before its exec was not executed (R1)
    refused = generation == COMMAND
    assert kill_inits_in_starts(cold, trace, refused=refused) > (40 if generation == INIT else 5)
    finish(cold)


@pytest.mark.parametrize("generation", [0, 1])
def test_an_init_that_waited_killed_at_each_step_of_a_start(scene: Scene, generation: int) -> None:
    """The same from its order on, for itself and the command."""

    def trace(step: int) -> Tracer:
        start(scene, "true")
        wait_for(lambda: len(waiting_inits(scene.service.state)) == WAITING_INITS)
        inits = waiting_inits(scene.service.state)
        return Tracer(inits[min(inits)], step, "kill", generation=generation)

    # those that wait now are for bob, whose job was the last one
    for _ in range(WAITING_INITS):
        start(scene, "true")
    assert kill_inits_in_starts(scene, trace) > 5
    finish(scene)


def kill_inits_in_starts(scene: Scene, trace: Callable[[int], Tracer], *, refused: bool = False) -> int:
    """Have an init or its command killed at each step of a start; the step that no start came to.

    *refused*: each start that was hit must be.
    """
    for step in itertools.count(1):
        with trace(step) as tracer:
            before = scene.jobs_of("alice")
            job = start(scene, "echo begun; exec sleep 0.01")
        if not tracer.hit:
            return step
        if refused or not isinstance(job, pb.Job):
            # not before the answer is there: a job that was refused must leave nothing at all
            assert (job, scene.jobs_of("alice").keys() - before.keys()) == (grpc.StatusCode.INTERNAL, set())
        settle(scene)
    raise AssertionError("unreachable")


@pytest.mark.slow
@pytest.mark.parametrize("victim", SESSION)
def test_killed_at_each_step_of_an_exec(cold: Scene, victim: str) -> None:
    """The session is refused or has an end; its job goes on, and whatever is left of it holds up no end."""
    for step in itertools.count(1):
        job = start(cold, "exec sleep 600")
        assert isinstance(job, pb.Job)
        with Tracer(spawner(cold), step, "kill", generation=SESSION[victim]) as tracer:
            session = enter(cold, job.id, "echo begun; exec sleep 0.01")
        if isinstance(session, pb.Session):
            # once a session was answered, only its command may be killed
            assert session.number
        else:
            assert session is grpc.StatusCode.INTERNAL
        assert cold.jobs_of("alice")[job.id].state == pb.JOB_STATE_RUNNING
        ended = stop(cold, job.id)
        assert isinstance(ended, pb.Job)
        assert (ended.state, ended.signal) == (pb.JOB_STATE_EXITED, signal.SIGTERM)
        settle(cold)
        if not tracer.hit:
            break
    assert step > {"session": 20, "command": 5}.get(victim, 3)
    finish(cold)


def enter(scene: Scene, job_id: int, command: str) -> pb.Session | grpc.StatusCode:
    """Start a session in a job as alice, or give the code of the refusal."""
    try:
        request = pb.ExecRequest(id=job_id, command=command)
        return scene.stub("alice").Exec(request, timeout=OTHERS_SECONDS).session
    except grpc.RpcError as error:
        return answered(error)


@SAMPLED
@pytest.mark.parametrize("scene_name", ["cold", "scene"])
def test_the_launcher_killed_at_each_step_of_a_start(
    request: pytest.FixtureRequest, scene_name: str, stride: int
) -> None:
    """pjwd ends; the next one knows what was acknowledged, and finds or clears away what was not."""
    scene: Scene = request.getfixturevalue(scene_name)
    steps = itertools.count(2, stride)

    def trace(step: int) -> Tracer:
        return Tracer(scene.service.launcher_pid(), step, "kill")

    assert kill_in_starts(scene, trace, steps) > 40
    finish(scene)


@SAMPLED
def test_the_server_killed_at_each_step_of_a_start(scene: Scene, stride: int) -> None:
    """The same for the server, whatever its threads are about to do."""
    steps = itertools.count(5, stride)

    def trace(step: int) -> Tracer:
        return Tracer(scene.service.pid, step, "kill", calls=SERVER_CALLS)

    assert kill_in_starts(scene, trace, steps) > 15
    finish(scene)


def kill_in_starts(scene: Scene, trace: Callable[[int], Tracer], steps: Iterator[int]) -> int:
    """Have a start killed at each step, and pjwd started again; the step that no start came to."""
    for step in steps:
        with trace(step) as tracer:
            job = start(scene, "echo begun; exec sleep 100")
        if not tracer.hit:
            return step
        scene.restart()
        if isinstance(job, pb.Job):
            assert scene.jobs_of("alice")[job.id].state == pb.JOB_STATE_RUNNING
        else:
            assert job is grpc.StatusCode.UNAVAILABLE
        scene.goes_on()
        settle(scene)
    raise AssertionError("unreachable")


PATIENT: Final = "trap 'echo heard; exit 3' TERM; echo ready; while :; do sleep 100 & wait; done"


def start_patient(scene: Scene) -> int:
    """Start a job that ends with 3 when it is stopped."""
    job = start(scene, PATIENT)
    assert isinstance(job, pb.Job)
    wait_for(lambda: scene.output_size(job.id) > 0)
    return job.id


def test_init_killed_at_each_step_of_a_stop(scene: Scene) -> None:
    """The stop is answered: with the end, when init had recorded it, and else as lost."""
    for step in itertools.count(1):
        job_id = start_patient(scene)
        with Tracer(scene.init_pid(job_id), step, "kill") as tracer:
            job = stop(scene, job_id)
        assert isinstance(job, pb.Job)
        if not tracer.hit:
            assert job.exit_code == 3
            break
        if job.state == pb.JOB_STATE_EXITED:
            assert (job.exit_code, job.reason) == (3, pb.END_REASON_STOPPED)
        settle(scene)
    assert step > 5
    finish(scene)


@SAMPLED
@pytest.mark.parametrize("victim", ["launcher", "server"])
def test_killed_at_each_step_of_a_stop(scene: Scene, victim: str, stride: int) -> None:
    """A stop that was answered is over; one that was not goes on or can be asked for again."""
    for step in itertools.count(1, stride):
        job_id = start_patient(scene)
        pid = scene.service.launcher_pid() if victim == "launcher" else scene.service.pid
        with Tracer(pid, step, "kill", calls=() if victim == "launcher" else SERVER_CALLS) as tracer:
            job = stop(scene, job_id)
        if not tracer.hit:
            break
        scene.restart()
        if isinstance(job, pb.Job):
            assert job.exit_code == 3
        else:
            assert job is grpc.StatusCode.UNAVAILABLE
        again = stop(scene, job_id)
        assert isinstance(again, pb.Job)
        assert (again.exit_code, again.reason) == (3, pb.END_REASON_STOPPED)
        scene.goes_on()
        settle(scene)
    assert step > 5
    finish(scene)


# What the launcher does at the end of a job, but for reading: keep the accounts, remove, tell.
END_CALLS: Final = ("pwrite64", "rmdir", "unlinkat", "sendmsg")
# It leaves no files, so the launcher removes all of it unasked; and its reason is in its accounts alone.
HUNGRY_BYTES: Final = 16 * 1024**2
HUNGRY: Final = "mkfifo ask; exec 3<>ask; read x <&3; rm ask; exec tail /dev/zero"


@pytest.mark.parametrize(
    ("victim", "stride"),
    [
        ("launcher", 1),
        ("server", 13),
        pytest.param("server", 5, marks=SOME_STEPS),
        pytest.param("server", 1, marks=EVERY_STEP),
    ],
)
def test_killed_at_each_step_of_an_end(scene: Scene, victim: str, stride: int) -> None:
    """Accounts and reason are what they would have been, and nothing of the job is left."""
    request = pb.StartRequest(command=HUNGRY, limits=pb.Limits(memory_max_bytes=HUNGRY_BYTES))
    for step in itertools.count(1, stride):
        job_id = scene.stub("alice").Start(request, timeout=OTHERS_SECONDS).job.id
        pid = scene.service.launcher_pid() if victim == "launcher" else scene.service.pid
        calls = END_CALLS if victim == "launcher" else SERVER_CALLS
        with Tracer(pid, step, "kill", calls=calls) as tracer:
            scene.service.tell(job_id)
            wait_for(lambda: has_ended(scene) or is_told(scene, job_id))  # noqa: B023  called at once
        if tracer.hit:
            scene.restart()
        wait_for(lambda: is_told(scene, job_id))  # noqa: B023  called at once
        job = scene.job_of(job_id, "alice")
        assert (job.reason, job.exit_code) == (pb.END_REASON_OOM_KILLED, 128 + signal.SIGKILL)
        assert job.usage.oom_kills == 1
        assert job.usage.memory_peak_bytes > HUNGRY_BYTES // 2
        assert job.usage.cpu_usage_usec > 0
        scene.goes_on()
        settle(scene)
        if not tracer.hit:
            break
    # the server has only the row to write and to sync, and the files to remove: the launcher did the rest
    assert step > (5 if victim == "launcher" else 3)
    finish(scene)


def has_ended(scene: Scene) -> bool:
    """Whether the server has."""
    return scene.service.process is not None and scene.service.process.poll() is not None


def is_told(scene: Scene, job_id: int) -> bool:
    """Whether the service tells the end of a job of alice's now."""
    try:
        return scene.stub("alice").Get(pb.GetRequest(id=job_id), timeout=OTHERS_SECONDS).job.HasField("end")
    except grpc.RpcError:
        return False


# How often a step must leave a start whole until that counts as a failure which nobody noticed.
TRIES: Final = 3


@pytest.mark.parametrize("number", WANTS, ids=errno.errorcode.get)
@pytest.mark.parametrize("generation", [LAUNCHER, SPAWNER, INIT, COMMAND])
def test_each_step_of_a_start_refused(cold: Scene, number: int, generation: int) -> None:
    """No memory, space or descriptor for a step of launcher or init: a refusal, and nothing left."""
    scene = cold
    for step in itertools.count(1):
        tries = itertools.count(1)
        while True:
            pid = scene.service.launcher_pid() if generation == LAUNCHER else spawner(scene)
            before = scene.jobs_of("alice")
            with Tracer(pid, step, number, generation=max(0, generation), calls=WANTS[number]) as tracer:
                # it outlives the tracer, which would count the steps of its end as those of its start
                job = start(scene, "exec sleep 300")
            fatal = tracer.hit in FATAL and generation == LAUNCHER
            if fatal or not tracer.hit or not isinstance(job, pb.Job) or next(tries) == TRIES:
                break
            # now and then the launcher does something else beside the start, and that is what failed
            settle(scene)
        if not tracer.hit:
            break
        if fatal and job is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            # Init was spawned, and nobody can watch it: the launcher ends, and the next one finds it by its
            # cgroup. That the end of a watch is refused does not matter.
            if not isinstance(job, pb.Job):
                assert job is grpc.StatusCode.UNAVAILABLE
                scene.restart()
        else:
            # Of the exec itself the kernel's answer is passed on as it is. A new spawner that nobody can
            # watch is ended, and the start refused.
            executed = (generation, tracer.hit) == (COMMAND, "execve")
            expected = grpc.StatusCode.FAILED_PRECONDITION if executed else grpc.StatusCode.RESOURCE_EXHAUSTED
            now = scene.jobs_of("alice")
            assert (job, now) == (expected, before), (
                step,
                tracer.hit,
                {
                    k: (before.get(k), now.get(k))
                    for k in before.keys() | now.keys()
                    if before.get(k) != now.get(k)
                },
            )
        settle(scene)
    settle(scene)
    finish(scene)
