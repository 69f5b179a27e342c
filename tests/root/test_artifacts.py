"""`--output`: files that are kept of a job after its end, listed and copied then."""

import asyncio
import json
import os
import re
import select
import signal
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest

import pjw
from pjw import errors
from pjw.model import (
    Artifacts,
    ArtifactsState,
    EndReason,
    ExitStatus,
    Job,
    JobSpec,
    JobState,
    QueueSpec,
    Retry,
)
from tests.support.disks import MIB, fill, small_disk
from tests.support.service import Service, packs, wait_for

# The packing lasts: in so deep a tree there are very many ways to try such a pattern.
_DEEP = "mkdir -p $(printf 'a/%.0s' $(seq 24))"
_LASTING = "**/" * 12 + "z"


@pytest.fixture
def disk() -> Iterator[Path]:
    """A disk of 24 MB."""
    with small_disk(24) as point:
        yield point


def lasting(code: int, **limits: int) -> JobSpec:
    """A job whose command ends at once with *code*, and whose packing goes on for long."""
    return JobSpec(f"{_DEEP}; exit {code}", {"cpu_max_millicores": 100, **limits}, outputs=[_LASTING])


def kept_file(service: Service, job_id: int) -> Path:
    """Where the artifacts of a job are on the server."""
    return service.state / f"jobs/{job_id}/artifacts"


def names(client: pjw.Client, job_id: int) -> list[str]:
    """What was kept, sorted."""
    return sorted(each.path for each in client.artifacts(job_id))


def await_packing(client: pjw.Client, job_id: int) -> Job:
    """The job, when its command has ended and its files are being packed."""
    wait_for(lambda: "keeps its artifacts" in client.get(job_id).detail)
    return client.get(job_id)


def processes(service: Service, job_id: int) -> list[int]:
    """The pids of a job's processes, its init's among them."""
    group = next(group for group in service.job_cgroups() if group.name == f"job-{job_id}")
    return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]


def run(client: pjw.Client, spec: JobSpec) -> Job:
    """The job, when it has ended."""
    return client.wait(client.start(spec).id)


def test_a_program_is_built_and_kept(service: Service, tmp_path: Path) -> None:
    """What several patterns match is listed, and copied as a whole and in parts; nothing else is there."""
    command = (
        "mkdir -p dist/lib dist/empty src; echo main >dist/main; chmod +x dist/main; echo a >dist/lib/a.so;"
        " echo x >src/x.c; echo l >src/log.txt; ln -s lib/a.so dist/link; exit 3"
    )
    done = service.pjw(
        *("run", "--output", "dist/**", "--output", "**/*.txt"),
        *("--output-dir", str(tmp_path / "out"), command),
    )
    assert (done.returncode, done.stderr) == (3, b"")
    out = tmp_path / "out"
    assert (out / "dist/main").read_text() == "main\n" and os.access(out / "dist/main", os.X_OK)
    assert (out / "dist/link").read_text() == "a\n" and (out / "dist/empty").is_dir()
    assert (out / "src/log.txt").exists() and not (out / "src/x.c").exists()

    with service.client() as client:
        job = max(client.list(), key=lambda each: each.id)
        assert job.artifacts is not None and job.artifacts.state is ArtifactsState.KEPT
        assert job.artifacts.bytes == kept_file(service, job.id).stat().st_size
        assert job.exit_status == ExitStatus(3) and job.reason is EndReason.COMPLETED and job.detail == ""
    listed = [json.loads(line) for line in service.ok("artifacts", str(job.id)).splitlines()]
    assert {each["path"]: each["kind"] for each in listed} == {
        **dict.fromkeys(("dist", "dist/lib", "dist/empty", "src"), "directory"),
        **dict.fromkeys(("dist/main", "dist/lib/a.so", "src/log.txt"), "file"),
        "dist/link": "link",
    }
    assert "dist/link -> lib/a.so" in service.at_terminal("artifacts", str(job.id))
    service.ok("cp", f"{job.id}:dist/main", str(tmp_path / "alone"))
    assert (tmp_path / "alone").read_text() == "main\n"
    service.ok("cp", f"{job.id}:/run/job/dist/lib/.", str(tmp_path / "lib"))
    assert (tmp_path / "lib/a.so").read_text() == "a\n"
    archive = service.pjw("cp", f"{job.id}:dist/lib", "-").stdout
    with tarfile.open(fileobj=BytesIO(archive)) as copied:
        assert copied.getnames() == ["lib", "lib/a.so"]
    for path, why in (("src/x.c", "not among its artifacts"), ("/etc", "what was kept of /run/job")):
        code, said = service.refused("cp", f"{job.id}:{path}", str(tmp_path / "no"))
        assert code == 1 and why in said
    assert not (tmp_path / "no").exists()


def test_it_is_made_by_the_job_s_user_alone(service: Service) -> None:
    """The program that reads the job's files is of the job's user, and in the job's cgroup."""
    with service.client() as client:
        job = client.start(lasting(0))
        running = await_packing(client, job.id)
        assert running.state is JobState.RUNNING and running.end is None
        wait_for(lambda: len(processes(service, job.id)) == 2)
        [packer] = set(processes(service, job.id)) - {service.init_pid(job.id)}
        wait_for(lambda: b"collect" in Path(f"/proc/{packer}/cmdline").read_bytes())
        # it takes its name a moment after its exec
        wait_for(lambda: Path(f"/proc/{packer}/comm").read_text() == "pjw-archive\n")
        lines = Path(f"/proc/{packer}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        uid = (service.scratch()[0]).stat().st_uid
        assert status["Name"] == "pjw-archive" and status["Uid"].split() == [str(uid)] * 4 and uid
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        init = Path(f"/proc/{service.init_pid(job.id)}/status")
        # CAP_KILL, and nothing else any more, when the packer is on its way
        kill = [f"{name}:\t{1 << 5:016x}" for name in ("CapPrm", "CapEff")]
        wait_for(lambda: all(each in init.read_text() for each in kill))

        with pytest.raises(errors.JobStateError, match="its command has ended"):
            client.exec(job.id, "true")
        with pytest.raises(errors.JobStateError, match="its artifacts come with its end"):
            list(client.artifacts(job.id))
        stopped = client.stop(job.id, grace=0)
        assert stopped.exit_status == ExitStatus(0) and stopped.reason is EndReason.COMPLETED
        assert stopped.artifacts == Artifacts(ArtifactsState.FAILED, detail="the job was stopped")
        assert not kept_file(service, job.id).exists()
        with pytest.raises(errors.CopyError, match="has no artifacts: the job was stopped"):
            list(client.artifacts(job.id))


def test_nothing_matches(service: Service, tmp_path: Path) -> None:
    """A warning, and no other exit code; but where they are required the job has failed."""
    out = str(tmp_path / "out")
    done = service.pjw("run", "--output", "*.o", "--output-dir", out, "exit 0")
    assert done.returncode == 0 and b"has no artifacts: no file of the job matches" in done.stderr
    required = ("run", "--output", "*.o", "--output-required")
    assert service.pjw(*required, "exit 0").returncode == 1
    job_id = service.ok("list").split()[-1]
    for wait in (["wait"], ["wait", "--format", "template:{reason}"]):
        assert service.pjw(*wait, job_id).returncode == 1
    assert job_id in service.ok("list", "--failed").split()
    assert service.pjw(*required, "exit 7").returncode == 7
    assert service.pjw(*required, "touch x.o").returncode == 0
    with service.client() as client:
        job = run(client, JobSpec("true", outputs=["x"], output_required=True))
        assert (job.exit_status, job.reason) == (ExitStatus(0), EndReason.ARTIFACTS_MISSING)
        assert not job.succeeded and job.artifacts is not None and job.artifacts.state is ArtifactsState.EMPTY
    assert not Path(out).exists()
    for wrong in ("--output=../x", "--output=/etc/passwd", "--output=12Q", "--output-required"):
        refused = service.pjw("run", wrong, "true")
        assert refused.returncode in (1, 2), refused


@pytest.mark.parametrize("limit", ["1000", "20K"])
def test_the_limit_of_output(service: Service, limit: str) -> None:
    """No more than output may be: no archive then, and the reason; nothing of it is left."""
    with service.client() as client:
        spec = JobSpec("seq 1 20000 >f", {"output_max_bytes": limit}, outputs=["f"])
        job = run(client, spec)
        assert job.exit_status == ExitStatus(0) and job.artifacts is not None
        assert job.artifacts.state is ArtifactsState.FAILED
        assert "larger than the job's output may be" in job.artifacts.detail
        assert not kept_file(service, job.id).exists()


@pytest.fixture
def on_disk(
    disk: Path, visible: Path, make_service: Callable[..., Service]
) -> Iterator[Callable[[int], Service]]:
    """Start a service with its state on the small disk, scratch elsewhere, and a mark in bytes."""
    made: list[Service] = []

    def make(free_bytes_min: int) -> Service:
        marks = f"disk.free_bytes_min = {free_bytes_min}\ndisk.free_inodes_min = 0\n"
        made.append(make_service(config=f'scratch_dir = "{visible}/scratch"\n{marks}'))
        made[-1].state = disk / "state"
        return made[-1].start()

    yield make
    for service in made:
        wait_for(lambda: not service.job_cgroups())  # noqa: B023
        service.stop()


def test_a_full_disk(disk: Path, on_disk: Callable[[int], Service]) -> None:
    """The end is told all the same, with the reason; and what was written makes room again."""
    service = on_disk(0)
    with service.client() as client:
        fill(disk / "rest", leave=2 * MIB)
        job = run(client, JobSpec(f"head -c {4 * MIB} /dev/zero >f; exit 4", outputs=["f"]))
        assert job.exit_status == ExitStatus(4) and job.artifacts is not None
        assert job.artifacts.state is ArtifactsState.FAILED
        assert "no space left on device" in job.artifacts.detail
        assert not kept_file(service, job.id).exists()
        (disk / "rest").unlink()
        again = run(client, JobSpec(f"head -c {4 * MIB} /dev/zero >f", outputs=["f"]))
        assert again.artifacts is not None and again.artifacts.state is ArtifactsState.KEPT


def test_a_disk_that_is_about_to_be_full(on_disk: Callable[[int], Service]) -> None:
    """The job that packs so much is ended before others' jobs find no room; its end stays what it was."""
    service = on_disk(8 * MIB)
    with service.client() as client:
        outputs = ["f", _LASTING]
        command = f"{_DEEP}; truncate -s {15 * MIB} f; exit 7"
        job = run(client, JobSpec(command, {"cpu_max_millicores": 100}, outputs=outputs))
        assert (job.exit_status, job.reason) == (ExitStatus(7), EndReason.COMPLETED)
        assert job.artifacts is not None and job.artifacts.state is ArtifactsState.FAILED
        assert "the disk of pjwd was about to be full" in job.artifacts.detail
        assert not kept_file(service, job.id).exists()


def test_the_quota_of_stored_bytes(make_service: Callable[..., Service]) -> None:
    """They count in it while they are kept, and are not kept beyond it."""
    service = make_service(config="[clients]\nstored_bytes_max = 200000\n").start()
    with service.client() as client:
        job = run(client, JobSpec("truncate -s 100K f", outputs=["f"]))
        assert job.artifacts is not None and job.artifacts.state is ArtifactsState.KEPT
        assert client.quota().stored_bytes == job.artifacts.bytes
        second = run(client, JobSpec("truncate -s 150K f; rm -f g", outputs=["f"]))
        assert second.artifacts is not None and second.artifacts.state is ArtifactsState.FAILED
        assert "may be stored" in second.artifacts.detail
        assert not kept_file(service, second.id).exists()
        client.delete(job.id)
        wait_for(lambda: not kept_file(service, job.id).parent.exists())
        wait_for(lambda: client.quota().stored_bytes == 0)


def test_of_a_workspace(service: Service, tmp_path: Path) -> None:
    """Where a job has a workspace, they are files of that, and an upload is unpacked there."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/source").write_text("from outside")
    with service.client() as client:
        uploaded = client.upload([str(tmp_path / "in")])
        spec = JobSpec(
            "cp source $HOME/other; mkdir dist; mv source dist/made",
            workspace="things",
            upload=uploaded.name,
            outputs=["dist", "other"],
        )
        job = run(client, spec)
        assert (job.succeeded, job.artifacts and job.artifacts.state) == (True, ArtifactsState.KEPT)
        assert names(client, job.id) == ["dist", "dist/made"]
        client.copy_from(job.id, "/run/workspace/dist/made", str(tmp_path / "made"))
        assert (tmp_path / "made").read_text() == "from outside"
        with pytest.raises(errors.CopyError, match="only what was kept of /run/workspace is there"):
            client.copy_from(job.id, "/run/job/other", str(tmp_path / "other"))
        client.remove_workspace("things")


def test_they_are_private(service: Service, tmp_path: Path) -> None:
    """Another client has neither the job nor its files; they are the server's own."""
    with service.client() as client, service.client("bob") as other:
        job = run(client, JobSpec("echo secret >f", outputs=["f"]))
        assert stat.S_IMODE(kept_file(service, job.id).stat().st_mode) == 0o400
        for call in (other.read_artifacts, other.artifacts):
            with pytest.raises(errors.JobNotFoundError):
                list(call(job.id))
        with pytest.raises(errors.JobNotFoundError):
            other.copy_from(job.id, "f", str(tmp_path / "f"))


@pytest.mark.parametrize("killed", ["server", "launcher"])
def test_pjwd_is_dead_at_the_end(make_service: Callable[..., Service], killed: str) -> None:
    """All of them are kept although nobody was there when the command ended; what is not whole is none.

    The latter is as after a power cut that took a part of the file, and so its mode.
    """
    service = make_service().start()
    command = "while [ ! -e go ]; do sleep 0.05; done; seq 1 1000 >f; exit 2"
    with service.client() as client:
        jobs = [client.start(JobSpec(command, outputs=["*"])) for _ in range(2)]
        inits = [os.pidfd_open(service.init_pid(job.id)) for job in jobs]
        service.kill(killed)
        for scratch in service.scratch():
            (scratch / "go").touch()
        for init in inits:
            assert select.select([init], [], [], 20)[0]
            os.close(init)
        whole, short = (kept_file(service, job.id) for job in jobs)
        assert stat.S_IMODE(whole.stat().st_mode) == stat.S_IMODE(short.stat().st_mode) == 0o400
        short.chmod(0o600)
        service.start()
        kept, lost = (client.wait(job.id) for job in jobs)
        assert kept.exit_status == lost.exit_status == ExitStatus(2)
        assert kept.artifacts is not None and kept.artifacts.state is ArtifactsState.KEPT
        assert names(client, kept.id) == ["f", "go"]
        assert lost.artifacts is not None and lost.artifacts.state is ArtifactsState.FAILED
        assert "before they were whole" in lost.artifacts.detail
        assert not short.exists()


@pytest.mark.parametrize(
    ("whose", "why"),
    [("init", "before they were whole"), ("packer", "signal 9 has killed the program for archives")],
)
def test_a_kill_while_they_are_packed(service: Service, whose: str, why: str) -> None:
    """The end is known, and there are no artifacts: never a part of them."""
    with service.client() as client:
        job = client.start(lasting(5))
        await_packing(client, job.id)
        wait_for(lambda: any(map(packs, processes(service, job.id))))
        init = service.init_pid(job.id)
        [packer] = filter(packs, processes(service, job.id))
        os.kill(init if whose == "init" else packer, signal.SIGKILL)
        ended = client.wait(job.id)
        assert (ended.exit_status, ended.reason) == (ExitStatus(5), EndReason.COMPLETED)
        assert ended.artifacts is not None and ended.artifacts.state is ArtifactsState.FAILED
        assert why in ended.artifacts.detail
        assert not kept_file(service, job.id).exists()


def test_pjwd_is_killed_while_they_are_packed(make_service: Callable[..., Service]) -> None:
    """The next one finds a job that is packed, and can stop that; its end is what was recorded."""
    service = make_service().start()
    with service.client() as client:
        for killed in ("server", "both"):
            job = client.start(lasting(6))
            await_packing(client, job.id)
            service.kill(killed)
            service.start()
            found = await_packing(client, job.id)
            assert found.state is JobState.RUNNING and found.artifacts == Artifacts()
            with pytest.raises(errors.JobStateError, match="keeps its artifacts"):
                client.exec(job.id, "true")
            ended = client.stop(job.id)
            assert (ended.exit_status, ended.reason) == (ExitStatus(6), EndReason.COMPLETED)
            assert ended.artifacts == Artifacts(ArtifactsState.FAILED, detail="the job was stopped")
            assert not kept_file(service, job.id).exists()


def test_a_job_that_is_stopped_keeps_nothing(service: Service) -> None:
    """A stop is no end to wait for."""
    with service.client() as client:
        job = client.start(JobSpec("echo >f; exec sleep 600", outputs=["f"]))
        service.ok("exec", str(job.id), "until [ -e f ]; do sleep 0.02; done")
        stopped = client.stop(job.id)
        assert stopped.reason is EndReason.STOPPED
        assert stopped.artifacts == Artifacts(ArtifactsState.FAILED, detail="the job was stopped")


def test_a_short_archive_is_none(service: Service) -> None:
    """What somebody has cut short on the server is told, and nothing is made of it."""
    with service.client() as client:
        job = run(client, JobSpec("seq 1 1000 >f", outputs=["f"]))
        os.truncate(kept_file(service, job.id), 1024)
        with pytest.raises(errors.OutputLostError, match="1024 of"):
            list(client.artifacts(job.id))


def test_the_time_limit_is_the_command_s(service: Service) -> None:
    """A command that has ended is not killed by its limit; one that is killed by it keeps its files."""
    with service.client() as client:
        job = client.start(lasting(0, time_max_seconds=5))
        await_packing(client, job.id)
        late = run(client, JobSpec("echo >f; sleep 60 & sleep 60", {"time_max_seconds": 6}, outputs=["f"]))
        assert late.reason is EndReason.TIMED_OUT and late.artifacts is not None
        assert late.artifacts.state is ArtifactsState.KEPT
        # the other one began before it, with a lower limit
        assert client.get(job.id).state is JobState.RUNNING
        assert client.stop(job.id, grace=0).reason is EndReason.COMPLETED


def test_in_the_queue(service: Service, tmp_path: Path) -> None:
    """Each attempt, and each element of an array, has its own."""
    with service.client() as client:
        spec = JobSpec(
            "echo $PJW_ATTEMPT >f; [ $PJW_ATTEMPT = 2 ]",
            outputs=["f"],
            output_required=True,
            queue=QueueSpec(retry=Retry(1, backoff_seconds=0)),
        )
        [job] = client.submit([spec])
        last = client.wait(job.id)
        assert last.attempt == 2 and last.artifacts is not None
        assert (last.artifacts.state, last.artifacts.required) == (ArtifactsState.KEPT, True)
        assert names(client, job.id) == names(client, last.id) == ["f"]
        spec = JobSpec("echo >e$PJW_ARRAY_INDEX", outputs=["e*"], queue=QueueSpec(array="1-2"))
        [array] = client.submit([spec])
        ended = client.wait(array.id)
        assert ended.artifacts is None
        assert names(client, client.get(f"{array.id}_2").id) == ["e2"]
        assert '"path": "e1"' in service.ok("artifacts", f"{array.id}_1")
        service.ok("cp", f"{array.id}_1:e1", str(tmp_path))
        assert (tmp_path / "e1").read_text() == "\n"
        code, said = service.refused("artifacts", str(array.id))
        assert code == 1 and "name one of its elements, 1-2" in said
        [cancelled] = client.submit([JobSpec("true", outputs=["f"], queue=QueueSpec(held=True))])
        assert client.stop(cancelled.id).artifacts is None


def test_what_cannot_be_packed(service: Service) -> None:
    """Links are not followed, FIFOs and devices are left out, and what cannot be read is an error."""
    with service.client() as client:
        command = "mkdir d; mkfifo d/pipe d/other; mknod d/device c 0 0; ln -s /etc d/etc; echo >d/f"
        job = run(client, JobSpec(command, outputs=["d", "d/etc/*"]))
        assert job.artifacts is not None
        assert re.fullmatch(r"left out d/\w+: a (FIFO|device); and 2 more", job.artifacts.detail)
        assert names(client, job.id) == ["d", "d/etc", "d/f"]
        lost = {
            "mkdir d; echo >d/f; chmod 0 d/f": "cannot read d/f: permission denied",
            "echo >d; chmod 0 .": "cannot enter /run/job: permission denied",
            r"""mkdir d; f="d/$(printf '\377\n\033')"; >"$f"; chmod 0 "$f" """: (
                r"cannot read d/\xff?\x1b: permission denied"
            ),
            "truncate -s 1T d": "cannot write the archive: it is larger than the job's output may be",
        }
        for command, why in lost.items():
            job = run(client, JobSpec(command, outputs=["d"]))
            assert job.artifacts == Artifacts(ArtifactsState.FAILED, detail=why)
            assert job.exit_status == ExitStatus(0)
            assert not kept_file(service, job.id).exists()
        # both ends of a line that is too long
        command = "d=$(printf 'd%.0s' $(seq 250)); mkdir -p $d/$d; echo >$d/$d/f; chmod 0 $d/$d/f"
        job = run(client, JobSpec(command, outputs=["d*"]))
        assert job.artifacts is not None
        assert re.fullmatch(r"cannot read d+\.\.\.d+/f: permission denied", job.artifacts.detail)


def test_odd_names(service: Service, tmp_path: Path) -> None:
    """Every byte of a name comes back, and none of it steers a terminal."""
    found = [b"a\nb", b"n\xff", b"\x1b[31m"]
    with service.client() as client:
        command = r"""for f in 'a\nb' 'n\377' '\033[31m'; do >"$(printf "$f")"; done"""
        job = run(client, JobSpec(command, outputs=["*"]))
        client.copy_from(job.id, ".", str(tmp_path / "out"))
    assert sorted(os.listdir(bytes(tmp_path / "out"))) == sorted(found)
    listed = [json.loads(line) for line in service.ok("artifacts", str(job.id)).splitlines()]
    assert {each["path"] for each in listed} == {"a\nb", "n\\xff", "\x1b[31m"}
    assert "\x1b" not in service.at_terminal("artifacts", str(job.id))


def test_with_a_terminal_input_and_stderr(service: Service) -> None:
    """The descriptors of a start are in their order with everything else that may come along."""
    with service.client() as client:
        name = client.upload([__file__]).name
        spec = JobSpec("cat; ls >f; echo err >&2", input=True, split_stderr=True, upload=name, outputs=["f"])
        job = client.start(spec)
        client.write_input(job.id, [b"typed\n"])
        ended = client.wait(job.id)
        assert b"".join(client.logs(job.id)) == b"typed\n"
        assert b"".join(client.logs(job.id, stderr=True)) == b"err\n"
        assert ended.artifacts is not None and ended.artifacts.state is ArtifactsState.KEPT
        job = run(client, JobSpec("tty >f", terminal=pjw.TerminalSize(24, 80), outputs=["f"]))
        assert job.artifacts is not None and job.artifacts.state is ArtifactsState.KEPT


async def _with_async_client(service: Service, job_id: int, target: Path) -> list[str]:
    async with pjw.AsyncClient(service.address, *service.files()) as client:
        await client.copy_from(job_id, "d/f", str(target))
        return [each.path async for each in client.artifacts(job_id)]


def test_the_asyncio_client(service: Service, tmp_path: Path) -> None:
    """It lists and copies as the other one does."""
    with service.client() as client:
        job = run(client, JobSpec("mkdir d; echo text >d/f", outputs=["."]))
    assert asyncio.run(_with_async_client(service, job.id, tmp_path / "f")) == ["d", "d/f"]
    assert (tmp_path / "f").read_text() == "text\n"


def test_a_backup_has_them(service: Service, tmp_path: Path) -> None:
    """They are whole in what is restored."""
    with service.client() as client:
        job = run(client, JobSpec("seq 1 1000 >f", outputs=["f"]))
    command = [str(service.pjwd), "backup", "--state-dir", str(service.state), str(tmp_path / "copy")]
    subprocess.run(command, check=True)
    copy = tmp_path / f"copy/jobs/{job.id}/artifacts"
    assert copy.read_bytes() == kept_file(service, job.id).read_bytes()
