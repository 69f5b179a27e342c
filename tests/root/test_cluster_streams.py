"""What clients do within jobs, through a gateway: input, terminals, sessions, copies, files and ports.

Each must be as on one machine, to the byte and to the word, with the gateway's ids; also when the gateway or
a node is killed meanwhile.
"""

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import grpc
import pytest

from pjw import errors
from pjw.cluster.v1 import cluster_pb2 as cpb
from pjw.cluster.v1.cluster_pb2_grpc import NodeServiceStub
from pjw.model import JobSpec, TerminalSize
from pjw.v1 import job_worker_pb2 as pb
from tests.root.test_cli_stdin import piped
from tests.root.test_cp import tree_of
from tests.root.test_forward import SERVER, digest
from tests.root.test_upload import sent
from tests.support.cluster import Cluster, NodeService, cluster
from tests.support.service import BIN, CALL_SECONDS, Running, Service, wait_for
from tests.support.terminal import Terminal
from tests.support.uploads import Upload, sha256_line
from tests.support.worker_harness import python
from tests.unit.test_archive_program import END, entry

MIB: Final = 1024 * 1024


@pytest.fixture(scope="module")
def made() -> Iterator[Cluster]:
    """One cluster for all tests here."""
    # no node is lost here, however slow the machine is
    with cluster(lost_after_seconds=60.0) as made:
        # so that no id of a job is the same here and on its node
        for _ in range(3):
            made.gateway.ok("wait", made.gateway.ok("start", "true").strip())
        made.gateway.ok("rm", "1", "2", "3")
        yield made


@pytest.fixture
def two(made: Cluster) -> Iterator[Cluster]:
    """The same, whole again after each test."""
    yield made
    made.idle()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory as people have them."""
    source = tmp_path / "src"
    (source / "lib/deep").mkdir(parents=True)
    (source / "lib/data").write_bytes(os.urandom(3 * MIB + 1))
    (source / "lib/deep/ünï").write_bytes(b"")
    (source / "build.sh").write_text("#!/bin/sh\n")
    (source / "build.sh").chmod(0o755)
    (source / "link").symlink_to("lib/data")
    return source


def running(two: Cluster, *command: str) -> tuple[str, NodeService]:
    """A job that runs, and its node."""
    job_id = int(two.gateway.ok("start", *command))
    return str(job_id), two.node_of(job_id)


def restart(gateway: Service) -> None:
    """Kill -9 the gateway, and start it again."""
    gateway.stop(signal.SIGKILL)
    gateway.start()


def uploads(service: Service, where: str) -> list[str]:
    """The uploads that a pjwd has stored."""
    directory = service.state / where
    return sorted(os.listdir(directory)) if directory.exists() else []


def no_uploads(two: Cluster) -> bool:
    """Whether nobody has one."""
    nodes = two.nodes.values()
    return not uploads(two.gateway, "uploads") and not any(uploads(node, "jobs/uploads") for node in nodes)


# --- input


def test_input_is_exact(two: Cluster) -> None:
    """Some MiB, which the job reads late, and of which the gateway is killed in the middle."""
    gateway = two.gateway
    data = os.urandom(5 * MIB + 1)
    assert piped(gateway, "run", "--stdin", "-", "sha256sum", data=data).stdout == sha256_line(data)
    with gateway.client() as client:
        # while no node has it
        gateway.ok("nodes", "drain", "n1", "n2", client="ann")
        job_id = client.start(JobSpec("while [ ! -e go ]; do sleep 0.05; done; sha256sum", input=True)).id

        def pieces() -> Iterator[bytes]:
            yield data[: 3 * MIB]
            restart(gateway)
            yield data[3 * MIB :]

        gateway.ok("nodes", "resume", "n1", "n2", client="ann")
        assert client.write_input(job_id, pieces()) == len(data)
        two.node_of(job_id)
        client.run_in(job_id, "touch go")
        client.wait(job_id)
        assert b"".join(client.logs(job_id)) == sha256_line(data)


def test_whose_input_it_is_and_when_it_ends(two: Cluster) -> None:
    """Errors have the types, the words and the ids of one machine; the newest writer writes."""
    gateway = two.gateway
    without, _ = running(two, "sleep 300")
    with gateway.client() as client, gateway.client("bob") as other:
        with pytest.raises(errors.JobStateError, match=f"^job {without} takes no input$"):
            client.write_input(int(without), [b"x"])
        job_id = client.start(JobSpec("head -c 2; echo; sleep 300", input=True)).id
        two.node_of(job_id)
        with pytest.raises(errors.JobNotFoundError, match=f"^no job {job_id}$"):
            other.write_input(job_id, [b"x"])
        with gateway.stub() as stub:
            # no such offset
            requests = [pb.WriteInputRequest(id=job_id), pb.WriteInputRequest(offset=9, data=b"x")]
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.WriteInput(iter(requests), timeout=CALL_SECONDS))
            assert (caught.value.code(), caught.value.details()) == (
                grpc.StatusCode.OUT_OF_RANGE,
                f"cannot write input of job {job_id} from byte 9: it has 0 bytes",
            )
        with gateway.stub() as stub, gateway.stub() as other_stub, Upload(stub, job_id) as first:
            assert first.write(b"a", 0) == 1
            with Upload(other_stub, job_id) as second:
                assert second.offset == 1
                assert first.end() == (
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"another WriteInput call for job {job_id} took over",
                )
                # it hears of the job's end, though it says nothing
                client.stop(job_id, grace=0)
                assert second.end() == (
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"job {job_id} has ended, and reads no input any more",
                )


def _piped(gateway: Service, command: list[str]) -> Running:
    """A program that calls the gateway as alice, with pipes."""
    pipe = subprocess.PIPE
    return Running(command, env=gateway.environment(), stdin=pipe, stdout=pipe, stderr=pipe)


# --- terminals


def test_a_terminal_with_a_resize(two: Cluster) -> None:
    """`run -it`, `exec -it` in the same job, `attach`: sizes, keys and exit codes as on one machine."""
    gateway = two.gateway
    shell = ("-e", "PS1=ready> ", "bash", "--norc", "--noprofile", "-i")
    pjw = str(BIN / "pjw")
    with Terminal([pjw, "run", "-it", *shell], gateway.environment()) as terminal:
        terminal.wait_for("ready>")
        terminal.type("stty size\r")
        terminal.wait_for("30 100")
        terminal.resize(120, 40)
        terminal.type("until [ \"$(stty size)\" = '40 120' ]; do sleep 0.1; done; echo re''sized\r")
        terminal.wait_for("resized")
        job = gateway.ok("list", "-n", "1").strip()
        with Terminal([pjw, "exec", "-it", *shell[:2], job, *shell[2:]], gateway.environment()) as inner:
            inner.wait_for("ready>")
            inner.resize(90, 20)
            inner.type("until [ \"$(stty size)\" = '20 90' ]; do sleep 0.1; done; echo in''ner\r")
            inner.wait_for("inner")
            # the gateway is killed under both
            restart(gateway)
            inner.type("echo back\r")
            inner.wait_for("back\n")
            inner.type("~.")
            assert inner.wait_for_end() == 0
        with Terminal([pjw, "attach", f"{job}/1"], gateway.environment(), columns=80, lines=25) as again:
            again.wait_for("inner")
            again.type("stty size; exit 5\r")
            assert again.wait_for_end() == 5
            assert "25 80" in again.text
        terminal.type("echo still''here\r")
        terminal.wait_for("stillhere")
        terminal.type("~.")
        assert terminal.wait_for_end() == 0
    with Terminal([pjw, "attach", job], gateway.environment(), columns=70, lines=25) as back:
        back.type("stty size\r")
        back.wait_for("25 70")
        back.type("exit 3\r")
        assert back.wait_for_end() == 3
    with gateway.client() as client:
        with pytest.raises(errors.JobStateError, match=f"^job {job} has ended$"):
            client.resize(int(job), TerminalSize(10, 10))
        with pytest.raises(errors.SessionNotFoundError, match=f"^no session 9 of job {job}$"):
            client.resize(int(job), TerminalSize(10, 10), session=9)


# --- sessions


def test_exec_and_sessions(two: Cluster) -> None:
    """Both outputs, input, exit codes, signals, refusals, and sessions that are waited for and ended."""
    gateway = two.gateway
    with gateway.client() as client:
        # at once, though no node has it yet
        job = str(client.start("sleep 300").id)
        assert client.run_in(int(job), "echo there").output == b"there\n"
    data = os.urandom(3 * MIB)
    done = piped(gateway, "exec", "-i", job, "sha256sum; echo beside >&2; exit 7", data=data)
    assert (done.stdout, done.stderr, done.returncode) == (sha256_line(data), b"beside\n", 7)
    for command, code in (("exit 0", 0), ("kill -9 $$", 137), ("no-such-program", 127)):
        assert gateway.pjw("exec", job, command).returncode == code, command
    assert gateway.pjw("exec", job, "--", "no-such-program").returncode == 127
    assert gateway.refused("exec", "-w", "/no/job 1", job, "true") == (
        1,
        "pjw: error: cannot enter the working directory /no/job 1: no such file or directory (ENOENT)\n",
    )
    with gateway.client() as client, gateway.client("bob") as other:
        session = client.exec(int(job), JobSpec("echo begun; trap 'exit 4' HUP; sleep 300 & wait"))
        assert session.job_id == int(job)
        again = JobSpec("echo once; sleep 300", request_id="the-same")
        assert client.exec(int(job), again).number == client.exec(int(job), again).number
        assert next(iter(client.logs(int(job), session=session.number))) == b"begun\n"
        # another client's, and none
        for ask, number in (
            (other.wait_session, session.number),
            (other.stop_session, session.number),
            (client.wait_session, 99),
        ):
            with pytest.raises(errors.SessionNotFoundError, match=f"^no session {number} of job {job}$"):
                ask(int(job), number)
        with pytest.raises(errors.JobNotFoundError, match=f"^no job {job}$"):
            other.exec(int(job), "true")
        ended = client.stop_session(int(job), session.number)
        assert (ended.job_id, ended.exit_status and ended.exit_status.code) == (int(job), 4)
        with pytest.raises(errors.JobStateError, match=f"session {session.number} of job {job} has no term"):
            client.resize(int(job), TerminalSize(10, 10), session=session.number)
        gateway.ok("nodes", "drain", "n1", "n2", client="ann")
        waiting = client.start("true")
        with pytest.raises(errors.JobStateError, match=f"^cannot enter job {waiting.id}: it is queued$"):
            client.exec(waiting.id, "true")
        with pytest.raises(errors.JobStateError, match=f"^job {waiting.id} has not begun$"):
            client.resize(waiting.id, TerminalSize(10, 10))
        gateway.ok("nodes", "resume", "n1", "n2", client="ann")
        client.wait(waiting.id)
        with pytest.raises(errors.JobStateError, match=f"^cannot enter job {waiting.id}: it is exited$"):
            client.exec(waiting.id, "true")


@pytest.mark.parametrize("what", ["gateway", "server", "both"])
def test_an_exec_is_whole_over_a_kill(two: Cluster, what: str) -> None:
    """Kill -9 of the gateway, of the node's server, of its launcher too: every byte, and the exit code."""
    gateway = two.gateway
    job, node = running(two, "sleep 300")
    command = "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo line $i; sleep 0.02; done; sha256sum; exit 6"
    whole = b"".join(b"line %d\n" % number for number in range(1, 101))
    data = os.urandom(2 * MIB)
    with _piped(gateway, [str(BIN / "pjw"), "exec", "-i", job, command]) as done:
        assert done.stdin is not None and done.stdout is not None and done.stderr is not None
        done.stdin.write(data[:MIB])
        done.stdin.flush()
        seen = b"".join(done.stdout.readline() for _ in range(10))
        if what == "gateway":
            restart(gateway)
        else:
            node.kill(what)
            node.start()
        # if it has ended, what it said tells why
        with suppress(BrokenPipeError):
            done.stdin.write(data[MIB:])
            done.stdin.close()
        seen += done.stdout.read()
        assert (done.stderr.read(), done.wait(CALL_SECONDS)) == (b"", 6)
    assert seen == whole + sha256_line(data)


# --- files


def test_a_tree_is_copied_in_and_out(two: Cluster, source: Path, tmp_path: Path) -> None:
    """The same files, links and modes; also when the gateway is killed in the middle of one."""
    gateway = two.gateway
    job, _ = running(two, "sleep 300")
    assert gateway.ok("cp", str(source), f"{job}:") == ""
    assert gateway.ok("cp", f"{job}:src", str(tmp_path / "back")) == ""
    assert tree_of(tmp_path / "back") == tree_of(source)
    assert gateway.refused("cp", f"{job}:none", str(tmp_path)) == (
        1,
        f"pjw: error: cannot copy none of job {job}: cannot read none: no such file or directory\n",
    )
    assert gateway.refused("cp", f"{job}:src", str(tmp_path), client="bob") == (
        1,
        f"pjw: error: no job {job}\n",
    )
    big = os.urandom(20 * MIB)
    (tmp_path / "big").write_bytes(big)
    gateway.ok("cp", str(tmp_path / "big"), f"{job}:")
    with gateway.popen("cp", f"{job}:big", "-") as copying:
        assert copying.stdout is not None and copying.stderr is not None
        # the pipe holds it up here
        archive = copying.stdout.read(MIB)
        restart(gateway)
        archive += copying.stdout.read()
        assert (copying.wait(CALL_SECONDS), copying.stderr.read()) == (0, b"")
    assert subprocess.run(["tar", "-xO"], input=archive, capture_output=True, check=True).stdout == big


def test_files_are_sent_with_a_job(two: Cluster, source: Path) -> None:
    """They wait at the gateway, over a kill, for a node; nothing of them stays at either."""
    gateway = two.gateway
    line = sha256_line((source / "lib/data").read_bytes())
    command = "./in/build.sh && sha256sum < in/lib/data"
    assert gateway.pjw("run", "--upload", f"{source}:in", command).stdout == line
    wait_for(lambda: no_uploads(two))
    gateway.ok("nodes", "drain", "n1", "n2", client="ann")
    waiting = gateway.ok("start", "--upload", f"{source}:in", "sha256sum < in/lib/data").strip()
    assert len(uploads(gateway, "uploads")) == 1
    restart(gateway)
    two.await_nodes({"n1": "drained", "n2": "drained"})
    gateway.ok("nodes", "resume", "n1", "n2", client="ann")
    gateway.ok("wait", waiting)
    assert gateway.ok("logs", waiting).encode() == line
    wait_for(lambda: no_uploads(two))
    with gateway.client() as client, gateway.client("bob") as other:
        for name, data in (("mine", [entry("x", data=b"1") + END]), ("no-archive", [b"x" * 1024])):
            sent(gateway, name, data)
        with pytest.raises(errors.CopyError, match="there is none called mine"):
            other.start(JobSpec("true", upload="mine"))
        # what cannot be unpacked is the end of its job
        broken = client.wait(client.start(JobSpec("true", upload="no-archive")).id)
        assert broken.reason == "start_failed" and "cannot unpack" in broken.detail
        assert client.quota().stored_bytes >= 1024
        job_id = client.start(JobSpec("cat x", upload="mine")).id
        assert b"".join(client.logs(job_id)) == b"1"
    wait_for(lambda: no_uploads(two))


def test_no_node_gets_the_files_of_another_s_job(two: Cluster) -> None:
    """Nor does it get files in any other session than its own."""
    gateway, node = two.gateway, two.nodes["n1"]
    files = (str(node.certs / "node-n1.crt"), str(node.certs / "node-n1.key"))
    request = cpb.FetchUploadRequest(session="x", uuid="y")
    with gateway.channel(files) as channel:
        stub = NodeServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.FetchUpload(request, timeout=CALL_SECONDS))
    assert (caught.value.code(), caught.value.details()) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "the session of this claim is over",
    )


def test_artifacts(two: Cluster, tmp_path: Path) -> None:
    """They are kept on the node, listed and copied through the gateway, and go with the job."""
    gateway = two.gateway
    command = "mkdir dist; head -c 3000000 /dev/urandom > dist/a; sha256sum < dist/a"
    job = gateway.ok("start", "--output", "dist/**", command).strip()
    done = json.loads(gateway.ok("wait", "--format", "jsonl", job))
    assert (done["exitCode"], done["artifacts"]["state"]) == (0, "kept")
    assert [json.loads(line)["path"] for line in gateway.ok("artifacts", job).splitlines()] == [
        "dist",
        "dist/a",
    ]
    gateway.ok("cp", f"{job}:dist/a", str(tmp_path / "a"))
    assert sha256_line((tmp_path / "a").read_bytes()) == gateway.ok("logs", job).encode()
    assert gateway.refused("artifacts", job, client="bob") == (1, f"pjw: error: no job {job}\n")
    with gateway.client() as client:
        missing = client.wait(client.start(JobSpec("true", outputs=["none"], output_required=True)).id)
        assert missing.reason == "artifacts_missing"
        with pytest.raises(errors.CopyError, match=f"^job {missing.id} has no artifacts: no file of the job"):
            list(client.read_artifacts(missing.id))
        going = client.start(JobSpec("sleep 300", outputs=["none"])).id
        with pytest.raises(
            errors.JobStateError, match=f"^job {going} is .*: its artifacts come with its end"
        ):
            list(client.read_artifacts(going))


# --- ports


def test_a_port_of_a_job(two: Cluster) -> None:
    """Some MiB there and back through `pjw forward`; nobody who listens, another client, a break."""
    gateway = two.gateway
    job, node = running(two, *python(SERVER))
    wait_for(lambda: gateway.ok("logs", "--no-follow", job) == "ready\n")
    data = os.urandom(4 * MIB)
    with gateway.popen("forward", job, "0:8080") as forward:
        assert forward.stdout is not None
        line = forward.stdout.readline().decode()
        found = re.fullmatch(rf"127\.0\.0\.1:(\d+) leads to port 8080 of job {job}\n", line)
        assert found, line
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", int(found[1]))) as connection:
                connection.settimeout(CALL_SECONDS)
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                got = b"".join(iter(lambda: connection.recv(MIB), b""))
            assert got == digest(data)
        with gateway.client() as client, gateway.client("bob") as other:
            with pytest.raises(errors.JobStateError) as nobody:
                list(client.connect(int(job), 9))
            assert f"port 9 of job {job}" in str(nobody.value)
            with pytest.raises(errors.JobNotFoundError, match=f"^no job {job}$"):
                list(other.connect(int(job), 8080))
            with pytest.raises(errors.InvalidJobError, match="a port is a number from 1 to 65535, not 0"):
                list(client.connect(int(job), 0))
            # a connection that is lost is not made again
            with gateway.stub() as stub:
                requests: SimpleQueue[pb.ForwardRequest | None] = SimpleQueue()
                requests.put(pb.ForwardRequest(id=int(job), port=8080))
                call = stub.Forward(iter(requests.get, None), timeout=CALL_SECONDS)
                assert next(call) == pb.ForwardResponse()
                node.kill("server")
                with pytest.raises(grpc.RpcError) as caught:
                    next(call)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                requests.put(None)
            node.start()
            two.await_nodes({"n1": "up", "n2": "up"})
            gateway.ok("stop", "--grace", "0", job)
        assert forward.wait(CALL_SECONDS) == 0
