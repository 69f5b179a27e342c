"""`--upload`: files that a job has before its command starts; in the queue as well."""

import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import grpc
import pytest

from pjw import AsyncClient, errors
from pjw.model import EndReason, JobSpec, JobState, QueueSpec, Retry
from pjw.worker.uploads import PER_CLIENT_MAX
from tests.support.service import Service, wait_for
from tests.support.uploads import send_files
from tests.unit.test_archive_program import END, HOSTILE, entry


@pytest.fixture
def own_service(make_service: Callable[..., Service]) -> Service:
    """One that a test may stop, and kill."""
    return make_service().start()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A C project."""
    project = tmp_path / "project"
    (project / "include").mkdir(parents=True)
    (project / "include/words.h").write_text('#define WORDS "built in a job"\n')
    (project / "main.c").write_text(
        '#include <stdio.h>\n#include "words.h"\nint main(void) { puts(WORDS); return 0; }\n'
    )
    (project / "build").write_text("#!/bin/sh\nexec cc -Iinclude -static -o hello main.c\n")
    (project / "build").chmod(0o755)
    (project / "link").symlink_to("main.c")
    return project


def stored(service: Service) -> list[str]:
    """The uploads that are there."""
    directory = service.state / "jobs/uploads"
    return sorted(os.listdir(directory)) if directory.exists() else []


def threads(pid: int) -> list[str]:
    """The numbers of a process's threads."""
    return os.listdir(f"/proc/{pid}/task")


def sent(service: Service, name: str, data: Iterable[bytes]) -> None:
    """An upload of any bytes."""
    with service.stub() as stub:
        send_files(stub, name, data)


@pytest.mark.skipif(
    shutil.which("cc") is None, reason="no compiler, as in the machine; the host of CI runs this"
)
def test_a_project_is_built_and_its_program_fetched(service: Service, project: Path, tmp_path: Path) -> None:
    """The files are there when the command starts, as its own; nothing of the upload is left then."""
    job = service.ok("start", "--upload", str(project), "./build && touch built && exec sleep 600").strip()
    service.ok("exec", job, "while [ ! -e built ]; do sleep 0.05; done")
    assert service.ok("exec", job, "./hello; stat -c %u main.c; id -u; readlink link").split("\n")[0] == (
        "built in a job"
    )
    assert stored(service) == []
    service.ok("cp", f"{job}:hello", str(tmp_path / "hello"))
    assert subprocess.check_output([tmp_path / "hello"]) == b"built in a job\n"
    service.ok("stop", "--grace", "0", job)


def test_places_and_files(service: Service, project: Path, tmp_path: Path) -> None:
    """Several, each below a path, with the command's own directory there; a file goes by its name."""
    (tmp_path / "one:two").write_text("colon\n")
    done = service.ok(
        *(
            "run",
            "--upload",
            f"{project}:a/b",
            "--upload",
            str(project / "main.c"),
            "--workdir",
            "/run/job/a",
        ),
        *("--upload", str(tmp_path / "one:two"), "ls -d b/include/words.h ../main.c ../one:two b/link"),
    )
    assert done.split() == ["../main.c", "../one:two", "b/include/words.h", "b/link"]
    for wrong in (f"{project}:/tmp", f"{project}:../x", ":x"):
        refused = service.pjw("run", "--upload", wrong, "true")
        assert refused.returncode == 2 and b"--upload" in refused.stderr
    missing = service.pjw("run", "--upload", str(tmp_path / "none"), "true")
    assert missing.returncode == 125 and b"no such file" in missing.stderr


def test_it_is_private_and_counts(service: Service) -> None:
    """What is stored is for nobody else to read, and another client cannot have it."""
    with service.client() as client, service.client("bob") as other:
        sent(service, "mine", [entry("x", data=b"1" * 1000) + END])
        [file] = (service.state / "jobs/uploads").iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o400
        assert client.quota().stored_bytes >= file.stat().st_size
        with pytest.raises(errors.CopyError, match="there is none called mine"):
            other.start(JobSpec("true", upload="mine"))
        job = client.start(JobSpec("cat x", upload="mine"))
        assert b"".join(client.logs(job.id)) == b"1" * 1000
        assert stored(service) == []
        with pytest.raises(errors.CopyError, match="there is none called mine"):
            client.start(JobSpec("true", upload="mine"))


def test_one_that_broke_off_starts_nothing(service: Service) -> None:
    """Its job is not made; the rest may be sent, and then it can be started."""
    whole = entry("x", data=b"whole\n") + END
    with service.client() as client, service.stub() as stub:
        from pjw.v1 import job_worker_pb2 as pb

        first = pb.WriteInputRequest(upload="part", data=whole[:700])
        assert [each.offset for each in stub.WriteInput(iter([first]))][-1] == 700
        before = [job.id for job in client.list()]
        # the refusal takes it away, too
        with pytest.raises(errors.CopyError, match="it broke off after 700 bytes"):
            client.start(JobSpec("true", upload="part"))
        assert [job.id for job in client.list()] == before
        assert stored(service) == []
        list(stub.WriteInput(iter([pb.WriteInputRequest(upload="part", data=whole[:700])])))
        rest = pb.WriteInputRequest(upload="part", offset=700, data=whole[700:], end=True)
        assert [each.ended for each in stub.WriteInput(iter([rest]))][-1]
        job = client.start(JobSpec("cat x", upload="part"))
        assert b"".join(client.logs(job.id)) == b"whole\n"


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_archives(service: Service, what: str) -> None:
    """Refused with the reason, and nothing of the job stays."""
    end = b"" if what.startswith(("cut", "nothing", "no archive")) else END
    with service.client() as client:
        before = [job.id for job in client.list()]
        sent(service, "hostile", [HOSTILE[what] + end])
        with pytest.raises(errors.CopyError, match=r"^cannot unpack the upload: cannot "):
            client.start(JobSpec("true", upload="hostile"))
        assert stored(service) == []
        assert [job.id for job in client.list()] == before


def test_no_room_is_told(service: Service) -> None:
    """What the kernel refuses the program in the job is the reason, by name."""
    with service.client() as client:
        sent(service, "twice", [entry("a", data=b"x") + entry("a/b", data=b"y") + END])
        with pytest.raises(errors.CopyError, match=r"cannot unpack the upload: cannot .* a/b: "):
            client.start(JobSpec("true", upload="twice"))


def test_in_the_queue(own_service: Service, project: Path) -> None:
    """It stays as long as a job there is to have it, also over a restart."""
    with own_service.client() as client:
        name = client.upload([str(project)]).name
        made = client.submit(
            [JobSpec("cat include/words.h", upload=name, queue=QueueSpec(held=True)) for _ in range(2)]
        )
        own_service.stop()
        own_service.start()
        assert len(stored(own_service)) == 1
        for job in made:
            client.release(job.id)
            client.wait(job.id)
            assert b"built in a job" in b"".join(client.logs(job.id))
        wait_for(lambda: not stored(own_service))
        with pytest.raises(errors.CopyError):
            client.submit([JobSpec("true", upload=name)])


def test_another_attempt_has_it_too(service: Service) -> None:
    """A job that is tried again begins with the same files."""
    with service.client() as client:
        sent(service, "again", [entry("x", data=b"text\n") + END])
        spec = JobSpec(
            "cat x; rm x; exit 1", upload="again", queue=QueueSpec(retry=Retry(1, backoff_seconds=0))
        )
        [job] = client.submit([spec])
        last = client.wait(job.id)
        assert last.attempt == 2 and b"".join(client.logs(last.id)) == b"text\n"


def test_an_error_in_the_queue_is_the_job_s_end(service: Service) -> None:
    """With the reason, and not tried for ever."""
    with service.client() as client:
        sent(service, "bad", [b"no archive" * 100])
        [job] = client.submit([JobSpec("true", upload="bad")])
        ended = client.wait(job.id)
        assert ended.reason is EndReason.START_FAILED
        assert ended.detail.startswith("cannot unpack the upload: cannot read the archive: ")


def test_there_are_not_too_many(own_service: Service) -> None:
    """A client has so many uploads at once."""
    with own_service.client() as client:
        for number in range(PER_CLIENT_MAX):
            sent(own_service, f"u{number}", [END])
        with pytest.raises(grpc.RpcError, match=f"no more than {PER_CLIENT_MAX} may be"):
            sent(own_service, "one-more", [END])
        for number in range(PER_CLIENT_MAX):
            client.start(JobSpec("true", upload=f"u{number}"))


async def test_the_asynchronous_client(service: Service, project: Path) -> None:
    """It sends as the other one does."""
    async with AsyncClient(service.address, *service.files()) as client:
        uploaded = await client.upload([(str(project), "p")])
        job = await client.start(JobSpec("cat p/include/words.h", upload=uploaded.name))
        assert b"built in a job" in b"".join([piece async for piece in client.logs(job.id)])


def test_a_kill_while_it_is_unpacked(own_service: Service) -> None:
    """A job whose start nobody has answered begins with all of its files, or not at all."""
    files_count = 20_000
    entries = [entry(f"d/{number}", data=b"x") for number in range(files_count)]
    with own_service.client() as client:
        sent(
            own_service,
            "many",
            [b"".join(entries[at : at + 100]) for at in range(0, files_count, 100)] + [END],
        )
        with own_service.stub() as stub:
            from pjw.v1 import job_worker_pb2 as pb

            spec = pb.StartRequest(command="ls d | wc -l", upload="many")
            starting = stub.Start.future(spec)
            wait_for(lambda: list(own_service.state.glob("scratch/*/d/1000")))
            launcher, server = own_service.launcher_pid(), own_service.pid
            os.kill(launcher, signal.SIGKILL)
            os.kill(server, signal.SIGKILL)
            assert starting.exception() is not None
        assert own_service.process is not None
        own_service.process.wait()
        own_service.start()
        [job] = list(client.list())
        ended = client.wait(job.id)
        if ended.state is JobState.EXITED:
            assert b"".join(client.logs(job.id)).split() == [str(files_count).encode()]


def test_the_launcher_opens_nothing_of_a_job(service: Service, tmp_path: Path) -> None:
    """Neither server nor launcher opens a name of an archive, or one below the job's files, by strace."""
    if shutil.which("strace") is None:
        pytest.skip("no strace")
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-e", "trace=open,openat,openat2", "-o", str(trace)]
    traced = [*command, "-p", str(service.launcher_pid()), "-p", str(service.pid)]
    with subprocess.Popen(traced, stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        while b"attached" not in strace.stderr.readline():
            pass
        with service.client() as client:
            sent(service, "one", [entry("marked/file", data=b"x") + END])
            job = client.start(JobSpec("exec sleep 600", upload="one"))
            client.copy_from(job.id, "marked", str(tmp_path / "back"))
            client.copy_to(job.id, str(tmp_path / "back"), "marked/again")
            # what was started meanwhile is traced as well: a job opens what it likes
            ours = {thread for pid in (service.launcher_pid(), service.pid) for thread in threads(pid)}
            strace.send_signal(signal.SIGINT)
            strace.stderr.read()
            # to remove them, the launcher goes through their directories
            client.stop(job.id, grace=0)
    lines = trace.read_text(errors="replace").splitlines()
    opened = [line for line in lines if line.split()[0] in ours]
    # it saw what they do, and that was not this
    assert any("openat(" in line for line in opened)
    own = [line for line in opened if "marked" in line or f"scratch/{job.id}/" in line]
    assert own == []
