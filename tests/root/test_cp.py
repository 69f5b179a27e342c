"""`pjw cp`, and copies by the clients: files into jobs that run and out of them, whole or not at all."""

import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Final

import pytest

import pjw
from pjw import errors
from pjw.model import Archive, JobSpec
from pjw.v1 import job_worker_pb2 as pb
from tests.root.test_cli_stdin import piped
from tests.support.service import BIN, Service, wait_for
from tests.unit.test_archive_program import END, HOSTILE, entry

MIB: Final = 1024 * 1024


@pytest.fixture
def job(service: Service) -> Iterator[str]:
    """A job to copy into, and out of."""
    job = service.ok("start", "--name", "box", "sleep", "600").strip()
    yield job
    service.ok("stop", "--grace", "0", job)


def tree_of(directory: Path) -> dict[str, str]:
    """What is in a directory: the sums of files, where links lead."""
    return {
        str(path.relative_to(directory)): f"-> {path.readlink()}"
        if path.is_symlink()
        else "directory"
        if path.is_dir()
        else f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mode & 0o100:o}"
        for path in directory.rglob("*")
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory as people have them."""
    source = tmp_path / "src"
    (source / "lib/deep/er").mkdir(parents=True)
    (source / "main.c").write_text("int main(void) { return 0; }\n")
    (source / "lib/data").write_bytes(os.urandom(3 * MIB + 1))
    (source / "lib/deep/er/ünï").write_bytes(b"")
    (source / "build.sh").write_text("#!/bin/sh\n")
    (source / "build.sh").chmod(0o755)
    (source / "link").symlink_to("lib/data")
    return source


def test_a_directory_there_and_back(service: Service, job: str, source: Path, tmp_path: Path) -> None:
    """The same files, links and permissions to execute; by id and by name; nothing else is printed."""
    assert service.ok("cp", str(source), f"{job}:") == ""
    assert service.ok("exec", job, "cd src && ls -1 && ./build.sh && stat -c %u main.c && id -u").split()[
        :4
    ] == [
        "build.sh",
        "lib",
        "link",
        "main.c",
    ]
    back = tmp_path / "back"
    assert service.ok("cp", "box:src", str(back)) == ""
    assert tree_of(back) == tree_of(source)
    # into a directory that is there; and the contents alone
    (tmp_path / "in").mkdir()
    service.ok("cp", f"{job}:/run/job/src/.", str(tmp_path / "in"))
    service.ok("cp", "box:src", str(tmp_path / "in"))
    assert tree_of(tmp_path / "in/src") == tree_of(source)
    assert (tmp_path / "in/main.c").exists()
    # the job's files are its user's
    assert service.ok("exec", job, 'test "$(stat -c %u src/main.c)" = "$(id -u)" && echo mine') == "mine\n"


def test_single_files(service: Service, job: str, tmp_path: Path) -> None:
    """By their own name, and by another; replaced as a whole; empty ones too."""
    (tmp_path / "a").write_bytes(b"first")
    service.ok("cp", str(tmp_path / "a"), f"{job}:/tmp")
    service.ok("cp", str(tmp_path / "a"), f"{job}:b")
    assert service.ok("exec", job, "cat /tmp/a b") == "firstfirst"
    (tmp_path / "a").write_bytes(b"")
    service.ok("cp", str(tmp_path / "a"), f"{job}:b")
    (tmp_path / "c").write_text("old")
    service.ok("cp", f"{job}:b", str(tmp_path / "c"))
    assert (tmp_path / "c").read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_archives_as_streams(service: Service, job: str, source: Path) -> None:
    """`-` is a tar archive, as tar(1) reads and writes it."""
    data = subprocess.run(["tar", "c", "src"], cwd=source.parent, capture_output=True, check=True).stdout
    assert piped(service, "cp", "-", f"{job}:new", data=data).returncode == 0
    done = service.pjw("cp", f"{job}:new/src", "-")
    assert (done.returncode, done.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert "src/lib/deep/er/ünï" in archive.getnames()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["{job}:none", "{here}/x"],
            "pjw: error: cannot copy none of job {job}: cannot read none: no such file or directory\n",
        ),
        (
            ["{job}:/proc/1/mem", "{here}/x"],
            "pjw: error: cannot copy /proc/1/mem of job {job}: cannot read /proc/1/mem: permission denied\n",
        ),
        (
            ["{here}/file", "{job}:no/such/x"],
            (
                "pjw: error: cannot copy no/such/x of job {job}: cannot unpack into no/such/x:"
                " no such file or directory\n"
            ),
        ),
        (
            ["{here}/file", "{job}:/etc"],
            "pjw: error: cannot copy /etc of job {job}: cannot make file: read-only file system\n",
        ),
    ],
)
def test_what_the_job_refuses(
    service: Service, job: str, tmp_path: Path, words: list[str], error: str
) -> None:
    """It is said why, with 1; nothing half made stays, here or there."""
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    place = {"job": job, "here": str(tmp_path)}
    assert service.refused("cp", *(word.format(**place) for word in words)) == (1, error.format(**place))
    assert sorted(tmp_path.rglob("*")) == before
    assert service.ok("exec", job, "ls -A") == ""


def test_what_cannot_be_read_or_written_here(service: Service, job: str, tmp_path: Path) -> None:
    """125, and the job has nothing of it."""
    none = tmp_path / "none"
    assert service.refused("cp", str(none), f"{job}:x") == (
        125,
        f"pjw: error: cannot read {none}: no such file or directory (ENOENT)\n",
    )
    code, words = service.refused("cp", f"{job}:.", str(none / "x"))
    assert (code, words) == (125, f"pjw: error: cannot write {none}: no such file or directory (ENOENT)\n")
    assert service.ok("exec", job, "ls -A") == ""
    service.ok("exec", job, "mkdir d && echo 1 > d/f")
    (tmp_path / "d").write_text("a file")
    assert service.refused("cp", f"{job}:d", str(tmp_path / "d")) == (
        125,
        f"pjw: error: cannot write to {tmp_path}/d: it is no directory\n",
    )
    assert (tmp_path / "d").read_text() == "a file"


def test_wrong_usage(service: Service, job: str) -> None:
    """One of both is in a job."""
    for words in (["a", "b"], [f"{job}:a", f"{job}:b"], ["", f"{job}:b"], ["a", "-1x:b"]):
        assert service.pjw("cp", *words).returncode == 2, words


def test_of_jobs_that_do_not_run(service: Service, tmp_path: Path) -> None:
    """Ended ones, another client's, none."""
    ended = service.ok("start", "true").strip()
    service.ok("wait", ended)
    (tmp_path / "file").write_text("x")
    assert service.refused("cp", str(tmp_path / "file"), f"{ended}:x")[0] == 1
    hers = service.ok("start", "sleep", "600").strip()
    for number in (hers, "999"):
        code, words = service.refused("cp", f"{number}:.", str(tmp_path / "x"), client="bob")
        assert (code, words) == (1, f"pjw: error: no job {number}\n")


def test_a_job_whose_root_has_no_program(service: Service, source: Path, tmp_path: Path) -> None:
    """Nothing of what does it is the job's: PATH leads nowhere, and what runs is a file of memory."""
    job = service.ok("start", "-e", "PATH=/nowhere", "--", "/bin/sleep", "600").strip()
    service.ok("cp", str(source), f"{job}:/tmp/x")
    service.ok("cp", f"{job}:/tmp/x", str(tmp_path / "back"))
    assert tree_of(tmp_path / "back") == tree_of(source)


def test_it_runs_as_the_job_and_within_it(service: Service, tmp_path: Path) -> None:
    """As the job's user, without privilege, in its cgroup; it holds nothing of the host."""
    job = service.ok("start", "mkfifo /tmp/held; sleep 600").strip()
    with service.stub() as stub:
        session = stub.Exec(pb.ExecRequest(id=int(job), archive=pb.Archive(path="in", unpack=True))).session
    script = (
        "for p in /proc/[0-9]*; do if grep -qs pjw-archive $p/comm; then"
        " grep -E '^(Uid|CapEff|NoNewPrivs|Seccomp):' $p/status; readlink $p/exe; fi; done"
    )
    wait_for(lambda: "NoNewPrivs" in service.ok("exec", job, script))
    said = service.ok("exec", job, script)
    uid = service.ok("exec", job, "id -u").strip()
    assert said.split()[:2] == ["Uid:", uid]
    assert "CapEff:\t0000000000000000" in said and "NoNewPrivs:\t1" in said and "Seccomp:\t2" in said
    assert "memfd:pjw-archive" in said
    service.ok("stop", job)
    assert session.number


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_archives_into_a_job(service: Service, job: str, what: str) -> None:
    """Refused with a reason; the canary beside the directory is alive."""
    service.ok("exec", job, "mkdir -p in; echo alive > canary")
    end = b"" if what.startswith(("cut", "nothing", "no archive")) else END
    done = piped(service, "cp", "-", f"{job}:in", data=HOSTILE[what] + end)
    assert done.returncode == 1 and done.stderr.startswith(b"pjw: error: cannot copy in of job ")
    assert service.ok("exec", job, "cat canary; ls -A") == "alive\ncanary\nin\n"


def test_the_limit_of_output_is_a_reason(service: Service, tmp_path: Path) -> None:
    """Never a short file."""
    job = service.ok("start", "--output", "1M", "head -c 3000000 /dev/zero > big; sleep 600").strip()
    wait_for(lambda: service.ok("exec", job, "stat -c %s big 2>/dev/null || :").strip() == "3000000")
    code, words = service.refused("cp", f"{job}:big", str(tmp_path / "big"))
    assert code == 1 and "the archive is larger than the job's limit of output" in words
    assert not list(tmp_path.glob("big")) and not list(tmp_path.glob(".pjw*"))


def test_what_was_left_out_is_told(service: Service, job: str, tmp_path: Path) -> None:
    """A FIFO, and a link that leads out of what is copied."""
    service.ok(
        "exec",
        job,
        "mkdir d; mkfifo d/fifo; ln -s /etc/passwd d/out; ln -s ../../x d/up; ln -s f d/f2; echo 1 >d/f",
    )
    done = service.pjw("cp", f"{job}:d", str(tmp_path / "d"))
    assert done.returncode == 0 and done.stdout == b""
    assert sorted(done.stderr.decode().splitlines()) == [
        "pjw: left out d/fifo: a FIFO",
        "pjw: left out out: a link out of what is copied, to /etc/passwd",
        "pjw: left out up: a link out of what is copied, to ../../x",
    ]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["f", "f2"]


def test_nothing_is_stored_of_a_copy(service: Service, job: str, tmp_path: Path) -> None:
    """It is forgotten at once, and its bytes are free again."""
    (tmp_path / "big").write_bytes(bytes(5 * MIB))
    service.ok("cp", str(tmp_path / "big"), f"{job}:big")
    service.ok("cp", f"{job}:big", str(tmp_path / "back"))
    service.refused("cp", f"{job}:none", str(tmp_path / "x"))
    wait_for(lambda: not archives_of(service, job))


def test_a_client_that_is_interrupted_leaves_nothing(service: Service, job: str, tmp_path: Path) -> None:
    """Ctrl-C in the midst of a copy."""
    command = ["cp", "-", f"{job}:in"]
    process = subprocess.Popen(
        [BIN / "pjw", *command],
        env=service.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(entry("half", data=bytes(MIB))[: MIB // 2])
    process.stdin.flush()
    wait_for(lambda: ".pjw-archive" in service.ok("exec", job, "ls -A in 2>/dev/null || :"))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    wait_for(lambda: service.ok("exec", job, "ls -A in") == "")
    wait_for(lambda: not archives_of(service, job))


def archives_of(service: Service, job: str) -> list[Path]:
    """What is stored of copies."""
    files = (service.state / "jobs/sessions").glob(f"{job}-*/session")
    return [file for file in files if json.loads(file.read_text())["archive"]]


# --- by the clients


async def test_both_clients(service: Service, job: str, source: Path, tmp_path: Path) -> None:
    """The same calls, sync and asyncio."""
    number = int(job)
    counted: list[int] = []
    async with pjw.AsyncClient(service.address, *service.files()) as client:
        copied = await client.copy_to(number, str(source), "one", counted.append)
        assert copied.bytes == counted[-1] > 3 * MIB and copied.left_out == []
        copied = await client.copy_from(number, "one", str(tmp_path / "one"))
        assert copied.bytes > 3 * MIB and tree_of(tmp_path / "one") == tree_of(source)
        data = b"".join([piece async for piece in client.read_archive(number, "one")])

        async def pieces() -> AsyncGenerator[bytes, None]:
            yield data

        assert await client.write_archive(number, pieces(), "two") == []
        with pytest.raises(errors.CopyError, match="no such file"):
            await client.copy_from(number, "none", str(tmp_path / "none"))
        with pytest.raises(errors.ConfigError, match="cannot read"):
            await client.copy_to(number, str(tmp_path / "none"))
        with pytest.raises(errors.InvalidJobError, match="empty"):
            await client.copy_from(number, "", str(tmp_path / "none"))


def test_an_archive_is_no_program_of_the_client_s(service: Service, job: str) -> None:
    """A name that is a path, or none at all, is refused before anything runs."""
    for wrong in ({"path": ""}, {"path": "a", "name": "b"}, {"path": "a", "unpack": True, "name": "../b"}):
        with pytest.raises(errors.InvalidJobError):
            Archive(**wrong)
    assert JobSpec(Archive("-x; rm *").argv).argv == ("pjw-archive", "pack", "-x; rm *")
