"""Server, launcher, readers and clients that stop, stall or vanish; news of output that the kernel drops."""

import ctypes
import os
import select
import signal
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from pjw.v1 import job_worker_pb2 as pb
from tests.support.scene import OTHERS_SECONDS, Scene
from tests.support.service import Running, wait_for

MIB: Final = 1024**2
_libc: Final = ctypes.CDLL(None, use_errno=True)


def test_the_server_stopped(scene: Scene) -> None:
    """SIGSTOP: jobs and their output need no server; what was asked meanwhile is answered when it goes on."""
    with scene.frozen(scene.service.pid):
        asked = scene.stub("alice").Start.future(pb.StartRequest(command="echo late"), timeout=OTHERS_SECONDS)
        scene.goes_on()
        assert not asked.done()
    late = asked.result().job.id
    answer = scene.stub("alice").Logs(pb.LogsRequest(id=late), timeout=OTHERS_SECONDS)
    assert b"".join(response.data for response in answer) == b"late\n"
    scene.goes_on()
    scene.others_unharmed()
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()


def test_a_job_ends_while_the_server_is_stopped(scene: Scene) -> None:
    """Its end and its last bytes are there when the server goes on."""
    with scene.frozen(scene.service.pid):
        init = os.pidfd_open(scene.init_pid(scene.job))
        scene.tell(scene.job)
        assert select.select([init], [], [], OTHERS_SECONDS)[0]
        os.close(init)
    wait_for(lambda: scene.job_of(scene.job, "alice").HasField("end"))
    assert scene.job_of(scene.job, "alice").exit_code == 7
    scene.nothing_left()


def test_the_launcher_stopped(scene: Scene) -> None:
    """SIGSTOP: only starts and stops wait for it; all else is answered, and output flows."""
    with scene.frozen(scene.service.launcher_pid()):
        asked = scene.stub("alice").Start.future(pb.StartRequest(command="echo late"), timeout=OTHERS_SECONDS)
        scene.goes_on()
        assert scene.jobs_of("bob")[scene.other].state == pb.JOB_STATE_RUNNING
        logs = scene.stub("bob").Logs(pb.LogsRequest(id=scene.other), timeout=OTHERS_SECONDS)
        assert next(logs).data.startswith(b"line 0 of output\n")
        logs.cancel()
        assert not asked.done()
    assert asked.result().job.id
    scene.goes_on()
    scene.others_unharmed()
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()


def test_the_launcher_stopped_for_good(scene: Scene) -> None:
    """SIGSTOP, and SIGKILL of the server, as the watchdog does it: the next launcher ends this one."""
    pid = scene.service.launcher_pid()
    launcher = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(launcher, signal.SIGSTOP)
        scene.goes_on()
        scene.kill(scene.service.pid)
        scene.restart()
        assert select.select([launcher], [], [], 0)[0]
        scene.service.await_log(f"killed launcher {pid}, which hung")
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(launcher, signal.SIGCONT)
        os.close(launcher)
    scene.goes_on()
    scene.others_unharmed()
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()


def _change_time(path: Path) -> None:
    # only the modification time: to inotify that is a write, and it touches no byte
    times = struct.pack("qqqq", 0, 0x3FFFFFFE, 0, 0x3FFFFFFF)  # omit, now
    assert _libc.utimensat(-100, os.fsencode(path), times, 0) == 0, os.strerror(ctypes.get_errno())


@contextmanager
def _witness(*paths: Path) -> Iterator[int]:
    """A queue of our own with the same events in it."""
    queue = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    for path in paths:
        assert _libc.inotify_add_watch(queue, os.fsencode(path), 2) > 0
    try:
        yield queue
    finally:
        os.close(queue)


def test_events_of_inotify_lost(scene: Scene) -> None:
    """More changes than a stopped server's queue holds: news of the last bytes is dropped, not the bytes."""
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    command = "mkfifo ask; echo begun; read x <ask; echo last words; read x <ask"
    quiet = scene.stub("alice").Start(pb.StartRequest(command=command), timeout=OTHERS_SECONDS).job.id
    logs = scene.stub("alice").Logs(pb.LogsRequest(id=quiet), timeout=OTHERS_SECONDS)
    assert next(logs).data == b"begun\n"
    wait_for((scene.service.state / "scratch" / str(quiet) / "ask").exists)
    crowd = scene.stub("alice").Logs(pb.LogsRequest(id=scene.job), timeout=OTHERS_SECONDS)
    next(crowd)
    # init sleeps, so it has said all of the first words; the server has heard that once it answers
    init = Path(f"/proc/{scene.init_pid(quiet)}/stat")
    wait_for(lambda: init.read_text().rpartition(")")[2].split()[0] == "S")
    scene.jobs_of("alice")
    paths = [scene.service.state / "jobs" / str(n) / "output" for n in (quiet, scene.job, scene.other)]
    with scene.frozen(scene.service.pid), _witness(*paths) as queue:
        # of the two others by turns, since the kernel merges an event with one like it before it
        for _ in range(most // 2 + 1000):
            for path in paths[1:]:
                _change_time(path)
        with (scene.service.state / "scratch" / str(quiet) / "ask").open("wb", buffering=0) as ask:
            ask.write(b"\n")
        wait_for(lambda: paths[0].read_bytes() == b"begun\nlast words\n")
        events = b""
        while select.select([queue], [], [], 0)[0]:
            events += os.read(queue, MIB)
        seen = [struct.unpack_from("iI", events, n) for n in range(0, len(events), 16)]
        assert any(mask & 0x4000 for _, mask in seen), "the queue did not overflow"
        assert not any(watch == 1 for watch, _ in seen), "the news of the last words was not dropped"
    # the job says nothing more and does not end: only the overflow itself can wake its reader
    assert next(logs).data == b"last words\n"
    logs.cancel()
    crowd.cancel()
    scene.goes_on()
    scene.others_unharmed()
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()


def test_readers_that_do_not_read(scene: Scene) -> None:
    """Eight streams that nobody reads and a stopped pjw: their job, and all others, go on and end."""
    size = 16 * MIB
    big = scene.stub("alice").Start(pb.StartRequest(command=f"head -c {size} /dev/zero")).job.id
    with ExitStack() as stack:
        stalled = [scene.stub("alice").Logs(pb.LogsRequest(id=big)) for _ in range(8)]
        reader: Running = stack.enter_context(scene.service.popen("logs", str(big)))
        assert reader.stdout is not None
        assert os.read(reader.stdout.fileno(), 1) == b"\0"
        with scene.frozen(reader.pid):
            wait_for(lambda: scene.job_of(big, "alice").HasField("end"))
            assert scene.output_size(big) == size
            scene.goes_on()
            scene.others_unharmed()
            assert all(call.is_active() for call in stalled)
        got = 1
        while data := reader.stdout.read(MIB):
            got += len(data)
        assert (got, reader.wait(OTHERS_SECONDS)) == (size, 0)
        for call in stalled:
            assert sum(len(response.data) for response in call) == size
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()


@pytest.mark.parametrize("command", ["start", "stop", "logs"])
def test_a_client_that_vanishes(scene: Scene, command: str) -> None:
    """kill -9 of pjw within a call: the job is there or not, a stop goes on, a stream leaves nothing."""
    job = (
        scene.stub("alice")
        .Start(
            pb.StartRequest(command="trap 'echo heard' TERM; echo ready; while :; do sleep 100 & wait; done")
        )
        .job
    )
    wait_for(lambda: scene.output_size(job.id) > 0)
    before = scene.jobs_of("alice").keys()
    arguments = {"start": ["exec sleep 100"], "stop": [str(job.id)], "logs": [str(job.id)]}[command]
    for _ in range(3):
        with scene.service.popen(command, *arguments) as client:
            if command == "start":
                wait_for(lambda: scene.jobs_of("alice").keys() != before)  # noqa: B023
            elif command == "stop":
                wait_for(lambda: scene.output_size(job.id) > len("ready\n"))
            else:
                wait_for(lambda: scene.service.open_outputs(job.id) > 0)
            client.kill()
        before = scene.jobs_of("alice").keys()
    if command == "stop":
        # nobody waits for it any more, and after its grace period it is done all the same
        wait_for(lambda: scene.job_of(job.id, "alice").HasField("end"))
        assert scene.job_of(job.id, "alice").reason == pb.END_REASON_STOPPED
    wait_for(lambda: scene.service.open_outputs(job.id) == 0)
    scene.goes_on()
    scene.others_unharmed()
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()


def test_a_reader_that_does_not_read_while_the_server_restarts(scene: Scene) -> None:
    """What was on its way cannot be told of the restart; pjw goes on at the exact byte all the same."""
    size = 16 * MIB
    big = scene.stub("alice").Start(pb.StartRequest(command=f"head -c {size} /dev/zero")).job.id
    wait_for(lambda: scene.job_of(big, "alice").HasField("end"))
    with scene.service.popen("logs", str(big)) as reader:
        assert reader.stdout is not None
        assert os.read(reader.stdout.fileno(), 1) == b"\0"
        assert scene.service.stop() == 0
        scene.service.start()
        got = 1
        while data := reader.stdout.read(MIB):
            got += len(data)
        assert reader.stderr is not None
        assert (got, reader.wait(OTHERS_SECONDS), reader.stderr.read()) == (size, 0, b"")
    scene.goes_on()
    scene.others_unharmed()
