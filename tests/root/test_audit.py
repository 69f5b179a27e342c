"""The audit log of a real pjwd: a line for every call, none of what is secret, and a disk that fills up."""

import json
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from pjw.certs.identity import identity_of
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support.service import METHODS, Service, ask, wait_for

SECRET: Final = "hunter2"


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of one page."""
    point = Path(tempfile.mkdtemp(prefix="pjw-test-audit-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "pjw-test", point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)
        point.rmdir()


@pytest.fixture
def audited(make_service: Callable[..., Service], visible: Path) -> Service:
    """A service with an audit log, an admin, and a limit of followers."""
    path = visible / "audit.jsonl"
    return make_service(
        clients=("alice", "bob", "ann"),
        config=f'audit_log = "{path}"\n[roles]\nadmins = ["ann"]\n[clients]\nfollowers_max = 1\n',
    ).start()


def log_of(service: Service) -> Path:
    """Where its configuration puts it."""
    assert service.config is not None
    return Path(service.config.split('"')[1])


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line, each of which must be whole."""
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def test_every_call_is_a_line_and_no_secret_is_in_one(audited: Service) -> None:
    """Each method by pjw, served and refused: who, what, which job, the code; no command and no output."""
    path = log_of(audited)
    job_id = int(audited.ok("start", f"echo {SECRET}; sleep 300; : {SECRET}"))
    with audited.popen("logs", str(job_id)) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == f"{SECRET}\n".encode()
        audited.refused("logs", str(job_id))
        reader.kill()
    audited.refused("start", f"/nonexistent/{SECRET}", SECRET)
    audited.refused("get", str(job_id), client="bob")
    audited.refused("--all", "get", str(job_id), client="bob")
    audited.ok("--all", "list", client="ann")
    audited.ok("--all", "stop", str(job_id), client="ann")
    audited.ok("logs", str(job_id))

    def calls() -> list[dict[str, Any]]:
        # without the Wait of a `pjw logs` that lasts, by which it hears that the job is held up
        found = [line for line in lines(path) if line["method"] != "Wait"]
        return sorted(found, key=lambda line: str(line["time"]))

    wait_for(lambda: len(calls()) == 9)
    assert [
        (line["client"], line["method"], line["job_id"], line["all_clients"], line["code"])
        for line in calls()
    ] == [
        ("alice", "Start", job_id, False, "OK"),
        ("alice", "Logs", job_id, False, "CANCELLED"),
        ("alice", "Logs", job_id, False, "RESOURCE_EXHAUSTED"),
        ("alice", "Start", None, False, "FAILED_PRECONDITION"),
        ("bob", "Get", job_id, False, "NOT_FOUND"),
        ("bob", "Get", job_id, True, "PERMISSION_DENIED"),
        ("ann", "List", None, True, "OK"),
        ("ann", "Stop", job_id, True, "OK"),
        ("alice", "Logs", job_id, False, "OK"),
    ]
    sent = [line["bytes"] for line in lines(path) if line["method"] == "Logs"]
    assert sorted(sent) == [0, len(SECRET) + 1, len(SECRET) + 1]
    assert SECRET not in path.read_text() + audited.log.read_text()
    serial = identity_of((audited.certs / "bob.crt").read_bytes()).serial
    assert {int(line["serial"], 16) for line in lines(path) if line["client"] == "bob"} == {serial}
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in lines(path))


def test_bad_calls_of_every_method_are_lines(audited: Service) -> None:
    """Garbage, by every method: one line each, so that no method goes past the log."""
    with audited.channel() as channel:
        for method, _ in METHODS:
            assert ask(channel, method, b"\xff")[1] is grpc.StatusCode.INVALID_ARGUMENT
    wait_for(lambda: len(lines(log_of(audited))) == len(METHODS))
    assert [(line["method"], line["code"]) for line in lines(log_of(audited))] == [
        (method, "INVALID_ARGUMENT") for method, _ in METHODS
    ]


def test_the_log_is_roots_alone(audited: Service) -> None:
    """Of mode 0600, and held by the server as a descriptor; the launcher has none, and no job sees it."""
    path = log_of(audited)
    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 0, 0o600)
    held = {}
    for pid in (audited.pid, audited.launcher_pid()):
        directory = Path(f"/proc/{pid}/fd")
        held[pid] = [name for name in os.listdir(directory) if os.readlink(directory / name) == str(path)]
    assert (len(held[audited.pid]), len(held[audited.launcher_pid()])) == (1, 0)
    # not even where its mode would let all read it, as it does beside it
    path.chmod(0o644)
    (path.parent / "beside").write_text("seen\n")
    (path.parent / "beside").chmod(0o644)
    job_id = audited.ok("start", f"cd {path.parent}; cat beside {path.name}").strip()
    assert audited.ok("logs", job_id) == f"seen\ncat: {path.name}: Permission denied\n"


def test_calls_under_way_are_written_when_pjwd_ends(audited: Service) -> None:
    """A follower that the drain ends has its line; a restart goes on in the same file."""
    path = log_of(audited)
    job_id = audited.start_job("echo up; sleep 300")
    with audited.stub() as stub:
        call = stub.Logs(pb.LogsRequest(id=job_id))
        assert next(call).data == b"up\n"
        assert audited.stop() == 0
    assert [(line["method"], line["code"]) for line in lines(path)] == [
        ("Start", "OK"),
        ("Logs", "UNAVAILABLE"),
    ]
    audited.start()
    assert audited.job(job_id).state == pb.JOB_STATE_RUNNING
    wait_for(lambda: len(lines(path)) == 3)
    audited.ok("stop", str(job_id))


def test_a_full_disk_holds_no_call_up_and_loses_no_line(
    make_service: Callable[..., Service], small_disk: Path
) -> None:
    """Calls go on; pjwd says once that it cannot write, and once that it can again; every line is whole."""
    path = small_disk / "audit.jsonl"
    service = make_service(config=f'audit_log = "{path}"\n').start()
    with service.stub() as stub:
        for _ in range(60):
            stub.List(pb.ListRequest())
        service.await_log("cannot write the audit log")
        assert 5 < len(lines(path)) < 60
        for _ in range(60):
            stub.List(pb.ListRequest())
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    wait_for(lambda: len(lines(path)) == 120)
    service.await_log("is written again")
    failed, again = [line for line in service.log.read_text().splitlines() if " ERROR: " in line]
    assert failed.startswith("pjwd: ERROR: cannot write the audit log: no space ")
    assert again == "pjwd: ERROR: the audit log is written again; 0 lines were lost"
    assert service.stop() == 0


def test_pjwd_ends_on_a_full_disk_and_says_what_is_lost(
    make_service: Callable[..., Service], small_disk: Path
) -> None:
    """Its end waits for no space, and the lines that found none are counted in its own log."""
    path = small_disk / "audit.jsonl"
    service = make_service(config=f'audit_log = "{path}"\n').start()
    with service.stub() as stub:
        for _ in range(60):
            stub.List(pb.ListRequest())
    service.await_log("cannot write the audit log")
    assert service.stop() == 0
    assert (
        f"pjwd: ERROR: the audit log ends without {60 - len(lines(path))} lines\n" in service.log.read_text()
    )


def test_an_audit_log_that_cannot_be_opened_keeps_pjwd_from_starting(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    """Who asks for a log must get one: a link, which another user may have put there, is refused in words."""
    path = tmp_path / "audit.jsonl"
    path.symlink_to("/etc/shadow")
    service = make_service(config=f'audit_log = "{path}"\n')
    done = subprocess.run(service.command(), capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [
        f"pjwd: error: cannot open the audit log {path}: too many levels of symbolic links (ELOOP)",
        "hint: its directory must be there, and it must be no link",
    ]


def test_a_log_that_is_rotated_loses_no_line(audited: Service) -> None:
    """Each call is in the old file or in the new one, once: with the `create` of logrotate and without."""
    path = log_of(audited)
    audited.ok("start", "true")
    ids: list[int] = []
    for number in range(4):
        with audited.channel() as channel:
            stub = JobWorkerServiceStub(channel)
            before = [stub.Get.future(pb.GetRequest(id=1), timeout=60) for _ in range(50)]
            path.rename(f"{path}.{number}")
            if number % 2:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o640))
            os.kill(audited.pid, signal.SIGHUP)
            after = [stub.Get.future(pb.GetRequest(id=1), timeout=60) for _ in range(50)]
            ids += [call.result().job.id for call in (*before, *after)]
        opened = b"the audit log is open again"
        wait_for(lambda: audited.log.read_bytes().count(opened) == number + 1)  # noqa: B023
        audited.ok("get", "1")
        wait_for(lambda: path.exists() and any(each["method"] == "Get" for each in lines(path)))
    assert audited.stop() == 0
    files = [path, *path.parent.glob(f"{path.name}.?")]
    assert len(files) == 5
    found = [each for file in files for each in lines(file) if each["method"] == "Get"]
    assert len(found) == len(ids) + 4
    assert stat.S_IMODE(Path(f"{path}.2").stat().st_mode) == 0o640
    assert stat.S_IMODE(Path(f"{path}.3").stat().st_mode) == 0o600


def test_a_log_that_cannot_be_opened_again_stays(make_service: Callable[..., Service], visible: Path) -> None:
    """And the log of pjwd says why: a link in its place is nobody's but an attacker's."""
    path = visible / "audit.jsonl"
    service = make_service(config=f'audit_log = "{path}"\n').start()
    path.rename(visible / "old")
    path.symlink_to("elsewhere")
    os.kill(service.pid, signal.SIGHUP)
    wait_for(lambda: b"kept the old audit log" in service.log.read_bytes())
    assert f"cannot open {path}: too many levels of symbolic links" in service.log.read_text()
    service.ok("list")
    assert service.stop() == 0
    assert [each["method"] for each in lines(visible / "old")] == ["List"]
    assert not (visible / "elsewhere").exists()
