"""Workspaces: directories of clients that outlive jobs (S6): whose they are, quotas, removal, crashes."""

import asyncio
import os
import sqlite3
import tarfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path

import pytest

from pjw.arrays import Element
from pjw.errors import (
    CopyError,
    LimitReachedError,
    WorkspaceBusyError,
    WorkspaceNotFoundError,
)
from pjw.launcher.protocol import Refused, RemoveWorkspace, WorkspaceUse
from pjw.model import EndReason, Job, JobSpec, JobState, QueueSpec, Retry, TerminalSize
from pjw.worker import QueueSlots, Worker, workspaces
from pjw.worker.queue import Queue
from pjw.worker.settings import DiskMarks, Quotas, Retention
from tests.root.test_launcher_hostile import Peer, connect, peer
from tests.root.test_project_quota import quota_disk
from tests.root.test_upload import sent
from tests.support.disks import small_disk
from tests.support.service import Service, wait_for
from tests.support.worker_harness import ASK, MIB, Bench, open_bench, read_all
from tests.unit.test_archive_program import END, entry

__all__ = ["connect", "peer", "quota_disk"]

IDLE = "echo in; exec sleep 1000"
# fails beside another one of its kind
ALONE = "mkdir alone && rmdir alone"
MANY = QueueSlots(cpu_max_millicores=0)


@pytest.fixture
def clean_service(idle_service: Service) -> Service:
    """The shared service, without the jobs and workspaces that other tests have left."""
    for name in ("alice", "bob"):
        with idle_service.client(name) as client:
            for each in client.workspaces():
                client.remove_workspace(each.name)
    return idle_service


async def begin(
    worker: Worker, command: str, workspace: str = "work", client: str = "local", **more: object
) -> Job:
    """Start a job in a workspace."""
    return await worker.start(JobSpec(command, workspace=workspace, **more), client)  # type: ignore[arg-type]


async def say(
    worker: Worker, command: str, workspace: str = "work", client: str = "local", **more: object
) -> bytes:
    """Run a job in a workspace to its end; its output."""
    job = await begin(worker, command, workspace, client, **more)
    output = await read_all(worker, job.id)
    await worker.wait(job.id)
    return output


async def listed_once(
    worker: Worker, condition: Callable[[Mapping[str, int]], bool], client: str = "local"
) -> dict[str, int]:
    """The workspaces of a client with their bytes, once they are so: one was counted or removed."""
    async with asyncio.timeout(60):
        while True:
            found = {each.name: each.bytes for each in await worker.workspaces(client)}
            if condition(found):
                return found
            await asyncio.sleep(0.02)


async def counted(worker: Worker, name: str = "work", client: str = "local", least: int = 1) -> int:
    """Wait until what a workspace has was counted as so much; the number of bytes."""
    return (await listed_once(worker, lambda found: found.get(name, 0) >= least, client))[name]


async def gone(worker: Worker, name: str = "work") -> None:
    """Wait for the end of a removal that is under way, or over."""
    with suppress(WorkspaceNotFoundError):
        await worker.remove_workspace(name)


def directory(bench: Bench, name: str = "work", number: int = 0) -> Path:
    """Where a workspace lies on the host."""
    return bench.state / "workspaces" / str(number) / name


# --- what it is


async def test_it_outlives_jobs(worker: Worker, bench: Bench) -> None:
    """A job begins in it, and the next one finds what is there, also after a restart of pjwd."""
    assert await say(
        worker, 'pwd; echo "$PJW_WORKSPACE"; echo data > kept; id -u > "$PJW_WORKSPACE/uid"'
    ) == (b"/run/workspace\n/run/workspace\n")
    assert await say(worker, "cat kept; stat -c '%a %u' .; cat uid") == b"data\n700 %d\n%d\n" % (
        bench.settings.uid_first,
        bench.settings.uid_first,
    )
    await bench.close(worker)
    again = await bench.open()
    job = await begin(again, "cat kept")
    assert (job.workspace, job.workdir, job.exclusive) == ("work", "/run/workspace", False)
    assert await read_all(again, job.id) == b"data\n"
    assert (await again.wait(job.id)).workspace == "work"


async def test_the_rest_of_a_job_is_as_ever(worker: Worker) -> None:
    """Its own directory, a workdir that is asked for, and a job without a workspace sees none."""
    script = "echo 1 > $HOME/file; echo $HOME; pwd; ls /run"
    assert await say(worker, script, workdir="/usr") == b"/run/job\n/usr\njob\nworkspace\n"
    look = 'cd /run/workspace 2>&1; ls -A /run/workspace; echo "<$PJW_WORKSPACE>"'
    job = await worker.start(JobSpec(look))
    output = await read_all(worker, job.id)
    assert b"<>" in output
    assert b"ermission denied" in output


async def test_its_mount_gives_no_privilege(worker: Worker) -> None:
    """Neither set-id programs nor devices work there; programs do."""
    mount = await say(worker, "grep ' /run/workspace ' /proc/self/mountinfo")
    options = mount.split()[5].split(b",")
    assert {b"rw", b"nosuid", b"nodev"} <= set(options)
    assert b"noexec" not in options
    assert await say(worker, "cp /bin/true program && ./program && echo ran") == b"ran\n"


async def test_a_session_is_there_too(worker: Worker) -> None:
    """`pjw exec` begins where the job did."""
    job = await begin(worker, IDLE)
    session = await worker.exec(job.id, JobSpec("pwd; echo $PJW_WORKSPACE; echo 1 > of-session"))
    await worker.wait_session(job.id, session.number)
    await worker.stop(job.id)
    assert await say(worker, "ls") == b"of-session\n"


async def test_jobs_share_it(worker: Worker) -> None:
    """Two jobs of a client at once, each with what the other writes."""
    one = await begin(worker, "mkfifo pipe && echo made && cat pipe")
    [made] = [chunk async for chunk in _first(worker, one.id)]
    assert made == b"made\n"
    assert await say(worker, "echo hello > pipe") == b""
    assert (await read_all(worker, one.id)) == b"made\nhello\n"


async def _first(worker: Worker, job_id: int) -> AsyncIterator[bytes]:
    async for chunk in worker.logs(job_id):
        yield chunk
        return


# --- whose it is


async def test_another_client_has_another(worker: Worker, bench: Bench) -> None:
    """The same name is another directory; neither lists, sees, names nor removes that of the other."""
    await say(worker, "echo secret > file", client="alice")
    assert await say(worker, "ls; ls /run/workspace/.. | sort", client="bob") == b"job\nworkspace\n"
    assert [each.name for each in await worker.workspaces("bob")] == ["work"]
    await say(worker, "true", "other", client="bob")
    assert [each.name for each in await worker.workspaces("alice")] == ["work"]
    with pytest.raises(WorkspaceNotFoundError, match=r"^no workspace other$"):
        await worker.remove_workspace("other", "alice")
    with pytest.raises(WorkspaceNotFoundError):
        await worker.remove_workspace("never", "alice")
    look = f"ls {bench.state}/workspaces 2>&1; cat {directory(bench)}/file 2>&1"
    assert b"secret\n" not in await say(worker, look, client="bob")
    assert directory(bench, number=0).stat().st_uid != directory(bench, number=1).stat().st_uid


async def test_a_directory_of_another_user_is_refused(worker: Worker, bench: Bench) -> None:
    """When the operator moves the range of user ids, nobody gets what was another's."""
    await say(worker, "echo 1 > file")
    os.chown(directory(bench), bench.settings.uid_first + 5, -1)
    with pytest.raises(Exception, match="belongs to user id"):
        await begin(worker, "cat file")
    assert await worker.workspaces()
    await worker.remove_workspace("work")
    assert await say(worker, "ls") == b""


async def test_a_mode_of_nothing_is_mended(worker: Worker) -> None:
    """A job cannot lock the next one out."""
    await say(worker, "chmod 0 .")
    assert await say(worker, "stat -c %a .") == b"700\n"


# --- exclusive


async def test_exclusive_is_refused_beside_another(worker: Worker) -> None:
    """In words, either way round; in another workspace, and for another client, it starts."""
    shared = await begin(worker, IDLE)
    with pytest.raises(WorkspaceBusyError, match=f"job {shared.id} uses it already") as refused:
        await begin(worker, IDLE, exclusive=True)
    assert (refused.value.workspace, refused.value.holder) == ("work", shared.id)
    assert refused.value.hint == "wait for its end, or put the job into the queue: --queue"
    other = await begin(worker, IDLE, client="bob", exclusive=True)
    third = await begin(worker, IDLE, "third", exclusive=True)
    await worker.stop(shared.id)
    alone = await begin(worker, IDLE, exclusive=True)
    with pytest.raises(WorkspaceBusyError, match=f"job {alone.id} uses it alone"):
        await begin(worker, "true")
    for job in (alone, other, third):
        await worker.stop(job.id)
    assert await say(worker, "echo in") == b"in\n"


async def test_a_queued_job_waits_for_it(worker: Worker) -> None:
    """With a detail that says for what. Others of the client go first, but none that would share it."""
    running = await begin(worker, IDLE)
    queued = await begin(worker, "echo alone; ls", exclusive=True, queue=QueueSpec())
    behind = await begin(worker, "echo behind > file", queue=QueueSpec())
    elsewhere = await begin(worker, "true", "other", queue=QueueSpec())
    without = await worker.start(JobSpec("true", queue=QueueSpec()))
    await worker.wait(elsewhere.id)
    await worker.wait(without.id)
    shown = await worker.get(queued.id)
    assert shown.state is JobState.QUEUED
    assert shown.detail == f"waits for the workspace work, which job {running.id} uses"
    assert (await worker.get(behind.id)).state is JobState.QUEUED
    await worker.stop(running.id)
    assert await read_all(worker, queued.id) == b"alone\n"
    assert (await worker.wait(queued.id)).succeeded
    assert (await worker.wait(behind.id)).succeeded


async def test_many_that_wait_go_one_by_one(worker: Worker) -> None:
    """Twenty exclusive jobs: never two at once, and all of them run."""
    jobs = await worker.submit(
        [JobSpec(ALONE, workspace="work", exclusive=True, queue=QueueSpec()) for _ in range(20)]
    )
    ended = [await worker.wait(job.id) for job in jobs]
    assert [job.exit_status.code for job in ended if job.exit_status] == [0] * 20


async def test_a_count_lets_the_queue_go_on(bench: Bench) -> None:
    """What was refused for the bytes of the last count starts when there is less, with no other end."""
    worker = await bench.open(quotas=Quotas(workspace_bytes_max=2 * MIB))
    await say(worker, "head -c 3M /dev/zero > file")
    await counted(worker, least=3 * MIB)
    worker.reconfigure(bench.changed(quotas=Quotas()))
    last = await begin(worker, f"cd /run/job; {ASK}read line <&3; rm /run/workspace/file")
    queued = await begin(worker, "echo in", queue=QueueSpec(held=True))
    worker.reconfigure(bench.changed(quotas=Quotas(workspace_bytes_max=2 * MIB)))
    await worker.release(queued.id)
    bench.tell(last.id)
    async with asyncio.timeout(60):
        assert await read_all(worker, queued.id) == b"in\n"


async def test_two_that_are_refused_wait(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that is refused at a limit frees its workspace, and lets no other client try again for that."""
    freed: list[str] = []
    clients, refused, tell = ("alice", "bob"), asyncio.Event(), Queue.workspace_freed

    def note(queue: Queue, client: str) -> None:
        freed.append(client)
        tell(queue, client)
        if set(freed) == set(clients):
            refused.set()

    monkeypatch.setattr(Queue, "workspace_freed", note)
    worker = await bench.open(quotas=Quotas(stored_bytes_max=1000))
    for client in clients:
        await worker.wait((await worker.start(JobSpec("head -c 2000 /dev/zero"), client)).id)
    queued = [await begin(worker, "true", client=client, queue=QueueSpec()) for client in clients]
    async with asyncio.timeout(60):
        await refused.wait()
    await worker.wait((await worker.start(JobSpec("sleep 0.5"))).id)
    assert len(freed) < 10
    for job in queued:
        await worker.stop(job.id)


# --- arrays


async def test_elements_share_it(bench: Bench) -> None:
    """Two elements of an array at once, each with what the other writes; one that waits counts as one job."""
    worker = await bench.open(queue=MANY)
    await say(worker, "mkfifo pipe")
    script = "if [ $PJW_ARRAY_INDEX = 1 ]; then cat pipe; else echo hello > pipe; fi"
    array = await begin(worker, script, queue=QueueSpec(array="1-2"))
    assert (array.workspace, array.exclusive) == ("work", False)
    assert (await worker.wait(array.id)).succeeded
    element = await worker.get(Element(array.id, 1))
    assert (element.workspace, element.workdir) == ("work", "/run/workspace")
    assert await read_all(worker, element.id) == b"hello\n"
    held = await begin(worker, "true", queue=QueueSpec(array="1-1000", held=True))
    [work] = await worker.workspaces()
    assert work.jobs == 1
    with pytest.raises(WorkspaceBusyError, match=f"job {held.id} waits in the queue for it"):
        await worker.remove_workspace("work")
    await worker.stop(held.id)
    await worker.remove_workspace("work")


async def test_elements_that_are_alone(bench: Bench) -> None:
    """One at a time, in their order, however much room there is."""
    worker = await bench.open(queue=MANY)
    script = f"{ALONE} && echo $PJW_ARRAY_INDEX >> order"
    array = await begin(worker, script, exclusive=True, queue=QueueSpec(array="1-12%4"))
    ended = await worker.wait(array.id)
    assert ended.array is not None
    assert (ended.succeeded, ended.array.succeeded) == (True, 12)
    assert (await say(worker, "cat order")).split() == [b"%d" % index for index in range(1, 13)]


async def test_a_retry_is_there_again(worker: Worker) -> None:
    """Another attempt of an exclusive job has what the first one left."""
    job = await begin(
        worker,
        "test -e before || { touch before; exit 1; }",
        exclusive=True,
        queue=QueueSpec(retry=Retry(1, backoff_seconds=0)),
    )
    ended = await worker.wait(job.id)
    assert (ended.succeeded, ended.attempt, ended.workspace, ended.exclusive) == (True, 2, "work", True)


# --- uploads and copies


def test_an_upload_goes_there(clean_service: Service, tmp_path: Path) -> None:
    """Over what is there, and what else is there stays. `pjw cp` begins there, too."""
    service, source, out = clean_service, tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "a").write_text("one\n")
    upload = ("--workspace", "w", "--upload", str(source))
    assert service.ok("run", *upload, "cat a; echo made > b; ls -A /run/job") == "one\n"
    (source / "a").write_text("two\n")
    job = service.ok("start", *upload, "--workdir", "/", "exec sleep 1000").strip()
    service.ok("cp", f"{job}:b", str(out))
    assert out.read_text() == "made\n"
    service.ok("cp", str(out), f"{job}:c")
    service.ok("cp", str(out), f"{job}:/run/job/own")
    assert service.ok("exec", job, "cat a c; ls -A; ls -A /run/job") == "two\nmade\na\nb\nc\nown\n"


def test_all_that_a_start_may_bring(clean_service: Service) -> None:
    """Input, stderr apart, an upload and a workspace: init takes each descriptor for what it is."""
    with clean_service.client() as client:
        sent(clean_service, "all", [entry("file", data=b"uploaded\n") + END])
        spec = JobSpec(
            "cat; cat file; pwd; echo apart >&2",
            workspace="w",
            exclusive=True,
            upload="all",
            input=True,
            split_stderr=True,
        )
        job = client.start(spec)
        client.write_input(job.id, [b"typed\n"])
        assert b"".join(client.logs(job.id)) == b"typed\nuploaded\n/run/workspace\n"
        assert b"".join(client.logs(job.id, stderr=True)) == b"apart\n"
        assert client.wait(job.id).succeeded
        sent(clean_service, "more", [entry("more", data=b"1") + END])
        terminal = JobSpec("ls", workspace="w", upload="more", input=True, terminal=TerminalSize(24, 80))
        job = client.start(terminal)
        assert b"".join(client.logs(job.id)).split() == [b"file", b"more"]


def test_an_upload_that_cannot_be_unpacked(clean_service: Service) -> None:
    """No job comes to be, the workspace is free again, and has what came before the error."""
    with clean_service.client() as client:
        sent(clean_service, "leads-out", [entry("first", data=b"1") + entry("../x", data=b"2") + END])
        with pytest.raises(CopyError, match=r"leads out of the directory"):
            client.start(JobSpec("true", workspace="w", exclusive=True, upload="leads-out"))
        with pytest.raises(CopyError, match="there is none called leads-out"):
            client.start(JobSpec("true", workspace="w", exclusive=True, upload="leads-out"))
        job = client.start(JobSpec("ls -A", workspace="w", exclusive=True))
        assert b"".join(client.logs(job.id)) == b"first\n"
        # from the queue, which has no files for it any more
        sent(clean_service, "later", [b"no archive" * 60])
        queued = client.start(
            JobSpec("true", workspace="w", exclusive=True, upload="later", queue=QueueSpec())
        )
        assert client.wait(queued.id).reason is EndReason.START_FAILED
        client.remove_workspace("w")


def test_each_element_unpacks_it(clean_service: Service) -> None:
    """Several at once, over each other's files: each finds them whole."""
    entries = [entry(f"d/{number}", data=b"whole\n") for number in range(300)]
    entries.append(entry("link", tarfile.SYMTYPE, linkname="d"))
    with clean_service.client() as client:
        sent(clean_service, "each", [b"".join(entries) + END])
        array = client.start(
            JobSpec("cat link/* | uniq -c", workspace="w", upload="each", queue=QueueSpec(array="1-8"))
        )
        ended = client.wait(array.id)
        assert ended.array is not None
        assert (ended.array.succeeded, ended.array.count) == (8, 8)
        for index in range(1, 9):
            said = b"".join(client.logs(f"{array.id}_{index}"))
            assert said.split() == [b"300", b"whole"]


async def test_exclusive_holds_over_a_restart(worker: Worker, bench: Bench) -> None:
    """The next worker knows who is in it alone."""
    job = await begin(worker, IDLE, exclusive=True)
    await bench.close(worker)
    again = await bench.open()
    with pytest.raises(WorkspaceBusyError, match=f"job {job.id} uses it alone"):
        await begin(again, "true")
    with pytest.raises(WorkspaceBusyError, match=f"cannot remove the workspace work: job {job.id} uses it"):
        await again.remove_workspace("work")
    await again.stop(job.id)
    assert await say(again, "echo in") == b"in\n"


async def test_a_start_that_fails_gives_it_back(worker: Worker) -> None:
    """Whatever the reason is."""
    for wrong in (
        JobSpec(["/no/such"], workspace="work", exclusive=True),
        JobSpec("true", workspace="work", exclusive=True, workdir="/no/such"),
    ):
        with pytest.raises(Exception, match="cannot"):
            await worker.start(wrong)
    assert await say(worker, "echo in", exclusive=True) == b"in\n"


# --- quotas and retention


async def test_too_many_are_refused(bench: Bench) -> None:
    """With the numbers; one less, and it is made. A queued job counts from when it was put there."""
    worker = await bench.open(quotas=Quotas(workspaces_max=2))
    await say(worker, "true", "one")
    held = await begin(worker, "true", "two", queue=QueueSpec(held=True))
    with pytest.raises(LimitReachedError) as refused:
        await begin(worker, "true", "three")
    words = "cannot make the workspace three: local has 2 workspaces, and at most 2 may be"
    assert (str(refused.value), refused.value.limit, refused.value.most) == (words, "workspaces_max", 2)
    with pytest.raises(LimitReachedError):
        await begin(worker, "true", "three", queue=QueueSpec())
    await say(worker, "true", "three", client="bob")
    await worker.remove_workspace("one")
    await say(worker, "true", "three")
    await worker.stop(held.id)


async def test_its_bytes_count(bench: Bench) -> None:
    """In the account of the client, and in a quota of workspaces alone, with the numbers."""
    worker = await bench.open(quotas=Quotas(stored_bytes_max=4 * MIB))
    await say(worker, "head -c 3M /dev/zero > file")
    await counted(worker, least=3 * MIB)
    await say(worker, "head -c 3M /dev/zero > file2")
    await counted(worker, least=6 * MIB)
    with pytest.raises(
        LimitReachedError, match="of output, artifacts, input, scratch, workspaces and images"
    ) as refused:
        await begin(worker, "true")
    assert refused.value.limit == "stored_bytes_max"
    worker.reconfigure(bench.changed(quotas=Quotas(workspace_bytes_max=5 * MIB)))
    with pytest.raises(
        LimitReachedError, match=r"^the workspaces of local have 6.* and may have at most 5 ?M"
    ):
        await begin(worker, "true")
    # without one it starts
    assert (await worker.wait((await worker.start(JobSpec("true"))).id)).succeeded
    await worker.remove_workspace("work")
    # the first time that anybody asks: what there was then would be the answer for a second
    assert (await worker.quota()).stored_bytes < MIB
    assert await say(worker, "ls") == b""


async def test_a_count_does_not_rest_from_idleness(
    bench: Bench, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long nothing was to be counted before does not delay a count, and so no quota."""
    monkeypatch.setattr(workspaces, "_REST", 100)
    assert (await worker.wait((await worker.start(JobSpec("sleep 0.5"))).id)).succeeded
    await say(worker, "head -c 1M /dev/zero > file")
    async with asyncio.timeout(20):
        await counted(worker, least=MIB)


async def test_a_project_quota_bounds_it(quota_disk: Path) -> None:
    """Where the state directory's file system has them: by the kernel, for all of a client's together."""
    async with open_bench(quota_disk) as bench:
        worker = await bench.open(quotas=Quotas(workspace_bytes_max=4 * MIB))
        fill = "head -c 3M /dev/zero > file && echo whole"
        assert await say(worker, fill, "one") == b"whole\n"
        assert b"whole" not in await say(worker, f"({fill}) 2>&1", "two")
        assert await say(worker, fill, "one", client="bob") == b"whole\n"
        await worker.remove_workspace("one")
        assert await say(worker, "rm -f file; " + fill, "two") == b"whole\n"


async def test_what_is_unused_for_long_is_removed(bench: Bench) -> None:
    """By the time of the last use; not one that a job uses, or waits for."""
    worker = await bench.open()
    for name in ("old", "running", "queued", "new"):
        await say(worker, "echo 1 > file", name)
    running = await begin(worker, IDLE, "running")
    queued = await begin(worker, "true", "queued", queue=QueueSpec(held=True))
    await counted(worker, "new")
    await bench.close(worker)
    with closing(sqlite3.connect(bench.state / "jobs.sqlite")) as table:
        table.execute("UPDATE workspaces SET used_ns = used_ns - 100 * 1000000000 WHERE name <> 'new'")
        table.commit()
    worker = await bench.open(retention=Retention(workspace_age_seconds=50))
    found = await listed_once(worker, lambda found: len(found) < 4)
    assert list(found) == ["new", "queued", "running"]
    await gone(worker, "old")
    assert not directory(bench, "old").exists()
    for job in (running, queued):
        await worker.stop(job.id)


@pytest.mark.parametrize(
    ("marks", "fill"),
    [
        (DiskMarks(free_bytes_min=20 * MIB, free_inodes_min=0), "head -c 60M /dev/zero > file"),
        (DiskMarks(free_bytes_min=0, free_inodes_min=12_000), "seq 5000 | xargs touch"),
    ],
    ids=["bytes", "inodes"],
)
async def test_a_full_disk_ends_who_fills_it(marks: DiskMarks, fill: str) -> None:
    """Who fills a workspace is ended, however quickly it was full; before a neighbour with more scratch."""
    with small_disk(64) as disk:
        async with open_bench(disk) as bench:
            worker = await bench.open(disk=marks)
            script = f"cd; head -c 2M /dev/zero > file; seq 200 | xargs touch; {IDLE}"
            neighbour = await worker.start(JobSpec(script), "bob")
            await bench.wait_for_output(neighbour.id, b"in")
            job = await begin(worker, f"{fill}; exec sleep 1000")
            async with asyncio.timeout(60):
                assert (await worker.wait(job.id)).reason is EndReason.DISK_LIMIT
            assert (await worker.get(neighbour.id)).state is JobState.RUNNING
            await worker.stop(neighbour.id)
            await worker.remove_workspace("work")


# --- removal


async def test_a_removal(worker: Worker, bench: Bench) -> None:
    """All is gone when it returns; the name can be used at once, for an empty one."""
    await say(worker, "mkdir -p a/b && echo 1 > a/b/file && chmod 0 a")
    await worker.remove_workspace("work")
    assert await worker.workspaces() == []
    assert not directory(bench).exists()
    assert await say(worker, "ls -A; pwd") == b"/run/workspace\n"


async def test_one_in_use_is_not_removed(worker: Worker) -> None:
    """Neither one that a job uses, nor one that a queued job waits for: in words."""
    job = await begin(worker, IDLE)
    with pytest.raises(WorkspaceBusyError) as refused:
        await worker.remove_workspace("work")
    assert str(refused.value) == f"cannot remove the workspace work: job {job.id} uses it"
    assert refused.value.hint == f"wait for its end, or stop it: pjw stop {job.id}"
    queued = await begin(worker, "true", queue=QueueSpec(held=True))
    await worker.stop(job.id)
    with pytest.raises(WorkspaceBusyError, match=f"job {queued.id} waits in the queue for it"):
        await worker.remove_workspace("work")
    await worker.stop(queued.id)
    await worker.remove_workspace("work")


async def test_starts_and_removals_at_once(worker: Worker) -> None:
    """Each start has a whole workspace, or is refused; no removal takes one away under a job."""

    async def start() -> bool:
        try:
            return await say(worker, "echo 1 > file; sleep 0.02; cat file") == b"1\n"
        except WorkspaceBusyError as error:
            return "being removed" in str(error)

    async def remove() -> bool:
        with suppress(WorkspaceBusyError, WorkspaceNotFoundError):
            await worker.remove_workspace("work")
        return True

    for _ in range(5):
        done = await asyncio.gather(*(each() for _ in range(6) for each in (start, remove)))
        assert all(done)


async def test_links_lead_nowhere(worker: Worker, bench: Bench, tmp_path: Path) -> None:
    """Links in a workspace, to whatever on the host: counting, mounting and removing follow none of them."""
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("here")
    links = (
        f"ln -s {canary} link; ln -s / root; ln -s ../../.. up; ln -s {bench.state} state; mkdir d;"
        f" ln -s {canary}/file d/file; ln -s . loop; ln -s {canary} work"
    )
    await say(worker, links)
    assert await counted(worker) < MIB
    await worker.remove_workspace("work")
    assert (canary / "file").read_text() == "here"
    assert not directory(bench).exists()
    # and in the place of one: only root can put it there, and it is not followed
    directory(bench).symlink_to(canary)
    with pytest.raises(Exception, match=r"internal|cannot make the workspace"):
        await begin(worker, "ls")
    directory(bench).unlink()
    assert (canary / "file").stat().st_uid == 0


async def test_a_hostile_tree_is_removed(worker: Worker, bench: Bench) -> None:
    """Names of any bytes, thousands of files, many levels."""
    script = (
        "import os\n"
        "for number in range(1000): open(b'\\xff\\n%d' % number, 'w')\n"
        "for _ in range(1000): os.mkdir('d'); os.chdir('d')\n"
        "os.mkfifo('pipe')"
    )
    await worker.wait((await begin(worker, f'exec /usr/bin/python3 -I -S -c "{script}"')).id)
    await worker.remove_workspace("work")
    assert not directory(bench).exists()


# --- crashes and upgrades


async def test_a_kill_in_mid_removal(bench: Bench) -> None:
    """The next worker goes on with it: until it is done, nobody sees a part of the workspace."""
    worker = await bench.open()
    await say(worker, "echo 1 > file; mkdir a")
    await bench.close(worker)
    with closing(sqlite3.connect(bench.state / "jobs.sqlite")) as table:
        table.execute("UPDATE workspaces SET removing = 1")
        table.commit()
    (directory(bench) / "file").unlink()
    worker = await bench.open()
    assert await worker.workspaces() == []
    await gone(worker)
    assert await say(worker, "ls -A; echo end") == b"end\n"


async def test_a_launcher_killed_in_mid_making(worker: Worker, bench: Bench) -> None:
    """A directory that is not its client's yet becomes that at the next start."""
    directory(bench).mkdir(parents=True, mode=0o700)
    assert await say(worker, "stat -c %a . && echo 1 > file && cat file") == b"700\n1\n"


async def test_a_directory_of_no_table_is_removed(worker: Worker, bench: Bench) -> None:
    """A table of before came back: what it does not know never becomes another client's."""
    await say(worker, "echo secret > file")
    await bench.close(worker)
    with closing(sqlite3.connect(bench.state / "jobs.sqlite")) as table:
        table.execute("DELETE FROM workspaces")
        table.commit()
    worker = await bench.open()
    await asyncio.to_thread(wait_for, lambda: not directory(bench).exists())
    assert await say(worker, "ls -A; echo end") == b"end\n"


def test_kills_lose_nothing(make_service: Callable[..., Service]) -> None:
    """pjwd is killed while a job runs in a workspace, and while one is removed: nothing is half-made."""
    service = make_service().start()
    with service.client() as client:

        def said(command: str, workspace: str) -> bytes:
            job = client.start(JobSpec(command, workspace=workspace))
            output = b"".join(client.logs(job.id))
            client.wait(job.id)
            return output

        job = client.start(JobSpec("echo 1 > file; exec sleep 1000", workspace="kept", exclusive=True))
        said("mkdir d; cd d; seq 3000 | xargs touch", "large")
        with service.popen("workspace", "rm", "large") as removal:
            wait_for(lambda: _begun(service))
            service.kill("both")
            service.start()
            # it comes back, and waits for the end of the same removal
            assert removal.wait(60) == 0
        with pytest.raises(WorkspaceBusyError, match=f"job {job.id} uses it"):
            client.remove_workspace("kept")
        assert [each.name for each in client.workspaces()] == ["kept"]
        client.stop(job.id)
        assert said("cat file", "kept") == b"1\n"
        assert said("ls -A", "large") == b""


def _begun(service: Service) -> bool:
    """Whether some of the files are gone."""
    with suppress(FileNotFoundError):
        return len(os.listdir(service.state / "workspaces/0/large/d")) < 3_000
    return True


# --- the launcher alone


def test_the_launcher_takes_no_path(connect: Callable[..., Peer], bench: Bench) -> None:
    """A hostile server names a path, or another user: refused, and nothing is made or removed."""
    hostile = connect()
    for name in ("..", ".", "../../etc", "/etc", "a/b", "", "1", "a\n"):
        for request in (RemoveWorkspace(hostile.uid, name), WorkspaceUse(hostile.uid, name)):
            reply = hostile.ask(request)
            assert isinstance(reply, Refused)
            assert reply.kind == "invalid"
        if name:
            assert isinstance(hostile.launch(1, workspace=name), Refused)
    for uid in (0, 1, hostile.uid - 1, hostile.uid + 10):
        reply = hostile.ask(RemoveWorkspace(uid, "work"))
        assert isinstance(reply, Refused)
        assert "is not one for jobs" in reply.operation
    assert os.listdir(bench.state / "workspaces") == []


def test_the_launcher_opens_nothing_below(connect: Callable[..., Peer], bench: Bench) -> None:
    """A workspace that is a link, or whose client's directory is one, is not mounted, counted or removed."""
    hostile = connect()
    etc = bench.directory / "etc"
    etc.mkdir()
    (etc / "work").mkdir()
    (etc / "work" / "file").touch()
    place = bench.state / "workspaces"
    (place / "0").mkdir(mode=0o700)
    (place / "0" / "link").symlink_to(etc / "work")
    assert isinstance(hostile.launch(1, workspace="link"), Refused)
    hostile.ask(RemoveWorkspace(hostile.uid, "link"))
    assert (etc / "work" / "file").exists()
    assert (etc / "work").stat().st_uid == 0


# --- as a user


def test_a_virtual_environment_is_kept(clean_service: Service) -> None:
    """docs/workspaces.md: a Python job keeps its virtual environment between jobs."""
    script = (
        'test -d venv || { python3 -m venv --without-pip venv && echo "made venv"; };'
        ' venv/bin/python -c "import sys; print(sys.prefix)"'
    )
    run = ("run", "--workspace", "analysis", script)
    assert clean_service.ok(*run) == "made venv\n/run/workspace/venv\n"
    assert clean_service.ok(*run) == "/run/workspace/venv\n"
    assert clean_service.ok("workspace", "ls") == "analysis\n"
    assert clean_service.ok("workspace", "ls", client="bob") == ""
    assert clean_service.ok("workspace", "rm", "analysis") == "analysis\n"
    code, words = clean_service.refused("workspace", "rm", "analysis")
    assert (code, words) == (1, "pjw: error: no workspace analysis\nhint: pjw workspace ls\n")


def test_words_of_refusals(clean_service: Service) -> None:
    """As pjw tells them."""
    job = clean_service.ok("start", "--workspace", "w", "sleep 1000").strip()
    assert '"workspace": "w"' in clean_service.ok("get", job)
    assert clean_service.refused("run", "--workspace", "w", "--exclusive", "true")[1] == (
        f"pjw: error: cannot start the job in the workspace w: job {job} uses it already\n"
        "hint: wait for its end, or put the job into the queue: --queue\n"
    )
    assert clean_service.refused("workspace", "rm", "w")[1] == (
        f"pjw: error: cannot remove the workspace w: job {job} uses it\n"
        f"hint: wait for its end, or stop it: pjw stop {job}\n"
    )
    assert "is no name for a workspace" in clean_service.refused("run", "--workspace", "a/b", "true")[1]
    table = clean_service.at_terminal("workspace", "ls")
    assert table.splitlines()[0].split() == ["NAME", "SIZE", "FILES", "JOBS", "USED"]
