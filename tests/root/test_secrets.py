"""Secrets of jobs: in the job's environment, and nowhere else; while a job waits in a file of their own."""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from pjw import JobSpec, QueueSpec
from pjw.errors import LimitReachedError
from pjw.model import EndReason, Retry
from pjw.worker import Worker
from pjw.worker.settings import Quotas
from tests.support.service import BIN, CALL_SECONDS, Service, wait_for
from tests.support.worker_harness import DEADLINE_SECONDS, Bench, read_all

VALUE: Final = "s3cr3t-0f-a-test"
GONE: Final = (
    "its secrets are gone: a backup has none, and the service was restored from one;"
    " put the job into the queue again"
)
SECRET: Final = {"TOKEN": VALUE}
HELD: Final = QueueSpec(held=True)


def kept(state: Path) -> list[Path]:
    """The files with secrets."""
    return sorted((state / "jobs" / "secrets").glob("*"))


def traces(directory: Path) -> list[str]:
    """Files below a directory that have the secret in them."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(directory)) for path in files if VALUE.encode() in path.read_bytes())


async def test_a_plain_start_stores_none(bench: Bench) -> None:
    """Its command has the variable; no file has its value."""
    worker = await bench.open()
    job = await worker.start(
        JobSpec("echo $OTHER; printf %s $TOKEN | wc -c", env={"OTHER": "x"}, secrets=SECRET)
    )
    assert await read_all(worker, job.id) == b"x\n16\n"
    assert traces(bench.state) == []
    assert kept(bench.state) == []


async def test_in_the_queue(bench: Bench) -> None:
    """A file of mode 0600 while the job waits; it goes when the job is executed or cancelled."""
    worker = await bench.open()
    spec = JobSpec("echo $TOKEN | wc -c", secrets=SECRET, queue=HELD)
    first, second = await worker.submit([spec, spec])
    third, other = await worker.submit([spec, JobSpec(["true"], secrets={"A": "1"}, queue=HELD)])
    assert len(kept(bench.state)) == 3
    for path in kept(bench.state):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert traces(bench.state) == [
        str(path.relative_to(bench.state)) for path in kept(bench.state) if VALUE in path.read_text()
    ]
    assert VALUE not in repr(first)
    assert VALUE not in repr(spec)
    await worker.stop(other.id)
    assert len(kept(bench.state)) == 2
    await worker.release(first.id)
    assert await read_all(worker, first.id) == b"17\n"
    # shared by the second
    assert len(kept(bench.state)) == 2
    await worker.stop(second.id)
    assert len(kept(bench.state)) == 1
    await bench.close(worker)
    worker = await bench.open()
    await worker.release(third.id)
    assert await read_all(worker, third.id) == b"17\n"
    await no_secrets(worker, bench)


async def no_secrets(worker: Worker, bench: Bench) -> None:
    """Nothing of them is left, whoever removes them right now."""
    await worker.list()
    assert kept(bench.state) == []
    assert not (bench.state / "jobs" / "secrets").exists()
    assert traces(bench.state) == []


async def test_attempts_have_them(bench: Bench) -> None:
    """Each of them, and after the last one nobody."""
    worker = await bench.open()
    retry = QueueSpec(retry=Retry(2, backoff_seconds=0))
    [job] = await worker.submit([JobSpec("echo $TOKEN | wc -c; exit 1", secrets=SECRET, queue=retry)])
    done = await worker.wait(job.id)
    assert done.attempt == 3
    for each in await worker.list():
        assert await read_all(worker, each.id) == b"17\n"
    await no_secrets(worker, bench)


async def test_what_is_refused_leaves_none(bench: Bench) -> None:
    """Nor does a request that has made a job before, nor a crash between the file and the row."""
    worker = await bench.open(quotas=Quotas(queued_bytes_max=300))
    with pytest.raises(LimitReachedError, match="commands and variables of the jobs"):
        await worker.submit([JobSpec(["true"], secrets={"A": "x" * 300}, queue=HELD)])
    assert kept(bench.state) == []
    spec = JobSpec(["true"], secrets=SECRET, queue=HELD, request_id="one")
    [job] = await worker.submit([spec])
    assert await worker.submit([spec]) == [job]
    assert len(kept(bench.state)) == 1
    await bench.close(worker)
    left = bench.state / "jobs" / "secrets" / "0123"
    left.write_text("{}")
    worker = await bench.open()
    assert not left.exists()
    assert len(kept(bench.state)) == 1
    await worker.stop(job.id)
    await no_secrets(worker, bench)


async def test_secrets_that_are_gone(bench: Bench) -> None:
    """A job whose secrets were lost does not run without them; it says so."""
    worker = await bench.open()
    [job] = await worker.submit([JobSpec(["true"], secrets=SECRET, queue=HELD)])
    kept(bench.state)[0].unlink()
    await worker.release(job.id)
    ended = await worker.wait(job.id)
    assert (ended.reason, ended.detail) == (
        EndReason.START_FAILED,
        GONE,
    )


def test_as_somebody_types_it(make_service: Callable[..., Service], tmp_path: Path) -> None:
    """start, run and submit; from a value, from pjw's environment and from files; nobody is told them."""
    service = make_service(config=f'audit_log = "{tmp_path}/audit"\n').start()
    file = tmp_path / "secrets"
    file.write_text(f"# of a test\nTOKEN={VALUE}\nFROM_HERE\n")
    show = 'echo "$TOKEN $FROM_HERE"'
    done = service.pjw("run", "--secret-file", str(file), show, FROM_HERE="abc")
    assert done.stdout == f"{VALUE} abc\n".encode()
    held = service.pjw(
        "start", "--hold", "--secret", f"TOKEN={VALUE}", "--secret", "FROM_HERE", show, FROM_HERE="d"
    )
    job = held.stdout.decode().strip()
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"command": "echo $TOKEN | wc -c"}\n' * 2)
    ids = service.ok("submit", "--secret", f"TOKEN={VALUE}", str(jobs)).split()
    for each in ids:
        assert service.ok("wait", each) == "0\n"
        assert service.ok("logs", each) == "17\n"
    told = "".join(
        service.ok(*words)
        for words in (
            ("list", "--format", "json"), ("get", job), ("events", "--since", "0", "--no-follow"),
            ("events", "--list", "--no-follow"), ("queue", "--format", "json"),
        )
    )  # fmt: skip
    assert VALUE not in told
    assert VALUE not in (tmp_path / "audit").read_text()
    assert VALUE not in service.log.read_text()
    for options, words in (
        (["--secret", "NOT_SET"], "--secret: the variable NOT_SET is not set here"),
        (["--secret", f"{VALUE}=x"], "--secret: that is not the name of an environment variable"),
        (["--env", "A=1", "--secret", "A=2"], "A is given both as a variable and as a secret"),
        (["--secret-file", "/nonexistent"], "cannot read --secret-file /nonexistent"),
    ):
        code, said = service.refused("start", *options, "true")
        assert words in said
        assert VALUE not in said
    file.write_text(f"TOKEN=x\n{VALUE}\n")
    code, said = service.refused("start", "--secret-file", str(file), "true")
    assert (
        code,
        f"{file}, line 2: that is not the name of an environment variable" in said,
        VALUE in said,
    ) == (
        1,
        True,
        False,
    )
    # a kill, and the job has them all the same
    assert service.process is not None
    service.process.kill()
    service.process.wait(DEADLINE_SECONDS)
    service.start()
    service.ok("release", job)
    assert service.ok("logs", job) == f"{VALUE} d\n"
    wait_for(lambda: kept(service.state) == [])


def test_a_backup_has_none(make_service: Callable[..., Service], visible: Path) -> None:
    """After a restore such a job says that its secrets are gone, and is not executed."""
    service = make_service().start()
    job = service.ok("start", "--hold", "--secret", f"TOKEN={VALUE}", "echo ran").strip()
    target = visible / "backup"
    command = [str(BIN / "pjwd"), "backup", "--state-dir", str(service.state), str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=CALL_SECONDS)
    assert traces(target) == []
    assert traces(service.state) != []
    service.stop()
    shutil.rmtree(service.state)
    subprocess.run(["cp", "-a", target, service.state], check=True)
    service.state.chmod(0o711)
    service.start()
    service.ok("release", job)
    code, words = service.refused("wait", job)
    assert (code, f"job {job} was never started: its secrets are gone: a backup has none" in words) == (
        1,
        True,
    )
    assert json.loads(service.ok("get", job))["reason"] == "start_failed"


def test_nobody_reads_them_in_proc(make_service: Callable[..., Service]) -> None:
    """Neither another client's job nor another user of the host; no command line has them."""
    service = make_service().start()
    job = service.ok("start", "--secret", f"TOKEN={VALUE}", "sleep 300").strip()
    everywhere = (
        "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -c 's3cr[3]t'"
    )
    assert service.pjw("run", everywhere, client="bob").stdout == b"0\n"
    done = subprocess.run(
        ["sh", "-c", everywhere], capture_output=True, user=65534, group=65534, extra_groups=[], check=False
    )
    assert done.stdout == b"0\n"
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert [line for line in lines if VALUE.encode() in line] == []
    service.ok("stop", job)
