"""A gateway whose places a real Slurm gives: what it takes back, what it forgets, and what dies meanwhile."""

import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from pjw import Job, JobSpec, QueueSpec
from pjw.model import Retry
from pjw.server.config import HOLD_SOCKET
from tests.root import test_cluster as neutral
from tests.support.cluster import Cluster
from tests.support.service import CALL_SECONDS, wait_for
from tests.support.slurm_cluster import SlurmCluster, await_no_places, slurm_cluster


@pytest.fixture(scope="module")
def made() -> Iterator[SlurmCluster]:
    """One Slurm, one gateway and two nodes for all tests here."""
    with slurm_cluster(keys='partitions = ["only-*"]\nconstraints = ["of-*"]\n') as made:
        yield made


@pytest.fixture
def two(made: SlurmCluster) -> Iterator[SlurmCluster]:
    """The same, whole again after each test."""
    yield made
    made.idle()


def test_getting_started_through_slurm(two: SlurmCluster) -> None:
    """The session of the seed's first page; Slurm learns no command, and no name but a uuid."""
    gateway = two.gateway
    ids = [
        gateway.ok("start", command).strip()
        for command in ('echo "hello world"', "sleep 300", "trap 'exit 0' TERM; echo ready; sleep 300 & wait")
    ]
    assert ids == ["1", "2", "3"]
    done = json.loads(gateway.ok("wait", "--format", "jsonl", "1"))
    assert (done["exitCode"], done["state"], done["reason"]) == (0, "exited", "completed")
    assert done["node"] in two.nodes
    assert gateway.ok("logs", "1") == "hello world\n"
    with gateway.popen("logs", "3") as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"ready\n"
        held = two.slurm.ok("squeue", "--noheader", "--format=%j %k %u %T %o")
        stopped = gateway.ok("stop", "3")
        assert (logs.stdout.read(), logs.wait(10)) == (b"", 0)
    assert '"exitCode": 0,' in stopped
    assert '"reason": "stopped"' in gateway.ok("stop", "2")
    assert "sleep" not in held and "hello" not in held
    assert {line.split()[2] for line in held.splitlines()} == {"daemon"}
    assert {line.split()[1] for line in held.splitlines()} == {"1:528:0::"}
    await_no_places(two)


def of_kind(command: str, **limits: int) -> JobSpec:
    """A job for a place of its own kind."""
    return JobSpec(command, limits=limits)


@pytest.mark.parametrize(
    "test",
    [
        neutral.test_changes_and_usage_are_told,
        neutral.test_what_a_command_leaves_is_told_as_on_one_machine,
        neutral.test_a_node_that_is_away_for_a_moment_loses_nothing,
    ],
)
def test_what_does_not_depend_on_the_engine(two: SlurmCluster, test: Callable[[Cluster], None]) -> None:
    """The same as with the engine `pool`."""
    test(two)


@pytest.mark.parametrize("what", ["gateway", "both"])
def test_a_follow_is_whole_over_a_kill(two: SlurmCluster, what: str) -> None:
    """As with the engine `pool`."""
    neutral.test_a_follow_is_whole_over_a_kill(two, what)


def test_warm_places_take_the_next_job_of_their_kind(two: SlurmCluster) -> None:
    """A job that follows costs Slurm nothing; another shape has a place of its own; both are given back."""
    slurm = two.slurm
    with two.gateway.client() as client:
        first = client.wait(client.start("true").id)
        [(number, name, state)] = slurm.jobs()
        assert (name[:4], state) == ("pjw-", "RUNNING")
        for _ in range(5):
            assert client.wait(client.start("true").id).node == first.node
        assert slurm.jobs() == [(number, name, "RUNNING")]
        larger = client.start(of_kind("true", memory_max_bytes=256 * 1024**2))
        client.wait(larger.id)
        assert [each[0] for each in slurm.jobs()] != [number]
    await_no_places(two)


def test_many_jobs_need_few_places(two: SlurmCluster) -> None:
    """More than the nodes have room for: all run, once, and Slurm is asked for no more than 16 at a time."""
    with two.gateway.client() as client:
        jobs = [client.start("echo done") for _ in range(40)]
        assert {client.wait(job.id).reason for job in jobs} == {"completed"}
        assert b"".join(client.logs(jobs[-1].id)) == b"done\n"
    asked = int(two.slurm.ok("scontrol", "show", "config").split("NEXT_JOB_ID")[1].split()[1])
    assert asked <= 40
    await_no_places(two)


def test_a_place_that_slurm_takes_back(two: SlurmCluster) -> None:
    """Scancel: the job is stopped, within its grace, and is told revoked; the place is free only then."""
    gateway, slurm = two.gateway, two.slurm
    job_id = gateway.ok(
        "start", "trap 'sleep 1; echo told; exit 3' TERM; echo ready; sleep 300 & wait"
    ).strip()
    with gateway.popen("logs", job_id) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"ready\n"
        [(number, _, _)] = slurm.jobs()
        slurm.ok("scancel", number)
        assert (logs.stdout.read(), logs.wait(CALL_SECONDS)) == (b"told\n", 0)
    done = json.loads(gateway.ok("get", job_id))
    assert (done["state"], done["reason"], done["exitCode"]) == ("exited", "revoked", 3)
    assert done["detail"] == f"Slurm took its place on node {done['node']} back (Slurm's job {number})"
    await_no_places(two)


def test_slurm_may_not_requeue_a_place(two: SlurmCluster) -> None:
    """A place that began again elsewhere would be another one: Slurm refuses, and the job goes on."""
    gateway, slurm = two.gateway, two.slurm
    job_id = gateway.ok("start", "echo ready; sleep 300").strip()
    two.node_of(int(job_id))
    [(number, _, _)] = slurm.jobs()
    assert slurm.call("scontrol", "requeue", number).returncode != 0
    assert [each for each, _, _ in slurm.jobs()] == [number]
    assert json.loads(gateway.ok("get", job_id))["state"] == "running"
    gateway.ok("stop", job_id)
    await_no_places(two)


def test_a_hold_that_is_killed(two: SlurmCluster) -> None:
    """As an orphan, for example: nobody knows who has the place now, so the job does not go on."""
    gateway, slurm = two.gateway, two.slurm
    job_id = gateway.ok("start", "echo ready; sleep 300").strip()
    with gateway.popen("logs", job_id) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"ready\n"
        [(number, _, _)] = slurm.jobs()
        slurm.ok("scancel", "--signal=KILL", "--full", number)
        assert (logs.stdout.read(), logs.wait(CALL_SECONDS)) == (b"", 0)
    assert json.loads(gateway.ok("get", job_id))["reason"] == "revoked"
    await_no_places(two)


def test_a_job_goes_to_the_partition_and_the_feature_that_it_names(two: SlurmCluster) -> None:
    """Of those that the operator allows. What Slurm does not take waits in its words, and holds nobody up."""
    gateway = two.gateway
    never = gateway.ok("start", "--partition", "only-n1", "--constraint", "of-n2", "true").strip()
    with gateway.client() as client:
        words = "sbatch: Batch job submission failed: Requested node configuration is not available"
        wait_for(lambda: client.get(int(never)).detail == f"waits: Slurm does not take it: {words}")
        for name in two.nodes:
            for option, word in (("--partition", f"only-{name}"), ("--constraint", f"of-{name}")):
                done = client.wait(int(gateway.ok("start", option, word, "true")))
                assert (done.node, done.partition + done.constraint) == (name, word)
        array = client.start(JobSpec("true", partition="only-n2", queue=QueueSpec(array="1-2")))
        assert client.wait(array.id).partition == "only-n2"
        assert {client.get(f"{array.id}_{index}").node for index in (1, 2)} == {"n2"}
        # its next attempt asks for the same
        again = client.start(
            JobSpec("false", constraint="of-n1", queue=QueueSpec(retry=Retry(1, backoff_seconds=0)))
        )
        last = client.wait(again.id)
        assert (last.attempt, last.constraint, last.node) == (2, "of-n1", "n1")
        assert client.stop(int(never)).reason == "cancelled"
    for option, word in (("--partition", "all"), ("--constraint", "slow")):
        code, said = gateway.refused("start", option, word, "true")
        what = option.strip("-")
        assert (code, said.splitlines()) == (
            1,
            [
                f"pjw: error: no job may name the {what} {word}",
                f"hint: the operator can allow it with gateway.slurm.{what}s",
            ],
        )


def test_slurm_forgets_a_place_that_waits(two: SlurmCluster) -> None:
    """Scancel before it began: the gateway asks for another one; a stop of the job takes back what waits."""
    gateway, slurm = two.gateway, two.slurm
    with gateway.client() as client:
        blockers = [client.start(of_kind("sleep 300", cpu_max_millicores=3000)) for _ in two.nodes]
        for each in blockers:
            two.node_of(each.id)
        waiting = client.start(of_kind("echo here", cpu_max_millicores=3000))
        wait_for(lambda: [each for each in slurm.jobs() if each[2] == "PENDING"])
        wait_for(lambda: client.get(waiting.id).detail == "waits: Slurm says Resources")
        [before] = [each for each in slurm.jobs() if each[2] == "PENDING"]
        slurm.ok("scancel", before[0])
        wait_for(lambda: [each for each in slurm.jobs() if each[2] == "PENDING" and each[0] != before[0]])
        # what waits for nothing is taken back
        other = client.start(of_kind("true", cpu_max_millicores=3000))
        wait_for(lambda: len([each for each in slurm.jobs() if each[2] == "PENDING"]) == 2)
        assert client.stop(other.id).reason == "cancelled"
        wait_for(lambda: len([each for each in slurm.jobs() if each[2] == "PENDING"]) == 1)
        client.stop(blockers[0].id, grace=0)
        assert client.wait(waiting.id).reason == "completed"


def test_a_drained_node_is_told(two: SlurmCluster) -> None:
    """By Slurm's administrator, with his reason; and by the gateway's, whose word Slurm hears too."""
    gateway, slurm = two.gateway, two.slurm
    with gateway.client() as client:
        for name in two.nodes:
            slurm.ok("scontrol", "update", f"nodename={name}", "state=drain", "reason=bad disk")
        job = client.start("true")
        wait_for(lambda: client.get(job.id).detail.startswith("waits: Slurm says "))
        assert "n1, n2 drained: bad disk" in client.get(job.id).detail
        slurm.ok("scontrol", "update", "nodename=n2", "state=resume")
        assert client.wait(job.id).node == "n2"
        slurm.ok("scontrol", "update", "nodename=n1", "state=resume")
        gateway.ok("nodes", "drain", "n2", client="ann")
        try:
            assert {client.wait(client.start("true").id).node for _ in range(2)} == {"n1"}
        finally:
            gateway.ok("nodes", "resume", "n2", client="ann")


@pytest.mark.parametrize("what", ["gateway", "server", "both"])
def test_a_place_keeps_its_job_over_a_kill(two: SlurmCluster, what: str) -> None:
    """A hold that took a second job has that one when gateway or node are back."""
    gateway, slurm = two.gateway, two.slurm
    with gateway.client() as client:
        client.wait(client.start("true").id)
        second = client.start("echo ready; sleep 300")
        node = two.node_of(second.id)
        held = slurm.jobs()
        assert len(held) == 1
        if what == "gateway":
            gateway.stop(signal.SIGKILL)
            gateway.start()
        else:
            node.kill(what)
            node.start()
        two.await_nodes(dict.fromkeys(two.nodes, "up"))
        wait_for(lambda: not client.get(second.id).detail)
        assert client.get(second.id).state == "running"
        if what == "gateway":
            # known to the next gateway at once: it goes on to a third job
            third = client.start("sleep 300")
            two.node_of(third.id)
            assert client.stop(second.id, grace=0).reason == "stopped"
            assert client.stop(third.id, grace=0).reason == "stopped"
            assert client.wait(client.start("true").id).reason == "completed"
            assert held[0] in slurm.jobs()
        else:
            slurm.ok("scancel", held[0][0])
            assert client.wait(second.id).reason == "revoked"


def test_a_hold_that_died_while_its_node_was_away(two: SlurmCluster) -> None:
    """The node cannot know it: the sampler finds that Slurm has no such place, and the job is stopped."""
    gateway, slurm = two.gateway, two.slurm
    job_id = int(gateway.ok("start", "sleep 300"))
    node = two.node_of(job_id)
    node.kill("server")
    [(number, _, _)] = slurm.jobs()
    slurm.ok("scancel", "--signal=KILL", "--full", number)
    wait_for(lambda: (number, "RUNNING") not in [(each[0], each[2]) for each in slurm.jobs()])
    node.start()
    with gateway.client() as client:
        assert client.wait(job_id).reason == "revoked"


def test_slurmd_and_slurmctld_die(two: SlurmCluster) -> None:
    """Kill -9 during a live follow: no job notices; starts wait for the controller, and say so."""
    gateway, slurm = two.gateway, two.slurm
    with gateway.client() as client:
        job = client.start("i=0; while [ $i -lt 200 ]; do i=$((i+1)); echo line $i; sleep 0.02; done")
        node = two.node_of(job.id)
        seen = client.logs(job.id, follow=True)
        begun = next(iter(seen))
        slurm.end(f"slurmd-{node.name}", signal.SIGKILL)
        slurm.end("slurmctld", signal.SIGKILL)
        waiting = client.start(of_kind("echo late", memory_max_bytes=128 * 1024**2))
        wait_for(
            lambda: "Slurm" in client.get(waiting.id).detail and "controller" in client.get(waiting.id).detail
        )
        whole = begun + b"".join(seen)
        assert whole == b"".join(b"line %d\n" % (number + 1) for number in range(200))
        slurm.start_controller()
        slurm.start_node(node.name)
        assert client.wait(waiting.id).reason == "completed"
        assert client.get(job.id).reason == "completed"


def test_nothing_is_submitted_twice_over_a_kill_of_the_gateway(two: SlurmCluster) -> None:
    """What waits in Slurm is the next gateway's, too."""
    gateway, slurm = two.gateway, two.slurm
    with gateway.client() as client:
        blockers = [client.start(of_kind("sleep 300", cpu_max_millicores=3000)) for _ in two.nodes]
        for each in blockers:
            two.node_of(each.id)
        waiting = [client.start(of_kind("true", cpu_max_millicores=3000)) for _ in range(3)]
        wait_for(lambda: len(slurm.jobs()) == 5)
        gateway.stop(signal.SIGKILL)
        gateway.start()
        two.await_nodes(dict.fromkeys(two.nodes, "up"))
        wait_for(lambda: client.get(waiting[0].id).detail.startswith("waits: Slurm says "))
        assert len(slurm.jobs()) == 5
        for each in blockers:
            client.stop(each.id, grace=0)
        assert {client.wait(each.id).reason for each in waiting} == {"completed"}


def test_munge_is_down(two: SlurmCluster) -> None:
    """Slurm's programs cannot say who they are: a job that waits says so, and goes on when it is back."""
    gateway, slurm = two.gateway, two.slurm
    with gateway.client() as client:
        slurm.end("munged")
        waiting = client.start(of_kind("echo late", memory_max_bytes=64 * 1024**2))
        wait_for(lambda: "unge" in client.get(waiting.id).detail)
        gateway.await_log("Slurm does not answer: squeue: ")
        slurm.start_munge()
        assert client.wait(waiting.id).reason == "completed"


def test_who_calls_slurm_is_killed(two: SlurmCluster) -> None:
    """The gateway cannot start another, so it ends; the next one has its jobs."""
    gateway = two.gateway
    job_id = int(gateway.ok("start", "sleep 300"))
    two.node_of(job_id)
    assert gateway.process is not None
    children = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text().split()
    [helper] = [pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == "pjwd-slurm\n"]
    status = Path(f"/proc/{helper}/status").read_text()
    assert re.search(r"^Uid:\t1\t1\t1\t1$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    os.kill(int(helper), signal.SIGKILL)
    assert gateway.process.wait(CALL_SECONDS) == 1
    text = gateway.log.read_text()
    # told once with its reason, and no bug for whoever reads the log later
    assert "answers of Slurm: the task has died, and pjw cannot go on without it" in text
    gateway.log.write_text(text.replace("Traceback", "traceback"))
    gateway.start()
    with gateway.client() as client:
        wait_for(lambda: not client.get(job_id).detail)
        assert client.stop(job_id, grace=0).reason == "stopped"


def test_what_is_missing_is_said_at_the_start(two: SlurmCluster, tmp_path: Path) -> None:
    """No sbatch, no slurm.conf: in words, and the gateway does not start."""
    gateway = two.gateway
    assert gateway.config is not None
    for old, new, words in (
        (f'bin = "{two.slurm.bin}"', 'bin = "/var/empty"', "needs sbatch, and there is none in /var/empty\n"),
        (f'conf = "{two.slurm.conf}"', 'conf = "/no/such"', "names /no/such, and there is no such file\n"),
    ):
        config = tmp_path / "pjwd.toml"
        config.write_text(gateway.config.replace(old, new))
        command = [*gateway.command()[:-2], "--config", str(config)]
        command[command.index("--state-dir") + 1] = str(tmp_path / "state")
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CALL_SECONDS)
        assert (done.returncode, words in done.stderr) == (1, True), done
        assert "hint: " in done.stderr and "Traceback" not in done.stderr


def test_who_may_hold_a_place(two: SlurmCluster) -> None:
    """Root and the gateway's user; and the socket of a node takes nothing that is no hold."""
    program = str(two.slurm.directory / "pjw-hold")
    prefix = two.apart["n1"].prefix
    arguments = (program, HOLD_SOCKET, "1:528:0::", "x")

    def hold(*command: str, job: str = "999999") -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*prefix, *command],
            env={"SLURM_JOB_ID": job},
            capture_output=True,
            text=True,
            check=False,
            timeout=CALL_SECONDS,
        )

    nobody = hold("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *arguments)
    assert nobody.returncode == 75
    assert nobody.stderr == "pjw-hold: pjwd lets in only root and the user of its cluster.hold_user\n"
    odd = hold(program, HOLD_SOCKET, "nonsense", "x")
    assert (odd.returncode, odd.stderr) == (
        75,
        "pjw-hold: the gateway knows nothing of this place, or has it elsewhere\n",
    )
    for job in ("", "0x1", "-1"):
        assert hold(*arguments, job=job).returncode == 64
    assert hold(program).returncode == 64
    # one that Slurm has never heard of gets jobs like others, and is let go when there is none
    assert hold(*arguments).returncode == 0


STORM_SECONDS: Final = 25.0


@pytest.mark.slow
def test_a_storm(two: SlurmCluster) -> None:
    """Random kills under eight clients: no job runs twice, none is forgotten, output is whole."""
    gateway, slurm = two.gateway, two.slurm
    chance = random.Random(16)
    ended: list[Job] = []
    over = threading.Event()

    def work(number: int) -> None:
        with gateway.client("alice" if number % 2 else "bob") as client:
            while not over.is_set():
                limits = {"memory_max_bytes": (64 + number % 3) * 1024**2}
                job = client.start(JobSpec("echo begun; sleep 0.3; echo ended", limits=limits))
                done = client.wait(job.id)
                ended.append(done)
                output = b"".join(client.logs(job.id))
                assert output == b"begun\nended\n" or done.reason != "completed", (done, output)

    def kill(what: str) -> None:
        node = chance.choice(list(two.nodes.values()))
        match what:
            case "gateway":
                gateway.stop(signal.SIGKILL)
                gateway.start()
            case "server" | "both":
                node.kill(what)
                node.start()
            case "slurmctld":
                slurm.end(what, signal.SIGKILL)
                slurm.start_controller()
            case "slurmd":
                slurm.end(f"slurmd-{node.name}", signal.SIGKILL)
                slurm.start_node(node.name)
            case "place":
                for number, _, state in slurm.jobs()[:2]:
                    if state == "RUNNING":
                        slurm.ok("scancel", *chance.choice(([], ["--signal=KILL", "--full"])), number)

    with ThreadPoolExecutor(8) as threads:
        clients = [threads.submit(work, number) for number in range(8)]
        deadline = time.monotonic() + STORM_SECONDS
        try:
            while time.monotonic() < deadline:
                kill(chance.choice(["gateway", "server", "both", "slurmctld", "slurmd", "place", "place"]))
                time.sleep(chance.random())
        finally:
            over.set()
        for name, state in slurm.states().items():
            if "drain" in state:
                slurm.ok("scontrol", "update", f"nodename={name}", "state=resume")
        for each in clients:
            each.result(CALL_SECONDS)
    print(Counter(job.reason for job in ended))
    # a launcher that is killed in the middle of a launch cannot say what became of it
    assert {job.reason for job in ended} <= {"completed", "revoked", "launch_interrupted"}
    assert len(ended) > STORM_SECONDS / 4
    rows = [json.loads(line) for node in two.nodes.values() for line in neutral.rows_of(node.state)]
    uuids = [row["request_id"] for row in rows]
    assert len(uuids) == len(set(uuids))
