"""pjw.Client and pjw.AsyncClient with a real pjwd: every call, and connections lost at the worst moment."""

import asyncio
import errno
import os
import signal
import threading
import time
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, contextmanager
from inspect import isasyncgen, isawaitable
from typing import Any, Final

import pytest

import pjw
from pjw import errors
from pjw.client.retry import LONGEST_PAUSE_SECONDS, RECONNECT_SECONDS, RESTART_SECONDS
from pjw.model import EndReason, ExitStatus, JobSpec, JobState
from pjw.v1 import job_worker_pb2 as pb
from tests.support.relay import Relay
from tests.support.service import Service, wait_for

# Each line waits for one key in its file: so a reader is known to be in the middle.
STEPS: Final = (
    "echo one; while ! [ -e go ]; do sleep 0.02; done; echo two;"
    " while ! [ -e end ]; do sleep 0.02; done; echo three"
)


class Blocking:
    """A client whose calls block, whichever of the two it is."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, kind: type[Any], *arguments: str, **options: Any
    ) -> None:
        self._loop: Final = loop

        async def make() -> Any:
            return kind(*arguments, **options)

        self._client: Final = asyncio.run_coroutine_threadsafe(make(), self._loop).result()

    def close(self) -> None:
        """End the connection."""
        self.call("close")

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call, and wait for the answer."""
        answer = getattr(self._client, method)(*arguments, **options)
        if isawaitable(answer):
            return asyncio.run_coroutine_threadsafe(_awaited(answer), self._loop).result()
        if isasyncgen(answer):
            return self._blocking(answer)
        return answer

    def _blocking(self, stream: AsyncIterable[Any]) -> Iterator[Any]:
        steps = aiter(stream)
        while True:
            try:
                yield asyncio.run_coroutine_threadsafe(_awaited(anext(steps)), self._loop).result()
            except StopAsyncIteration:
                return


async def _awaited(what: Any) -> Any:
    return await what


def in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """What comes of it, when it has come."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  raised again by result()
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


Connect = Callable[..., AbstractContextManager[Blocking]]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One loop for all of them, which runs in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(params=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest, loop: asyncio.AbstractEventLoop) -> Connect:
    """A client of a service, by way of another address when one is given."""

    @contextmanager
    def open_client(
        service: Service, address: str | None = None, reconnect_seconds: float = RECONNECT_SECONDS
    ) -> Iterator[Blocking]:
        kind, files = getattr(pjw, request.param), service.files()
        client = Blocking(loop, kind, address or service.address, *files, reconnect_seconds=reconnect_seconds)
        try:
            yield client
        finally:
            client.close()

    return open_client


def ids(jobs: Iterable[pjw.Job]) -> list[int]:
    """The ids of jobs."""
    return [job.id for job in jobs]


def touch(service: Service, job_id: int, name: str) -> None:
    """Let a job of STEPS go on."""
    (service.state / "scratch" / str(job_id) / name).touch()


def test_a_job_from_start_to_delete(service: Service, connect: Connect) -> None:
    """Each call once, with what it is to answer."""
    with connect(service) as client:
        spec = JobSpec(["sh", "-c", "echo hello; exit 3"], name="hello", labels={"suite": "client"})
        job = client.call("start", spec)
        assert (job.name, job.labels, job.command) == ("hello", spec.labels, spec.display)
        assert b"".join(client.call("logs", job.id)) == b"hello\n"
        assert b"".join(client.call("logs", job.id, 2, follow=False)) == b"llo\n"
        [timed] = client.call("timed_logs", job.id)
        assert (timed.data, timed.time >= job.start) == (b"hello\n", True)
        ended = client.call("wait", job.id)
        assert (ended.exit_status, ended.reason) == (ExitStatus(3), EndReason.COMPLETED)
        assert client.call("get", job.id) == ended
        assert client.call("find", "hello") == ended
        assert client.call("stop", job.id) == ended
        client.call("delete", job.id)
        with pytest.raises(errors.JobNotFoundError):
            client.call("get", job.id)
        with pytest.raises(errors.JobNotFoundError, match="no job hello"):
            client.call("find", "hello")


def test_a_list_is_of_what_was_asked_for(service: Service, connect: Connect) -> None:
    """States, labels, names, the newest ones: each alone, and all pages."""
    with connect(service) as client:
        label = {"run": str(id(client))}
        jobs = ids(client.call("start", JobSpec("true", labels=label)) for _ in range(4))
        # no shell: one that is about to execute a command takes SIGINT, and then waits for the command's end
        nap = JobSpec(["sleep", "300"], labels=label, name=f"n{id(client)}")
        running = client.call("start", nap).id
        for job_id in jobs:
            client.call("wait", job_id)
        assert ids(client.call("list", labels=label)) == [*jobs, running]
        assert ids(client.call("list", labels=label, newest_first=True, limit=2)) == [running, jobs[3]]
        assert ids(client.call("list", labels=label, limit=0)) == []
        assert ids(client.call("list", labels=label, states=[JobState.EXITED])) == jobs
        assert ids(client.call("list", labels=label, states=[JobState.RUNNING])) == [running]
        assert ids(client.call("list", name=f"n{id(client)}")) == [running]
        stopped = client.call("stop", running, grace=60.5, signal=signal.SIGINT)
        assert (stopped.exit_status, stopped.reason) == (ExitStatus(signal=2), EndReason.STOPPED)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (("start", JobSpec(["nosuchprogram"])), errors.LaunchError),
        # R5: as a Worker says them
        (("start", JobSpec("true", workdir="/nonexistent")), errors.WorkdirError),
        (("start", JobSpec("true", {"cpu_max_millicores": 2**40})), errors.LimitRangeError),
        (("get", 2**70), errors.JobNotFoundError),
        (("stop", 999_999), errors.JobNotFoundError),
        (("delete", 999_999), errors.JobNotFoundError),
        (("wait", 999_999), errors.JobNotFoundError),
        (("logs", 999_999), errors.JobNotFoundError),
    ],
)
def test_refusals_are_errors_of_ours(
    service: Service, connect: Connect, call: tuple[Any, ...], error: type[Exception]
) -> None:
    """Never gRPC's own; with the facts of each."""
    with connect(service) as client, pytest.raises(error) as caught:
        list(client.call(*call))
    if isinstance(caught.value, errors.WorkdirError):
        assert (caught.value.workdir, caught.value.errno) == ("/nonexistent", errno.ENOENT)
    if isinstance(caught.value, errors.LimitRangeError):
        assert (caught.value.limit, caught.value.value, caught.value.least) == (
            "cpu_max_millicores",
            2**40,
            None,
        )
        assert 0 < (caught.value.most or 0) < 2**40


def test_a_start_whose_answer_is_lost_starts_once(service: Service, connect: Connect) -> None:
    """The job had been started when the line was cut: the second attempt finds it."""
    with Relay(service.address) as relay, connect(service, relay.address) as client:
        before = ids(client.call("list"))
        running = ids(client.call("list", states=[JobState.RUNNING]))
        relay.hold_answers()
        starting = in_thread(lambda: client.call("start", JobSpec("sleep 300")))
        with connect(service) as direct:
            # one whose start is still under way would be given up with its caller
            wait_for(lambda: len(ids(direct.call("list", states=[JobState.RUNNING]))) > len(running))
            relay.cut()
            job = starting.result(30)
            assert ids(direct.call("list")) == [*before, job.id]
            direct.call("stop", job.id)


def test_a_start_whose_server_is_killed_starts_once(
    make_service: Callable[..., Service], connect: Connect
) -> None:
    """Killed after it had started the job, and before the client heard of it."""
    service = make_service().start()
    with Relay(service.address) as relay, connect(service, relay.address) as client:
        assert ids(client.call("list")) == []
        relay.hold_answers()
        starting = in_thread(lambda: client.call("start", JobSpec("sleep 300", request_id="once")))
        with service.stub() as stub:
            wait_for(lambda: stub.List(pb.ListRequest(states=[pb.JOB_STATE_RUNNING])).jobs)
        service.stop(signal.SIGKILL)
        relay.cut()
        service.start()
        job = starting.result(60)
        assert (ids(client.call("list")), job.state) == ([job.id], JobState.RUNNING)


def test_a_delete_whose_answer_is_lost_is_done(service: Service, connect: Connect) -> None:
    """The second attempt finds no job, which is what was asked for."""
    with Relay(service.address) as relay, connect(service, relay.address) as client:
        job_id = client.call("start", JobSpec("true")).id
        client.call("wait", job_id)
        relay.hold_answers()
        deleting = in_thread(lambda: client.call("delete", job_id))
        with service.stub() as stub:
            wait_for(lambda: job_id not in [job.id for job in stub.List(pb.ListRequest()).jobs])
        relay.cut()
        deleting.result(30)


def test_streams_and_waits_go_on_after_a_cut(service: Service, connect: Connect) -> None:
    """At the exact byte; and a wait for a job is a wait for it still."""
    with Relay(service.address) as relay, connect(service, relay.address) as client:
        job_id = client.call("start", JobSpec(STEPS)).id
        logs = client.call("logs", job_id)
        waiting = in_thread(lambda: client.call("wait", job_id))
        assert next(logs) == b"one\n"
        relay.cut()
        touch(service, job_id, "go")
        assert next(logs) == b"two\n"
        relay.cut()
        touch(service, job_id, "end")
        assert b"".join(logs) == b"three\n"
        assert waiting.result(30).exit_status == ExitStatus(0)


def test_the_last_lines_go_on_after_a_cut(service: Service, connect: Connect) -> None:
    """Where they began is the server's to say: nothing is lost or doubled by who began in the middle."""
    with Relay(service.address) as relay, connect(service, relay.address) as client:
        job_id = client.call("start", JobSpec(f"seq 1000; {STEPS}")).id
        with service.popen("logs", str(job_id)) as whole:
            assert whole.stdout is not None
            while whole.stdout.readline() != b"one\n":
                pass
            whole.terminate()
        logs = client.call("logs", job_id, tail=2)
        assert next(logs) == b"1000\none\n"
        relay.cut()
        touch(service, job_id, "go")
        touch(service, job_id, "end")
        assert b"".join(logs) == b"two\nthree\n"


def test_the_last_lines_of_a_silent_job_go_on_after_a_cut(service: Service, connect: Connect) -> None:
    """What is written while there is no connection is not lost, though nothing had come before."""
    with Relay(service.address) as relay, connect(service, relay.address) as client:
        job_id = client.call("start", JobSpec(STEPS)).id
        output = service.state / "jobs" / str(job_id) / "output"
        wait_for(lambda: output.read_bytes() == b"one\n")
        logs = in_thread(lambda: b"".join(client.call("logs", job_id, tail=0)))
        wait_for(lambda: service.open_outputs(job_id) == 1)
        # what was answered has come, as the answers to later calls have; meanwhile pjwd looks for the tail
        for _ in range(20):
            client.call("get", job_id)
        os.kill(service.pid, signal.SIGSTOP)
        try:
            relay.cut()
            touch(service, job_id, "go")
            wait_for(lambda: output.read_bytes() == b"one\ntwo\n")
        finally:
            os.kill(service.pid, signal.SIGCONT)
        touch(service, job_id, "end")
        assert logs.result(60) == b"two\nthree\n"


def test_a_client_that_was_answered_waits_for_a_restart(
    make_service: Callable[..., Service], connect: Connect
) -> None:
    """A call into the gap of a restart is answered after it."""
    service = make_service().start()
    with connect(service) as client:
        job_id = client.call("start", JobSpec("true")).id
        client.call("wait", job_id)
        assert service.stop() == 0
        getting = in_thread(lambda: client.call("get", job_id))
        with pytest.raises(TimeoutError):
            getting.result(1)
        service.start()
        assert getting.result(30).id == job_id


def test_the_first_start_of_a_client_outlasts_a_restart(
    make_service: Callable[..., Service], connect: Connect
) -> None:
    """V10: a script that starts a job while pjwd restarts has its job, once."""
    service = make_service().start()
    assert service.stop() == 0
    with connect(service) as client:
        starting = in_thread(lambda: client.call("start", JobSpec("true")))
        with pytest.raises(TimeoutError):
            starting.result(0.5)
        service.start()
        job_id = starting.result(30).id
        assert [job.id for job in client.call("list")] == [job_id]


def test_a_server_that_was_never_there_is_told_at_once(service: Service, connect: Connect) -> None:
    """However long a lost one would be waited for; a start is told in some seconds, which a restart takes."""
    with connect(service, "127.0.0.1:1") as client:
        for call in (("get", 1), ("start", JobSpec("true")), ("logs", 1), ("wait", 1)):
            began = time.monotonic()
            with pytest.raises(errors.ServerUnreachableError, match="connection refused"):
                list(client.call(*call))
            seconds = time.monotonic() - began
            assert (seconds >= RESTART_SECONDS - LONGEST_PAUSE_SECONDS) == (call[0] == "start"), call


def test_a_server_that_does_not_come_back_is_given_up(
    make_service: Callable[..., Service], connect: Connect
) -> None:
    """In words that say for how long, and what may have happened."""
    service = make_service().start()
    with connect(service, reconnect_seconds=1) as client:
        client.call("start", JobSpec("true"))
        assert service.stop() == 0
        with pytest.raises(errors.ServerUnreachableError, match="did not come back within 1 s") as caught:
            client.call("start", JobSpec("true"))
        assert caught.value.hint == "the job may have started: see pjw list"


def test_closing_ends_a_call_under_way(service: Service, connect: Connect) -> None:
    """Whoever waits in another thread is told, and nothing is tried again."""
    with connect(service) as client:
        job_id = client.call("start", JobSpec("sleep 300")).id
        waiting = in_thread(lambda: client.call("wait", job_id))
        wait_for(lambda: service.job(job_id).state == pb.JOB_STATE_RUNNING)
    error = waiting.exception(30)
    assert isinstance(error, errors.ServerUnreachableError | CancelledError)
    with connect(service) as client:
        client.call("stop", job_id)


def test_run_is_a_start_its_output_and_its_end(service: Service, connect: Connect) -> None:
    """As subprocess.run: with input, both outputs, and an exit code that is no error."""
    with connect(service) as client:
        done = client.call("run", "cat; echo oops >&2; exit 3", input=b"words\n")
        assert (done.output, done.stderr, done.job.exit_status) == (b"words\noops\n", b"", ExitStatus(3))
        done = client.call("run", JobSpec("echo out; echo oops >&2", split_stderr=True))
        assert (done.output, done.stderr, done.job.state) == (b"out\n", b"oops\n", JobState.EXITED)
        assert client.call("run", ["true"], input=b"x" * 1000).output == b""
