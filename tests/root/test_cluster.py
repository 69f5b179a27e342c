"""A gateway and two nodes, each a real pjwd: sessions, faults during a live follow, and who is refused."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from pjw.certs import authority
from pjw.cluster.v1 import cluster_pb2 as cpb
from pjw.cluster.v1.cluster_pb2_grpc import ClusterServiceStub, NodeServiceStub
from pjw.v1 import job_worker_pb2 as pb
from tests.support.cluster import LOST_AFTER_SECONDS, Cluster, cluster
from tests.support.service import BIN, CALL_SECONDS, Running, Service, end_all, wait_for

# what the command below has written when it was told to end
LINES: Final = 150
# A line every few milliseconds, each with its number; then it waits for a file that the test makes.
COUNT: Final = f"i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo line $i; sleep 0.02; done"
WHOLE: Final = b"".join(b"line %d\n" % number for number in range(1, LINES + 1))


@pytest.fixture(scope="module")
def made() -> Iterator[Cluster]:
    """One cluster for all tests here."""
    with cluster() as made:
        yield made


@pytest.fixture
def two(made: Cluster) -> Iterator[Cluster]:
    """The same, whole again after each test."""
    yield made
    made.idle()


def read_until(logs: Running, count: int) -> bytes:
    """Read whole lines of a follower until it has had so many."""
    assert logs.stdout is not None
    return b"".join(logs.stdout.readline() for _ in range(count))


def test_getting_started_through_a_gateway(two: Cluster) -> None:
    """The session of the seed's first page: ids are the gateway's, output comes from the nodes."""
    gateway = two.gateway
    hello = 'echo "hello world"'
    ids = [
        gateway.ok("start", command).strip()
        for command in (hello, "sleep 300", "trap 'exit 0' TERM; echo ready; sleep 300 & wait")
    ]
    assert ids == ["1", "2", "3"]
    assert gateway.ok("list") == "1\n2\n3\n"
    assert gateway.ok("logs", "1") == "hello world\n"
    done = json.loads(gateway.ok("wait", "--format", "jsonl", "1"))
    assert (done["exitCode"], done["state"], done["reason"]) == (0, "exited", "completed")
    assert list(done)[:5] == ["id", "command", "start", "end", "exitCode"]
    assert done["node"] in two.nodes
    with gateway.popen("logs", "3") as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"ready\n"
        stopped = gateway.ok("stop", "3")
        assert (logs.stdout.read(), logs.wait(10)) == (b"", 0)
    assert '"exitCode": 0,' in stopped
    assert '"reason": "stopped"' in gateway.ok("stop", "2")
    assert gateway.ok("logs", "1") == "hello world\n"
    # another client's are none
    assert gateway.refused("get", "1", client="bob") == (1, "pjw: error: no job 1\n")
    assert gateway.refused("logs", "1", client="bob") == (1, "pjw: error: no job 1\n")
    assert gateway.ok("--all", "list", client="ann") == "1\n2\n3\n"
    assert gateway.ok("rm", "1", "2", "3") == "1\n2\n3\n"
    assert gateway.ok("list") == ""
    # nor are they on the nodes any more, with what they wrote
    wait_for(lambda: not any(rows_of(node.state) for node in two.nodes.values()))


def test_jobs_are_on_both_nodes_and_wait_for_room(two: Cluster) -> None:
    """First fit by what the limits promise; what has no room waits, and says so; a stop ends it there."""
    gateway = two.gateway
    ids = [int(gateway.ok("start", "--cpus", "2", "sleep 300")) for _ in range(3)]
    wait_for(lambda: [gateway.job(each).state for each in ids[:2]] == [pb.JOB_STATE_RUNNING] * 2)
    assert [gateway.job(each).node for each in ids[:2]] == ["n1", "n2"]
    waiting = json.loads(gateway.ok("get", str(ids[2])))
    assert (waiting["state"], waiting["detail"], waiting["node"]) == (
        "queued",
        "waits: no node has room for it now",
        "",
    )
    assert gateway.ok("list", "--state", "queued") == f"{ids[2]}\n"
    assert json.loads(gateway.ok("stop", str(ids[2])))["reason"] == "cancelled"
    more = int(gateway.ok("start", "--cpus", "2", "true"))
    gateway.ok("stop", str(ids[0]))
    assert json.loads(gateway.ok("wait", "--format", "jsonl", str(more)))["exitCode"] == 0


def test_changes_and_usage_are_told(two: Cluster) -> None:
    """As on one machine: each change of a state once and in order, and what running jobs use now."""
    gateway = two.gateway
    with gateway.stub() as stub:
        begin = next(stub.WatchJobs(pb.WatchJobsRequest(no_snapshot=True), timeout=CALL_SECONDS)).sequence
        job_id = gateway.start_job("sleep 300")
        two.node_of(job_id)
        for snapshot in stub.WatchUsage(pb.WatchUsageRequest(), timeout=CALL_SECONDS):
            if [each.job.id for each in snapshot.jobs if each.sample.pids >= 2] == [job_id]:
                break
        gateway.ok("stop", str(job_id))
        states: list[int] = []
        for response in stub.WatchJobs(pb.WatchJobsRequest(since=begin), timeout=CALL_SECONDS):
            states += [change.job.state for change in response.changes if change.job.id == job_id]
            if pb.JOB_STATE_EXITED in states:
                break
    assert states == [
        pb.JOB_STATE_QUEUED,
        pb.JOB_STATE_STARTING,
        pb.JOB_STATE_RUNNING,
        pb.JOB_STATE_STOPPING,
        pb.JOB_STATE_EXITED,
    ]


def test_what_a_command_leaves_is_told_as_on_one_machine(two: Cluster) -> None:
    """Exit codes, a signal, a program that is missing, stderr apart, last lines, times and usage."""
    gateway = two.gateway
    with gateway.client() as client:
        done = client.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
        assert (done.job.exit_status.code if done.job.exit_status else None, done.output) == (
            7,
            b"out\nerr\n",
        )
        missing = client.start(["/no/such/program"])
        ended = client.wait(missing.id)
        assert (ended.reason, ended.exit_status) == ("start_failed", None)
        assert "cannot execute /no/such/program: no such file or directory (ENOENT)" in ended.detail
        assert b"".join(client.logs(missing.id)) == b""
    split = gateway.ok("start", "--split-stderr", "echo out; echo err >&2").strip()
    gateway.ok("wait", split)
    assert (gateway.ok("logs", split), gateway.ok("logs", "--stderr", split)) == ("out\n", "err\n")
    many = gateway.ok("start", "seq 1000").strip()
    gateway.ok("wait", many)
    assert gateway.ok("logs", "--tail", "2", many) == "999\n1000\n"
    assert re.fullmatch(r"\S+ 1000\n", gateway.ok("logs", "--tail", "1", "--timestamps", many))
    assert gateway.ok("logs", "--offset", "3889", many) == "000\n"
    job_id = int(gateway.ok("start", "sleep 300"))
    two.node_of(job_id)
    with gateway.client() as client:
        used = client.get(job_id).usage_now
        assert used is not None and used.pids >= 2
        assert client.usage_history(int(many)).job.usage is not None


@pytest.mark.parametrize("what", ["gateway", "server", "launcher", "both"])
def test_a_follow_is_whole_over_a_kill(two: Cluster, what: str) -> None:
    """kill -9 of the gateway, the node's server, its launcher, both: every byte once, in its order."""
    gateway = two.gateway
    job_id = int(gateway.ok("start", COUNT))
    node = two.node_of(job_id)
    with gateway.popen("logs", str(job_id)) as logs:
        seen = read_until(logs, 20)
        if what == "gateway":
            assert gateway.process is not None
            gateway.process.kill()
            gateway.process.wait()
            gateway.start()
        else:
            node.kill(what)
            node.start()
        assert logs.stdout is not None and logs.stderr is not None
        seen += logs.stdout.read()
        assert (logs.wait(CALL_SECONDS), logs.stderr.read()) == (0, b"")
    assert seen == WHOLE
    done = json.loads(gateway.ok("wait", "--format", "jsonl", str(job_id)))
    assert (done["state"], done["exitCode"], done["outputBytes"]) == ("exited", 0, len(WHOLE))


def test_a_gateway_restarts_with_running_jobs(two: Cluster) -> None:
    """Those that run go on, an end that nobody heard is told, what waits gets its turn, none runs twice."""
    gateway = two.gateway
    long = [int(gateway.ok("start", "--cpus", "1", "sleep 300")) for _ in range(4)]
    short = int(gateway.ok("start", "--cpus", "1", "sleep 1; echo done"))
    for each in (*long, short):
        two.node_of(each)
    gateway.stop(signal.SIGKILL)
    # the short one ends meanwhile
    time.sleep(1.5)
    gateway.start()
    two.await_nodes({"n1": "up", "n2": "up"})
    with gateway.client() as client:
        assert client.wait(short).exit_status is not None
        assert b"".join(client.logs(short)) == b"done\n"
        wait_for(lambda: all(client.get(each).state == "running" for each in long))
        for each in long:
            assert client.stop(each, grace=0).reason == "stopped"
    rows = [json.loads(line) for node in two.nodes.values() for line in rows_of(node.state)]
    uuids = [row["request_id"] for row in rows]
    assert len(uuids) == len(set(uuids))


def rows_of(state: Path) -> list[str]:
    """The jobs of a node's table; a copy, as its pjwd has it locked."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        for name in ("jobs.sqlite", "jobs.sqlite-wal"):
            if (state / name).exists():
                (Path(directory) / name).write_bytes((state / name).read_bytes())
        db = sqlite3.connect(f"{directory}/jobs.sqlite")
        try:
            query = "SELECT json_object('request_id', request_id, 'state', state) FROM jobs"
            return [row[0] for row in db.execute(query)]
        finally:
            db.close()


def test_a_node_that_is_lost(two: Cluster) -> None:
    """Its job is told lost, with its output so far; its copy is ended when it is back, and others go on."""
    gateway = two.gateway
    lost = int(gateway.ok("start", "--cpus", "2", "echo begun; sleep 300"))
    node = two.node_of(lost)
    other = int(gateway.ok("start", "--cpus", "2", "echo other; sleep 300"))
    assert two.node_of(other) is not node
    with gateway.popen("logs", str(lost)) as logs:
        assert read_until(logs, 1) == b"begun\n"
        assert node.process is not None
        launcher = node.launcher_pid()
        # silent, as a machine without power: nothing is closed
        for pid in (node.pid, launcher):
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        assert logs.stdout is not None and logs.stderr is not None
        assert (logs.stdout.read(), logs.wait(CALL_SECONDS)) == (b"", 1)
        took = time.monotonic() - began
        said = logs.stderr.read().decode()
    assert f"the output of job {lost} ends here, at byte 6: node {node.name} is lost" in said
    assert took < LOST_AFTER_SECONDS + 10
    told = json.loads(gateway.ok("get", str(lost)))
    assert (told["state"], told["reason"], told["exitCode"]) == ("lost", "node_lost", None)
    assert told["detail"] == f"nothing was heard of node {node.name} for too long"
    assert gateway.job(other).state == pb.JOB_STATE_RUNNING
    for pid in (launcher, node.pid):
        os.kill(pid, signal.SIGCONT)
    two.await_nodes({"n1": "up", "n2": "up"})
    # the copy that lived on is ended, and what it wrote can be read
    wait_for(lambda: not node.job_cgroups())
    assert gateway.ok("logs", str(lost)) == "begun\n"
    assert json.loads(gateway.ok("get", str(lost)))["state"] == "lost"


def test_a_gateway_that_is_killed_while_it_tells_jobs_to_be_lost(two: Cluster) -> None:
    """It has written that the node is lost, and not yet that its job is: the next gateway does."""
    gateway = two.gateway
    lost = int(gateway.ok("start", "sleep 300"))
    node = two.node_of(lost)
    node.kill("both")
    gateway.stop(signal.SIGKILL)
    with closing(sqlite3.connect(gateway.state / "jobs.sqlite")) as db, db:
        db.execute("UPDATE nodes SET is_lost = 1 WHERE name = ?", (node.name,))
    gateway.start()
    told = json.loads(gateway.ok("get", str(lost)))
    assert (told["state"], told["reason"]) == ("lost", "node_lost")
    node.start()
    two.await_nodes({"n1": "up", "n2": "up"})
    wait_for(lambda: not node.job_cgroups())


def test_a_node_that_is_away_for_a_moment_loses_nothing(two: Cluster) -> None:
    """Shorter than that: the job goes on, and says meanwhile that its node is not connected."""
    gateway = two.gateway
    job_id = int(gateway.ok("start", "sleep 300"))
    node = two.node_of(job_id)
    node.kill("server")
    wait_for(lambda: "is not connected now" in gateway.job(job_id).detail)
    node.start()
    two.await_nodes({"n1": "up", "n2": "up"})
    wait_for(lambda: not gateway.job(job_id).detail)
    assert gateway.job(job_id).state == pb.JOB_STATE_RUNNING
    # a stop that is asked for while it is away is told when it is back
    node.kill("both")
    with gateway.popen("stop", str(job_id)) as stopping:
        wait_for(lambda: gateway.job(job_id).state == pb.JOB_STATE_STOPPING)
        node.start()
        assert stopping.wait(CALL_SECONDS) == 0


def test_nodes_are_listed_drained_and_resumed(two: Cluster) -> None:
    """By admins; a drained node gets no jobs, and keeps those that it has."""
    gateway = two.gateway
    assert gateway.ok("nodes", client="ann") == "n1\nn2\n"
    assert gateway.ok("nodes", "drain", "n1", client="ann") == "n1\n"
    listed = json.loads(gateway.ok("nodes", "--format", "json", client="ann"))
    assert [(each["name"], each["state"], each["cpuMaxMillicores"]) for each in listed] == [
        ("n1", "drained", 3000),
        ("n2", "up", 3000),
    ]
    with gateway.client() as client:
        assert {client.wait(client.start("true").id).node for _ in range(3)} == {"n2"}
        gateway.ok("nodes", "drain", "n2", client="ann")
        waiting = client.start("true")
        assert client.get(waiting.id).detail == "waits: nodes drained: n1, n2"
        gateway.ok("nodes", "resume", "n1", "n2", client="ann")
        assert client.wait(waiting.id).node == "n1"
    assert gateway.refused("nodes", "drain", "n3", client="ann") == (
        1,
        "pjw: error: no node n3\nhint: pjw nodes\n",
    )
    for words, method in ((("nodes",), "ListNodes"), (("nodes", "drain", "n1"), "DrainNode")):
        code, said = gateway.refused(*words)
        assert (code, said.splitlines()[0]) == (1, f"pjw: error: alice may not use {method}")


def test_what_does_not_work_yet_is_refused_in_words(two: Cluster) -> None:
    """Before anything is made; each has a line in docs/cluster.md."""
    gateway = two.gateway
    before = gateway.ok("list")
    for words, told in ((("start", "--workspace", "w", "true"), "a workspace"),):
        code, said = gateway.refused(*words)
        line = f"pjw: error: {told} does not work through a gateway yet"
        assert (code, said.splitlines()[0]) == (1, line), words
    job_id = gateway.ok("start", "sleep 300").strip()
    before += f"{job_id}\n"
    assert gateway.ok("list") == before


def started(command: list[str], **options: Any) -> tuple[int, str]:
    """How a pjwd that does not start ends."""
    done = subprocess.run(command, capture_output=True, timeout=CALL_SECONDS, check=False, **options)
    return done.returncode, done.stderr.decode()


def test_a_configuration_that_is_no_gateways_or_no_nodes(two: Cluster, tmp_path: Path) -> None:
    """Each is refused at the start, in words; so is a second gateway in the same directory."""
    gateway, node = two.gateway, two.nodes["n1"]
    path = tmp_path / "pjwd.toml"
    serve = [str(gateway.pjwd), "serve", "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path / "state")]
    for name in ("ca.crt", "server.crt", "server.key"):
        serve += [f"--{name.replace('.', '-')}", str(gateway.certs / name)]
    begin = "pjwd: error: "
    path.write_text(gateway.config or "")
    assert started([*serve, "--config", str(path)]) == (
        1,
        f"{begin}{path} is the configuration of a gateway\nhint: pjwd gateway --config FILE\n",
    )
    path.write_text(node.config or "")
    as_gateway = [serve[0], "gateway", *serve[2:], "--config", str(path)]
    code, said = started(as_gateway)
    assert (code, said.splitlines()[0]) == (
        1,
        f"{begin}no certificate is configured by which the gateway calls its nodes",
    )
    code, said = started(gateway.command())
    assert (code, said.splitlines()[0]) == (
        1,
        f"{begin}another gateway uses the state directory {gateway.state}",
    )
    # a server's certificate is no node's
    path.write_text(f'[cluster]\ngateway = "{gateway.address}"\n[roles]\ngateways = ["gate"]\n')
    code, said = started([*serve, "--config", str(path)])
    assert f"this pjwd cannot be a node of {gateway.address}: the certificate is no node's" in said
    assert code == 1


def test_a_gateway_needs_no_root(two: Cluster) -> None:
    """Started as nobody it serves, without any capability, and reads its files again when it is told to."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    try:
        shutil.copytree(two.gateway.certs, directory / "certs")
        nobody = 65534
        for path in (directory, directory / "certs", *(directory / "certs").iterdir()):
            os.chown(path, nobody, nobody)
        certs = directory / "certs"
        config = directory / "pjwd.toml"
        config.write_text(
            f'[gateway]\ncrt = "{certs / "gate.crt"}"\nkey = "{certs / "gate.key"}"\n'
            '[roles]\nadmins = ["ann"]\n'
        )
        # the interpreter may lie where only root looks; the gateway gives this up when all is loaded
        command = ["setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups"]
        command += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        command += [str(two.gateway.pjwd), "gateway", "--config", str(config), "--listen", "127.0.0.1:0"]
        command += ["--state-dir", str(directory / "state")]
        for name in ("ca.crt", "server.crt", "server.key"):
            command += [f"--{name.replace('.', '-')}", str(certs / name)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            line = process.stderr.readline().decode()
            assert line.startswith("pjwd: ready on "), line
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE), status
            with two.gateway.channel("ann", line.split()[-1]) as channel:
                stub = ClusterServiceStub(channel)
                assert not stub.ListNodes(cpb.ListNodesRequest(), timeout=CALL_SECONDS).nodes
                # a role that is taken away is gone with a reload, which the gateway does by itself
                config.write_text(config.read_text().replace('"ann"', '"bob"'))
                process.send_signal(signal.SIGHUP)
                lines = [process.stderr.readline().decode() for _ in range(2)]
                assert lines == [
                    "pjwd: INFO: reload: the certificates are the same as before\n",
                    "pjwd: INFO: reload: the configuration is new: roles\n",
                ]
                with pytest.raises(grpc.RpcError) as caught:
                    stub.ListNodes(cpb.ListNodesRequest(), timeout=CALL_SECONDS)
                assert caught.value.code() is REFUSED
            process.terminate()
            assert process.wait(CALL_SECONDS) == 0
    finally:
        shutil.rmtree(directory)


def test_one_machine_has_no_nodes(service: Service) -> None:
    """And says what it is."""
    code, said = service.refused("nodes")
    assert (code, said) == (
        125,
        f"pjw: error: {service.address} is no gateway of a cluster: it has no nodes\n",
    )
    code, said = service.refused("start", "--node", "n1", "true")
    assert (code, said.splitlines()) == (
        1,
        [
            "pjw: error: a job has a node through a gateway alone, and this server is one machine",
            "hint: leave --node out",
        ],
    )
    for what in ("partition", "constraint"):
        code, said = service.refused("start", f"--{what}", "fast", "true")
        words = f"a job has a {what} through a gateway with Slurm alone, and this server is one machine"
        assert (code, said.splitlines()) == (1, [f"pjw: error: {words}", f"hint: leave --{what} out"])


# --- who is refused

REFUSED: Final = grpc.StatusCode.PERMISSION_DENIED


def session_of(two: Cluster, files: str | tuple[str, str], hello: cpb.Hello) -> tuple[grpc.StatusCode, str]:
    """How a session is refused."""
    with two.gateway.channel(files) as channel:
        stub: Any = NodeServiceStub(channel)
        call = stub.Session(iter([cpb.SessionRequest(hello=hello)]), timeout=CALL_SECONDS)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    return caught.value.code(), caught.value.details() or ""


def claim_of(
    two: Cluster, files: str | tuple[str, str], request: cpb.ClaimRequest
) -> tuple[grpc.StatusCode, str]:
    """How a claim is refused."""
    with two.gateway.channel(files) as channel:
        stub: Any = NodeServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Claim(request, timeout=CALL_SECONDS)
    return caught.value.code(), caught.value.details() or ""


def test_no_other_certificate_is_a_nodes(two: Cluster, tmp_path: Path) -> None:
    """A client called n1, an admin, the gateway's own, node n2 as n1, a node of another authority."""
    certs = two.gateway.certs
    authority.write_client(str(certs), "n1")
    no_node = "the certificate is no node's: it has no name that begins with pjw:node:"
    hello = cpb.Hello(node="n1", session="x", address="127.0.0.1:1")
    request = cpb.ClaimRequest(session="x", uuid="y")
    try:
        for client in ("n1", "alice", "ann", "gate"):
            assert session_of(two, client, hello) == (REFUSED, no_node)
            assert claim_of(two, client, request) == (REFUSED, no_node)
    finally:
        for kind in ("crt", "key"):
            (certs / f"n1.{kind}").unlink()
    second = (str(certs / "node-n2.crt"), str(certs / "node-n2.key"))
    assert session_of(two, second, hello) == (
        REFUSED,
        "the certificate is that of node n2, which is not n1",
    )
    assert claim_of(two, second, request) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the session of this claim is over",
    )
    other = tmp_path / "certs"
    authority.init_directory(str(other))
    authority.write_node(str(other), "n1")
    code, _ = session_of(two, (str(other / "node-n1.crt"), str(other / "node-n1.key")), hello)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert two.states() == dict.fromkeys(two.nodes, "up")


def test_a_nodes_certificate_is_no_clients_and_no_gateways(two: Cluster) -> None:
    """Neither at the gateway nor at another node; and clients do not get into a node."""
    certs = two.gateway.certs
    files = (str(certs / "node-n2.crt"), str(certs / "node-n2.key"))
    words = "cannot name the client: the certificate is that of node 'n2', which is no client"
    for service in (two.gateway, two.nodes["n1"]):
        with service.stub(files) as stub, pytest.raises(grpc.RpcError) as caught:
            stub.List(pb.ListRequest(), timeout=CALL_SECONDS)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAUTHENTICATED, words)
    for client in ("alice", "ann"):
        with two.nodes["n1"].stub(client) as stub, pytest.raises(grpc.RpcError) as caught:
            stub.List(pb.ListRequest(), timeout=CALL_SECONDS)
        assert (caught.value.code(), caught.value.details()) == (
            REFUSED,
            f"{client} is not among the clients of this server",
        )


def test_a_rogue_node_claims_nothing_of_anothers(two: Cluster) -> None:
    """With its own certificate and session it gets no job that was not assigned to it, and ends none."""
    gateway = two.gateway
    job_id = int(gateway.ok("start", "sleep 300"))
    node = two.node_of(job_id)
    [uuid] = [
        json.loads(row)["request_id"].removeprefix("cluster:")
        for row in rows_of(node.state)
        if json.loads(row)["state"] is None
    ]
    authority.write_node(str(gateway.certs), "rogue")
    files = (str(gateway.certs / "node-rogue.crt"), str(gateway.certs / "node-rogue.key"))
    hello = cpb.Hello(
        node="rogue",
        session="x",
        address="127.0.0.1:1",
        uid_first=two.uid_first,
        uid_count=16,
        cpu_max_millicores=1,
    )
    try:
        assert session_of(two, files, hello)[0] is grpc.StatusCode.FAILED_PRECONDITION
        from tests.support.worker_harness import UIDS

        hello.uid_count = UIDS
        job = pb.Job(id=1, state=pb.JOB_STATE_EXITED, reason=pb.END_REASON_COMPLETED, exit_code=0)
        said = [
            cpb.SessionRequest(hello=hello),
            cpb.SessionRequest(ended=cpb.Ended(uuid=uuid, job=job)),
            cpb.SessionRequest(unknown=cpb.Unknown(uuid=uuid)),
            cpb.SessionRequest(failed=cpb.Failed(uuid=uuid, detail="x", again=True)),
        ]
        with gateway.channel(files) as channel:
            stub: Any = NodeServiceStub(channel)
            call = stub.Session(iter(said), timeout=CALL_SECONDS)
            assert next(call).HasField("welcome")
            with pytest.raises(grpc.RpcError) as caught:
                stub.Claim(cpb.ClaimRequest(session="x", uuid=uuid), timeout=CALL_SECONDS)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            for _ in call:
                pass
        assert gateway.job(job_id).state == pb.JOB_STATE_RUNNING
        assert gateway.job(job_id).node == node.name
    finally:
        wait_for(lambda: two.states().get("rogue") in (None, "lost"))


def test_a_machine_that_its_operator_drains(two: Cluster) -> None:
    """`pjwd drain` on a node: the gateway shows it, and gives it no job, until `pjwd resume` there."""
    gateway, node = two.gateway, two.nodes["n1"]
    kept = int(gateway.ok("start", "sleep 300"))
    assert two.node_of(kept) is node
    pjwd = [str(BIN / "pjwd"), "drain", "--state-dir", str(node.state)]
    assert subprocess.check_output(pjwd, text=True) == "drained; jobs that have not ended: 1\n"
    two.await_nodes({"n1": "drained"})
    # other tests have left nodes that are away
    found = json.loads(gateway.ok("nodes", "--format", "json", client="ann"))
    [listed] = [each for each in found if each["name"] == "n1"]
    assert (listed["state"], listed["drainedThere"]) == ("drained", True)
    assert "(drained there: pjwd resume)" in gateway.at_terminal("nodes", client="ann", columns=140)
    with gateway.client() as client:
        assert {client.wait(client.start("true").id).node for _ in range(3)} == {"n2"}
    # it says so after a restart, too, and nobody but its own operator resumes it
    node.kill("both")
    node.start()
    two.await_nodes({"n1": "drained"})
    assert gateway.refused("nodes", "resume", "n1", client="ann") == (
        1,
        "pjw: error: node n1 gets no jobs yet: it was drained on its own machine\nhint: there: pjwd resume\n",
    )
    pjwd[1] = "resume"
    assert subprocess.check_output(pjwd, text=True) == "resumed\n"
    two.await_nodes({"n1": "up"})
    assert gateway.job(kept).state == pb.JOB_STATE_RUNNING


def test_a_node_that_is_gone_for_good(two: Cluster) -> None:
    """Removed when it is not connected and has no jobs; the output that it had is lost in words."""
    gateway = two.gateway
    node = two.add_node("n3")
    two.await_nodes({"n3": "up"})
    try:
        # one after the other, as `pjw rm`: a name that fails does not end it
        said = gateway.pjw("nodes", "drain", "n1", "nobody", "n2", client="ann")
        assert (said.returncode, said.stdout) == (1, b"n1\nn2\n")
        assert said.stderr == b"pjw: error: no node nobody\nhint: pjw nodes\n"
        there = gateway.ok("start", "echo output").strip()
        gateway.ok("wait", there)
        assert gateway.ok("logs", there) == "output\n"
        live = gateway.ok("start", "sleep 300").strip()
        assert two.node_of(int(live)) is node
        code, words = gateway.refused("nodes", "rm", "n3", client="ann")
        assert (code, words.splitlines()[0]) == (1, "pjw: error: cannot remove node n3: it is connected")
        node.stop()
        two.await_nodes({"n3": "away"})
        code, words = gateway.refused("nodes", "rm", "n3", client="ann")
        assert "cannot remove node n3: 1 of its jobs have not ended" in words
        node.start()
        gateway.ok("stop", live)
        node.stop()
        two.await_nodes({"n3": "away"})
        assert gateway.ok("nodes", "rm", "n3", client="ann") == "n3\n"
        assert "n3" not in gateway.ok("nodes", client="ann").split()
        code, words = gateway.refused("logs", there)
        assert f"what job {there} left is lost: its node n3 was removed from the cluster" in words
        assert json.loads(gateway.ok("get", there))["node"] == "n3"
        assert gateway.refused("nodes", "rm", "n3", client="ann")[1].startswith("pjw: error: no node n3\n")
        # nor does the next gateway know it
        gateway.stop()
        gateway.start()
        two.await_nodes({"n1": "drained", "n2": "drained"})
        assert "n3" not in two.states()
    finally:
        gateway.pjw("nodes", "resume", "n1", "n2", client="ann")
        # what is left is ended with the others
        if node.process is None:
            node.start()
        two.await_nodes({"n3": "up"})
    # one of that name is a new one, whose jobs have numbers of their own
    assert f"what job {there} left is lost" in gateway.refused("logs", there)[1]


def test_a_node_that_is_set_up_anew(two: Cluster) -> None:
    """It numbers its jobs from 1 again: nobody reads, removes or stops another job by the old numbers."""
    gateway = two.gateway
    others = list(two.nodes)
    node = two.add_node("n4")
    two.await_nodes({"n4": "up"})
    gateway.ok("nodes", "drain", *others, client="ann")
    try:
        before = gateway.ok("start", "echo before").strip()
        gateway.ok("wait", before)
        running = gateway.ok("start", "sleep 300").strip()
        assert two.node_of(int(running)) is node
        node.stop()
        two.await_nodes({"n4": "away"})
        end_all(node.state)
        shutil.rmtree(node.state)
        node.start()
        two.await_nodes({"n4": "up"})
        gateway.pjw("wait", running)
        assert gateway.job(int(running)).state == pb.JOB_STATE_LOST
        after = [gateway.ok("start", f"echo after {number}").strip() for number in range(2)]
        for each in after:
            gateway.ok("wait", each)
        for each in (before, running):
            code, words = gateway.refused("logs", each)
            assert (code, f"what job {each} left is lost: its node n4 was set up anew" in words) == (1, True)
        gateway.ok("rm", before, running)
        assert [gateway.ok("logs", each) for each in after] == ["after 0\n", "after 1\n"]
    finally:
        gateway.pjw("nodes", "resume", *others, client="ann")
