"""The life of a job: what it starts dies with it, stop reaches all of it, a bad start leaves nothing."""

import asyncio
import errno
import os
import signal
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from pjw.errors import InvalidJobError, JobNotFoundError, KernelError, LaunchError, describe_errno
from pjw.model import EndReason, ExitStatus, JobSpec, JobState
from pjw.worker import Worker
from tests.support.service import instance_cgroups, wait_for
from tests.support.worker_harness import (
    ASK,
    MIB,
    Bench,
    check_no_new_descriptors,
    open_descriptors,
    python,
    read_all,
    run,
    start,
    start_said,
)

# Prints its line once every way out of a tree of processes was taken: a child, a process group of
# its own, a session of its own, and a daemon that was forked twice and closed its output or not.
SCATTER = """
import os, signal, sys, time
def branch(prepare):
    if os.fork() == 0:
        prepare()
        os.write(done, b'.')
        while True: time.sleep(60)
def daemon(keep):
    if os.fork(): os._exit(0)
    os.setsid()
    if os.fork(): os._exit(0)
    if not keep: os.closerange(0, 3)
def stubborn():
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
ready, done = os.pipe()
branch(lambda: None)
branch(os.setpgrp)
branch(os.setsid)
branch(lambda: daemon(True))
branch(lambda: daemon(False))
STUBBORN
for _ in range(COUNT): os.read(ready, 1)
print('scattered', flush=True)
"""


def scatter(then: str, *, stubborn: bool = False) -> list[str]:
    """The argv of SCATTER and what its main process, maybe deaf to signals as well, does afterwards."""
    script = SCATTER.replace("STUBBORN", "branch(stubborn); stubborn()" if stubborn else "")
    return python(script.replace("COUNT", "6" if stubborn else "5") + then)


# --- the end


async def test_what_the_command_leaves_dies_with_it(bench: Bench, worker: Worker) -> None:
    """Children, sessions and double-forked daemons end with the command, and so does its output at once."""
    job, output = await run(worker, scatter("sys.exit(4)", stubborn=True))
    assert (output, job.exit_status, job.reason) == (b"scattered\n", ExitStatus(code=4), EndReason.COMPLETED)
    bench.check_nothing_remains()


async def test_a_daemon_that_holds_the_output_does_not_hold_the_job(bench: Bench, worker: Worker) -> None:
    """`sleep 1000 &` as the last words of a script: the job ends, with its output, when the shell does."""
    async with asyncio.timeout(10):
        job, output = await run(worker, "setsid sleep 1000 & echo started")
    assert (output, job.exit_status) == (b"started\n", ExitStatus(code=0))
    bench.check_nothing_remains()


async def test_the_last_bytes_are_never_lost(worker: Worker) -> None:
    """All that was written before the end is there, also by a process that the end killed."""
    script = """
import os, time
ready, done = os.pipe()
if os.fork() == 0:
    with open(1, 'wb') as out: out.write(b'c' * SIZE); out.flush(); os.write(done, b'.'); time.sleep(1000)
os.read(ready, 1)
with open(1, 'wb') as out: out.write(b'p' * SIZE)
"""
    for size in (1, 4095, 65_536, 1_000_003):
        _, output = await run(worker, python(script.replace("SIZE", str(size))))
        assert output == b"c" * size + b"p" * size


async def test_a_job_may_close_its_output(bench: Bench, worker: Worker) -> None:
    """A job that closes stdout and stderr goes on, and its readers wait for its end."""
    job = await start(worker, ASK + "echo before; exec >&- 2>&-; touch closed; read x <&3; exit 5")
    reader = asyncio.ensure_future(read_all(worker, job.id))
    await bench.wait_for_output(job.id, b"before\n")
    assert (await worker.get(job.id)).state is JobState.RUNNING
    assert not reader.done()
    bench.tell(job.id)
    assert await reader == b"before\n"
    assert (await worker.wait(job.id)).exit_status == ExitStatus(code=5)


async def test_a_job_may_truncate_its_stdout(worker: Worker) -> None:
    """Truncation of stdout is refused to the job (it is a pipe) and takes nothing away."""
    script = """
import os
os.write(1, b'kept')
try: os.ftruncate(1, 0)
except OSError as error: os.write(1, b' %d' % error.errno)
"""
    job, output = await run(worker, python(script))
    assert (output, job.exit_status) == (b"kept %d" % errno.EINVAL, ExitStatus(code=0))
    assert (await run(worker, "echo one; : > /dev/stdout; echo two"))[1] == b"one\ntwo\n"


async def test_output_without_newlines(worker: Worker) -> None:
    """64 MB without a newline arrive whole."""
    job = await start(worker, f"tr '\\0' x < /dev/zero | head -c {64 * MIB}")
    size = 0
    async for chunk in worker.logs(job.id):
        assert chunk == b"x" * len(chunk)
        size += len(chunk)
    assert size == 64 * MIB
    assert (await worker.wait(job.id)).exit_status == ExitStatus(code=0)


@pytest.mark.parametrize("code", [0, 1, 2, 125, 126, 127, 128, 130, 137, 143, 254, 255])
async def test_exit_codes_are_kept(worker: Worker, code: int) -> None:
    """A code is a code, also where a shell would take it for a signal."""
    job, _ = await run(worker, f"exit {code}")
    assert (job.exit_status, job.reason) == (ExitStatus(code=code), EndReason.COMPLETED)


@pytest.mark.parametrize(
    "number", [signal.SIGHUP, signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, 64]
)
async def test_signals_are_kept(worker: Worker, number: int) -> None:
    """A job that dies of a signal says which; nobody stopped it, so it has completed."""
    job, _ = await run(worker, f"kill -{int(number)} $$")
    assert (job.exit_status, job.reason) == (ExitStatus(signal=int(number)), EndReason.COMPLETED)
    assert job.usage is not None
    assert job.usage.oom_kills == 0


# --- the command


async def test_an_argv_is_executed_as_it_is(worker: Worker) -> None:
    """No shell sees an argv: every argument arrives whole, empty, blank or special."""
    arguments = ["", " ", "a b", "$HOME", "`id`", "*", "'", '"', "\\", "\n", "-n", "ü", "\x01", "x" * 131_071]
    script = "import os, sys; os.write(1, b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
    _, output = await run(worker, [*python(script), *arguments])
    assert output == "\0".join(arguments).encode()


async def test_a_string_is_a_shell_command(worker: Worker) -> None:
    """Pipes, variables and lists work; what the shell cannot find is its own 127."""
    assert (await run(worker, "x=3; echo $x | sed s/3/4/ && echo $((1+1)) # no"))[1] == b"4\n2\n"
    job, output = await run(worker, "nonexistent-program")
    assert job.exit_status == ExitStatus(code=127)
    assert b"not found" in output


async def test_a_program_is_looked_up_in_the_job_s_path(worker: Worker) -> None:
    """A name without a slash is searched in the PATH that the job has."""
    assert (await run(worker, ["printf", "%s", "found"]))[1] == b"found"


@pytest.mark.parametrize(
    "command", ["", "   ", "\n", [], [""], ["a\0b"], "a\0b", "\udcff", "x" * 131_072, ["x" * 100_000] * 6]
)
def test_a_command_that_can_never_work(command: str | list[str]) -> None:
    """Empty, with a NUL, not Unicode, too long: refused before anything is done."""
    with pytest.raises(InvalidJobError):
        JobSpec(command)


# --- a start that fails


def nothing_made(bench: Bench) -> list[str]:
    """All that a failed start could have left."""
    return bench.remains() + [str(path) for path in (bench.state / "jobs").iterdir()]


@pytest.fixture
def programs(bench: Bench) -> Path:
    """A directory of files that cannot be executed, for different reasons."""
    directory = bench.directory / "programs"
    directory.mkdir()
    for name, text, mode in (
        ("plain", "#!/bin/sh\n", 0o644),
        ("interpreter", "#!/nonexistent/interpreter\n", 0o755),
        ("format", "no program at all\n", 0o755),
        ("empty", "", 0o755),
        ("elf", "\x7fELF", 0o755),
        ("secret", "#!/bin/sh\n", 0o700),
    ):
        (directory / name).write_text(text)
        (directory / name).chmod(mode)
    (directory / "loop").symlink_to("loop")
    bench.directory.chmod(0o755)
    return directory


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("missing", errno.ENOENT),
        ("plain", errno.EACCES),
        ("interpreter", errno.ENOENT),
        ("format", errno.ENOEXEC),
        ("empty", errno.ENOEXEC),
        ("elf", errno.ENOEXEC),
        ("secret", errno.EACCES),
        ("loop", errno.ELOOP),
        ("plain/x", errno.ENOTDIR),
        ("", errno.EACCES),
        ("x" * 256, errno.ENAMETOOLONG),
    ],
)
async def test_what_cannot_be_executed(
    bench: Bench, worker: Worker, programs: Path, name: str, error: int
) -> None:
    """It is an error of start(), with the kernel's reason, and nothing is half made."""
    program = f"{programs}/{name}"
    before = open_descriptors()
    with pytest.raises(LaunchError) as caught:
        await start(worker, [program])
    assert (caught.value.program, caught.value.errno) == (program, error)
    assert str(caught.value).startswith(f"cannot execute {program[:50]}")
    assert str(caught.value).endswith(f": {describe_errno(error)}")
    assert nothing_made(bench) == []
    assert await worker.list() == []
    assert worker.live_count == 0
    check_no_new_descriptors(before)
    # the id stays used, and the next job is none the worse
    assert (await run(worker, ["echo", "fine"]))[0].id == 2


async def test_a_program_that_is_in_no_directory(worker: Worker) -> None:
    """A name that PATH does not lead to is ENOENT."""
    with pytest.raises(LaunchError) as caught:
        await start(worker, ["nonexistent-program"])
    assert (caught.value.program, caught.value.errno) == ("nonexistent-program", errno.ENOENT)


async def test_a_program_that_is_being_written(worker: Worker, programs: Path) -> None:
    """A writer keeps no job from executing a program of the host, nor a job a writer: there is no ETXTBSY."""
    program = programs / "written"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    with program.open("ab"):
        job = await start(worker, [str(program), "100"])
    program.open("ab").close()
    await worker.stop(job.id)


async def test_a_step_of_the_launcher_that_fails(bench: Bench, worker: Worker) -> None:
    """A scratch directory that is there already: a typed error that names the step, and nothing half made."""
    (bench.state / "scratch" / "1").mkdir()
    with pytest.raises(
        KernelError, match=r"cannot make the scratch directory .*/scratch/1: file exists"
    ) as caught:
        await start(worker, ["true"])
    assert caught.value.errno == errno.EEXIST
    (bench.state / "scratch" / "1").rmdir()
    assert nothing_made(bench) == []
    assert await worker.list() == []
    assert (await run(worker, ["true"]))[0].id == 2


async def test_a_cgroup_that_is_there_already(bench: Bench, worker: Worker) -> None:
    """A cgroup of the next id, which a table that was taken away may leave: refused, and not used."""
    clients = [parent / f"client-{bench.settings.uid_first}" for parent in instance_cgroups(bench.state)]
    for client in clients:
        (client / "job-1").mkdir(parents=True)
    with pytest.raises(Exception, match="cannot create the cgroup of job 1: it exists"):
        await start(worker, ["true"])
    for client in clients:
        (client / "job-1").rmdir()
        client.rmdir()
    assert nothing_made(bench) == []
    assert await worker.list() == []


async def test_a_step_of_init_that_fails(bench: Bench) -> None:
    """A path to hide that cannot be looked up (ELOOP): the error names step, path and errno (R2)."""
    (bench.directory / "loop").symlink_to("loop")
    worker = await bench.open(hidden_paths=(str(bench.directory / "loop"),))
    before = open_descriptors()
    with pytest.raises(KernelError) as caught:
        await start(worker, ["true"])
    assert caught.value.errno == errno.ELOOP
    assert f"cannot hide {bench.directory}/loop for job " in str(caught.value)
    assert nothing_made(bench) == []
    check_no_new_descriptors(before)


async def test_a_memory_limit_that_is_too_small_for_exec(bench: Bench, worker: Worker) -> None:
    """With 2 MiB a program may start or not: it is a job that ended, or an error that leaves nothing."""
    big = python("x = bytes(50_000_000)")
    try:
        job, _ = await run(worker, big, memory_max_bytes=2 * MIB)
    except (LaunchError, KernelError):
        assert nothing_made(bench) == []
    else:
        assert job.reason is EndReason.OOM_KILLED
    bench.check_nothing_remains()


# --- a start that is cancelled


@pytest.mark.parametrize("command", [["sleep", "60"], ["/nonexistent"]])
async def test_a_cancelled_start_leaves_nothing(bench: Bench, worker: Worker, command: list[str]) -> None:
    """Whenever a start is cancelled, from its first step to its last, no job, row or process comes of it."""
    before = asyncio.all_tasks()
    finished = False
    turns = 0
    while not finished:
        starting = asyncio.ensure_future(start(worker, command))
        for _ in range(turns):
            await asyncio.sleep(0)
            if starting.done():
                break
        finished = starting.done()
        starting.cancel()
        (result,) = await asyncio.gather(starting, return_exceptions=True)
        if finished and not isinstance(result, BaseException):
            await worker.stop(result.id, grace_seconds=0)
        # Geometric: the first turns are where the table is written, the later ones wait for the launcher.
        turns += 1 + turns // 4
    await _until_idle(worker, before)
    assert [job.state for job in await worker.list() if not job.state.final] == []
    bench.check_nothing_remains()
    # those that were stopped wrote nothing, and keep no files; several of them lose theirs together
    await asyncio.to_thread(wait_for, lambda: not list((bench.state / "jobs").iterdir()))


async def _until_idle(worker: Worker, before: set[asyncio.Task[Any]]) -> None:
    """Let what a cancelled start has to undo come to its end."""
    async with asyncio.timeout(20):
        # a cancelled start goes on in a task of its own, also before its job counts as live
        await worker.emptied()
        while worker.live_count or asyncio.all_tasks() - before:
            await asyncio.sleep(0.01)
    # one more turn through the store's thread: all that was given to it before is done
    await worker.list()


# --- stop


async def test_stop_reaches_the_whole_tree(bench: Bench, worker: Worker) -> None:
    """SIGTERM goes to every process of the job, not to the command alone; nobody is left."""
    job = await start_said(worker, scatter("time.sleep(60)"), b"scattered\n")
    async with asyncio.timeout(30):
        ended = await worker.stop(job.id, grace_seconds=60)
    assert (ended.state, ended.reason) == (JobState.EXITED, EndReason.STOPPED)
    assert ended.exit_status == ExitStatus(signal=signal.SIGTERM)
    bench.check_nothing_remains()


async def test_sigterm_reaches_children_of_a_patient_shell(worker: Worker) -> None:
    """A child that catches SIGTERM has its time to tidy up, and its words are kept."""
    script = "trap 'sleep 0.2; echo tidied; exit 9' TERM; echo ready; while :; do sleep 60 & wait; done"
    job = await start_said(worker, script, b"ready\n")
    ended = await worker.stop(job.id)
    assert (ended.exit_status, ended.reason) == (ExitStatus(code=9), EndReason.STOPPED)
    assert b"tidied\n" in await read_all(worker, job.id)


async def test_who_ignores_sigterm_is_killed(bench: Bench, worker: Worker) -> None:
    """After the grace period, not before it, SIGKILL ends everything."""
    job = await start_said(worker, scatter("time.sleep(60)", stubborn=True), b"scattered\n")
    loop = asyncio.get_running_loop()
    begun = loop.time()
    ended = await worker.stop(job.id, grace_seconds=0.5)
    assert 0.5 <= loop.time() - begun < 30
    assert (ended.exit_status, ended.reason) == (ExitStatus(signal=signal.SIGKILL), EndReason.STOPPED)
    bench.check_nothing_remains()


async def test_a_grace_period_is_kept(bench: Bench) -> None:
    """A shell that ignores SIGTERM lives for the whole grace period and no longer."""
    worker = await bench.open(stop_grace_seconds=60)
    job = await start_said(worker, "trap '' TERM; echo ready; while :; do sleep 60; done", b"ready")
    loop = asyncio.get_running_loop()
    begun = loop.time()
    stopping = asyncio.ensure_future(worker.stop(job.id, grace_seconds=0.5))
    await asyncio.sleep(0)
    asked = await worker.get(job.id)
    # nothing is said of an end that has not come
    assert (asked.state, asked.end, asked.exit_status, asked.reason) == (JobState.STOPPING, None, None, None)
    # nobody else waits for that
    assert (await run(worker, ["echo", "meanwhile"]))[1] == b"meanwhile\n"
    ended = await stopping
    assert 0.5 <= loop.time() - begun < 30
    assert (ended.exit_status, ended.reason) == (ExitStatus(signal=signal.SIGKILL), EndReason.STOPPED)


async def test_a_stopped_job_stops(worker: Worker) -> None:
    """A job that has sent itself SIGSTOP gets the SIGTERM within the grace period."""
    job = await start_said(worker, "echo ready; kill -STOP $$; echo woken", b"ready\n")
    ended = await worker.stop(job.id, grace_seconds=60)
    assert (ended.exit_status, ended.reason) == (ExitStatus(signal=signal.SIGTERM), EndReason.STOPPED)


async def test_stop_right_after_start(bench: Bench, worker: Worker) -> None:
    """There is no moment in which a job cannot be stopped."""
    for _ in range(20):
        job = await start(worker, ["sleep", "60"])
        ended = await worker.stop(job.id, grace_seconds=60)
        assert ended.exit_status == ExitStatus(signal=signal.SIGTERM)
    bench.check_nothing_remains()


async def test_stop_in_mid_launch(worker: Worker) -> None:
    """Who stops a job before its start was answered waits for that, and then stops it."""
    starting = asyncio.ensure_future(start(worker, ["sleep", "60"]))
    while not worker.live_count:
        await asyncio.sleep(0)
    ended = await worker.stop(1, grace_seconds=60)
    assert (ended.state, ended.reason) == (JobState.EXITED, EndReason.STOPPED)
    assert (await starting).state is JobState.RUNNING


async def test_logs_in_mid_launch(worker: Worker) -> None:
    """Who follows a job before its start was answered waits for that, and then has all of its output."""
    starting = asyncio.ensure_future(start(worker, "echo words"))
    while not worker.live_count:
        await asyncio.sleep(0)
    assert not starting.done()
    async with asyncio.timeout(10):
        assert await read_all(worker, 1) == b"words\n"
    assert (await starting).id == 1


async def test_stops_at_the_same_time(worker: Worker) -> None:
    """Many may stop one job: all get the same end, and the shortest grace period counts."""
    job = await start_said(worker, "trap '' TERM; echo ready; while :; do sleep 60; done", b"ready")
    graces = [60.0, 0.2, 60.0, 0.2]
    async with asyncio.timeout(30):
        ended = await asyncio.gather(*(worker.stop(job.id, grace) for grace in graces))
    assert ended == [ended[0]] * 4
    assert ended[0].reason is EndReason.STOPPED


async def test_stop_of_an_ended_job_is_success(worker: Worker) -> None:
    """It changes nothing: the job keeps its own end."""
    job, _ = await run(worker, "exit 6")
    assert await worker.stop(job.id) == job
    assert (job.exit_status, job.reason) == (ExitStatus(code=6), EndReason.COMPLETED)


async def test_stop_returns_when_nothing_is_left(bench: Bench, worker: Worker) -> None:
    """When stop() returns, processes, cgroups and scratch are gone, and the output is whole."""
    job = await start_said(
        worker, f"echo x > file; {{ yes | head -c {MIB}; }}; echo ready; exec sleep 60", b"ready\n"
    )
    await worker.stop(job.id)
    assert bench.remains() == []
    assert len(await read_all(worker, job.id)) == MIB + len(b"ready\n")


async def test_a_cancelled_stop_goes_on(worker: Worker) -> None:
    """A client that hangs up in mid-stop changes nothing: the job ends."""
    job = await start_said(worker, "trap '' TERM; echo ready; while :; do sleep 60; done", b"ready")
    stopping = asyncio.ensure_future(worker.stop(job.id, grace_seconds=0.2))
    await asyncio.sleep(0)
    stopping.cancel()
    async with asyncio.timeout(30):
        ended = await worker.wait(job.id)
    assert ended.exit_status == ExitStatus(signal=signal.SIGKILL)


async def test_followers_of_a_stopped_job_end(worker: Worker) -> None:
    """A follower gets what there was and a clean end."""
    job = await start_said(worker, "echo words; exec sleep 60", b"words\n")
    async with aclosing(worker.logs(job.id)) as chunks:
        assert await anext(chunks) == b"words\n"
        stopping = asyncio.ensure_future(worker.stop(job.id))
        async with asyncio.timeout(30):
            assert [chunk async for chunk in chunks] == []
        await stopping


async def test_the_environment_of_the_worker_stays_outside(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the worker's process has in its environment, now or at its start, reaches a job."""
    monkeypatch.setenv("PJW_TEST_SECRET", "secret")
    _, output = await run(worker, "env")
    assert b"secret" not in output
    assert os.environ["PJW_TEST_SECRET"] == "secret"


async def test_a_vanished_job_is_not_found(worker: Worker) -> None:
    """The id of a start that failed leads nowhere, for ever."""
    with pytest.raises(LaunchError):
        await start(worker, ["/nonexistent"])
    with pytest.raises(JobNotFoundError):
        await worker.get(1)
    assert (await run(worker, ["true"]))[0].id == 2
