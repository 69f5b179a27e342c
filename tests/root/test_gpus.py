"""GPUs: who gets which, for how long, and what of the machine comes with them."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from pjw.client.sync import Client
from pjw.errors import GpuError, LimitReachedError
from pjw.launcher.jobs import JOB_DESCRIPTORS
from pjw.launcher.protocol import GpuNames, Gpus, Launched, Refused
from pjw.model import EndReason, GpuOffer, Job, JobSpec, JobState, QueueSpec, Retry
from tests.root.conftest import finish
from tests.root.test_launcher_hostile import Peer, connect, peer
from tests.support import cdi, documents
from tests.support.images import small_root
from tests.support.service import BIN, Service, wait_for, waiting_inits
from tests.support.worker_harness import Bench

__all__ = ["connect", "peer"]

DOCUMENT: Final = Path(__file__).parents[2] / "docs/gpus.md"
CONFIG: Final = """
[gpus]
kind = "nvidia.com/gpu"
cdi_dirs = ["{0}/none", "{0}/cdi"]
clients = ["alice", "team-*"]
"""
FEWER: Final = "cannot start the job with {} GPU{}: fewer are free now"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """A service on a machine with two GPUs, which are for alice."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    directory.chmod(0o755)
    cdi.make_gpus(directory)
    service = Service(directory, config=CONFIG.format(directory)).start()
    yield service
    try:
        finish(service)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def alice(service: Service) -> Iterator[Client]:
    """A client that may have them."""
    with service.client("alice") as client:
        yield client


@pytest.fixture
def spec(service: Service) -> Iterator[dict[str, Any]]:
    """What the CDI file says; a test may write another one."""
    path = service.directory / "cdi/nvidia.json"
    before = path.read_text()
    yield json.loads(before)
    path.unlink()
    path.write_text(before)


def say(client: Client, script: str, gpus: int = 1, **more: Any) -> str:
    """Run a job with GPUs; what it says, stderr too."""
    return client.run(JobSpec(f"exec 2>&1; {script}", gpus=gpus, **more)).output.decode()


def taken(client: Client, gpus: int) -> Job:
    """A job that has so many until it is stopped."""
    return client.start(JobSpec("exec sleep 1000", gpus=gpus))


# --- what a job has


def test_a_job_has_its_devices(alice: Client) -> None:
    """The first free GPU and what all have in common, as nodes that it can use; no other one."""
    said = say(
        alice, "cd /dev; stat -c '%n %t %T %a' nvidia*; ls nvidia-sub; head -c2 nvidiactl | od -An -tx1"
    )
    *nodes, of_sub, read = said.splitlines()
    assert nodes == ["nvidia-sub 0 0 755", "nvidia0 1 7 666", "nvidiactl 1 5 666"]
    assert (of_sub, read) == ("ctl", " 00 00")
    assert "No space left on device" in say(alice, "printf x | dd of=/dev/nvidia0")
    assert "nvidia1\n" in say(alice, "ls /dev", gpus=2)


def test_nothing_else_can_be_done_in_dev(alice: Client) -> None:
    """It is read-only again, and a mount of one node leads to no other."""
    said = say(
        alice, "touch /dev/x /run/x /run/daemon/x; rm /dev/nvidia0; mknod /tmp/n c 1 3; ls /dev/nvidia0/.."
    )
    assert said.count("Read-only file system") == 4
    assert "Operation not permitted" in said
    options = say(alice, "grep ' /dev/nvidia0 ' /proc/self/mountinfo").split()[5].split(",")
    assert {"nosuid", "noexec"} <= set(options)
    assert "nodev" not in options


def test_files_and_variables_come_with_them(alice: Client) -> None:
    """Read-only, where the job has its own or another one; a variable of the client's goes before."""
    script = (
        "cat /run/daemon/socket /etc/passwd; echo x > /run/daemon/socket; env | grep -e FAKE -e NVIDIA -e OF_"
    )
    said = say(alice, script, env={"OF_THE_CLIENT": "yes"}).splitlines()
    assert said[:2] == ["daemon", "library"]
    assert "Read-only file system" in said[2] or "Permission denied" in said[2]
    assert sorted(said[3:]) == ["FAKE_0=1", "NVIDIA_VISIBLE_DEVICES=void", "OF_THE_CLIENT=yes"]


def test_without_asking_a_job_has_none(alice: Client) -> None:
    """Neither node nor variable nor file."""
    said = say(alice, "ls /dev /run; env; head -n1 /etc/passwd", gpus=0)
    assert not any(word in said for word in ("nvidia", "NVIDIA", "daemon", "library"))


def test_a_session_has_the_devices(alice: Client) -> None:
    """`pjw exec` is within the job."""
    job = taken(alice, 1)
    said = alice.run_in(job.id, "ls /dev; cat /run/daemon/socket").output
    assert b"\nnvidia0\n" in said
    assert said.endswith(b"daemon\n")
    alice.stop(job.id, grace=0)


def test_a_job_in_an_image_has_all_of_it(service: Service, alice: Client) -> None:
    """Its devices, and each mount: the machine's files are not there. What has no place there is refused."""
    root = small_root(service.directory / "root")
    image = [str(BIN / "pjwd"), "image"]
    state = ["--state-dir", str(service.state)]
    subprocess.run([*image, "import", *state, "small", f"dir:{root}"], check=True, capture_output=True)
    script = "ls /dev/nvidia0 /dev/nvidia-sub/ctl /usr/lib >/dev/null && cat /run/daemon/socket /etc/passwd"
    assert say(alice, script, image="small") == "daemon\nlibrary\n"
    assert "nvidia" not in say(alice, "ls /dev", gpus=0, image="small")
    subprocess.run([*image, "rm", *state, "small"], check=True, capture_output=True)


# --- exclusive


def test_no_gpu_is_given_twice(alice: Client) -> None:
    """A start that there are too few for is refused with exact words; an end makes room, a failure too."""
    first = taken(alice, 1)
    assert "nvidia1" in say(alice, "ls /dev")
    with pytest.raises(LimitReachedError) as caught:
        taken(alice, 2)
    assert (str(caught.value), caught.value.limit) == (FEWER.format(2, "s"), "gpus")
    for broken in (JobSpec(["/none"], gpus=1), JobSpec("true", gpus=1, workdir="/none")):
        with pytest.raises(Exception, match="none"):
            alice.run(broken)
    second = taken(alice, 1)
    with pytest.raises(LimitReachedError, match=FEWER.format(1, "")):
        taken(alice, 1)
    for job in (first, second):
        alice.stop(job.id, grace=0)
    assert "nvidia1" in say(alice, "ls /dev", gpus=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_worker_knows_who_has_which(service: Service, alice: Client, number: int) -> None:
    """From its table: a GPU of a job that runs is nobody else's; that of one that has ended is."""
    stays = taken(alice, 1)
    # ends while nobody looks
    ends = taken(alice, 1)
    command = command_of(service, ends.id)
    service.stop(number)
    os.kill(command, signal.SIGKILL)
    service.start()
    with service.client("alice") as client:
        client.wait(ends.id)
        assert "nvidia1" in say(client, "ls /dev")
        with pytest.raises(LimitReachedError):
            taken(client, 2)
        client.stop(stays.id, grace=0)
        assert "nvidia0" in say(client, "ls /dev", gpus=2)


def command_of(service: Service, job_id: int) -> int:
    """The pid of a job's command."""
    init = service.init_pid(job_id)
    return int(Path(f"/proc/{init}/task/{init}/children").read_text().split()[0])


# --- the queue


def says(client: Client, job: Job, detail: str) -> bool:
    """Whether a job waits for that."""
    return client.get(job.id).detail == detail


def test_a_job_waits_for_gpus(service: Service, alice: Client) -> None:
    """It says for what; jobs without go on, no other with GPUs overtakes it, and an end is its turn."""
    running = taken(alice, 1)
    [both, one, none, last] = alice.submit(
        [
            JobSpec("ls /dev", gpus=2),
            JobSpec("ls /dev", gpus=1),
            JobSpec("ls /dev"),
            JobSpec("true", gpus=1, queue=QueueSpec(held=True)),
        ]
    )
    assert alice.wait(none.id).succeeded
    assert alice.get(both.id).detail == "is next: waits for 2 free GPUs"
    assert alice.get(one.id).detail == "waits for its turn to have GPUs"
    alice.stop(running.id, grace=0)
    for job, has in ((both, True), (one, False)):
        ended = alice.wait(job.id)
        assert (ended.succeeded, ended.gpus) == (True, job.gpus)
        assert ("nvidia1" in service.ok("logs", str(job.id))) == has
    alice.stop(last.id)


def test_who_is_next_may_leave_the_queue(alice: Client) -> None:
    """Stopped or held, it keeps nobody waiting any more."""
    running = taken(alice, 1)
    for leave in (alice.stop, alice.hold):
        [both] = alice.submit([JobSpec("true", gpus=2)])
        wait_for(partial(says, alice, both, "is next: waits for 2 free GPUs"))
        [one] = alice.submit([JobSpec("true", gpus=1)])
        wait_for(partial(says, alice, one, "waits for its turn to have GPUs"))
        leave(both.id)
        assert alice.wait(one.id).succeeded
        alice.stop(both.id)
    alice.stop(running.id, grace=0)


def test_elements_and_attempts_have_their_own(alice: Client) -> None:
    """Of two GPUs two elements that want one each; a further attempt has as many as the first."""
    one = 'test "$(ls /dev | grep -c "nvidia[01]")" = 1'
    [array] = alice.submit([JobSpec(one, gpus=1, queue=QueueSpec(array="1-4"))])
    ended = alice.wait(array.id)
    assert ended.array is not None
    assert ended.array.succeeded == 4
    again = QueueSpec(retry=Retry(1, backoff_seconds=0))
    [job] = alice.submit([JobSpec('ls /dev/nvidia1 && test "$PJW_ATTEMPT" = 2', gpus=2, queue=again)])
    last = alice.wait(job.id)
    assert (last.attempt, last.succeeded, last.gpus) == (2, True, 2)


def test_a_queued_job_survives_a_restart(service: Service, alice: Client) -> None:
    """It waits on, for what a job of the worker before has."""
    running = taken(alice, 2)
    [waiting] = alice.submit([JobSpec("ls /dev/nvidia1", gpus=2)])
    service.stop(signal.SIGKILL)
    service.start()
    with service.client("alice") as client:
        assert client.get(waiting.id).state is JobState.QUEUED
        client.stop(running.id, grace=0)
        assert client.wait(waiting.id).succeeded


# --- who may, and what there is


def test_who_is_offered_none(service: Service) -> None:
    """Nor is told how many there are; in the queue and at once."""
    with service.client("bob") as bob:
        for begin in (bob.run, lambda spec: bob.submit([spec])):
            with pytest.raises(GpuError, match=r"^your operator offers you no GPUs$"):
                begin(JobSpec("true", gpus=1))
        assert bob.quota().gpus == 0
    with service.client("alice") as client:
        assert client.quota().gpus == 2
        for begin in (client.run, lambda spec: client.submit([spec])):
            with pytest.raises(GpuError, match="asks for 3 GPUs, and the machine has 2"):
                begin(JobSpec("true", gpus=3))


def changed_node(spec: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The first GPU with another node."""
    for device in spec["devices"]:
        for node in device["containerEdits"]["deviceNodes"]:
            if node["path"] == "/dev/nvidia0":
                node.update(changes)
    return spec


def test_devices_that_are_not_what_they_should_be(
    service: Service, alice: Client, spec: dict[str, Any]
) -> None:
    """What has gone, a link, a file, a block device: refused with the path in the job; nothing is left."""
    top = service.directory
    (top / "link").symlink_to("nvidia0")
    (top / "file").touch()
    os.mknod(top / "block", stat.S_IFBLK | 0o666, os.makedev(7, 0))
    before = service.made()
    for name, error in (
        ("none", errno.ENOENT),
        ("link", errno.ELOOP),
        ("file", errno.ENODEV),
        ("block", errno.ENODEV),
    ):
        cdi.write(top, changed_node(spec, hostPath=str(top / name)))
        with pytest.raises(GpuError) as caught:
            alice.run(JobSpec("true", gpus=1))
        assert caught.value.errno == error
        assert str(caught.value).startswith("cannot give the job /dev/nvidia0, which its GPUs come with: ")
        assert str(top) not in f"{caught.value} {caught.value.hint}"
    wait_for(lambda: service.made() == before)
    [queued] = alice.submit([JobSpec("true", gpus=1)])
    ended = alice.wait(queued.id)
    assert (ended.reason, ended.detail[:14]) == (EndReason.START_FAILED, "cannot give th")
    cdi.write(top, changed_node(spec, hostPath=str(top / "nvidia0"), path="/dev/pts/0"))
    with pytest.raises(GpuError, match="/dev/pts/0"):
        alice.run(JobSpec("true", gpus=1))


def test_a_file_that_others_may_change(service: Service, alice: Client, spec: dict[str, Any]) -> None:
    """Nor one of another user, no JSON, or what would show hidden files: why is for the log alone."""
    path = service.directory / "cdi/nvidia.json"
    text = path.read_text()
    shown = {"hostPath": str(service.directory), "containerPath": "/opt"}
    spec["containerEdits"]["mounts"].append(shown)
    for wrong in (
        lambda: path.chmod(0o664),
        lambda: os.chown(path, 12345, -1),
        lambda: path.write_text("{"),
        lambda: path.write_text(json.dumps(spec)),
        lambda: (service.directory / "cdi").chmod(0o777),
    ):
        wrong()
        with pytest.raises(GpuError, match=r"^the operator's GPUs cannot be had now$"):
            alice.run(JobSpec("true", gpus=1))
        (service.directory / "cdi").chmod(0o755)
        path.unlink()
        path.write_text(text)
    assert "would show" in service.log.read_text()
    assert "nvidia0" in say(alice, "ls /dev")


# --- the command line and the document


def test_the_command_line(service: Service) -> None:
    """A file of `pjw submit`, `pjw get`; what is no number."""
    batch = service.directory / "batch"
    batch.write_text(json.dumps({"command": "ls /dev/nvidia0", "gpus": 1}))
    [job_id] = service.ok("submit", str(batch)).split()
    assert service.ok("logs", job_id) == "/dev/nvidia0\n"
    assert json.loads(service.ok("get", job_id))["gpus"] == 1
    assert json.loads(service.ok("quota", "--format", "json"))["gpus"] == 2
    batch.write_text(json.dumps({"command": "true", "gpus": "two"}))
    assert "from 0 to 64 GPUs, not 'two'" in service.refused("submit", str(batch))[1]
    assert "from 0 to 64 GPUs, not 65" in service.refused("run", "--gpus", "65", "true")[1]


def test_check_tells_what_there_is(service: Service, spec: dict[str, Any]) -> None:
    """The GPUs by one name each, and what is missing."""

    def said() -> str:
        command = service.command()
        command[1] = "check"
        return subprocess.run(command, capture_output=True, timeout=60, check=False).stdout.decode()

    assert "ok       GPUs nvidia.com/gpu: 0, 1, for alice, team-*\n" in said()
    cdi.write(service.directory, changed_node(spec, hostPath="/none"))
    assert "warning  GPU 0: /none: no such file or directory (ENOENT)\n" in said()


def test_the_document(make_service: Callable[..., Service]) -> None:
    """Typed on a machine with two GPUs: it shows what it says."""
    service = make_service()
    service.directory.chmod(0o755)
    spec = cdi.make_gpus(service.directory)
    spec["containerEdits"]["deviceNodes"].pop(0)
    cdi.write(service.directory, spec)
    service.config = CONFIG.format(service.directory)
    service.start()
    shell = ["setsid", "--ctty", "bash", "--norc", "--noediting"]
    env = {**service.environment(), "PATH": f"{BIN}:{os.environ['PATH']}", "LANG": "C.UTF-8", "NO_COLOR": "1"}
    documents.play(
        documents.commands_of(DOCUMENT), lambda _: documents.Terminal(shell, service.directory, env)
    )


# --- a hostile server


def offer(bench: Bench) -> GpuOffer:
    """The GPUs of a machine, for alice."""
    bench.state.parent.chmod(0o755)
    if not (bench.state.parent / "cdi").exists():
        cdi.make_gpus(bench.state.parent)
    return GpuOffer(cdi.KIND, (str(bench.state.parent / "cdi"),), ("alice",))


def test_the_launcher_looks_each_up(bench: Bench, connect: Callable[..., Peer]) -> None:
    """Whose they are and which there are; no path, nothing twice, and none without an offer."""
    peer = connect(gpus=offer(bench))
    assert peer.ask(Gpus()) == GpuNames(("0", "1"), ())
    for client, names, kind in (
        ("bob", ("0",), "gpu"),
        ("", ("0",), "gpu"),
        ("alice", ("2",), "gpu"),
        ("alice", ("all",), "gpu"),
        ("alice", ("/dev/mem",), "gpu"),
        ("alice", ("0", "0"), "invalid"),
        ("alice", tuple(map(str, range(65))), "invalid"),
    ):
        refused = peer.launch(1, gpus=names, client_name=client)
        assert isinstance(refused, Refused), names
        assert refused.kind == kind
    assert isinstance(peer.ask(Gpus(("2",))), Refused)
    none = connect(greet=False)
    assert none.hello.gpus.kind == ""


def test_the_launcher_keeps_nothing_of_a_device(bench: Bench, connect: Callable[..., Peer]) -> None:
    """As many descriptors as for any other job."""
    peer = connect(gpus=offer(bench), waiting_inits=1)
    before = 0
    for job_id, names in enumerate(((), ("0",), ("0", "1")), 1):
        assert isinstance(peer.launch(job_id, gpus=names, client_name="alice"), Launched)
        # what made the mounts, and the next init, goes a moment later; the first job brings what all need
        wait_for(lambda: len(waiting_inits(bench.state)) == 1)
        if not names:
            before = peer.open_descriptors()
        else:
            wait_for(partial(has_at_most, peer, before + (job_id - 1) * JOB_DESCRIPTORS))


def has_at_most(peer: Peer, count: int) -> bool:
    """Whether a launcher has so many descriptors open, and no more."""
    return peer.open_descriptors() <= count
