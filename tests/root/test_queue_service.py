"""The queue as a client has it: a real pjwd, a real pjw, raw calls, and kills at random moments."""

import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pjw import JobSpec, QueueSpec
from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import CALL_SECONDS, Service, reloaded, wait_for

# one job at a time
ONE: Final = "[queue]\nrunning_max = 1\n"
MANY: Final = "[queue]\nrunning_max = 8\ncpu_max_millicores = 0\n"


def submit(service: Service, command: str, count: int = 1, name: str = "alice", **waits: object) -> list[int]:
    """Put jobs into the queue by raw calls; their ids."""
    job = pb.QueuedJob(start=pb.StartRequest(command=command), **waits)  # type: ignore[arg-type]
    ids: list[int] = []
    with service.stub(name) as stub:
        while len(ids) < count:
            request = pb.SubmitRequest(jobs=[job] * min(500, count - len(ids)))
            ids += [each.id for each in stub.Submit(request, timeout=CALL_SECONDS).jobs]
    return ids


def state_of(service: Service, job_id: int) -> str:
    """The state of a job of alice's."""
    return pb.JobState.Name(service.job(job_id).state).removeprefix("JOB_STATE_")


def is_running(service: Service, job_id: int) -> Callable[[], bool]:
    """Whether a job runs."""
    return lambda: state_of(service, job_id) == "RUNNING"


def test_a_session(make_service: Callable[..., Service]) -> None:
    """Queue, look, hold, release, stop and wait, as somebody types it."""
    service = make_service(config=ONE).start()
    blocker = service.ok("start", "--queue", "sleep 300").strip()
    wait_for(is_running(service, int(blocker)))
    low = service.ok("start", "--priority", "-5", "echo low").strip()
    high = service.ok("start", "--priority", "5", "--name", "urgent", "echo high; exit 3").strip()
    held = service.ok("start", "--hold", "echo held").strip()
    later = service.ok("start", "--not-before", "2h", "echo later").strip()
    assert service.ok("queue").split() == [high, low, held, later]
    assert service.ok("list", "--state", "queued").split() == [low, high, held, later]
    wait_for(lambda: "is next: waits for a free slot" in service.ok("get", "urgent"))
    job = json.loads(service.ok("get", "urgent"))
    assert (job["state"], job["start"], job["end"], job["exitCode"]) == ("queued", None, None, None)
    assert (job["priority"], job["held"]) == (5, False)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", job["queued"])
    shown = service.at_terminal("queue")
    assert re.search(rf"^ +{high} +5 .*urgent: echo high; exit 3", shown, re.MULTILINE), shown
    assert "waits until it is released" in shown
    assert re.search(r"waits until 20\d\d-.* UTC", shown)
    assert service.ok("hold", "urgent") == "urgent\n"
    assert service.refused("hold", blocker) == (
        1,
        f"pjw: error: cannot hold job {blocker}: it does not wait in the queue (any more)\n",
    )
    assert service.ok("release", "urgent", held) == f"urgent\n{held}\n"
    waiting = service.popen("wait", "urgent", low)
    assert json.loads(service.ok("stop", blocker))["reason"] == "stopped"
    out, err = waiting.communicate(timeout=CALL_SECONDS)
    assert (out, err) == (b"3\n0\n", b"")
    stopped = json.loads(service.ok("stop", later))
    assert (stopped["state"], stopped["reason"], stopped["exitCode"]) == ("exited", "cancelled", None)
    assert (stopped["start"], stopped["usage"]) == (None, None)
    assert service.refused("wait", later) == (
        1,
        f"pjw: error: job {later} was never started: it was stopped before its turn came\n",
    )
    assert service.ok("logs", later) == ""
    assert service.ok("rm", later) == f"{later}\n"
    assert service.ok("list", "--reason", "cancelled") == ""
    assert service.ok("wait", held) == "0\n"
    assert service.ok("queue") == ""


def test_a_pipeline(make_service: Callable[..., Service]) -> None:
    """--after, as somebody types it: a step when the one before has ended well, or when it has not."""
    service = make_service(config=MANY).start()
    build = service.ok("start", "--hold", "echo build; exit 2").strip()
    test = service.ok("start", "--after", build, "echo test").strip()
    deploy = service.ok("start", "--after", test, "--after", f"{build}:any", "echo deploy").strip()
    report = service.ok("start", "--after", f"{build}:failed", "echo report").strip()
    assert service.ok("queue").split() == [build, test, deploy, report]
    job = json.loads(service.ok("get", deploy))
    assert (job["after"], job["unmet"]) == ([f"{test}:ok", f"{build}:any"], 2)
    assert job["detail"] == f"waits for the end of job {test}, {build}"
    assert service.refused("start", "--after", "12345", "true") == (1, "pjw: error: no job 12345\n")
    assert "perhaps" not in service.refused("start", "--after", "x", "true")[1]
    service.ok("release", build)
    assert service.ok("wait", report) == "0\n"
    assert service.refused("wait", deploy) == (
        1,
        f"pjw: error: job {deploy} was never started: job {test}, which it waited for, ended as cancelled\n",
    )
    assert service.ok("list", "--reason", "cancelled").split() == [test, deploy]
    service.ok("prune", "--force")


def test_a_file_of_jobs(make_service: Callable[..., Service], tmp_path: Path) -> None:
    """All of them or none; each waits for those above it that it names."""
    service = make_service(config=MANY).start()
    jobs = tmp_path / "jobs"
    jobs.write_text(
        '{"command": "echo one; exit 3", "name": "one", "hold": true}\n'
        '{"command": ["echo", "two"], "name": "two", "after": "one"}\n'
        '{"command": "echo three", "after": ["one:failed", "two:any"]}\n'
    )
    ids = service.ok("submit", str(jobs)).split()
    assert service.ok("list", "--state", "queued").split() == ids
    # a name is taken: nothing of it
    assert "a job called one: job" in service.refused("submit", str(jobs))[1]
    assert service.ok("list").split() == ids
    service.ok("release", "one")
    assert service.ok("wait", ids[2]) == "0\n"
    assert json.loads(service.ok("get", "two"))["reason"] == "cancelled"
    jobs.write_text('{"command": "true"}\n{"command": "true", "colour": 1}')
    code, words = service.refused("submit", str(jobs))
    assert (code, f"{jobs}, line 2: no key of a job is called 'colour'" in words) == (125, True)
    assert service.ok("list").split() == ids


def test_run_with_retries(make_service: Callable[..., Service]) -> None:
    """pjw run shows the output of each attempt, and ends as the last one."""
    service = make_service(config=MANY).start()
    command = "echo attempt $PJW_ATTEMPT; [ $PJW_ATTEMPT = 3 ] || exit 75"
    done = service.pjw("run", "--retry", "5", "--retry-on", "75,oom", "--backoff", "0s", command)
    assert (done.stdout, done.returncode) == (b"attempt 1\nattempt 2\nattempt 3\n", 0), done.stderr
    assert done.stderr.count(b"failed; attempt") == 2
    first, second, third = (json.loads(service.ok("get", each)) for each in service.ok("list").split())
    assert [each["attempt"] for each in (first, second, third)] == [1, 2, 3]
    assert (first["retriedAs"], second["retriedAs"], third["retriedAs"]) == (second["id"], third["id"], None)
    assert service.ok("wait", first["id"]) == "0\n"
    failed = service.ok("start", "--retry", "1", "--backoff", "0s", "exit 9").strip()
    done = service.pjw("wait", failed)
    assert (done.stdout, done.returncode) == (b"9\n", 9)
    code, words = service.refused("start", "--retry-on", "75", "true")
    assert (code, "--retry-on and --backoff need --retry" in words) == (1, True)


def test_run_in_the_queue(make_service: Callable[..., Service]) -> None:
    """pjw run says that the job waits, and goes on as ever; Ctrl-C takes it out of the queue."""
    service = make_service(config=ONE).start()
    [blocker] = submit(service, "sleep 300")
    wait_for(is_running(service, blocker))
    waiting = service.popen("run", "--queue", "echo hello; exit 4")
    given_up = service.popen("run", "--queue", "echo never")
    # by the order of their ids each knows which is which
    wait_for(lambda: len(service.ok("queue").split()) == 2)
    given_up.send_signal(signal.SIGINT)
    out, err = given_up.communicate(timeout=CALL_SECONDS)
    assert (out, given_up.returncode) == (b"", 130), err
    assert re.fullmatch(rb"pjw: job \d+ (waits for its turn|is next: waits for a free slot)\n", err)
    assert service.ok("stop", str(blocker))
    out, err = waiting.communicate(timeout=CALL_SECONDS)
    assert (out, waiting.returncode) == (b"hello\n", 4), err
    missing = service.pjw("run", "--queue", "--", "/no/such", "x")
    assert (missing.stdout, missing.returncode) == (b"", 1)
    assert (
        b"was never started: cannot execute /no/such: no such file or directory (ENOENT)\n" in missing.stderr
    )


def test_jobs_of_others(make_service: Callable[..., Service]) -> None:
    """NOT_FOUND for another client, whatever is asked; an admin may hold and release, a viewer may not."""
    service = make_service(
        config='[roles]\nadmins = ["bob"]\nviewers = ["carol"]\n', clients=("alice", "bob", "carol")
    )
    service.start()
    [job_id] = submit(service, "true", held=True)
    for name, all_clients, code in (
        ("bob", False, grpc.StatusCode.NOT_FOUND),
        ("carol", True, grpc.StatusCode.PERMISSION_DENIED),
    ):
        with service.stub(name) as stub:
            for call, request in ((stub.Hold, pb.HoldRequest), (stub.Release, pb.ReleaseRequest)):
                with pytest.raises(grpc.RpcError) as refused:
                    call(request(id=job_id, all_clients=all_clients), timeout=CALL_SECONDS)  # type: ignore[arg-type]
                assert refused.value.code() is code
    for name, after in (("bob", job_id), ("bob", 12345), ("carol", job_id)):
        waiting = pb.QueuedJob(start=pb.StartRequest(command="true"), after=[pb.Dependency(id=after)])
        with service.stub(name) as stub, pytest.raises(grpc.RpcError) as refused:
            stub.Submit(pb.SubmitRequest(jobs=[waiting]), timeout=CALL_SECONDS)
        # one that is another's is told as one that is not there
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert refused.value.details() == f"no job {after}"
    assert service.ok("--all", "queue", client="carol").split() == [str(job_id)]
    assert service.ok("queue", client="carol") == ""
    assert service.ok("--all", "release", str(job_id), client="bob") == f"{job_id}\n"
    assert service.ok("wait", str(job_id)) == "0\n"


def test_what_submit_refuses(make_service: Callable[..., Service]) -> None:
    """None at all, too many, a job that can never be: in words, and nothing is left."""
    service = make_service(config="[clients]\nqueued_max = 3\n").start()
    start = pb.StartRequest(command="true")
    for jobs, code, words in (
        ([], "INVALID_ARGUMENT", "from 1 to 500 jobs are put into the queue at once, not 0"),
        (
            [pb.QueuedJob(start=start)] * 501,
            "INVALID_ARGUMENT",
            "from 1 to 500 jobs are put into the queue",
        ),
        ([pb.QueuedJob(start=start), pb.QueuedJob()], "INVALID_ARGUMENT", "the command is empty"),
        (
            [pb.QueuedJob(start=start, not_before=Timestamp(seconds=-(2**62)))],
            "INVALID_ARGUMENT",
            "the time before which the job is not started is none",
        ),
        (
            [pb.QueuedJob(start=start, held=True)] * 4,
            "RESOURCE_EXHAUSTED",
            "the queue takes at most 3 jobs of alice",
        ),
    ):
        with service.stub() as stub, pytest.raises(grpc.RpcError) as refused:
            stub.Submit(pb.SubmitRequest(jobs=jobs), timeout=CALL_SECONDS)
        assert refused.value.code().name == code
        assert words in (refused.value.details() or "")
    assert service.ok("list") == ""


def test_the_library(make_service: Callable[..., Service]) -> None:
    """A spec with a queue is submitted, many are one call; hold, release and states are those of pjw."""
    service = make_service(config=ONE).start()
    with service.client() as alice:
        held = alice.start(JobSpec("echo held", queue=QueueSpec(held=True)))
        first, second = alice.submit(["exit 1", JobSpec(["sh", "-c", "exit 2"], queue=QueueSpec(priority=1))])
        assert [alice.wait(job.id).exit_status.code for job in (first, second)] == [1, 2]  # type: ignore[union-attr]
        assert [job.id for job in alice.list(states="queued")] == [held.id]
        assert alice.hold(held.id).held
        assert not alice.release(held.id).held
        assert b"".join(alice.logs(held.id)) == b"held\n"
        done = alice.run(JobSpec("cat", queue=QueueSpec()), input=b"abc")
        assert (done.output, done.job.queued is not None) == (b"abc", True)
        many = alice.run_many(["echo a", JobSpec("echo b; echo c >&2; exit 2", split_stderr=True)])
        assert [(each.output, each.stderr) for each in many] == [(b"a\n", b""), (b"b\n", b"c\n")]
        assert [each.job.exit_status.code for each in many if each.job.exit_status] == [0, 2]
        quota = alice.quota()
        assert (quota.queued, quota.queued_max) == (0, 100_000)


def test_a_reload(make_service: Callable[..., Service]) -> None:
    """More slots take effect at once."""
    service = make_service(config=ONE).start()
    ids = submit(service, "sleep 300", 2)
    wait_for(is_running(service, ids[0]))
    assert state_of(service, ids[1]) == "QUEUED"
    assert reloaded(service, MANY)[-1] == "INFO: reload: the configuration is new: queue"
    wait_for(is_running(service, ids[1]))


def test_at_most_four_builds_at_once(make_service: Callable[..., Service]) -> None:
    """The keys of docs/queue.md as they are written: four run, and no more, until all have run."""
    document = (Path(__file__).parents[2] / "docs/queue.md").read_text()
    section = document.partition("## At most four builds at once")[2]
    [keys] = re.findall(r"^```toml\n(.*?)^```", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    service = make_service(config="").start()
    assert reloaded(service, keys)[-1] == "INFO: reload: the configuration is new: queue"
    ids = submit(service, "sleep 0.3", 12)
    with service.stub() as stub:
        assert [stub.Wait(pb.WaitRequest(id=each), timeout=CALL_SECONDS).job.exit_code for each in ids] == [
            0
        ] * 12
    running, most = set[int](), 0
    for line in service.ok("events", "--since", "0", "--no-follow").splitlines():
        job = json.loads(line)["job"]
        if job["state"] in ("starting", "running"):
            running.add(job["id"])
        else:
            running.discard(job["id"])
        most = max(most, len(running))
    assert most == 4


def test_a_revoked_certificate_and_the_queue(make_service: Callable[..., Service]) -> None:
    """What waits of a client that is not let in any more goes on, as what runs does."""
    service = make_service(config=ONE).start()
    blocker, waits = submit(service, "sleep 1; echo a"), submit(service, "echo b")
    reloaded(service, ONE.replace("[queue]", 'allowed_clients = ["bob"]\n[queue]'))
    assert "not among the clients" in service.refused("list")[1]
    for job_id, line in ((*blocker, b"a\n"), (*waits, b"b\n")):
        path = service.state / "jobs" / str(job_id) / "output"
        wait_for(lambda path=path, line=line: path.exists() and path.read_bytes() == line)  # type: ignore[misc]
    reloaded(service, ONE)
    assert service.ok("wait", str(waits[0])) == "0\n"


def test_the_audit_log_and_metrics(make_service: Callable[..., Service], tmp_path: Path) -> None:
    """A submission is a line with the first id, and no command; what waits, and how long, is counted."""
    service = make_service(config=f'audit_log = "{tmp_path}/audit"\n{ONE}').start()
    ids = submit(service, "sleep 300", 3)
    wait_for(is_running(service, ids[0]))
    service.ok("queue")
    [line] = [
        json.loads(each) for each in (tmp_path / "audit").read_text().splitlines() if '"Submit"' in each
    ]
    assert (line["client"], line["job_id"], line["code"]) == ("alice", ids[0], "OK")
    assert "sleep" not in (tmp_path / "audit").read_text()


# --- kills


class Executions:
    """Counts executions of jobs from outside: of each id the files that a command has written its output to.

    A job that was started anew would have a new file. We keep each one that we see, by a link to it.
    """

    def __init__(self, jobs: Path, kept: Path) -> None:
        self._jobs: Final = jobs
        self._kept: Final = kept
        self._seen: Final[set[tuple[str, int]]] = set()
        kept.mkdir()

    def look(self) -> None:
        """Keep what there is now."""
        for name in os.listdir(self._jobs):
            with suppress(FileNotFoundError):
                # of ten thousand this is each look: no Path, and no link that is there
                path = f"{self._jobs}/{name}/output"
                seen = name, os.stat(path).st_ino
                if seen not in self._seen:
                    os.link(path, f"{self._kept}/{name}-{seen[1]}")
                    self._seen.add(seen)

    def counted(self) -> Counter[int]:
        """How often each id was executed."""
        written = [path.name for path in self._kept.iterdir() if path.stat().st_size]
        return Counter(int(name.partition("-")[0]) for name in written)

    @contextmanager
    def watched(self, pause: float) -> Iterator[None]:
        """Look again and again: a file that is replaced was there for as long as pjwd takes to start."""
        over = threading.Event()

        def run() -> None:
            while not over.wait(pause):
                self.look()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.look()


def check_each_runs_once(service: Service, count: int, kills: int, pause: float, seed: int) -> None:
    """Queue *count* jobs, kill pjwd so often while they are started, and see what became of each."""
    chance = random.Random(seed)
    ids = submit(service, "echo ran", count)
    executions = Executions(service.state / "jobs", service.directory / "kept")
    with executions.watched(pause):
        for _ in range(kills):
            time.sleep(chance.uniform(0.02, 0.5))
            service.kill(chance.choice(["server", "launcher", "both"]))
            service.start()
        with service.client() as alice:
            ends = [alice.wait(job_id) for job_id in ids]
    assert Counter((job.state, job.reason, job.exit_status and job.exit_status.code) for job in ends) == {
        ("exited", "completed", 0): count
    }
    assert executions.counted() == dict.fromkeys(ids, 1)


def test_each_job_runs_once_whatever_is_killed(make_service: Callable[..., Service]) -> None:
    """Server, launcher or both, at random moments: no job is lost, and none runs twice."""
    service = make_service(config=MANY).start()
    check_each_runs_once(service, 400, 8, 0.02, random.randrange(10**9))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_each_of_many_runs_once(make_service: Callable[..., Service]) -> None:
    """The same with more jobs (PJW_QUEUE_JOBS, default 10,000) and twenty kills."""
    service = make_service(config=MANY).start()
    jobs = int(os.environ.get("PJW_QUEUE_JOBS", "10000"))
    check_each_runs_once(service, jobs, 20, 0.2, random.randrange(10**9))
