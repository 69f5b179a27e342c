"""Mounts that the operator offers: who may have which, where, and what of the host they reach."""

import errno
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from pjw.client.sync import Client
from pjw.errors import InvalidJobError, MountError, MountNotFoundError
from pjw.launcher.jobs import JOB_DESCRIPTORS
from pjw.launcher.protocol import Launched, Refused, ReloadMounts
from pjw.model import EndReason, Job, JobSpec, JobState, Mount, MountSource, QueueSpec, Retry
from tests.root.conftest import finish
from tests.root.test_launcher_hostile import Peer, connect, peer
from tests.support.fuse import SUPPORTED, WHY_NOT, DeadFileSystem
from tests.support.service import Service, reloaded, wait_for, waiting_ids, waiting_inits
from tests.support.worker_harness import Bench

__all__ = ["connect", "peer"]

CONFIG: Final = """
[mounts.data]
path = "{0}/data"

[mounts.cache]
path = "{0}/cache"
read_only = false

[mounts.own]
path = "{0}/own"
clients = ["alice", "team-*"]

[mounts.gone]
path = "{0}/gone"

[mounts.file]
path = "{0}/data/file"

[mounts.fifo]
path = "{0}/fifo"

[mounts.link]
path = "{0}/link"

[mounts.behind]
path = "{0}/link/deep"

[mounts.deaf]
path = "{0}/dead/deep"
"""


@pytest.fixture(scope="module")
def lent() -> Iterator[Service]:
    """A service whose operator offers a data set, a cache, what is alice's alone, and what cannot be had."""
    # as that of the other tests (conftest.py)
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    directory.chmod(0o755)
    service = Service(directory, config=CONFIG.format(directory))
    for name in ("data", "cache", "own"):
        (directory / name).mkdir()
        (directory / name / "file").write_text(f"{name}\n")
    (directory / "data/deep").mkdir()
    (directory / "dead").mkdir()
    (directory / "cache").chmod(0o1777)
    (directory / "link").symlink_to("data")
    os.mkfifo(directory / "fifo")
    service.start()
    yield service
    try:
        finish(service)
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def alice(lent: Service) -> Iterator[Client]:
    """A client of it."""
    with lent.client("alice") as client:
        yield client


def say(client: Client, script: str, *mounts: str, **more: str) -> str:
    """Run a job with these mounts; what it says, stderr too."""
    return client.run(JobSpec(f"exec 2>&1; {script}", mounts=mounts, **more)).output.decode()  # type: ignore[arg-type]


# --- what a job has


def test_a_data_set_is_at_mnt_and_read_only(alice: Client) -> None:
    """By default: no job changes it, gains privilege by it or finds a device there; programs would run."""
    said = say(alice, "cat /mnt/data/file; touch /mnt/data/new; ls /mnt; touch /mnt/new", "data")
    lines = said.splitlines()
    assert (lines[0], lines[2]) == ("data", "data")
    assert "Read-only file system" in lines[1]
    assert "Read-only file system" in lines[3]
    options = say(alice, "grep ' /mnt/data ' /proc/self/mountinfo", "data").split()[5].split(",")
    assert {"ro", "nosuid", "nodev"} <= set(options)
    assert "noexec" not in options


def test_a_cache_is_written_as_the_client_s_user(lent: Service, alice: Client) -> None:
    """What the operator's modes allow; the file is the client's on the host, too."""
    assert say(alice, "echo made > /mnt/cache/made; echo 1 > /mnt/cache/file", "cache").endswith(
        "Permission denied\n"
    )
    made = lent.directory / "cache/made"
    assert made.read_text() == "made\n"
    assert made.stat().st_uid not in (0, os.getuid())
    with lent.client("bob") as bob:
        assert say(bob, "cat /mnt/cache/made", "cache") == "made\n"


def test_without_asking_a_job_has_none(alice: Client) -> None:
    """Neither the directory nor a change of its /mnt."""
    assert say(alice, "ls /mnt; ls /mnt/data").endswith("No such file or directory\n")


def test_other_places(alice: Client) -> None:
    """At a directory that is there, or one that can be made: in the job's own, its workspace, /tmp, /mnt."""
    places = ("/opt", "/run/job/a/b", "/tmp/c", "/mnt/d/e", "/run/workspace/f")
    mounts = [f"{name}:{place}" for name, place in zip(["data"] * 4 + ["own"], places, strict=True)]
    script = "cat " + " ".join(f"{place}/file" for place in places) + "; echo x > a/x; stat -c %u a /mnt/d"
    job, output, _ = alice.run(JobSpec(f"cd; exec 2>&1; {script}; id -u", mounts=mounts, workspace="work"))
    *seen, of_a, of_mnt, uid = output.decode().split()
    assert seen == ["data"] * 4 + ["own"]
    # what was made in the job's own directory is the job's
    assert (of_a, of_mnt) == (uid, "0")
    assert job.mounts == tuple(mounts)
    assert alice.get(job.id).mounts == tuple(mounts)
    alice.remove_workspace("work")


@pytest.mark.parametrize(
    ("path", "error"),
    [("/etc/passwd", errno.ENOTDIR), ("/usr/nowhere", errno.EROFS), ("/proc/self/root", 0)],
)
def test_places_that_cannot_be(lent: Service, alice: Client, path: str, error: int) -> None:
    """A file, what cannot be made, what is the job's own: refused with the path, and nothing is left."""
    before = lent.made()
    with pytest.raises((MountError, InvalidJobError), match=path) as caught:
        alice.run(JobSpec("true", mounts=[f"data:{path}"]))
    if error:
        assert isinstance(caught.value, MountError)
        assert caught.value.errno == error
    wait_for(lambda: lent.made() == before)


def test_no_link_of_the_job_s_is_followed(alice: Client) -> None:
    """A workspace is full of what its client put there: a link to another place is no place."""
    say(alice, "ln -s /usr there; mkdir real; ln -s real near", workspace="linked")
    for path in ("there", "near", "there/share"):
        with pytest.raises(MountError) as caught:
            alice.run(JobSpec("true", mounts=[f"data:/run/workspace/{path}"], workspace="linked"))
        assert caught.value.errno == errno.ELOOP
    assert say(alice, "cat real/file", "data:/run/workspace/real", workspace="linked") == "data\n"
    assert say(alice, "ls real", workspace="linked") == ""
    alice.remove_workspace("linked")


def test_what_is_mounted_below_is_not_seen(lent: Service, alice: Client) -> None:
    """One file system: the operator offers what is mounted in it by another name, or not."""
    deep = lent.directory / "data/deep"
    subprocess.run(["mount", "-t", "tmpfs", "pjw-test", deep], check=True)
    try:
        (deep / "secret").touch()
        assert say(alice, "ls /mnt/data/deep", "data") == ""
    finally:
        subprocess.run(["umount", deep], check=True)


def test_nothing_leads_out_of_it(alice: Client) -> None:
    """'..' is the job's own /mnt, and a link leads within what the job sees."""
    assert say(alice, "ls /mnt/data/..; cd /mnt/data/deep; ls ../..", "data") == "data\ndata\n"


def test_a_session_has_them(alice: Client) -> None:
    """`pjw exec` is within the job."""
    job = alice.start(JobSpec("exec sleep 1000", mounts=["data"]))
    assert alice.run_in(job.id, "cat /mnt/data/file").output == b"data\n"
    alice.stop(job.id, grace=0)


# --- whose they are


def test_what_is_not_offered_is_not_told_from_what_is_not(lent: Service) -> None:
    """A client learns nothing of another's mounts, by a start, a submission or its quota."""
    words = set()
    with lent.client("bob") as bob:
        for name in ("own", "nothing"):
            for begin in (bob.run, lambda spec: bob.submit([spec])):
                with pytest.raises(MountNotFoundError) as caught:
                    begin(JobSpec("true", mounts=[name]))
                assert caught.value.mount == name
                words.add((str(caught.value).replace(name, "NAME"), caught.value.hint))
        assert Mount("own") not in bob.quota().mounts
    assert len(words) == 1
    with lent.client("alice") as client:
        assert {Mount("own"), Mount("cache", read_only=False)} <= set(client.quota().mounts)


# --- what the host has


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("gone", errno.ENOENT),
        ("file", errno.ENOTDIR),
        ("fifo", errno.ENOTDIR),
        ("link", errno.ELOOP),
        ("behind", errno.ELOOP),
    ],
)
def test_what_the_host_does_not_have_is_told_without_its_path(
    lent: Service, alice: Client, name: str, error: int
) -> None:
    """A start is refused in words, with no path of the host's; nothing is left, and other mounts are had."""
    before = lent.made()
    with pytest.raises(MountError) as caught:
        alice.run(JobSpec("true", mounts=["data", name]))
    assert (caught.value.mount, caught.value.errno) == (name, error)
    assert str(lent.directory) not in f"{caught.value} {caught.value.hint}"
    wait_for(lambda: lent.made() == before)


def test_no_init_goes_on_waiting_for_a_job_that_was_refused(lent: Service, alice: Client) -> None:
    """It was made ahead, for the very job, and another job never takes it."""
    job = alice.wait(alice.start(JobSpec("true")).id)
    wait_for(lambda: job.id + 1 in waiting_ids(lent.state))
    with pytest.raises(MountError):
        alice.start(JobSpec("true", mounts=["gone"]))
    wait_for(lambda: job.id + 1 not in waiting_ids(lent.state))


def test_a_directory_that_gave_way_to_a_link(lent: Service, alice: Client) -> None:
    """Looked at for each start: who may rename it can have no job be shown another directory."""
    own, aside = lent.directory / "own", lent.directory / "aside"
    own.rename(aside)
    own.symlink_to("/root")
    try:
        with pytest.raises(MountError) as caught:
            alice.run(JobSpec("true", mounts=["own"]))
        assert caught.value.errno == errno.ELOOP
    finally:
        own.unlink()
        aside.rename(own)
    assert say(alice, "cat /mnt/own/file", "own") == "own\n"


@contextmanager
def deaf(lent: Service) -> Iterator[DeadFileSystem]:
    dead = DeadFileSystem(lent.directory / "dead")
    try:
        yield dead
    finally:
        dead.release()


@pytest.mark.skipif(not SUPPORTED, reason=WHY_NOT)
def test_a_dead_file_server_holds_up_nobody_else(lent: Service, alice: Client) -> None:
    """Nor does the launcher: that start alone waits, and is refused when the server is given up."""
    with deaf(lent) as dead:
        pjw = lent.popen("run", "--mount", "deaf", "true")
        wait_for(lambda: dead.held)
        assert say(alice, "cat /mnt/data/file", "data") == "data\n"
        assert pjw.poll() is None
        dead.release()
        _, words = pjw.communicate(timeout=30)
    assert pjw.returncode > 0
    assert b"cannot mount deaf: the operator's directory: " in words


# --- the queue


def ended(client: Client, spec: JobSpec) -> Job:
    """Put a job into the queue, and wait for its end."""
    [job] = client.submit([spec])
    return client.wait(job.id)


def test_jobs_of_the_queue_have_them(alice: Client) -> None:
    """Stored with the job: elements of an array and further attempts have them, too."""
    array = ended(
        alice, JobSpec('test "$(cat /mnt/data/file)" = data', mounts=["data"], queue=QueueSpec(array="1-2"))
    )
    assert array.array is not None
    assert array.array.succeeded == 2
    again = ended(
        alice,
        JobSpec(
            'cat /mnt/data/file; test "$PJW_ATTEMPT" = 2',
            mounts=["data"],
            queue=QueueSpec(retry=Retry(1, backoff_seconds=0)),
        ),
    )
    assert (again.attempt, again.succeeded, again.mounts) == (2, True, ("data:/mnt/data",))


def test_a_queued_job_whose_mount_is_gone_ends_with_the_reason(alice: Client) -> None:
    """It is the operator's to mend, and no turn of the queue's."""
    job = ended(alice, JobSpec("true", mounts=["gone"]))
    assert (job.state, job.reason) == (JobState.EXITED, EndReason.START_FAILED)
    assert job.detail.startswith("cannot mount gone: the operator's directory: no such file")


# --- the operator


def test_a_reload_is_for_new_jobs(lent: Service, alice: Client) -> None:
    """A mount comes, one is for others, one is withdrawn; a job that runs keeps what it has."""
    running = alice.start(JobSpec("exec sleep 1000", mounts=["data"]))
    held = alice.submit([JobSpec("true", mounts=["data"], queue=QueueSpec(held=True))])[0]
    config = CONFIG.format(lent.directory)
    changed = config.replace("[mounts.data]", "[mounts.set]").replace('"alice", "team-*"', '"bob"')
    reloaded(lent, changed)
    try:
        assert say(alice, "cat /mnt/set/file", "set") == "data\n"
        for name in ("data", "own"):
            with pytest.raises(MountNotFoundError):
                alice.run(JobSpec("true", mounts=[name]))
        assert alice.run_in(running.id, "cat /mnt/data/file").output == b"data\n"
        alice.release(held.id)
        failed = alice.wait(held.id)
        assert (failed.reason, failed.detail) == (EndReason.START_FAILED, "no mount data")
        # refused as a whole, also by the launcher
        said = reloaded(lent, changed.replace(f"{lent.directory}/own", str(lent.state)))
        assert any("would show" in line for line in said), said
        assert say(alice, "cat /mnt/set/file", "set") == "data\n"
    finally:
        reloaded(lent, config)
    alice.stop(running.id, grace=0)


def test_the_command_line(lent: Service) -> None:
    """`--mount`, a file of `pjw submit`, `pjw get` and `pjw quota`."""
    assert lent.ok("run", "--mount", "data", "--mount", "cache:/opt", "cat /mnt/data/file /opt/file") == (
        "data\ncache\n"
    )
    batch = lent.directory / "batch"
    batch.write_text(json.dumps({"command": "cat /srv/../mnt/data/file", "mounts": ["data"]}))
    [job_id] = lent.ok("submit", str(batch)).split()
    assert lent.ok("logs", job_id) == "data\n"
    assert json.loads(lent.ok("get", job_id))["mounts"] == ["data:/mnt/data"]
    assert "mount   data, read-only\nmount   cache\n" in lent.ok("quota", "--format", "table")
    assert json.loads(lent.ok("quota", "--format", "json"))["mounts"][0] == {"name": "data", "readOnly": True}
    code, words = lent.refused("run", "--mount", "nothing", "true")
    assert (code, words) == (
        1,
        "pjw: error: no mount nothing\nhint: `pjw quota` shows what your operator offers you\n",
    )


def test_check_tells_what_no_job_can_have(lent: Service) -> None:
    """What is missing, no directory or a link is a warning: pjwd serves all the same."""
    command = lent.command()
    command[1] = "check"
    said = subprocess.run(command, capture_output=True, timeout=60, check=False).stdout.decode()
    top = lent.directory
    assert f"ok       mount data: {top}/data, read-only, for *\n" in said
    assert f"ok       mount cache: {top}/cache, writable, for *\n" in said
    assert f"warning  mount gone: {top}/gone: no such file or directory (ENOENT)\n" in said
    assert f"warning  mount fifo: {top}/fifo is no directory\n" in said
    assert f'path = "{top}/data/deep"\n' in said


# --- a hostile server


OFFERED: Final = MountSource("data", "/usr/share", clients=("alice",))


@pytest.mark.parametrize(
    "mounts",
    [
        ("data",),
        ("data:/usr/share/..",),
        ("data:/proc/1",),
        ("data:/",),
        ("/etc:/mnt/etc",),
        ("../data:/mnt/data",),
        ("data:/mnt/a", "data:/mnt/a/b"),
        tuple(f"data:/mnt/{number}" for number in range(9)),
    ],
)
def test_the_launcher_takes_words_and_plain_paths_alone(
    connect: Callable[..., Peer], mounts: tuple[str, ...]
) -> None:
    """What the server checks, the launcher checks again."""
    peer = connect(mounts=(OFFERED,))
    refused = peer.launch(1, mounts=mounts, client_name="alice")
    assert isinstance(refused, Refused)
    assert refused.kind == "invalid"


def test_the_launcher_asks_its_own_table(connect: Callable[..., Peer]) -> None:
    """Whose mount it is; and without a configuration there is nothing to be taken anew."""
    peer = connect(mounts=(OFFERED,))
    for client, name in (("bob", "data"), ("", "data"), ("alice", "other")):
        refused = peer.launch(1, mounts=(f"{name}:/mnt/x",), client_name=client)
        assert refused == Refused("mount", "", name, 0, "`pjw quota` shows what your operator offers you")
    assert isinstance(peer.ask(ReloadMounts()), Refused)


def test_the_launcher_keeps_nothing_of_a_mount(bench: Bench, connect: Callable[..., Peer]) -> None:
    """The mount is the job's alone, and who opened it has gone: as many descriptors as for any other job."""
    peer = connect(mounts=(OFFERED,), waiting_inits=1)
    most = 0
    for job_id, mounts in enumerate(((), ("data:/mnt/data",), ("data:/opt", "data:/mnt/x")), 1):
        assert isinstance(peer.launch(job_id, mounts=mounts, client_name="alice"), Launched)
        wait_for(lambda: len(waiting_inits(bench.state)) == 1)
        # the first one brings what all need; who opened a mount, or made an init, goes a moment later
        most = most + JOB_DESCRIPTORS if most else peer.open_descriptors()
        wait_for(partial(has_at_most, peer, most))


def has_at_most(peer: Peer, count: int) -> bool:
    """Whether a launcher has no more descriptors open than so many."""
    return peer.open_descriptors() <= count


def test_a_greeting_that_would_show_what_is_hidden(bench: Bench, connect: Callable[..., Peer]) -> None:
    """Neither the state directory nor a hidden path within a mount."""
    for path in (bench.state, bench.state / "jobs", bench.state.parent):
        peer = connect(greet=False, mounts=(MountSource("all", str(path)),))
        assert isinstance(peer.ask(peer.hello), Refused)
