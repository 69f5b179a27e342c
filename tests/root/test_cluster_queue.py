"""The queue through a gateway: the order of one machine, and what only some nodes have."""

import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from pjw import Client
from pjw.cluster.v1 import cluster_pb2 as cpb
from pjw.errors import (
    GpuError,
    ImageNotFoundError,
    JobStateError,
    LimitReachedError,
    MountNotFoundError,
)
from pjw.model import After, Condition, Job, JobSpec, QueueSpec, Retry
from tests.support import cdi
from tests.support.cluster import Cluster, cluster
from tests.support.images import small_root
from tests.support.service import BIN, CALL_SECONDS, wait_for

# all of a node
WHOLE: Final = {"cpu_max_millicores": 3000}
THIRD: Final = {"cpu_max_millicores": 1000}
# eight times what a job may use by default
CLIENT_MEMORY: Final = 4 * 1024**3
NAP: Final = ["sleep", "300"]


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """What the operator of a node has for jobs."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def made(directory: Path) -> Iterator[Cluster]:
    """A gateway and two nodes; the second has a mount and two GPUs, and starts two jobs at most."""
    cdi.make_gpus(directory)
    (directory / "data").mkdir()
    (directory / "data/file").write_text("lent\n")
    config = (
        # fewer than the gateway thinks
        "[clients]\nrunning_total_max = 2\n"
        f'[network]\nhosts = ["good.test"]\n[mounts.data]\npath = "{directory}/data"\n'
        f'[gpus]\nkind = "{cdi.KIND}"\ncdi_dirs = ["{directory}/cdi"]\nclients = ["alice"]\n'
    )
    bounds = f"[clients]\nqueued_max = 40\n[queue]\nclient_memory_max_bytes = {CLIENT_MEMORY}\n"
    with cluster(node_configs={"n2": config}, gateway_config=bounds) as made:
        yield made


@pytest.fixture
def two(made: Cluster) -> Iterator[Cluster]:
    """The same, whole again after each test."""
    yield made
    made.idle()


@pytest.fixture
def alice(two: Cluster) -> Iterator[Client]:
    """A client."""
    with two.gateway.client() as client:
        yield client


@contextmanager
def drained(two: Cluster, *names: str) -> Iterator[None]:
    """The nodes get no jobs meanwhile."""
    with two.operator() as stub:
        for name in names:
            stub.DrainNode(cpb.DrainNodeRequest(name=name), timeout=CALL_SECONDS)
        try:
            yield
        finally:
            for name in names:
                stub.ResumeNode(cpb.ResumeNodeRequest(name=name), timeout=CALL_SECONDS)


def queued(command: str | Sequence[str] = "true", limits: dict[str, int] = WHOLE, **queue: object) -> JobSpec:
    """A job of the queue."""
    return JobSpec(command, limits, queue=QueueSpec(**queue))  # type: ignore[arg-type]


def until(client: Client, state: str, *jobs: Job) -> None:
    """Wait until jobs are in a state."""
    wait_for(lambda: all(client.get(each.id).state == state for each in jobs))


def out(client: Client, job: Job | str) -> bytes:
    """All output of a job."""
    return b"".join(client.logs(job if isinstance(job, str) else job.id))


def node_rows(two: Cluster) -> list[str]:
    """The request ids of all jobs that nodes have, from copies of their tables, which they have locked."""
    found: list[str] = []
    for node in two.nodes.values():
        with tempfile.TemporaryDirectory() as directory:
            for name in ("jobs.sqlite", "jobs.sqlite-wal"):
                shutil.copy(node.state / name, directory)
            with closing(sqlite3.connect(f"{directory}/jobs.sqlite")) as db:
                found += [row[0] for row in db.execute("SELECT request_id FROM jobs")]
    return found


def test_the_next_job_is_the_first_by_priority_and_age(two: Cluster, alice: Client) -> None:
    """One that has no room lets none pass it, held ones wait, and each says why it waits."""
    with drained(two, "n2"):
        running = alice.start(queued(NAP))
        until(alice, "running", running)
        jobs = alice.submit(
            [
                queued(priority=-5),
                queued(),
                queued(limits=THIRD),
                queued(priority=7),
                queued(priority=9, held=True),
                queued(held=True, priority=-9),
            ]
        )
        low, plain, small, high, held, released = jobs
        wait_for(lambda: alice.get(high.id).detail == "waits: no node has room for it now")
        assert alice.get(small.id).detail == "waits for its turn"
        assert alice.get(held.id).detail == "waits until it is released"
        assert alice.release(released.id).state == "queued"
        # of two that are next, the one that is held waits
        assert alice.hold(plain.id).held
        assert alice.stop(running.id, grace=0).reason == "stopped"
        done = [alice.wait(each.id) for each in (high, small, low, released)]
        assert [each.start for each in done] == sorted(each.start for each in done)
        assert {each.reason for each in done} == {"completed"}
        for each in (held, plain):
            assert alice.get(each.id).state == "queued"
        assert alice.stop(held.id).reason == "cancelled"
        alice.release(plain.id)
        assert alice.wait(plain.id).reason == "completed"
        assert alice.logs(held.id) is not None and out(alice, held) == b""
        with pytest.raises(JobStateError, match="it does not wait in the queue"):
            alice.hold(plain.id)


def test_clients_take_turns(two: Cluster, alice: Client) -> None:
    """Who has least of the cluster is next, however many jobs others had there before."""
    with drained(two, "n2"), two.gateway.client("bob") as bob:
        jobs = alice.submit([queued(NAP, THIRD) for _ in range(5)])
        until(alice, "running", *jobs[:3])
        later = bob.start(queued(NAP, THIRD))
        assert [alice.get(each.id).state for each in jobs[3:]] == ["queued"] * 2
        alice.stop(jobs[0].id, grace=0)
        until(bob, "running", later)
        assert [alice.get(each.id).state for each in jobs[3:]] == ["queued"] * 2
        alice.stop(jobs[1].id, grace=0)
        until(alice, "running", jobs[3])


def test_a_client_has_no_more_of_the_cluster_than_its_slots(two: Cluster, alice: Client) -> None:
    """On all nodes together; what another client has is no part of them."""
    half = {**THIRD, "memory_max_bytes": CLIENT_MEMORY // 2}
    running = alice.submit([queued(NAP, half), queued(NAP, half)])
    until(alice, "running", *running)
    waiting = alice.start(queued(limits=half))
    wait_for(lambda: alice.get(waiting.id).detail == "waits: jobs of alice have all of its slots")
    with two.gateway.client("bob") as bob:
        assert bob.run(JobSpec("true", half)).job.reason == "completed"
    alice.stop(running[0].id, grace=0)
    assert alice.wait(waiting.id).reason == "completed"


def test_jobs_wait_for_others(alice: Client) -> None:
    """For a good end, a bad one, any one; in vain means cancelled, and so on down the chain."""
    bad, good, *waiting = alice.submit(
        [
            queued("exit 3", THIRD),
            queued("true", THIRD),
            queued("true", THIRD, after=[After(earlier=0)]),
            queued("echo cleaned", THIRD, after=[After(earlier=0, condition=Condition.FAILED)]),
            queued("true", THIRD, after=[After(earlier=0, condition=Condition.ANY), After(earlier=1)]),
            queued("true", THIRD, after=[After(earlier=2)]),
        ]
    )
    ends = [alice.wait(each.id) for each in waiting]
    assert [each.reason for each in ends] == ["cancelled", "completed", "completed", "cancelled"]
    assert ends[0].detail == f"job {bad.id}, which it waited for, ended with exit code 3"
    assert out(alice, waiting[1]) == b"cleaned\n"
    before, after = alice.wait(good.id), ends[2]
    assert before.end is not None
    assert after.start >= before.end
    # what has ended already; and an element of an array
    array = alice.start(queued("exit $((PJW_ARRAY_INDEX % 2))", THIRD, array="1-2"))
    afterwards = alice.submit(
        [
            queued("true", THIRD, after=[After(good.id), After(array.id, element=2)]),
            queued("true", THIRD, after=[After(array.id, element=1)]),
            queued("true", THIRD, after=[After(array.id, Condition.FAILED)]),
        ]
    )
    assert [alice.wait(each.id).reason for each in afterwards] == ["completed", "cancelled", "completed"]


def test_an_array_with_a_failure_that_is_tried_again(two: Cluster, alice: Client) -> None:
    """Each element once but for that one; two at once; known by its index before and after its turn."""
    command = (
        "echo $PJW_ARRAY_INDEX $PJW_ATTEMPT; sleep 0.1; [ $PJW_ARRAY_INDEX != 3 ] || [ $PJW_ATTEMPT = 2 ]"
    )
    array = alice.start(queued(command, THIRD, array="1-8%2", retry=Retry(2, backoff_seconds=0)))
    assert alice.wait(f"{array.id}_8").succeeded
    done = alice.wait(array.id)
    assert (done.succeeded, done.state) == (True, "exited")
    assert done.array is not None
    assert (done.array.succeeded, done.array.failed, done.array.waiting) == (8, 0, 0)
    for index in range(1, 9):
        assert out(alice, f"{array.id}_{index}") == b"%d %d\n" % (index, 2 if index == 3 else 1)
    third = alice.get(f"{array.id}_3")
    assert (third.attempt, third.succeeded) == (2, True)
    first = next(each for each in alice.list() if each.retried_as == third.id)
    assert (first.attempt, first.array_index) == (1, 3)
    assert out(alice, first) == b"3 1\n"
    # waiting for, and stopping, an attempt is about the newest one
    assert alice.wait(first.id).id == third.id
    begun: set[int] = set()
    most = 0
    for change in alice.watch_jobs(since=0):
        if change.job.id == array.id and change.job.state.final:
            break
        if change.job.array_id == array.id:
            (begun.discard if change.job.state.final or change.job.state == "queued" else begun.add)(
                change.job.id
            )
            most = max(most, len(begun))
    assert most == 2
    with pytest.raises(JobStateError, match="is an array, and has no output of its own"):
        list(alice.logs(array.id))
    ids = [each.id for each in alice.list() if each.array_id == array.id]
    alice.delete(array.id)
    assert not {array.id, *ids} & {each.id for each in alice.list()}


def test_elements_are_held_and_stopped_one_by_one(two: Cluster, alice: Client) -> None:
    """Before their turn and in it; and all at once with their array."""
    array = alice.start(queued(NAP, THIRD, array="1-9%2"))
    wait_for(lambda: alice.get(f"{array.id}_2").state == "running")
    assert alice.hold(f"{array.id}_3").held
    assert alice.stop(f"{array.id}_4").reason == "cancelled"
    assert alice.stop(f"{array.id}_1", grace=0).reason == "stopped"
    wait_for(lambda: alice.get(f"{array.id}_5").state == "running")
    assert alice.get(f"{array.id}_3").state == "queued"
    assert alice.hold(array.id).held
    assert alice.stop(f"{array.id}_2", grace=0).reason == "stopped"
    alice.release(array.id)
    wait_for(lambda: alice.get(f"{array.id}_3").state == "running")
    done = alice.stop(array.id, grace=0)
    assert (done.reason, done.array and done.array.cancelled) == ("stopped", 5)
    assert alice.wait(f"{array.id}_9").reason == "cancelled"
    assert out(alice, f"{array.id}_9") == b""


def test_a_time_before_which_it_is_not_started(alice: Client) -> None:
    """To the second, in any time zone."""
    due = datetime.now(UTC) + timedelta(seconds=1.5)
    job = alice.start(queued("true", THIRD, not_before=due))
    assert alice.get(job.id).detail == f"waits until {due:%Y-%m-%d %H:%M:%S} UTC"
    assert alice.wait(job.id).start >= due


def test_the_queue_takes_so_many(alice: Client) -> None:
    """All or none of a submission, and an array is one."""
    with pytest.raises(LimitReachedError, match="the queue takes at most 40 jobs of alice"):
        alice.submit([queued(held=True) for _ in range(41)])
    held = alice.submit([queued(held=True) for _ in range(39)] + [queued(held=True, array="1-1000")])
    assert alice.quota().queued == 40
    for each in held:
        alice.stop(each.id)


def test_a_gateway_is_killed_in_the_middle_of_an_array(two: Cluster, alice: Client) -> None:
    """Twice: each element ran once, none was forgotten, and what waited for the array goes on."""
    before = len(node_rows(two))
    array = alice.start(queued("echo $PJW_ARRAY_INDEX; sleep 0.2", THIRD, array="1-40%5"))
    last = alice.start(queued("echo last", THIRD, priority=5, after=[After(array.id)]))
    for some in (8, 20):
        wait_for(lambda some=some: (told := alice.get(array.id).array) and told.succeeded >= some)  # type: ignore[misc]
        two.gateway.stop(signal.SIGKILL)
        two.gateway.start()
    done = alice.wait(array.id)
    assert done.array is not None
    assert (done.array.succeeded, done.array.failed, done.array.cancelled) == (40, 0, 0)
    assert out(alice, alice.wait(last.id)) == b"last\n"
    indices = [each.array_index for each in alice.list() if each.array_id == array.id]
    assert sorted(filter(None, indices)) == list(range(1, 41))
    rows = node_rows(two)
    assert len(rows) == len(set(rows)) == before + 41
    assert {out(alice, f"{array.id}_{index}") for index in (1, 20, 40)} == {b"1\n", b"20\n", b"40\n"}


def test_what_is_lost_with_its_node_is_tried_again_where_that_is_asked_for(
    two: Cluster, alice: Client
) -> None:
    """Elsewhere, once; what waits for it waits for the next attempt; what may not be tried again is lost."""
    spec = queued(
        "echo $PJW_ATTEMPT; [ $PJW_ATTEMPT != 1 ] || sleep 300", THIRD, retry=Retry(0, if_lost=True)
    )
    once = alice.start(queued(NAP, THIRD))
    again = alice.start(spec)
    last = alice.start(queued("true", THIRD, after=[After(again.id)]))
    until(alice, "running", once, again)
    node = two.nodes[alice.get(again.id).node]
    assert alice.get(once.id).node == node.name
    pids = (node.pid, node.launcher_pid())
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        done = alice.wait(again.id)
        assert (done.reason, done.attempt) == ("completed", 2)
        assert done.node != node.name
        first = alice.get(again.id)
        assert (first.state, first.reason, first.retried_as) == ("lost", "node_lost", done.id)
        assert alice.wait(once.id).reason == "node_lost"
        assert alice.wait(last.id).reason == "completed"
        assert out(alice, done) == b"2\n"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        two.await_nodes({"n1": "up", "n2": "up"})
    # the copy that lived on is ended
    wait_for(lambda: not node.job_cgroups())


def test_jobs_go_to_nodes_that_have_what_they_need(two: Cluster, alice: Client) -> None:
    """A mount, GPUs; what no node has is refused, and what one node alone has holds nobody else up."""
    lent = alice.run(JobSpec("cat /mnt/data/file", mounts=["data"]))
    assert (lent.output, lent.job.node) == (b"lent\n", "n2")
    quota = alice.quota()
    assert ([each.name for each in quota.mounts], quota.gpus) == (["data"], 2)
    with pytest.raises(MountNotFoundError):
        alice.start(JobSpec("true", mounts=["other"]))
    with pytest.raises(GpuError, match="asks for 3 GPUs, and no node has more than 2"):
        alice.start(JobSpec("true", gpus=3))
    named = alice.run(JobSpec("echo $HTTPS_PROXY", allow=["good.test"]))
    assert (named.output, named.job.node) == (b"http://127.0.0.1:3128\n", "n2")
    assert "does not offer it to alice" in alice.run(JobSpec("true", allow=["bad.test"])).job.detail
    with two.gateway.client("bob") as bob:
        # the node's operator says to whom, and so the node
        refused = bob.run(JobSpec("true", gpus=1)).job
        assert (refused.reason, refused.detail) == ("start_failed", "your operator offers you no GPUs")
    both = alice.start(JobSpec("ls /dev/nvidia? | wc -l; exec sleep 300", THIRD, gpus=2))
    until(alice, "running", both)
    assert alice.get(both.id).node == "n2"
    waiting = alice.start(JobSpec("true", THIRD, gpus=1))
    wait_for(lambda: alice.get(waiting.id).detail == "is next: waits for 1 free GPU")
    assert alice.run(JobSpec("true", THIRD)).job.reason == "completed"
    alice.stop(both.id, grace=0)
    assert alice.wait(waiting.id).reason == "completed"
    with drained(two, "n2"):
        for_mount = alice.start(JobSpec("true", THIRD, mounts=["data"]))
        wait_for(
            lambda: alice.get(for_mount.id).detail == "waits: no node that gets jobs now has the mount data"
        )
        assert alice.run(JobSpec("true", WHOLE)).job.node == "n1"
    assert alice.wait(for_mount.id).reason == "completed"


def test_a_job_that_a_node_cannot_start_now_waits_in_its_place(two: Cluster, alice: Client) -> None:
    """The node refuses it, whatever the gateway thinks; another one gets it, elements of an array too."""
    with drained(two, "n1"):
        jobs = alice.submit([queued(NAP, THIRD), queued(NAP, THIRD, array="1-2")])
        array = jobs[1].id
        until(alice, "running", jobs[0])
        two.gateway.await_log("node n2 cannot start job")
        wait_for(lambda: alice.get(f"{array}_2").state == "queued")
        plain = alice.start(queued(limits=THIRD, priority=1))
        why = "waits: no node can start a job now; they are tried again soon"
        wait_for(lambda: alice.get(plain.id).detail == why)
    assert alice.wait(plain.id).node == "n1"
    wait_for(lambda: alice.get(f"{array}_2").state == "running")
    assert [alice.get(each).node for each in (jobs[0].id, f"{array}_1", f"{array}_2")] == ["n2", "n2", "n1"]
    assert alice.stop(array, grace=0).reason == "stopped"


def test_an_image_that_a_node_gets_meanwhile(two: Cluster, alice: Client, directory: Path) -> None:
    """Of the node's operator's: the gateway hears of it soon, and sends jobs there."""
    with pytest.raises(ImageNotFoundError):
        alice.start(JobSpec("true", image="small"))
    root = small_root(directory / "root")
    words = ("image", "import", "--state-dir", str(two.nodes["n2"].state), "small", f"dir:{root}")
    subprocess.run([str(BIN / "pjwd"), *words], check=True, capture_output=True)

    def ran() -> bool:
        with suppress(ImageNotFoundError):
            done = alice.run(JobSpec("cat /etc/os-release", image="small", read_only=True))
            assert (done.output, done.job.node) == (b"ID=small\n", "n2")
            return True
        return False

    wait_for(ran)


def test_jobs_with_a_link_are_on_one_node(two: Cluster, alice: Client) -> None:
    """That of the first; and while there is no room for them there, others go before them."""
    first = alice.start(JobSpec("exec sleep 300", {"cpu_max_millicores": 2000}, link="db"))
    until(alice, "running", first)
    where = alice.get(first.id).node
    assert alice.run(JobSpec("true", THIRD, link="db")).job.node == where
    second = alice.start(JobSpec("true", WHOLE, link="db"))
    wait_for(lambda: "where others have its link db" in alice.get(second.id).detail)
    assert alice.run(JobSpec("true", WHOLE)).job.node != where
    alice.stop(first.id, grace=0)
    assert alice.wait(second.id).reason == "completed"
