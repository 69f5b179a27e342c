"""`pjw run` that cannot go on: it stops its job, or says that the job goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import BIN, Running, Service, wait_for
from tests.support.terminal import Terminal
from tests.support.worker_harness import ASK

STUBBORN: Final = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
# pjw, but for how long it waits for a server that went away
IMPATIENT: Final = (
    "from pjw.client.base import BaseClient; from pjw.cli.main import run\n"
    "BaseClient.__init__.__kwdefaults__['reconnect_seconds'] = 1\n"
    "run()"
)


def reason(service: Service, job_id: int) -> str:
    """Why a job has ended."""
    return pb.EndReason.Name(service.job(job_id).reason)


def stopping(service: Service) -> int:
    """The job that is being stopped, once there is one."""
    request = pb.ListRequest(states=[pb.JOB_STATE_STOPPING])
    with service.stub() as stub:
        wait_for(lambda: stub.List(request).jobs)
        [job] = stub.List(request).jobs
        return job.id


def test_input_that_is_too_long_ends_the_job(make_service: Callable[..., Service], tmp_path: Path) -> None:
    """Nobody could send the rest; what it had written is shown."""
    service = make_service(config="[clients]\ninput_bytes_max = 1000\n").start()
    (tmp_path / "data").write_bytes(bytes(5000))
    done = service.pjw("run", "--stdin", str(tmp_path / "data"), "echo begins; cat; sleep 300")
    assert done.returncode == 1
    assert done.stderr.decode() == (
        "pjw: error: the input of job 1 is longer than 1000 bytes, and this server takes no more\n"
        "hint: the operator sets clients.input_bytes_max\n"
        "pjw: job 1 was stopped\n"
    )
    assert done.stdout.startswith(b"begins\n")
    assert reason(service, 1) == "END_REASON_STOPPED"


def test_output_that_may_not_be_followed_ends_the_job(make_service: Callable[..., Service]) -> None:
    """At the operator's limit of followers: a job that nobody sees was not asked for."""
    service = make_service(config="[clients]\nfollowers_max = 1\n").start()
    job_id = service.start_job("echo ready; sleep 300")
    with service.popen("logs", str(job_id)) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"ready\n"
        code, words = service.refused("run", "sleep 300")
        service.ok("stop", "--grace", "0", str(job_id))
    assert (code, "clients.followers_max" in words) == (1, True), words
    assert words.endswith("pjw: job 2 was stopped\n")
    assert reason(service, 2) == "END_REASON_STOPPED"


def test_who_is_let_in_no_more_is_told_that_the_job_goes_on(make_service: Callable[..., Service]) -> None:
    """A certificate that was revoked meanwhile can stop nothing either."""
    service = make_service()
    revoked = service.directory / "revoked"
    revoked.touch()
    service.config = f'revoked = "{revoked}"\n'
    service.start()
    with service.popen("run", "echo ready; sleep 300") as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline() == b"ready\n"
        certificate = subprocess.run(
            ["openssl", "x509", "-noout", "-serial", "-in", service.certs / "alice.crt"],
            capture_output=True,
            check=True,
        )
        revoked.write_bytes(certificate.stdout.removeprefix(b"serial="))
        os.kill(service.pid, signal.SIGHUP)
        assert run.wait(30) == 1
        last = run.stderr.read().decode().splitlines()[-1]
    assert last == (
        "pjw: job 1 could not be stopped, and may still run: the client certificate has been revoked"
    )
    revoked.write_bytes(b"")
    os.kill(service.pid, signal.SIGHUP)
    wait_for(lambda: service.pjw("get", "1").returncode == 0)
    assert service.job(1).state == pb.JOB_STATE_RUNNING


def test_a_connection_that_is_lost_for_good_leaves_the_job_and_says_so(
    make_service: Callable[..., Service],
) -> None:
    """Nobody is there who could be asked to stop it; how to come back to it is said."""
    service = make_service().start()
    with service.program([sys.executable, "-c", IMPATIENT, "run", "echo ready; sleep 300"]) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline() == b"ready\n"
        service.stop(signal.SIGKILL)
        assert run.wait(60) == 125
        words = run.stderr.read().decode()
    assert words == (
        f"pjw: error: the connection to {service.address} was lost after 6 bytes of output, and did not come"
        " back within 1 s\nhint: job 1 goes on without it: pjw logs 1\n"
    )
    service.start()
    assert service.job(1).state == pb.JOB_STATE_RUNNING


def test_ctrl_c_ends_the_wait_for_a_job_that_is_stopped_for_an_error(service: Service) -> None:
    """Whatever grace period was asked for."""
    with (
        open("/dev/full", "wb") as full,
        Running(
            [str(BIN / "pjw"), "run", "--grace", "1h", STUBBORN],
            env=service.environment(),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
        ) as run,
    ):
        assert run.stderr is not None
        job = stopping(service)
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == 125
        assert run.stderr.read().decode() == (
            "pjw: error: cannot write to stdout: no space left on device (ENOSPC)\n"
            f"pjw: job {job} was stopped\n"
        )


def test_a_terminal_that_is_closed_ends_the_job(service: Service) -> None:
    """As it would end what runs there; its shell's second SIGHUP is no order to kill."""
    command = ASK + "trap 'read x <&3; exit 6' TERM; echo ready; sleep 300 & wait"
    # the tests may run under nohup(1)
    program = ["env", "--default-signal=HUP", str(BIN / "pjw"), "run", "--grace", "60", command]
    with service.program(program) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.readline() == b"ready\n"
        run.send_signal(signal.SIGHUP)
        job = stopping(service)
        run.send_signal(signal.SIGHUP)
        service.tell(job)
        assert (run.wait(30), run.stderr.read()) == (6, b"")


def test_a_hangup_that_is_ignored_stays_so(service: Service) -> None:
    """As nohup(1) has it."""
    with Running(
        ["bash", "-c", f"trap '' HUP; exec {BIN}/pjw run 'echo ready; sleep 0.5; exit 7'"],
        env=service.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        run.send_signal(signal.SIGHUP)
        assert run.wait(30) == 7


def test_who_does_not_wait_for_a_start_is_told_that_there_may_be_a_job(
    make_service: Callable[..., Service],
) -> None:
    """The third Ctrl-C: the request is under way, and nobody knows more."""
    service = make_service().start()
    launcher = service.launcher_pid()
    os.kill(launcher, signal.SIGSTOP)
    try:
        with Terminal([str(BIN / "pjw"), "run", "sleep 300"], service.environment()) as run:
            with service.stub() as stub:
                wait_for(lambda: stub.List(pb.ListRequest()).jobs)
            run.type("\x03")
            run.wait_for("the job is stopped once its start is answered")
            run.type("\x03")
            run.wait_for("the job is killed once its start is answered")
            run.type("\x03")
            assert run.wait_for_end() == 130
            assert "pjw: the job may have started: see pjw list" in run.text
    finally:
        os.kill(launcher, signal.SIGCONT)


def test_a_stdout_that_does_not_block_gets_every_byte(service: Service) -> None:
    """Who shares it has set it so; a full pipe is no error."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [str(BIN / "pjw"), "run", "head -c 3000000 /dev/zero; exit 3"]
    with Running(command, env=service.environment(), stdin=subprocess.DEVNULL, stdout=writer) as run:
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert len(pipe.read()) == 3_000_000
        assert run.wait(30) == 3
