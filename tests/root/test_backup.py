"""pjwd backup, and what a pjwd has that starts from one: after a loss of the state directory, for real."""

import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pjw.server.backup import CHANGES_LEFT_OUT, IDS_LEFT_OUT
from pjw.worker.state_dir import BACKED_UP
from tests.support.service import BIN, Service, wait_for

BLOB = "head -c 3000000 /dev/urandom | tee /dev/stderr"


@pytest.fixture
def target(visible: Path) -> Path:
    """Where a backup goes: it is not there yet."""
    return visible / "backup"


@pytest.fixture
def service(make_service: Callable[..., Service]) -> Service:
    """A service."""
    return make_service().start()


def backup(service: Service, target: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run `pjwd backup`."""
    command = [str(BIN / "pjwd"), "backup", "--state-dir", str(service.state), *options, str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def refused(service: Service, target: Path) -> str:
    """Run a `pjwd backup` that must fail; its words."""
    done = backup(service, target)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    return done.stderr


def end_jobs(service: Service) -> str:
    """End the jobs of a service that has been stopped."""
    command = [str(BIN / "pjwd"), "end-jobs", "--state-dir", str(service.state), "--grace", "0"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def restore(service: Service, target: Path) -> None:
    """As docs/service.md has it."""
    subprocess.run(["cp", "-a", target, service.state], check=True)
    service.state.chmod(0o711)


def output(service: Service, job: str, *options: str) -> bytes:
    """All that a job has written."""
    done = service.pjw("logs", *options, job)
    assert done.returncode == 0, done.stderr
    return done.stdout


def job(service: Service, job_id: str) -> dict[str, object]:
    """A job as `pjw get` shows it."""
    return dict(json.loads(service.ok("get", job_id)))


def test_a_lost_state_directory_is_restored(service: Service, target: Path) -> None:
    """From a backup of a running pjwd: ended jobs with their output, running ones lost, and no id twice."""
    both = service.ok("start", "--split-stderr", "--label", "kind=blob", BLOB).strip()
    service.ok("wait", both)
    failed = service.ok("start", "echo no; exit 7").strip()
    service.pjw("wait", failed)
    silent = service.ok("start", "--name", "silent", "true").strip()
    service.ok("wait", silent)
    removed = service.ok("start", "echo gone").strip()
    service.ok("wait", removed)
    service.ok("rm", removed)
    running = service.ok("start", "echo so far; sleep 300").strip()
    with service.popen("logs", running) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"so far\n"
        reader.kill()
        outputs = {each: output(service, each) for each in (both, failed, silent)}
        errors = output(service, both, "--stderr")
        shown = {each: job(service, each) for each in (both, failed, silent)}

        done = backup(service, target)
        assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
        words = "4 jobs, 1 of which have not ended; not in the backup: configuration, certificates, keys"
        assert words in done.stderr
        later = service.ok("start", "echo later").strip()
        service.ok("wait", later)
    assert service.stop() == 0
    shutil.rmtree(service.state)
    # the jobs of before would go on beside a state that knows nothing of their output
    assert end_jobs(service) == "jobs ended: 1\n"

    restore(service, target)
    service.start()
    assert service.ok("list").split() == [both, failed, silent, running]
    assert {each: output(service, each) for each in outputs} == outputs
    assert output(service, both, "--stderr") == errors
    assert len(errors) == 3_000_000
    assert {each: job(service, each) for each in shown} == shown
    lost = job(service, running)
    assert (lost["state"], lost["reason"], lost["exitCode"]) == ("lost", "lost", None)
    assert output(service, running) == b"so far\n"
    # nothing of what was given between the backup and the loss is given again
    new = service.ok("start", "--name", "silent", "echo new").strip()
    assert int(new) == int(running) + IDS_LEFT_OUT + 1 > int(later)
    assert output(service, new) == b"new\n"
    # and it can be backed up again
    assert backup(service, target.with_name("second")).returncode == 0


def test_what_waits_is_held_after_a_restore(make_service: Callable[..., Service], target: Path) -> None:
    """It may have run since the backup, so it runs again only when its client says so."""
    service = make_service(config="[queue]\nrunning_max = 1\n").start()
    blocker = service.ok("start", "--queue", "sleep 300").strip()
    wait_for(lambda: job(service, blocker)["state"] == "running")
    waiting = service.ok("start", "--queue", "--priority", "3", "--env", "A=b", "echo $A").strip()
    assert waiting == str(int(blocker) + 1)
    assert backup(service, target).returncode == 0
    assert not job(service, waiting)["held"]
    assert service.stop() == 0
    shutil.rmtree(service.state)
    end_jobs(service)
    restore(service, target)
    service.start()
    assert job(service, blocker)["state"] == "lost"
    held = job(service, waiting)
    assert (held["state"], held["held"], held["priority"]) == ("queued", True, 3)
    assert service.ok("release", waiting) == f"{waiting}\n"
    assert service.ok("wait", waiting) == "0\n"


def test_the_numbers_of_changes_after_a_restore(service: Service, target: Path) -> None:
    """They go on far above: whoever has one from after the backup is told to begin anew."""
    kept = service.ok("start", "true").strip()
    service.ok("wait", kept)
    assert backup(service, target).returncode == 0
    service.ok("wait", service.ok("start", "true").strip())
    [last] = [json.loads(line) for line in service.ok("events", "--no-follow", "--since", "3").splitlines()]
    assert service.stop() == 0
    shutil.rmtree(service.state)
    restore(service, target)
    service.start()
    code, words = service.refused("events", "--since", last["sequence"], "--no-follow")
    assert (code, f"cannot resume behind change {last['sequence']}" in words, "--list" in words) == (
        1,
        True,
        True,
    )
    [first] = service.ok("events", "--list", "--no-follow").splitlines()
    assert json.loads(first)["job"]["id"] == kept
    again = service.ok("start", "true").strip()
    service.ok("wait", again)
    lines = service.ok("events", "--since", str(2 + CHANGES_LEFT_OUT), "--no-follow").splitlines()
    assert [int(json.loads(line)["sequence"]) - CHANGES_LEFT_OUT for line in lines] == [3, 4]


def test_a_backup_has_what_it_should_and_nothing_else(service: Service, target: Path) -> None:
    """Owners and modes are those of the state directory; no key, no scratch, no input, no lock."""
    service.ok("wait", service.ok("start", BLOB).strip())
    running = service.ok("start", "--stdin", "/etc/hostname", "cat; sleep 300").strip()
    wait_for(lambda: (service.state / "jobs" / running / "output").stat().st_size > 0)
    target.mkdir(mode=0o755)
    assert backup(service, target).returncode == 0
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert {each.name for each in target.iterdir()} == {"jobs", "jobs.sqlite", "job-users"}
    for path in (
        *(target / "jobs").rglob("*"),
        target / "jobs",
        target / "jobs.sqlite",
        target / "job-users",
    ):
        if path.is_file():
            assert path.name in (*BACKED_UP, "jobs.sqlite", "job-users")
        there, here = os.lstat(service.state / path.relative_to(target)), os.lstat(path)
        assert (here.st_uid, here.st_gid, here.st_mode) == (there.st_uid, there.st_gid, there.st_mode), path
    assert {each.name for each in (target / "jobs" / running).iterdir()} >= {"output", "status"}
    # the copy in pjwd's hands has been freed
    held = [
        os.stat(f"/proc/{service.pid}/fd/{fd}")
        for fd in os.listdir(f"/proc/{service.pid}/fd")
        if "table-copy" in os.readlink(f"/proc/{service.pid}/fd/{fd}")
    ]
    wait_for(lambda: all(each.st_size == 0 for each in held))
    assert held


def test_a_copy_leaves_free_what_jobs_need(make_service: Callable[..., Service], target: Path) -> None:
    """With less free space pjwd would end a job for a backup."""
    service = make_service(config="[disk]\nfree_bytes_min = 1_000_000_000_000_000\n").start()
    words = refused(service, target)
    assert "pjwd says: the copy of the job table takes " in words
    assert "of which 909T stay free (disk.free_bytes_min)" in words
    assert not target.exists()


def test_a_stopped_pjwd_is_backed_up(service: Service, target: Path) -> None:
    """Also one that was killed, whose table has its latest rows in SQLite's log."""
    first = service.ok("start", "echo one").strip()
    service.ok("wait", first)
    service.stop(signal.SIGKILL)
    assert backup(service, target).returncode == 0
    shutil.rmtree(service.state)
    restore(service, target)
    service.start()
    assert output(service, first) == b"one\n"


def test_backups_while_jobs_come_and_go(service: Service, target: Path) -> None:
    """Each of them is whole: each ended job has its output, whatever was started and removed meanwhile."""
    load = (
        'while :; do id=$(pjw start "echo $$; head -c 50000 /dev/zero"); pjw wait $id >/dev/null;'
        " [ $((id % 3)) = 0 ] && pjw rm $id; done"
    )
    loads = [service.program(["sh", "-c", f"PATH={BIN}:$PATH; {load}"]) for _ in range(3)]
    try:
        for number in range(3):
            last = int(service.ok("start", "true"))
            wait_for(lambda: int(service.ok("start", "true")) > last + 8)  # noqa: B023
            each = target.with_name(f"backup-{number}")
            done = backup(service, each)
            assert done.returncode == 0, done.stderr
            with sqlite3.connect(each / "jobs.sqlite") as table:
                ended = table.execute("SELECT id, output_bytes FROM jobs WHERE output_bytes > 0").fetchall()
                [(sums,)] = table.execute("SELECT total(ended_bytes) FROM clients").fetchall()
            table.close()
            assert len(ended) > number
            assert sums == sum(size for _, size in ended)
            for job_id, size in ended:
                assert (each / "jobs" / str(job_id) / "output").stat().st_size == size
    finally:
        for each_load in loads:
            each_load.kill()
            each_load.communicate()


def test_a_link_on_the_way_to_a_backup_decides_nothing(service: Service, target: Path) -> None:
    """All is made where the link leads, which was judged; nothing is made beside the link."""
    target.mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:
        link = Path(shared, "link")
        link.symlink_to(target)
        link.parent.chmod(0o777)
        done = backup(service, link)
        assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
        assert list(Path(shared).iterdir()) == [link]
    assert (target / "jobs.sqlite").exists()


def test_what_cannot_be_backed_up_is_said(service: Service, target: Path, visible: Path) -> None:
    """And leaves nothing behind."""
    target.mkdir()
    (target / "file").touch()
    assert refused(service, target).startswith(
        f"pjwd: error: cannot back up to {target}: it is not empty\nhint:"
    )
    (target / "file").unlink()
    target.rmdir()
    assert "there is no directory" in refused(service, visible / "none" / "backup")
    inside = service.state / "backup"
    assert "it lies in the state directory" in refused(service, inside)
    assert "others than root may write /tmp" in refused(service, Path("/tmp/pjw-backup"))
    elsewhere = backup(service, target, "--state-dir", str(visible))
    assert f"cannot back up {visible}: it has no job table" in elsewhere.stderr
    assert list(visible.iterdir()) == []


def test_a_backup_that_breaks_off_leaves_nothing(service: Service, visible: Path) -> None:
    """A full disk, a hostile file, a signal; what a kill has left, the next backup removes."""
    job_id = service.ok("start", BLOB).strip()
    service.ok("wait", job_id)
    small = visible / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "pjw-test", small], check=True)
    try:
        assert "it is a mount point" in refused(service, small)
        words = refused(service, small / "backup")
        assert f"{small}/backup.partial/jobs/{job_id}/output: no space left on device" in words.lower()
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
        small.rmdir()
    # a server that was taken over: root copies no other file, and hangs on no FIFO
    hostile = service.state / "jobs" / job_id / "usage"
    hostile.unlink(missing_ok=True)
    hostile.symlink_to("/etc/shadow")
    assert "too many levels of symbolic links" in refused(service, visible / "backup").lower()
    hostile.unlink()
    os.mkfifo(hostile)
    assert "not a regular file" in refused(service, visible / "backup")
    hostile.unlink()
    assert list(visible.iterdir()) == []
    # one that runs is not disturbed, one that was killed is in nobody's way
    partial = visible / "backup.partial"
    partial.mkdir()
    (partial / "half").touch()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert f"another `pjwd backup` is writing {partial}" in refused(service, visible / "backup")
    os.close(descriptor)
    assert backup(service, visible / "backup").returncode == 0
    assert [each.name for each in visible.iterdir()] == ["backup"]


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("VIEW jobs AS", "'jobs' is a view, and pjwd makes none"),
        ("TABLE jobs AS", "the id of a job is no number"),
    ],
)
def test_a_table_that_names_other_directories_is_refused(
    service: Service, target: Path, schema: str, words: str
) -> None:
    """A server that was taken over can write to it; root touches nothing outside of the backup."""
    service.ok("wait", service.ok("start", "echo one").strip())
    service.stop()
    with sqlite3.connect(service.state / "jobs.sqlite") as table:
        table.execute("ALTER TABLE jobs RENAME TO real_jobs")
        table.execute(f"CREATE {schema} SELECT '../../old' id, 'exited' state, 1 output_bytes")
    table.close()
    old = target.with_name("old")
    old.mkdir()
    said = refused(service, target)
    assert list(target.parent.iterdir()) == [old]
    assert f"cannot back up {service.state}: its job table is damaged: {words}" in said


def test_nobody_but_root_asks_for_a_copy(service: Service) -> None:
    """The socket is root's; and pjwd goes on when who asks goes away or says nothing."""
    path = service.state / "backup.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_uid == 0
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asker:
            asker.connect(str(path))
    assert service.ok("list") == ""
