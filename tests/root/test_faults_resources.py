"""No space, no descriptors, no memory, a disk that has become read-only: for jobs, launcher and server."""

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import grpc
import pytest

from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.job import OUTPUT_HELD
from pjw.worker.settings import WAITING_INITS
from tests.support.disks import fill, free_bytes, small_disk
from tests.support.scene import OTHERS_SECONDS, Scene, config_of
from tests.support.service import Service, wait_for
from tests.support.worker_harness import uid_range

MIB: Final = 1024**2


def start_code(scene: Scene, command: str = "exec sleep 100") -> grpc.StatusCode:
    """Start a job as alice; what came of it."""
    try:
        scene.stub("alice").Start(pb.StartRequest(command=command), timeout=OTHERS_SECONDS)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def start_codes(scene: Scene, count: int) -> list[grpc.StatusCode]:
    """Start that many at once."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: start_code(scene), range(count)))


def finish(scene: Scene) -> None:
    """After the fault: every promise."""
    scene.goes_on()
    scene.others_unharmed()
    scene.end_known()
    scene.output_whole()
    scene.nothing_left()


def limit(pid: int, kind: str, soft: int) -> None:
    """Change a soft limit of a running process, as its own user: root may lack CAP_SYS_RESOURCE."""
    uid = os.stat(f"/proc/{pid}").st_uid
    subprocess.run(
        ["prlimit", f"--pid={pid}", f"--{kind}={soft}:"], user=uid, group=uid, extra_groups=[], check=True
    )


def soft_limit(pid: int, name: str) -> int:
    """A soft limit of a running process."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(int(line.removeprefix(name).split()[0]) for line in lines if line.startswith(name))


# --- descriptors


@pytest.mark.parametrize("victim", ["launcher", "server"])
def test_no_descriptors(scene: Scene, victim: str) -> None:
    """With so few more, or none: starts are refused while some are left, nobody dies, and others read on."""
    pid = scene.service.launcher_pid() if victim == "launcher" else scene.service.pid
    scene.jobs_of("bob")  # his connection is there
    former = soft_limit(pid, "Max open files")
    codes = []
    for more in range(20):
        highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        limit(pid, "nofile", highest + 1 + more)
        codes += start_codes(scene, 6)
        assert scene.job_of(scene.other, "bob").state == pb.JOB_STATE_RUNNING
        scene.goes_on()
    limit(pid, "nofile", former)
    # also where one start alone would find enough: they are kept for what runs
    assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}, codes
    assert start_code(scene) is grpc.StatusCode.OK
    finish(scene)


# --- memory


def test_the_launcher_without_memory(scene: Scene) -> None:
    """Not a page more (RLIMIT_AS), and no spawner: once no init waits, starts are refused, or it ends."""
    pid = scene.service.launcher_pid()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit(pid, "as", pages * os.sysconf("SC_PAGE_SIZE"))
    # it starts another, which takes memory; to have an init cloned takes none of the launcher's
    spawner = scene.service.spawner_pid()
    assert spawner is not None
    os.kill(spawner, signal.SIGKILL)
    wait_for(lambda: scene.service.spawner_pid() is None)
    codes = set()
    for _ in range(WAITING_INITS + 5):
        codes.add(start_code(scene, "true #" + "x" * 100_000))
        scene.goes_on()
    refused = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}
    assert codes & refused, codes
    assert codes <= refused | {grpc.StatusCode.OK}, codes
    if grpc.StatusCode.UNAVAILABLE in codes:
        scene.restart()
    else:
        limit(pid, "as", -1)
    assert start_code(scene) is grpc.StatusCode.OK
    finish(scene)


@contextmanager
def memory_cgroup(bytes_max: int) -> Iterator[Path]:
    """A memory cgroup of our own, of v1 or v2."""
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"pjw-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(bytes_max))
        yield group
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def oom_kills(group: Path) -> int:
    """The kernel's own count."""
    file = group / "memory.oom_control"
    text = (file if file.exists() else group / "memory.events").read_text()
    return dict(line.split() for line in text.splitlines())["oom_kill"] != "0"


def test_the_server_out_of_memory(scene: Scene) -> None:
    """The kernel's OOM killer takes the server: the same as any other kill -9."""
    with memory_cgroup(4 * MIB) as group:
        (group / "cgroup.procs").write_text(str(scene.service.pid))
        process = scene.service.process
        assert process is not None
        while process.poll() is None:
            start_code(scene, "true #" + "x" * 100_000)
        assert (process.wait(), oom_kills(group)) == (-signal.SIGKILL, True)
        scene.goes_on()
    scene.restart()
    finish(scene)


# --- the disk


@pytest.fixture
def point() -> Iterator[Path]:
    """A disk of 64 MB, which becomes read-only when it fails."""
    with small_disk(64, "errors=remount-ro") as point:
        yield point


@pytest.fixture
def on_disk(point: Path, tmp_path: Path) -> Iterator[Scene]:
    """A scene with its state on that disk."""
    uid_first = uid_range()
    service = Service(tmp_path, config=config_of(uid_first))
    service.state = point / "state"
    scene = Scene(service.start(), uid_first)
    yield scene
    scene.close()
    service.stop()
    for group in service.job_cgroups():  # after a failure: what runs would keep the disk mounted
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def test_no_space(on_disk: Scene, point: Path) -> None:
    """Output waits in its pipe, starts are refused, the rest is answered; with space all goes on."""
    scene = on_disk
    filler = point / "filler"
    fill(filler)
    # what the steady jobs still had room for (the last block of each file) is soon full, too
    wait_for(lambda: free_bytes(point) == 0)
    sizes = [scene.output_size(job_id) for job_id in (scene.job, scene.other)]
    for _ in range(3):
        assert start_code(scene) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert scene.jobs_of("bob")[scene.other].state == pb.JOB_STATE_RUNNING
    assert [scene.output_size(job_id) for job_id in (scene.job, scene.other)] <= [n + 8192 for n in sizes]
    filler.unlink()
    finish(scene)


@pytest.mark.parametrize(
    "script",
    [
        "cat /dev/zero >fill",
        "/usr/bin/python3 -I -S -c 'for i in range(100_000): open(str(i), \"w\").close()'",
    ],
    ids=["bytes", "inodes"],
)
def test_a_job_that_fills_the_disk(on_disk: Scene, script: str) -> None:
    """Its scratch takes all bytes, or all inodes: it is ended for that, and all else goes on, starts too."""
    scene = on_disk
    command = f"exec 2>&1; {script}; exec sleep 1000"
    filler = scene.stub("alice").Start(pb.StartRequest(command=command)).job.id
    wait_for(lambda: scene.job_of(filler, "alice").reason == pb.END_REASON_DISK_LIMIT)
    wait_for(lambda: start_code(scene) is grpc.StatusCode.OK)
    finish(scene)


def test_a_disk_that_becomes_read_only(on_disk: Scene, point: Path) -> None:
    """As after an error of the disk (ext4, errors=remount-ro): starts are refused, the rest is answered.

    Jobs are held back as on a full disk, which is said of them, and can be stopped. Once the disk is repaired
    and pjwd started again nothing of them is left; what nobody could write down is lost, and not a guess.
    """
    scene, service = on_disk, on_disk.service
    done = scene.stub("bob").Start(pb.StartRequest(command="echo kept; exit 4")).job.id
    wait_for(lambda: scene.job_of(done, "bob").HasField("end"))
    subprocess.run(["sync", "-f", point], check=True)
    lines = Path("/proc/mounts").read_text().splitlines()
    device = next(line.split()[0] for line in lines if f" {point} " in line)
    Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("1")
    with pytest.raises(OSError, match="Read-only file system"):
        (point / "probe").write_text("")
    for _ in range(3):
        assert start_code(scene) is grpc.StatusCode.INTERNAL
    assert scene.job_of(done, "bob").exit_code == 4
    logs = scene.stub("bob").Logs(pb.LogsRequest(id=done), timeout=OTHERS_SECONDS)
    assert b"".join(response.data for response in logs) == b"kept\n"
    steady = ((scene.job, "alice"), (scene.other, "bob"))
    # no init can note it there; pjwd finds it when it writes a sample
    wait_for(lambda: {scene.job_of(*job).detail for job in steady} == {OUTPUT_HELD}, 90)
    for job_id, client in steady:
        assert scene.job_of(job_id, client).state == pb.JOB_STATE_RUNNING
        request = pb.StopRequest(id=job_id)
        request.grace.seconds = 1
        ended = scene.stub(client).Stop(request, timeout=OTHERS_SECONDS).job
        assert (ended.state, ended.HasField("exit_code"), ended.signal) == (pb.JOB_STATE_LOST, False, 0)
    scene.close()
    service.stop()
    subprocess.run(["umount", point], check=True)
    # A copy: a mount namespace of somebody's may hold the old mount for longer, and it would be the same one.
    image = point.parent / "repaired"
    subprocess.run(["cp", "--sparse=always", point.parent / "image", image], check=True)
    subprocess.run(
        ["e2fsck", "-fy", image], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    service.start()
    assert scene.job_of(done, "bob").exit_code == 4
    for job_id, client in steady:
        assert scene.job_of(job_id, client).state == pb.JOB_STATE_LOST
    scene.nothing_left()
