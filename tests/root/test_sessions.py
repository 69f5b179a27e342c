"""Sessions, other commands in jobs that run, by the library: exact, counted, outliving what serves them."""

import asyncio
import hashlib
import os
import select
import signal
from collections.abc import Sequence
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from pjw.errors import (
    InvalidJobError,
    JobNotFoundError,
    JobStateError,
    LaunchError,
    LimitReachedError,
    SessionNotFoundError,
    WorkdirError,
)
from pjw.launcher.protocol import SESSIONS_MAX
from pjw.model import EndReason, ExitStatus, JobSpec, JobState, Session
from pjw.worker import Part, Worker
from pjw.worker import sessions as sessions_module
from pjw.worker.session_files import SessionFiles, SessionRequest
from pjw.worker.state_dir import StateDir
from tests.support.service import spawner_of, wait_for
from tests.support.worker_harness import (
    DEADLINE_SECONDS,
    MIB,
    Bench,
    launchers_of,
    processes_where,
    python,
    read_all,
    start,
    start_said,
    status_words,
)

SLEEP = ["sleep", "600"]


async def execute(worker: Worker, job_id: int, command: str | Sequence[str], **how: Any) -> Session:
    """Start a command in a job."""
    detached = how.pop("detached", False)
    return await worker.exec(job_id, JobSpec(command, **how), detached=detached)


async def output_of(worker: Worker, session: Session, *, stderr: bool = False) -> bytes:
    """All that a session writes, to its end."""
    part = Part(session=session.number, stderr=stderr)
    return b"".join([data async for data in worker.logs(session.job_id, part)])


async def run(worker: Worker, job_id: int, command: str | Sequence[str], **how: Any) -> tuple[Session, bytes]:
    """Run a command in a job to its end; how it ended, and its output."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        session = await execute(worker, job_id, command, **how)
        output = await output_of(worker, session)
        return await worker.wait_session(job_id, session.number), output


async def said(worker: Worker, session: Session, text: bytes) -> None:
    """Wait until a session has written *text*."""
    got = b""
    async with (
        asyncio.timeout(DEADLINE_SECONDS),
        aclosing(worker.logs(session.job_id, Part(session=session.number))) as pieces,
    ):
        async for data in pieces:
            got += data
            if text in got:
                return
    raise AssertionError(f"the session ended without saying {text!r}: {got!r}")


def is_ready_within(descriptor: int, milliseconds: int) -> bool:
    """Whether a descriptor becomes readable in time."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(milliseconds))


def supervisors(bench: Bench, job_id: int) -> list[int]:
    """The processes that wait for the commands of a job's sessions."""
    pids = [int(pid) for pid in (bench.cgroups(job_id)[0] / "cgroup.procs").read_text().split()]
    init = bench.init_pid(job_id)
    return [pid for pid in pids if pid != init and status_words(pid).get("Uid", "").split()[:1] == ["0"]]


# --- how it ends


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("exit 0", ExitStatus(0)),
        ("exit 3", ExitStatus(3)),
        ("kill -9 $$", ExitStatus(signal=9)),
        (["true"], ExitStatus(0)),
        ("exit 255", ExitStatus(255)),
    ],
)
async def test_it_ends_as_its_command_does(
    worker: Worker, command: str | list[str], status: ExitStatus
) -> None:
    """Its exit code, or its signal; the job goes on."""
    job = await start(worker, SLEEP)
    session, _ = await run(worker, job.id, command)
    assert (session.state, session.exit_status) == (JobState.EXITED, status)
    assert session.reason is EndReason.COMPLETED
    assert (await worker.get(job.id)).state is JobState.RUNNING


async def test_what_cannot_be_executed(bench: Bench, worker: Worker) -> None:
    """No such program, none that may be executed, no such directory: then there is no session."""
    job = await start(worker, SLEEP)
    with pytest.raises(LaunchError, match="no such file"):
        await execute(worker, job.id, ["/no/such"])
    with pytest.raises(LaunchError, match="permission denied"):
        await execute(worker, job.id, ["/etc/passwd"])
    with pytest.raises(WorkdirError):
        await execute(worker, job.id, ["true"], workdir="/no/such")
    with pytest.raises(SessionNotFoundError):
        await worker.wait_session(job.id, 1)
    assert not (bench.state / "jobs" / "sessions").exists()


async def test_output_is_whole_to_the_byte(worker: Worker) -> None:
    """Every byte of both outputs, apart, whatever they are."""
    job = await start(worker, SLEEP)
    script = (
        "import os,sys\n"
        "data = bytes(range(256)) * 40000\n"
        "os.set_blocking(1, True)\n"
        "sys.stdout.buffer.write(data); sys.stdout.flush()\n"
        "sys.stderr.buffer.write(data[::-1][:100000]); sys.stderr.flush()\n"
    )
    session = await execute(worker, job.id, python(script))
    data = bytes(range(256)) * 40000
    assert await output_of(worker, session) == data
    assert await output_of(worker, session, stderr=True) == data[::-1][:100000]


async def test_input_is_whole_to_the_byte(worker: Worker) -> None:
    """What is streamed comes in, with its end."""
    job = await start(worker, SLEEP)
    data = os.urandom(3 * MIB)
    session = await execute(worker, job.id, ["sha256sum"], input=True)
    async with worker.write_input(job.id, session=session.number) as writer:
        for offset in range(0, len(data), MIB):
            await writer.write(writer.offset, data[offset : offset + MIB])
        await writer.write(writer.offset, b"", end=True)
    assert (await output_of(worker, session)).split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert (await worker.wait_session(job.id, session.number)).exit_status == ExitStatus(0)


async def test_it_is_in_the_job(bench: Bench, worker: Worker) -> None:
    """The job's user, files, processes, name and cgroup; the same environment, and what was asked for."""
    job = await start_said(worker, "echo one >file; echo ready; sleep 600", b"ready\n")
    script = (
        "cat /run/job/file; hostname; echo $PJW_JOB_ID $HOME $A; pwd; id -u; ulimit -c;"
        " cat /proc/1/comm; cat /proc/self/cgroup"
    )
    session, output = await run(worker, job.id, script, env={"A": "b"}, workdir="/tmp")
    assert session.exit_status == ExitStatus(0), output
    lines = output.decode().splitlines()
    assert lines[:4] == ["one", f"job-{job.id}", f"{job.id} /run/job b", "/tmp"]
    assert lines[4] == str(bench.settings.uid_first)
    assert lines[6] == "pjw-init"
    assert all(line.endswith("/") for line in lines[7:]), lines


async def test_its_processes_and_memory_count_as_the_job_s(bench: Bench, worker: Worker) -> None:
    """What a session may not have is what its job may not have."""
    job = await start(worker, SLEEP, memory_max_bytes=64 * MIB, pids_max=8)
    # less than the limit, then more
    held = "import sys\nx = bytearray({} * 2**20)\nprint('held', flush=True)\nsys.stdin.read()\n"
    session = await execute(worker, job.id, python(held.format(40)), input=True)
    await said(worker, session, b"held\n")
    # the supervisor, and the command, which is its child
    [supervisor] = supervisors(bench, job.id)
    command = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().strip()
    for cgroup in bench.cgroups(job.id):
        assert {str(supervisor), command} <= set((cgroup / "cgroup.procs").read_text().split())
    async with worker.write_input(job.id, session=session.number) as writer:
        await writer.write(0, b"", end=True)
    assert (await worker.wait_session(job.id, session.number)).exit_status == ExitStatus(0)
    session, output = await run(worker, job.id, python(held.format(200)))
    assert (session.exit_status, output) == (ExitStatus(signal=9), b"")
    # init, its command, the supervisor and this program leave room for four
    forks = (
        "import os, time\n"
        "for count in range(20):\n"
        "    try:\n"
        "        if os.fork() == 0: time.sleep(600)\n"
        "    except BlockingIOError:\n"
        "        print(count)\n"
        "        break\n"
    )
    session, output = await run(worker, job.id, python(forks))
    assert (session.exit_status, output) == (ExitStatus(0), b"4\n")
    ended = await worker.stop(job.id, 0)
    assert ended.usage is not None
    assert (ended.usage.oom_kills, ended.reason) == (1, EndReason.STOPPED)
    assert ended.usage.memory_peak_bytes > 40 * MIB


async def test_what_a_session_leaves_belongs_to_its_job(worker: Worker) -> None:
    """A process in the background neither holds the session nor ends with it, whatever it writes."""
    job = await start(worker, SLEEP)
    session, output = await run(worker, job.id, "yes & echo $! >pid; sleep 0.1")
    assert session.exit_status == ExitStatus(0)
    assert output.startswith(b"y\n")
    session, _ = await run(worker, job.id, "sleep 600 & echo $! >pid")
    session, _ = await run(worker, job.id, "kill -0 $(cat pid)")
    assert session.exit_status == ExitStatus(0)


# --- the end of the job


async def test_a_stop_ends_sessions(bench: Bench, worker: Worker) -> None:
    """SIGTERM reaches their commands: 143, or 137 where the job was quicker. The job's record is right."""
    job = await start(worker, SLEEP)
    session = await execute(worker, job.id, SLEEP)
    stopped = await worker.stop(job.id)
    assert (stopped.state, stopped.exit_status) == (JobState.EXITED, ExitStatus(signal=15))
    ended = await worker.wait_session(job.id, session.number)
    assert ended.exit_status in (ExitStatus(signal=15), ExitStatus(signal=9))
    bench.check_nothing_remains()


async def test_the_end_of_the_command_ends_sessions(bench: Bench, worker: Worker) -> None:
    """Nobody is left of a job that has ended: 137, and never 0."""
    job = await start_said(worker, "mkfifo go; echo ready; read line <go", b"ready\n")
    session = await execute(worker, job.id, "trap '' TERM; echo here; sleep 600")
    await said(worker, session, b"here\n")
    await run(worker, job.id, "echo >go")
    ended_job = await worker.wait(job.id)
    assert ended_job.exit_status == ExitStatus(0)
    ended = await worker.wait_session(job.id, session.number)
    assert (ended.state, ended.exit_status, ended.reason) == (
        JobState.EXITED,
        ExitStatus(signal=9),
        EndReason.STOPPED,
    )
    bench.check_nothing_remains()
    with pytest.raises(JobStateError, match="it is exited"):
        await execute(worker, job.id, ["true"])


async def test_nobody_who_is_stopped_holds_up_the_end_of_a_job(bench: Bench, worker: Worker) -> None:
    """With spawner, launcher and supervisor stopped the record is written, and init is gone (F5, F6)."""
    job = await start_said(worker, "mkfifo go; echo ready; read line <go", b"ready\n")
    first = await execute(worker, job.id, SLEEP)
    second = await execute(worker, job.id, SLEEP)
    [launcher] = launchers_of(os.getpid())
    spawner = spawner_of(launcher)
    assert spawner is not None
    pidfd = os.pidfd_open(bench.init_pid(job.id))
    status = bench.state / "jobs" / str(job.id) / "status"
    command = next(pid for pid in bench.processes() if status_words(pid)["Name"] == "sh")
    stopped = [launcher, spawner, *supervisors(bench, job.id)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        os.kill(command, signal.SIGKILL)
        await asyncio.wait_for(asyncio.to_thread(wait_for, lambda: b"\nended " in status.read_bytes()), 5)
        assert is_ready_within(pidfd, 1000), "init is held up"
    finally:
        os.close(pidfd)
        for pid in (launcher, spawner):
            os.kill(pid, signal.SIGCONT)
    await worker.wait(job.id)
    bench.check_nothing_remains()
    for session in (first, second):
        assert (await worker.wait_session(job.id, session.number)).exit_status == ExitStatus(signal=9)


async def test_a_killed_supervisor(bench: Bench, worker: Worker) -> None:
    """Nobody knows how such a session ended, and that is said; the job does not notice, nor hang."""
    sessions_module._JOB_ENDS_SECONDS, before = 0.2, sessions_module._JOB_ENDS_SECONDS  # type: ignore[misc]
    try:
        job = await start(worker, SLEEP)
        session = await execute(worker, job.id, SLEEP)
        [supervisor] = supervisors(bench, job.id)
        os.kill(supervisor, signal.SIGKILL)
        ended = await worker.wait_session(job.id, session.number)
        assert (ended.state, ended.exit_status) == (JobState.LOST, None)
        assert (await worker.get(job.id)).state is JobState.RUNNING
        await worker.stop(job.id, 0)
        bench.check_nothing_remains()
    finally:
        sessions_module._JOB_ENDS_SECONDS = before  # type: ignore[misc]


async def test_a_killed_init(bench: Bench, worker: Worker) -> None:
    """It is the parent of what waits for sessions. They end with it, and nobody says that they ended well."""
    job = await start(worker, SLEEP)
    session = await execute(worker, job.id, "trap '' TERM; echo here; sleep 600")
    await said(worker, session, b"here\n")
    [supervisor] = supervisors(bench, job.id)
    assert status_words(supervisor)["PPid"] == str(bench.init_pid(job.id))
    os.kill(bench.init_pid(job.id), signal.SIGKILL)
    assert (await worker.wait(job.id)).exit_status != ExitStatus(0)
    ended = await worker.wait_session(job.id, session.number)
    assert (ended.state, ended.exit_status) in (
        (JobState.EXITED, ExitStatus(signal=9)),
        (JobState.LOST, None),
    )
    bench.check_nothing_remains()


async def test_a_killed_spawner(bench: Bench, worker: Worker) -> None:
    """Its sessions go on, and hold up no end."""
    job = await start(worker, SLEEP)
    session = await execute(worker, job.id, "echo here; sleep 600")
    await said(worker, session, b"here")
    [launcher] = launchers_of(os.getpid())
    spawner = spawner_of(launcher)
    assert spawner is not None
    pidfd = os.pidfd_open(spawner)
    os.kill(spawner, signal.SIGKILL)
    # a request that it took before its end would be lost with it, and the client told so
    assert is_ready_within(pidfd, 1000)
    os.close(pidfd)
    assert (await run(worker, job.id, "echo again"))[1] == b"again\n"
    assert (await worker.stop(job.id, 0)).state is JobState.EXITED
    ended = await worker.wait_session(job.id, session.number)
    assert ended.exit_status in (ExitStatus(signal=15), ExitStatus(signal=9))
    bench.check_nothing_remains()


# --- restarts


async def test_it_outlives_server_and_launcher(bench: Bench) -> None:
    """The next worker has the same session: it reads on, writes on, and knows its end."""
    first = await bench.open()
    job = await start(first, SLEEP)
    session = await execute(first, job.id, "while read line; do echo got $line; done; exit 3", input=True)
    async with first.write_input(job.id, session=session.number) as writer:
        await writer.write(0, b"one\n")
    await said(first, session, b"got one\n")
    ended = await execute(first, job.id, "exit 4")
    await first.wait_session(job.id, ended.number)
    await bench.close(first)

    second = await bench.open()
    async with second.write_input(job.id, session=session.number) as writer:
        assert writer.offset == 4
        await writer.write(4, b"two\n", end=True)
    assert await output_of(second, session) == b"got one\ngot two\n"
    assert (await second.wait_session(job.id, session.number)).exit_status == ExitStatus(3)
    assert (await second.wait_session(job.id, ended.number)).exit_status == ExitStatus(4)
    third = await execute(second, job.id, ["true"])
    assert third.number == 3


async def test_a_request_starts_one_command(worker: Worker) -> None:
    """However often it is made."""
    job = await start(worker, SLEEP)
    made = [execute(worker, job.id, "echo x >>file; sleep 600", request_id="r") for _ in range(3)]
    found = await asyncio.gather(*made)
    again = await execute(worker, job.id, "echo x >>file; sleep 600", request_id="r")
    assert {session.number for session in (*found, again)} == {1}


# --- the lease


@pytest.fixture
async def hasty(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker that hangs sessions up soon."""
    monkeypatch.setattr(sessions_module, "LEASE_SECONDS", 0.5)
    return await bench.open(stop_grace_seconds=1)


async def test_a_session_whose_client_has_gone_is_hung_up(bench: Bench, hasty: Worker) -> None:
    """SIGHUP after the lease; not while somebody looks at it, nor a detached one."""
    job = await start(hasty, SLEEP)
    detached = await execute(hasty, job.id, "echo here; sleep 600", detached=True)
    kept = await execute(hasty, job.id, "trap 'echo bye; exit 9' HUP; echo here; while :; do sleep 0.1; done")
    waits = asyncio.ensure_future(hasty.wait_session(job.id, kept.number))
    left = await execute(hasty, job.id, "trap '' HUP; echo here; while :; do sleep 0.1; done")
    # the wait begins when SIGHUP may have come already, and sees the SIGKILL that follows
    await asyncio.sleep(1)
    ended = await asyncio.wait_for(hasty.wait_session(job.id, left.number), DEADLINE_SECONDS)
    assert ended.exit_status == ExitStatus(signal=9)
    assert ended.reason is EndReason.STOPPED
    assert not waits.done()
    waits.cancel()
    await asyncio.wait({waits})
    async with asyncio.timeout(DEADLINE_SECONDS):
        while runs(bench, b"echo bye"):
            await asyncio.sleep(0.05)
    assert (await hasty.wait_session(job.id, kept.number)).exit_status == ExitStatus(9)
    await said(hasty, detached, b"here")


def runs(bench: Bench, words: bytes) -> bool:
    """Whether a job has a process with these words in its command line: to ask for its session keeps that."""
    lines = []
    for pid in bench.processes():
        with suppress(FileNotFoundError, ProcessLookupError):
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return any(words in line for line in lines)


async def test_an_ended_session_is_forgotten(bench: Bench, hasty: Worker) -> None:
    """With its files, when nobody has looked at it for a while."""
    job = await start(hasty, SLEEP)
    session, _ = await run(hasty, job.id, "exit 3")
    directory = bench.state / "jobs" / "sessions"
    assert directory.exists()
    await asyncio.to_thread(wait_for, lambda: not directory.exists())
    with pytest.raises(SessionNotFoundError, match=f"no session 1 of job {job.id}"):
        await hasty.wait_session(job.id, session.number)


# --- whose, and how many


async def test_others_have_no_session_in_a_job(worker: Worker) -> None:
    """Another's job is none; nor is another's session."""
    job = await start(worker, SLEEP, "alice")
    with pytest.raises(JobNotFoundError):
        await worker.exec(job.id, JobSpec(["true"]), "bob")
    session = await worker.exec(job.id, JobSpec(["cat"], input=True), "alice")
    with pytest.raises(SessionNotFoundError):
        await worker.wait_session(job.id, session.number, "bob")
    with pytest.raises(SessionNotFoundError):
        await worker.read_logs(job.id, Part(session=session.number), "bob")
    with pytest.raises(SessionNotFoundError):
        async with worker.write_input(job.id, "bob", session.number):
            pass
    with pytest.raises(JobNotFoundError):
        await worker.exec(12345, JobSpec(["true"]), "alice")


async def test_a_job_has_so_many_sessions(worker: Worker) -> None:
    """At sixteen the next is refused, in the worker; when one has ended there is room again."""
    job = await start(worker, SLEEP)
    sessions = await asyncio.gather(
        *(execute(worker, job.id, "read line", input=True) for _ in range(SESSIONS_MAX))
    )
    with pytest.raises(LimitReachedError, match="16 sessions"):
        await execute(worker, job.id, ["true"])
    async with worker.write_input(job.id, session=sessions[0].number) as writer:
        await writer.write(0, b"\n", end=True)
    await worker.wait_session(job.id, sessions[0].number)
    ended = None
    async with asyncio.timeout(30):
        while ended is None:
            # the launcher hears of an end a moment after it is recorded
            with suppress(JobStateError):
                ended, _ = await run(worker, job.id, "exit 3")
    assert ended.exit_status == ExitStatus(3)


async def test_no_two_sessions_have_one_number(bench: Bench) -> None:
    """However many are made at once, in as many threads."""
    (bench.state / "jobs" / "1").mkdir(parents=True)
    with closing(StateDir(str(bench.state), os.geteuid())) as state:
        files = SessionFiles(state)
        asked = SessionRequest("true", 0)
        made = await asyncio.gather(*(asyncio.to_thread(files.create, 1, asked, None) for _ in range(200)))
        for each in made:
            for descriptor in each.descriptors:
                os.close(descriptor)
            files.remove(each.key)
    assert sorted(each.key for each in made) == [(1, number) for number in range(1, 201)]


async def test_what_a_session_writes_is_bounded_and_counted(worker: Worker) -> None:
    """By the job's limit of output, for each session; and it is stored for its client."""
    job = await start(worker, SLEEP, output_max_bytes=MIB)
    session, output = await run(worker, job.id, "yes")
    assert len(output) == MIB
    assert (session.exit_status, session.reason) == (ExitStatus(signal=9), EndReason.OUTPUT_LIMIT)
    assert (await worker.quota()).stored_bytes == MIB


async def test_a_session_without_input_takes_none(worker: Worker) -> None:
    """Its stdin is empty, as a job's."""
    job = await start(worker, SLEEP)
    session = await execute(worker, job.id, "cat; echo end; sleep 600")
    await said(worker, session, b"end\n")
    with pytest.raises(JobStateError, match="takes no input"):
        async with worker.write_input(job.id, session=session.number):
            pass
    with pytest.raises(InvalidJobError):
        JobSpec("")


async def test_nobody_of_the_host_is_there(bench: Bench, worker: Worker) -> None:
    """Neither the supervisor's memory nor its descriptors, nor a signal to it; and no way out by it."""
    job = await start(worker, SLEEP)
    script = (
        "import os\n"
        "found = []\n"
        "for pid in os.listdir('/proc'):\n"
        "    if pid.isdigit() and os.stat(f'/proc/{pid}').st_uid == 0 and pid != '1':\n"
        "        for name in ('root', 'cwd', 'exe', 'fd/0', 'ns/pid', 'mem', 'environ'):\n"
        "            look = open if name in ('mem', 'environ') else os.readlink\n"
        "            try:\n"
        "                look(f'/proc/{pid}/{name}')\n"
        "                found.append(name)\n"
        "            except PermissionError: pass\n"
        "        try:\n"
        "            os.kill(int(pid), 9); found.append('kill')\n"
        "        except PermissionError: found.append('safe')\n"
        "print(found, sorted(os.listdir('/proc/self/fd')))\n"
    )
    session, output = await run(worker, job.id, python(script))
    assert output == b"['safe'] ['0', '1', '2', '3']\n"
    assert session.exit_status == ExitStatus(0)
    seen = processes_where(lambda status: status["Name"] == "pjw-init" and status["Uid"].split()[0] == "0")
    assert bench.init_pid(job.id) in seen
    assert await read_all(worker, (await start(worker, ["true"])).id) == b""
