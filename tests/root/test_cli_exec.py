"""`pjw exec`, and sessions by the clients: to the byte, to the code, whatever becomes of the connection."""

import hashlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

import pjw
from pjw import errors
from pjw.model import ExitStatus, JobSpec
from tests.root.test_cli_stdin import piped
from tests.support import pjwd_with
from tests.support.service import BIN, Service, wait_for
from tests.support.worker_harness import status_words

MIB: Final = 1024 * 1024


@pytest.fixture
def job(service: Service) -> str:
    """A job to enter."""
    return service.ok("start", "sleep", "600").strip()


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["exit 0"], 0),
        (["exit 3"], 3),
        (["--", "/etc/passwd"], 126),
        (["no-such-program", "x"], 127),
        (["kill -9 $$"], 137),
        (["kill -TERM $$"], 143),
    ],
)
def test_exit_codes_are_exact(service: Service, job: str, command: list[str], code: int) -> None:
    """As a shell has them."""
    done = service.pjw("exec", job, *command)
    assert (done.returncode, done.stdout) == (code, b"")


def test_both_outputs_and_the_input(service: Service, job: str) -> None:
    """Stdout and stderr apart, every byte of what is piped in."""
    data = os.urandom(5 * MIB)
    done = piped(service, "exec", "-i", job, "sha256sum; echo beside >&2; exit 7", data=data)
    assert done.stdout.decode() == f"{hashlib.sha256(data).hexdigest()}  -\n"
    assert (done.stderr, done.returncode) == (b"beside\n", 7)
    # head reads no more, which is its own affair
    done = piped(service, "exec", "-i", job, "head", "-c", "3", data=data)
    assert (done.stdout, done.stderr, done.returncode) == (data[:3], b"", 0)


def test_where_and_with_what_it_begins(service: Service, job: str) -> None:
    """--workdir and --env; without them it is the job's own directory."""
    assert service.ok("exec", job, "pwd; cat /proc/1/comm") == "/run/job\npjw-init\n"
    assert service.ok("exec", "-w", "/tmp", "-e", "A=b c", job, "pwd; echo $A") == "/tmp\nb c\n"
    assert service.refused("exec", "-w", "/no/such", job, "true") == (
        1,
        "pjw: error: cannot enter the working directory /no/such: no such file or directory (ENOENT)\n",
    )


def test_a_detached_session_stays(service: Service, job: str) -> None:
    """It prints JOB/NUMBER, and is there when its client has gone."""
    assert service.ok("exec", "-d", job, "echo $$ >pid; exec sleep 600") == f"{job}/1\n"
    wait_for(lambda: service.pjw("exec", job, "kill -0 $(cat pid)").returncode == 0)


def test_jobs_that_do_not_run(service: Service) -> None:
    """An ended job, and none."""
    ended = service.ok("start", "true").strip()
    service.ok("wait", ended)
    assert service.refused("exec", ended, "true") == (
        1,
        f"pjw: error: cannot enter job {ended}: it is exited\n",
    )
    assert service.refused("exec", "999999", "true") == (1, "pjw: error: no job 999999\n")
    assert service.refused("exec", "--all", ended, "true")[0] == 2


def test_the_job_of_somebody_else(service: Service, job: str) -> None:
    """Is none, whatever one asks."""
    assert service.refused("exec", job, "true", client="bob") == (1, f"pjw: error: no job {job}\n")
    session = service.ok("exec", "-d", job, "sleep", "600").strip().split("/")[1]
    with client_of(service, "bob") as client:
        for ask in (client.wait_session, client.stop_session):
            with pytest.raises(errors.SessionNotFoundError, match=f"no session {session} of job {job}"):
                ask(int(job), int(session))
        with pytest.raises(errors.SessionNotFoundError):
            list(client.logs(job, session=int(session)))
        with pytest.raises(errors.SessionNotFoundError):
            client.write_input(job, [b"x"], session=int(session))


def test_ctrl_c_hangs_it_up(service: Service, job: str) -> None:
    """The first one ends it, and what it says at its end is seen; the second one leaves."""
    trap = "trap 'echo bye; exit 9' HUP; echo here; while :; do sleep 0.1; done"
    with service.popen("exec", job, trap) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"here\n"
        running.send_signal(signal.SIGINT)
        output, words = running.communicate(timeout=60)
        assert (output, running.returncode) == (b"bye\n", 9)
        # the shell's own, of its sleep: a user who typed Ctrl-C knows the rest
        assert words == b"Hangup\n"
    with service.popen("exec", job, "trap '' HUP; echo here; while :; do sleep 0.1; done") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"here\n"
        running.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGINT)
        assert running.wait(60) in (130, 137)


def test_the_end_of_the_job_ends_it(service: Service) -> None:
    """With 137 or 143 and in words, and never with 0."""
    job = service.ok("start", "sleep", "600").strip()
    with service.popen("exec", job, "trap '' TERM; echo here; while :; do sleep 0.1; done") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"here\n"
        service.ok("stop", job)
        _, words = running.communicate(timeout=60)
        assert running.returncode == 137
        assert b"ended, by the end of its job" in words


def test_a_session_goes_on_over_a_kill_of_server_and_launcher(make_service: Callable[..., Service]) -> None:
    """The same command reads on and writes on; its output is whole, and its exit code right."""
    service = make_service().start()
    job = service.ok("start", "sleep", "600").strip()
    script = "while read line; do echo got $line; done; echo end; exit 5"
    with subprocess.Popen(
        [str(BIN / "pjw"), "exec", "-i", job, script],
        env=service.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(b"one\n")
        running.stdin.flush()
        assert running.stdout.readline() == b"got one\n"
        kill_server_and_launcher(service)
        service.start()
        running.stdin.write(b"two\n")
        output, words = running.communicate(timeout=60)
        assert (output, words, running.returncode) == (b"got two\nend\n", b"", 5)


def supervisors_of(service: Service, job_id: int) -> list[int]:
    """The processes that wait for the commands of a job's sessions: root's, beside its init."""
    [group, *_] = [path for path in service.job_cgroups() if path.name == f"job-{job_id}"]
    pids = {int(pid) for pid in (group / "cgroup.procs").read_text().split()} - {service.init_pid(job_id)}
    return [pid for pid in pids if status_words(pid).get("Uid", "").split()[:1] == ["0"]]


def command_of(service: Service, job_id: int) -> int:
    """The pid, outside, of a job's own command: that of its processes that was there first."""
    init = service.init_pid(job_id)
    found = Path(f"/proc/{init}/task/{init}/children").read_text().split()
    return int(found[0])


@pytest.mark.parametrize(
    "fault", ["stopped", "supervisors killed", "spawner killed", "server and launcher killed"]
)
def test_no_process_of_ours_holds_up_the_end_of_a_job(
    make_service: Callable[..., Service], fault: str
) -> None:
    """All but init are stopped, the client too: a job ends, is recorded and is gone within a second.

    Nobody says then that the sessions ended well.
    """
    service = make_service().start()
    job_id = int(service.ok("start", "sleep", "600"))
    job = str(job_id)
    clients = [
        in_background(service, "exec", job, "echo here; exec sleep 600"),
        in_background(service, "exec", "-t", job, "echo here; exec sleep 600"),
    ]
    try:
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline().rstrip() == b"here"
        spawner, supervisors = service.spawner_pid(), supervisors_of(service, job_id)
        assert spawner is not None
        assert len(supervisors) == len(clients)
        ours = [service.pid, service.launcher_pid(), spawner, *supervisors]
        killed = {
            "stopped": [],
            "supervisors killed": supervisors,
            "spawner killed": [spawner],
            "server and launcher killed": [service.pid, service.launcher_pid()],
        }[fault]
        status = service.state / "jobs" / job / "status"
        init, command = service.init_pid(job_id), command_of(service, job_id)
        pidfd = os.pidfd_open(init)
        for pid in [*(client.pid for client in clients), *ours]:
            os.kill(pid, signal.SIGSTOP)
        try:
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            os.kill(command, signal.SIGKILL)
            assert select.select([pidfd], [], [], 1)[0], "init is held up"
            assert b"\nended " in status.read_bytes()
        finally:
            os.close(pidfd)
            for pid in [*(client.pid for client in clients), *ours]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        if service.pid in killed:
            end_killed(service)
            service.start()
        wait_for(lambda: service.job_cgroups() == [])
        assert service.job(job_id).exit_code == 128 + signal.SIGKILL
        for client in clients:
            assert client.wait(60) == 137
    finally:
        for client in clients:
            client.kill()
            client.communicate()


def kill_server_and_launcher(service: Service) -> None:
    """kill -9 of both; the next start has the same port."""
    os.kill(service.launcher_pid(), signal.SIGKILL)
    os.kill(service.pid, signal.SIGKILL)
    end_killed(service)


def end_killed(service: Service) -> None:
    """Collect a server that was killed."""
    assert service.process is not None
    assert service.process.wait(60) == -signal.SIGKILL
    service.process = None


def test_bytes_are_whole_over_a_kill_of_server_and_launcher(make_service: Callable[..., Service]) -> None:
    """In both directions, by their checksum; the kill comes in the midst of both."""
    service = make_service().start()
    job = service.ok("start", "sleep", "600").strip()
    halves = os.urandom(16 * MIB), os.urandom(16 * MIB)
    killed = threading.Event()
    with subprocess.Popen(
        [str(BIN / "pjw"), "exec", "-i", job, "cat; exit 4"],
        env=service.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        sender, receiver = running.stdin, running.stdout
        assert sender is not None
        assert receiver is not None

        def send() -> None:
            sender.write(halves[0])
            sender.flush()
            killed.wait(60)
            sender.write(halves[1])
            sender.close()

        thread = threading.Thread(target=send)
        thread.start()
        digest = hashlib.sha256(receiver.read(MIB))
        kill_server_and_launcher(service)
        killed.set()
        service.start()
        while data := receiver.read(MIB):
            digest.update(data)
        thread.join()
        assert digest.digest() == hashlib.sha256(b"".join(halves)).digest()
        assert running.wait(60) == 4


@pytest.mark.parametrize("how", [[], ["-t"]], ids=["pipes", "a terminal"])
def test_the_session_of_a_killed_client_is_hung_up(
    make_service: Callable[..., Service], how: list[str]
) -> None:
    """By SIGHUP after the lease, and not before; a detached one and the job go on."""
    lease_seconds = 2
    service = make_service()
    service.change = pjwd_with.short_leases
    service.start()
    job = service.ok("start", "sleep", "600").strip()
    service.ok("exec", "-d", job, "echo $$ >detached; exec sleep 600")
    script = "trap 'echo hung up >said; exit 9' HUP; echo here; while :; do sleep 0.1; done"
    client = in_background(service, "exec", *how, job, script)
    assert client.stdout is not None
    assert client.stdout.readline().rstrip() == b"here"
    said = service.state / "scratch" / job / "said"
    client.kill()
    client.communicate()
    began = time.monotonic()
    wait_for(said.exists)
    assert time.monotonic() - began > lease_seconds * 0.9
    assert service.ok("exec", job, "cat said; kill -0 $(cat detached) && echo there") == "hung up\nthere\n"


def in_background(service: Service, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start pjw in the background; the caller ends it."""
    return subprocess.Popen(
        [str(BIN / "pjw"), *arguments],
        env=service.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("restart", [False, True])
def test_it_never_ends_with_0_without_a_record(
    make_service: Callable[..., Service], *, restart: bool
) -> None:
    """Its command ends well, and whoever should have written that down was killed before: 125, and why."""
    service = make_service()
    service.change = pjwd_with.no_wait_for_job_ends
    service.start()
    job = service.ok("start", "mkfifo go; sleep 600").strip()
    client = in_background(service, "exec", job, "echo here; read line <go; exit 0")
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == b"here\n"
        [supervisor] = supervisors_of(service, int(job))
        if restart:
            kill_server_and_launcher(service)
        os.kill(supervisor, signal.SIGKILL)
        if restart:
            service.start()
        service.ok("exec", job, "echo >go")
        _, words = client.communicate(timeout=60)
        assert client.returncode == 125
        assert f"nobody knows how session 1 of job {job} ended".encode() in words
    finally:
        client.kill()
        client.communicate()


def settings_of(service: Service, name: str = "alice") -> tuple[str, str, str, str]:
    """What a client of the library needs."""
    found = service.environment(name)
    return found["PJW_SERVER"], found["PJW_CA_CRT"], found["PJW_CLIENT_CRT"], found["PJW_CLIENT_KEY"]


def client_of(service: Service, name: str = "alice") -> pjw.Client:
    """A client of the library."""
    return pjw.Client(*settings_of(service, name))


def test_from_the_library(service: Service, job: str) -> None:
    """A session by itself, and one that runs to its end."""
    with client_of(service) as client:
        done = client.run_in(job, "cat; echo beside >&2; exit 3", input=b"words\n")
        assert (done.output, done.stderr, done.session.exit_status) == (
            b"words\n",
            b"beside\n",
            ExitStatus(3),
        )
        spec = JobSpec(["sh", "-c", "echo $A; pwd"], env={"A": "b"}, workdir="/tmp", request_id="once")
        session = client.exec(job, spec)
        assert client.exec(job, spec).number == session.number
        assert b"".join(client.logs(job, session=session.number)) == b"b\n/tmp\n"
        ended = client.wait_session(job, session.number)
        assert (ended.command, ended.exit_status) == ("sh -c 'echo $A; pwd'", ExitStatus(0))
        with pytest.raises(errors.LaunchError) as caught:
            client.exec(job, ["/no/such"])
        assert caught.value.program == "/no/such"
        stays = client.exec(job, ["sleep", "600"])
        assert client.stop_session(job, stays.number).exit_status == ExitStatus(signal=1)


async def test_from_the_asynchronous_library(service: Service, job: str) -> None:
    """The same, awaited."""
    async with pjw.AsyncClient(*settings_of(service)) as client:
        done = await client.run_in(job, "cat; exit 3", input=b"words\n")
        assert (done.output, done.session.exit_status) == (b"words\n", ExitStatus(3))
        stays = await client.exec(job, ["sleep", "600"])
        assert (await client.stop_session(job, stays.number)).exit_status == ExitStatus(signal=1)
