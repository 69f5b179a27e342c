"""A gateway that keeps what nodes drop; a node of one's choice; what a node's retention leaves; metrics."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pjw.model import JobSpec
from pjw.v1 import job_worker_pb2 as pb
from tests.support import pjwd_with
from tests.support.cluster import Cluster
from tests.support.service import CALL_SECONDS, wait_for

METRICS = re.compile(r"^pjwd: metrics on (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def archive() -> Iterator[Path]:
    """A directory that the gateway's user can write to, as on a file system that is shared."""
    path = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def made(archive: Path) -> Iterator[Cluster]:
    """One cluster for all tests here; its nodes keep two ended jobs of a client."""
    cluster = Cluster(
        Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib")),
        gateway_config='[metrics]\nlisten = "127.0.0.1:0"\n',
        node_config="[retention]\njobs_per_client = 2\n",
        gateway_keys=f'archive = "{archive}"\nchoose_node = ["al*"]\n',
        gateway_change=pjwd_with.archive_again_soon,
    )
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def two(made: Cluster) -> Iterator[Cluster]:
    """The same, whole again after each test."""
    yield made
    made.idle()


def archived(archive: Path, job_id: int) -> Path:
    """The copy of a job's output, once it is whole."""
    path = archive / str(job_id)
    wait_for(path.exists)
    return path


# --- the archive


def test_output_outlives_its_node(two: Cluster, archive: Path) -> None:
    """Whole and by every option, while the node is away and when it has dropped the job."""
    gateway = two.gateway
    said = "for i in 1 2 3; do echo out $i; echo err $i >&2; sleep 0.05; done"
    with gateway.client() as client:
        job = client.start(JobSpec(said, split_stderr=True))
        client.wait(job.id)
        node = two.node_of(job.id)
        options = (
            (),
            ("--stderr",),
            ("--tail", "2"),
            ("--offset", "6"),
            ("--timestamps",),
            ("--timestamps", "--stderr", "--offset", "6"),
            ("--since", "1h"),
        )
        copy = archived(archive, job.id)
        wait_for(lambda: gateway.metric("pjw_archived_jobs_total") >= 1)
        before = {words: gateway.ok("logs", *words, str(job.id)) for words in options}
        assert before[()] == "out 1\nout 2\nout 3\n"
        assert before["--stderr",] == "err 1\nerr 2\nerr 3\n"
        node.stop()
        two.await_nodes({node.name: "away"})
        for words, expected in before.items():
            assert gateway.ok("logs", *words, str(job.id)) == expected, words
        code, told = gateway.refused("logs", "--offset", "99", str(job.id))
        assert (code, told.splitlines()[0]) == (
            1,
            "pjw: error: cannot read output from byte 99: it has 18 bytes",
        )
        assert sorted(each.name for each in copy.iterdir()) == [
            "output", "sha256", "stderr", "stderr_times", "times",
        ]  # fmt: skip
        sums = {line.split()[1]: line.split()[0] for line in (copy / "sha256").read_text().splitlines()}
        assert sums == {
            name: hashlib.sha256((copy / name).read_bytes()).hexdigest() for name in ("output", "stderr")
        }
        node.start()
        two.await_nodes({node.name: "up"})
        gateway.ok("rm", str(job.id))
        wait_for(lambda: not copy.exists())


def test_the_times_are_those_of_the_node(two: Cluster, archive: Path) -> None:
    """To the microsecond, for each piece of the output."""
    gateway = two.gateway
    with gateway.client() as client, gateway.stub() as stub:
        job = client.start(JobSpec("for i in 1 2 3 4; do echo $i; sleep 0.1; done", node="n1"))
        client.wait(job.id)

        def pieces() -> list[tuple[bytes, int]]:
            request = pb.LogsRequest(id=job.id, timestamps=True)
            return [
                (each.data, each.time.ToNanoseconds()) for each in stub.Logs(request, timeout=CALL_SECONDS)
            ]

        # before the copy is there, or after: it is all the same
        first = pieces()
        archived(archive, job.id)
        two.nodes["n1"].kill("server")
        two.await_nodes({"n1": "away"})
        assert pieces() == first
        assert len(first) > 1
        two.nodes["n1"].start()


def test_a_follower_goes_on_in_the_archive(two: Cluster, archive: Path) -> None:
    """Its node goes away in the middle of an output that is archived: no byte is missing or twice."""
    gateway = two.gateway
    with gateway.client() as client:
        job = client.start(
            JobSpec(
                "head -c 30000000 /dev/zero | tr '\\0' 'x'", limits={"output_max_bytes": "100M"}, node="n1"
            )
        )
        with gateway.popen("logs", str(job.id)) as logs:
            assert logs.stdout is not None
            seen = len(logs.stdout.read(1000))
            client.wait(job.id)
            archived(archive, job.id)
            wait_for(lambda: gateway.metric("pjw_archived_jobs_total") >= 1)
            two.nodes["n1"].stop(signal.SIGKILL)
            while chunk := logs.stdout.read(1 << 20):
                seen += len(chunk)
            assert logs.wait(CALL_SECONDS) == 0
        assert seen == 30_000_000
    two.nodes["n1"].start()


def test_a_node_keeps_output_until_it_is_copied(two: Cluster, archive: Path) -> None:
    """More than its retention allows, for as long as the archive takes nothing; then all of it is copied."""
    gateway, node = two.gateway, two.nodes["n1"]
    archive.chmod(0o755)
    failures = gateway.metric("pjw_archive_failures_total")
    with gateway.client() as client:
        jobs = [client.start(JobSpec(f"echo {number}", node="n1")) for number in range(6)]
        for job in jobs:
            client.wait(job.id)
        # the second attempt is after the node has looked at its retention
        wait_for(lambda: gateway.metric("pjw_archive_failures_total") >= failures + 2)
        assert len(list((node.state / "jobs").iterdir())) >= 6
        assert (
            "cannot archive the output of jobs of node n1: cannot archive the output of job"
            in gateway.log.read_text()
        )
        archive.chmod(0o777)
        for number, job in enumerate(jobs):
            assert (archived(archive, job.id) / "output").read_bytes() == b"%d\n" % number
            assert b"".join(client.logs(job.id)) == b"%d\n" % number
    # and then it keeps as many as it may, and one more that is on its way out
    wait_for(lambda: len(list((node.state / "jobs").iterdir())) <= 2 + 1)


def test_a_killed_gateway_leaves_no_half_copy(two: Cluster, archive: Path) -> None:
    """The next one removes what was begun, and makes the copy; what is removed meanwhile gets none."""
    gateway = two.gateway
    two.nodes["n2"].stop()
    with gateway.client() as client:
        jobs = [client.start(JobSpec(f"echo {number}; sleep 1", node="n1")) for number in range(2)]
        for job in jobs:
            wait_for(lambda job=job: client.get(job.id).state == "running")  # type: ignore[misc]
    gateway.stop(signal.SIGKILL)
    begun = archive / f".{jobs[0].id}.part"
    begun.mkdir()
    (begun / "output").write_bytes(b"ha")
    os.chown(begun, archive.stat().st_uid, -1)
    stale = archive / f"{jobs[1].id}"
    stale.mkdir()
    status = next(each for each in archive.iterdir() if each.name == "lock").stat()
    for path in (begun, begun / "output", stale):
        os.chown(path, status.st_uid, status.st_gid)
    gateway.start()
    with gateway.client() as client:
        for number, job in enumerate(jobs):
            client.wait(job.id)
            wait_for(lambda job=job: (archive / str(job.id) / "sha256").exists())  # type: ignore[misc]
            assert (archive / str(job.id) / "output").read_bytes() == b"%d\n" % number
    assert not begun.exists()
    two.nodes["n2"].start()


def test_an_archive_that_cannot_be_is_refused(two: Cluster, tmp_path: Path) -> None:
    """At the start, in words: it is not there, or it is that of another user."""
    gateway = two.gateway
    config = gateway.config or ""
    for path, words in (
        (tmp_path / "none", f"cannot use the archive {tmp_path / 'none'}: no such file or directory"),
        (Path(re.search(r'archive = "(.*)"', config)[1]), "permission denied (EACCES)"),  # type: ignore[index]
    ):
        file = tmp_path / "pjwd.toml"
        file.write_text(re.sub(r'archive = ".*"', f'archive = "{path}"', config))
        command = gateway.command()
        command[command.index("--state-dir") + 1] = str(tmp_path / "state")
        command[command.index("--config") + 1] = str(file)
        command[command.index("--listen") + 1] = "127.0.0.1:0"
        done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS, check=False)
        assert done.returncode == 1
        assert words in done.stderr.splitlines()[-2], done.stderr
        assert done.stderr.splitlines()[-1].startswith("hint: ")


# --- a node of one's choice


def test_a_job_waits_for_the_node_of_its_choice(two: Cluster) -> None:
    """It goes nowhere else, also after a restart of the gateway; and it says for what it waits."""
    gateway = two.gateway
    with gateway.client() as client:
        assert client.wait(client.start(JobSpec("true", node="n2")).id).node == "n2"
        gateway.ok("nodes", "drain", "n2", client="ann")
        job = client.start(JobSpec("true", node="n2"))
        assert client.get(job.id).detail == "waits for node n2: it is drained"
        gateway.stop(signal.SIGKILL)
    gateway.start()
    two.await_nodes({"n1": "up", "n2": "drained"})
    with gateway.client() as client:
        assert client.get(job.id).detail == "waits for node n2: it is drained"
        gateway.ok("nodes", "resume", "n2", client="ann")
        assert client.wait(job.id).node == "n2"
    for client_name, words, expected in (
        ("bob", ("--node", "n1"), "bob may not choose a node"),
        ("alice", ("--node", "n9"), "no node n9"),
        ("alice", ("--partition", "debug"), "a partition does not work with the engine pool yet"),
        ("alice", ("--constraint", "fast"), "a constraint does not work with the engine pool yet"),
    ):
        code, said = gateway.refused("start", *words, "true", client=client_name)
        assert (code, said.splitlines()[0]) == (1, f"pjw: error: {expected}")


# --- retention and truth


def test_a_node_keeps_ends_that_the_gateway_has_not_heard(two: Cluster) -> None:
    """More jobs than it may keep end while the gateway is away: none is lost."""
    gateway = two.gateway
    with gateway.client() as client:
        jobs = [
            client.start(JobSpec("sleep 1; exit 3", limits={"cpu_max_millicores": 500}, node="n1"))
            for _ in range(5)
        ]
        for job in jobs:
            wait_for(lambda job=job: client.get(job.id).state == "running")  # type: ignore[misc]
    gateway.stop(signal.SIGKILL)
    wait_for(lambda: not two.nodes["n1"].job_cgroups())
    gateway.start()
    with gateway.client() as client:
        for job in jobs:
            done = client.wait(job.id)
            assert (done.state, done.exit_status and done.exit_status.code) == ("exited", 3), done
    # and then it keeps as many as it may
    path = two.nodes["n1"].state / "jobs"
    wait_for(lambda: len(list(path.iterdir())) <= 2 + 1)


def test_metrics_of_gateway_and_nodes(two: Cluster) -> None:
    """Nodes and placements by state, claims and sessions."""
    gateway = two.gateway
    with gateway.client() as client:
        client.wait(client.start("true").id)
    assert gateway.metric('pjw_nodes{state="up"}') == 2
    assert gateway.metric('pjw_placements{state="queued"}') == 0
    assert gateway.metric("pjw_claims_total") >= 1
    assert gateway.metric("pjw_node_sessions_total") >= 2
    documented = Path(__file__).parents[2].joinpath("docs/monitoring.md").read_text()
    for name in set(re.findall(r"^(pjw_\w+)", gateway.metrics(), re.MULTILINE)):
        assert f"`{re.sub('_(bucket|sum|count)$', '', name)}`" in documented, name
