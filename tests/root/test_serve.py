"""pjwd as a program: what keeps it from starting, what it runs as, `check`, and how it ends."""

import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pjw.certs import authority
from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub
from tests.support import certs_factory, pjwd_with
from tests.support.service import BIN, Service, wait_for
from tests.support.worker_harness import ASK

SECONDS: Final = 60


def pjwd(*arguments: str, code: int = 1, setup: str | None = None) -> str:
    """Run a pjwd that ends by itself; its stderr. *setup* prepares a mount namespace of its own."""
    command = [str(BIN / "pjwd"), *arguments]
    if setup is not None:
        command = ["unshare", "--mount", "sh", "-ec", f'{setup}\nexec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert (done.returncode, done.stdout if code else b"") == (code, b""), done
    return done.stderr.decode()


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A service that is not started: its files, and the command line that would start it."""
    return Service(tmp_path_factory.mktemp("idle"), clients=["alice"])


def with_option(service: Service, option: str, value: str) -> list[str]:
    """The arguments of `pjwd serve`, with one replaced."""
    arguments = service.command()[1:]
    arguments[arguments.index(option) + 1] = value
    return arguments


def refused(words: str) -> str:
    """The pattern of one error in words and at most one hint."""
    return rf"pjwd: error: [^\n]*{words}[^\n]*\n(hint: [^\n]+\n)?\Z"


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        ("garbage", "'garbage' is not HOST:PORT"),
        ("localhost", "'localhost' is not HOST:PORT"),
        (":50051", "':50051' is not HOST:PORT"),
        ("localhost:", "'localhost:' is not HOST:PORT"),
        ("localhost:x", "'localhost:x' is not HOST:PORT"),
        ("localhost:65536", "'localhost:65536' is not HOST:PORT"),
        ("localhost:-1", "'localhost:-1' is not HOST:PORT"),
        ("localhost:1１", "is not HOST:PORT"),
        ("nosuchhost.invalid:0", "cannot listen on nosuchhost.invalid:0: "),
        ("192.0.2.1:0", "cannot listen on 192.0.2.1:0: cannot assign requested address"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_named(idle: Service, listen: str, words: str) -> None:
    """--listen with garbage, an unknown host, an address of another machine."""
    assert re.match(refused(words), pjwd(*with_option(idle, "--listen", listen)))


def test_a_port_in_use_is_named(idle: Service) -> None:
    """A second listener on the same port is refused, not shared."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        words = f"cannot listen on {address}: address already in use"
        assert re.match(refused(words), pjwd(*with_option(idle, "--listen", address)))


def test_a_second_pjwd_is_refused_the_port_and_the_state(service: Service, idle: Service) -> None:
    """Neither the port nor the state directory of a running pjwd can be taken by another."""
    words = f"cannot listen on {service.address}: address already in use"
    assert re.match(refused(words), pjwd(*with_option(idle, "--listen", service.address)))
    said = pjwd(*with_option(idle, "--state-dir", str(service.state)))
    # at once, and not only when it has waited
    first, _, rest = said.partition("\n")
    in_use = f"{service.state}/jobs.sqlite is in use by another pjwd"
    assert first == f"pjwd: WARNING: {in_use}; waiting 5 s for its end"
    assert re.match(refused(f"the job table {in_use}"), rest)
    assert service.ok("logs", service.ok("start", "echo unharmed").strip()) == "unharmed\n"


@pytest.mark.parametrize("option", ["--ca-crt", "--server-crt", "--server-key"])
def test_a_file_that_cannot_be_read_is_named(idle: Service, option: str, tmp_path: Path) -> None:
    """Missing, a directory, empty, garbage: the message has the path."""
    garbage, empty = tmp_path / "garbage", tmp_path / "empty"
    for file, content in ((garbage, b"\0\xff" * 100), (empty, b"")):
        file.write_bytes(content)
        file.chmod(0o600)
    for path in ("/nonexistent/file", str(tmp_path), str(garbage), str(empty)):
        assert re.match(refused(re.escape(path)), pjwd(*with_option(idle, option, path)))


def test_a_certificate_that_does_not_fit_is_refused_before_anything_listens(
    idle: Service, tmp_path: Path
) -> None:
    """Key of another, expired, of another CA, for clients only: said at the start, not by failing clients."""
    own = certs_factory.load((idle.certs / "ca.crt").read_bytes(), (idle.certs / "ca.key").read_bytes())
    odd = {
        "it expired on": certs_factory.issue(
            own,
            eku=certs_factory.SERVER,
            start=-2 * certs_factory.DAY,
            end=-certs_factory.DAY,
            sans=["localhost"],
        ),
        "it was not issued by the CA in": certs_factory.server(certs_factory.make_ca("another")),
        "it is not for serverAuth": certs_factory.issue(own, sans=["localhost"]),
    }
    for words, made in odd.items():
        crt, key = made.write(tmp_path, "odd")
        arguments = with_option(idle, "--server-crt", crt)
        arguments[arguments.index("--server-key") + 1] = key
        assert re.match(refused(words), pjwd(*arguments))
    other = pjwd(*with_option(idle, "--server-key", str(idle.certs / "alice.key")))
    assert re.match(refused(r"alice\.key: it does not belong to the certificate"), other)


def test_a_state_directory_that_cannot_be_used_is_named(idle: Service, tmp_path: Path) -> None:
    """A file in its place, /proc, a read-only file system, one that is full."""
    file = tmp_path / "file"
    file.write_text("")
    for path in (str(file), f"{file}/below", "/proc/pjw"):
        said = pjwd(*with_option(idle, "--state-dir", path))
        assert re.match(refused(f"cannot use the state directory {path}: "), said)
    mount = tmp_path / "mount"
    mount.mkdir()
    arguments = with_option(idle, "--state-dir", str(mount))
    said = pjwd(*arguments, setup=f"mount -t tmpfs -o ro,mode=755 tmpfs {mount}")
    assert re.match(refused(f"cannot use the state directory {mount}: [rR]ead-only file system"), said)
    full = f"mount -t tmpfs -o size=64k,mode=755 tmpfs {mount}; head -c 65536 /dev/zero >{mount}/x || true"
    assert re.match(refused("space|full"), pjwd(*arguments, setup=full))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("not toml", "it is not TOML"),
        ("colour = 1", "is not valid: Object contains unknown field `colour`"),
        ("[limits]\nram = 1", "no limit is called 'ram'"),
        ("[ceilings]\nram = 1", "no limit is called 'ram'"),
        ("[limits]\nmemory_max_bytes = 'much'", "is not valid: Expected `int`, got `str`"),
        ("[limits]\nmemory_max_bytes = -1", "limit memory_max_bytes must be a whole number"),
        ("[ceilings]\npids_max = 100", "the default limit pids_max is 512, above its ceiling of 100"),
        (
            "[limits]\ntime_max_seconds = 0\n[ceilings]\ntime_max_seconds = 5",
            "the default limit time_max_seconds is 0, above its ceiling of 5",
        ),
        ("user = 'nosuchuser'", "no user is called 'nosuchuser' on this host"),
        ("user = 'root'", "the server must not run as root"),
        ("stop_grace_seconds = -1", "stop_grace_seconds must be from 0 to 86400"),
        ("[job_users]\nuid_first = 0", "job_users.uid_first"),
        ("[job_users]\nuid_count = 0", "job_users.uid_count"),
        ("[job_users]\nuid_first = 4_294_967_294\nuid_count = 10", "the range of user ids for jobs must lie"),
        ("hidden_paths = ['relative']", "hidden_paths"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, config: str, words: str) -> None:
    """Broken TOML, unknown keys, limits above ceilings, users that will not do."""
    service = Service(tmp_path, clients=["alice"], config=config)
    assert re.match(refused(words), pjwd(*service.command()[1:]))


def test_a_configuration_that_cannot_be_read_is_named(idle: Service, tmp_path: Path) -> None:
    """A path that is missing, or no text."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for path in ("/nonexistent.toml", str(tmp_path), str(binary)):
        said = pjwd(*idle.command()[1:], "--config", path)
        assert re.match(refused(f"cannot read the configuration {path}: "), said)


def test_a_configured_default_ceiling_and_user_hold(make_service: Callable[..., Service]) -> None:
    """What the operator wrote is what a job gets, what a client may ask for, and who the server is."""
    config = "user = 'nobody'\n[limits]\npids_max = 50\n[ceilings]\npids_max = 100\n"
    service = make_service(config=config).start()
    assert '"pidsMax": 50' in service.ok("get", service.ok("start", "true").strip())
    above = pb.StartRequest(command="true", limits=pb.Limits(pids_max=101)).SerializeToString()
    assert service.answer("Start", above)[2] == "limit pids_max must be at most 100 on this server, not 101"
    within = pb.StartRequest(command="true", limits=pb.Limits(pids_max=100)).SerializeToString()
    assert service.answer("Start", within)[1].name == "OK"
    assert os.stat(f"/proc/{service.pid}").st_uid != 0
    assert "Uid:\t65534\t65534\t65534\t65534" in Path(f"/proc/{service.pid}/status").read_text()


def test_a_host_without_cgroup_controllers_is_refused(idle: Service) -> None:
    """Where nothing can be limited nothing is started: what is missing is named, with a next step."""
    gone = "for point in $(awk '$3 ~ /^cgroup/ {print $2}' /proc/mounts | tac); do umount -l $point; done"
    said = pjwd(*idle.command()[1:], setup=gone)
    assert re.match(refused("cannot limit jobs: no cgroup controller [^\\n]*memory"), said), said
    assert "\nhint: " in said


def test_a_job_cannot_reach_the_server(tmp_path: Path) -> None:
    """Key, configuration and state, readable for all by mistake, are not so in a job; nor is the process."""
    # below /tmp nothing is visible in a job at all
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    service = Service(directory, clients=["alice"], config="")
    try:
        service.start()
        hidden = [service.certs / "server.key", directory / "pjwd.toml", service.state / "jobs.sqlite"]
        for path in (directory, service.certs, service.state, *hidden):
            path.chmod(0o755)
        paths = " ".join(map(str, hidden))
        processes = " ".join(
            f"/proc/{pid}/{name}"
            for pid in (service.pid, service.launcher_pid())
            for name in (f"root{service.certs}/server.key", "mem", "environ", "fd/3")
        )
        script = f"for path in {paths} {processes}; do head -c 1 $path && echo read $path; done"
        job_id = service.ok("start", f"cat {service.certs}/server.crt; {{ {script}; }} 2>/dev/null").strip()
        # what is not secret is there: so the rest is hidden, and not merely elsewhere
        assert service.ok("logs", job_id) == (service.certs / "server.crt").read_text()
        assert service.stop() == 0
    finally:
        if service.process is not None:
            service.stop()
        shutil.rmtree(directory)


def test_not_root_is_a_plain_message(idle: Service) -> None:
    """Without root pjwd says what it needs it for, and what to do."""
    # imported while root: the interpreter may live where only root can read
    program = (
        "import os, shutil, sys, encodings.ascii\nimport pjw.server.boot, pjw.server.check\n"
        "from pjw.server.main import main\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *idle.command()[1:]],
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.match(refused("starting jobs needs root"), done.stderr.decode())
    check = subprocess.run(
        [sys.executable, "-c", program, "check"], capture_output=True, timeout=SECONDS, check=False
    )
    assert (check.returncode, check.stderr) == (1, b"")
    assert b"missing  not root\n         hint: " in check.stdout
    assert check.stdout.endswith(b"this host cannot run pjwd as it is\n")


def test_check_tells_what_the_host_offers_in_plain_words(tmp_path: Path) -> None:
    """Kernel, root, namespaces, init, cgroups, disks and users, each on a line, and a conclusion."""
    state = tmp_path / "state"
    done = subprocess.run(
        [str(BIN / "pjwd"), "check", "--state-dir", str(state)],
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    text = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b""), text
    for subject in (
        "kernel ",
        "root",
        "namespaces: pid, mnt, net",
        "pjw-init at ",
        "cgroup v",
        "file systems that jobs see: /",
        "disks for io",
        "user",
    ):
        assert re.search(rf"^ok +{re.escape(subject)}", text, re.MULTILINE), subject
    assert text.endswith("\nthis host can run pjwd\n")
    assert not state.exists()


def test_the_network_process_has_no_privilege_and_the_launcher_no_network(service: Service) -> None:
    """The server is nobody's user for good; the launcher is root and has no socket of the network."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{service.pid}/status").read_text().splitlines()
    )
    assert len(set(status["Uid"].split())) == len(set(status["Gid"].split())) == 1
    assert status["Uid"].split()[0] != "0"
    assert status["Groups"].strip() == ""
    assert (int(status["CapEff"], 16), int(status["CapPrm"], 16), status["NoNewPrivs"]) == (0, 0, "1")
    launcher = service.launcher_pid()
    assert os.stat(f"/proc/{launcher}").st_uid == 0
    assert Path(f"/proc/{launcher}/environ").read_bytes() == b""
    sockets = re.findall(r"socket:\[(\d+)\]", " ".join(readlinks(f"/proc/{launcher}/fd")))
    net = Path(f"/proc/{launcher}/net")
    # a kernel without IPv6 lacks two of them
    tables = "".join(
        (net / name).read_text() for name in ("tcp", "tcp6", "udp", "udp6") if (net / name).exists()
    )
    assert tables
    assert not set(sockets) & set(tables.split())


def readlinks(directory: str) -> list[str]:
    """Where every link of a directory leads to."""
    return [os.readlink(f"{directory}/{name}") for name in os.listdir(directory)]


def test_a_state_directory_below_a_closed_one_works(make_service: Callable[..., Service]) -> None:
    """The server's user could not even reach it by name, and has to restart there too."""
    service = make_service()
    closed = service.directory / "closed"
    closed.mkdir(mode=0o700)
    service.state = closed / "state"
    service.start()
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    for _ in range(2):
        job_id = service.ok("start", "pwd; echo hi > file; cat file").strip()
        assert service.ok("logs", job_id) == "/run/job\nhi\n"
        assert service.stop() == 0
        service.start()
    assert service.ok("logs", "1") == "/run/job\nhi\n"


def test_certs_init_makes_all_that_a_new_service_needs(tmp_path: Path) -> None:
    """`pjwd certs init DIR alice`, then serve and pjw with its files; a second client is added later."""
    certs = tmp_path / "certs"
    done = subprocess.run(
        [str(BIN / "pjwd"), "certs", "init", str(certs), "alice"], capture_output=True, check=True
    )
    made = [f"{certs}/{name}.{kind}" for name in ("ca", "server", "alice") for kind in ("crt", "key")]
    made.append(f"{certs}/alice.pjw")
    assert sorted(done.stdout.decode().split()) == sorted(made)
    assert all(stat.S_IMODE(os.stat(path).st_mode) == 0o600 for path in made if not path.endswith(".crt"))
    assert re.match(refused("exists"), pjwd("certs", "init", str(certs), "alice"))
    subprocess.run([str(BIN / "pjwd"), "certs", "client", str(certs), "bob"], capture_output=True, check=True)

    service = Service.__new__(Service)
    service.directory, service.certs, service.state = tmp_path, certs, tmp_path / "state"  # type: ignore[misc]
    service.log, service.config, service.address = tmp_path / "log", None, "localhost:0"  # type: ignore[misc]
    service.start()
    try:
        assert service.ok("logs", service.ok("start", "echo hi", client="alice").strip()) == "hi\n"
        assert service.ok("list", client="bob") == ""
        by_address = service.address.replace("localhost", "127.0.0.1")
        assert service.pjw("list", PJW_SERVER=by_address).returncode == 0
    finally:
        assert service.stop() == 0


# Numbered lines, with small pauses, until it is told to end; how many there were; an exit code of its own.
NUMBERED: Final = (
    "i=0; until [ -e end ]; do echo line $i; i=$((i+1)); sleep 0.008; done; echo $i lines; exit 7"
)
UNTIL_END: Final = "until [ -e end ]; do sleep 0.05; done; exit 3"


# How long a drain waits at most for calls that do not end.
def test_followers_and_jobs_live_through_restarts(make_service: Callable[..., Service]) -> None:
    """A server ended, then killed, in mid-stream: `pjw logs` goes on at the exact byte, and so do jobs."""
    service = make_service()
    service.change = pjwd_with.drain_for_long
    service.start()
    numbered, silent = service.start_job(NUMBERED), service.start_job(UNTIL_END)
    late = service.start_job("sleep 300")
    follow = f"{BIN}/pjw logs {numbered} | tee {service.directory}/seen"
    with (
        subprocess.Popen(
            ["sh", "-c", follow], env=service.environment(), stdout=subprocess.DEVNULL
        ) as numbered_logs,
        service.popen("logs", str(silent)) as silent_logs,
        service.popen("logs", str(late)) as late_logs,
    ):
        # a stream that has not begun is not taken up again: that would hide a wrong address
        wait_for(lambda: service.open_outputs(silent))
        for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
            seen = size_of(service.directory / "seen")
            wait_for(lambda: size_of(service.directory / "seen") > seen + 500)  # noqa: B023
            wait_for(lambda: service.open_outputs(late))
            # within the 30 s that stop() waits
            assert service.stop(number) == (0 if number == signal.SIGTERM else -number)
            service.start()
        for job_id in (numbered, silent):
            (service.state / "scratch" / str(job_id) / "end").touch()
        assert numbered_logs.wait(60) == 0
        *lines, last = (service.directory / "seen").read_text().splitlines()
        assert (lines, last) == ([f"line {n}" for n in range(len(lines))], f"{len(lines)} lines")
        assert silent_logs.communicate(timeout=60) == (b"", b"")
        assert silent_logs.returncode == 0
        assert late_logs.poll() is None
        service.ok("stop", str(late))
        assert late_logs.communicate(timeout=30) == (b"", b"")
    assert [(service.job(n).exit_code, service.job(n).reason) for n in (numbered, silent)] == [
        (7, pb.END_REASON_COMPLETED),
        (3, pb.END_REASON_COMPLETED),
    ]
    assert service.start_job("true") == 4


def size_of(path: Path) -> int:
    """How large a file is; 0 while there is none."""
    return path.stat().st_size if path.exists() else 0


def test_a_job_that_ends_while_no_server_runs_is_known_afterwards(
    make_service: Callable[..., Service],
) -> None:
    """Killed server, ended job, new server: output, exit code, end and usage are those of the job."""
    service = make_service(clients=["alice"]).start()
    job_id = service.start_job(ASK + "read x <&3; echo bye; exit 5")
    group = next(group for group in service.job_cgroups() if group.name == f"job-{job_id}")
    service.stop(signal.SIGKILL)
    service.tell(job_id)
    wait_for(lambda: not (group / "cgroup.procs").read_text())
    service.start()
    job = service.job(job_id)
    assert (job.state, job.reason, job.exit_code) == (pb.JOB_STATE_EXITED, pb.END_REASON_COMPLETED, 5)
    assert 0 < job.end.ToNanoseconds() / 1e9 - job.start.ToNanoseconds() / 1e9 < 30
    assert job.usage.cpu_usage_usec > 0
    assert service.ok("logs", str(job_id)) == "bye\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_drains_with_followers_and_stops_connected(
    make_service: Callable[..., Service], number: signal.Signals
) -> None:
    """20 followers and a stop under way do not hold the end up; it is an end with 0, and jobs go on."""
    service = make_service(clients=["alice"])
    service.change = pjwd_with.drain_for_long
    service.start()
    job_id = service.start_job("trap '' TERM; echo ready; while :; do sleep 1; done")
    with service.stub() as stub:
        followers = [stub.Logs(pb.LogsRequest(id=job_id)) for _ in range(20)]
        for follower in followers:
            assert next(follower).data == b"ready\n"
        stopping = stub.Stop.future(pb.StopRequest(id=job_id, grace=Duration(seconds=300)))
        wait_for(lambda: service.job(job_id).state == pb.JOB_STATE_STOPPING)
        # within the 30 s that stop() waits
        assert service.stop(number) == 0
        for call in (*followers, stopping):
            assert call.code() is grpc.StatusCode.UNAVAILABLE
    service.start()
    assert service.job(job_id).state == pb.JOB_STATE_RUNNING


def test_a_killed_launcher_ends_the_server_and_no_job(make_service: Callable[..., Service]) -> None:
    """Without its launcher the server can start and stop nothing: it ends in words; a new one takes over."""
    service = make_service(clients=["alice"]).start()
    job_id = service.start_job("sleep 300")
    os.kill(service.launcher_pid(), signal.SIGKILL)
    assert service.process is not None
    assert service.process.wait(20) == 1
    assert "the launcher has died; running jobs go on" in service.log.read_text()
    service.start()
    assert service.job(job_id).state == pb.JOB_STATE_RUNNING
    assert '"reason": "stopped"' in service.ok("stop", str(job_id))


def test_a_name_is_served_at_each_of_its_addresses_or_not_at_all(
    make_service: Callable[..., Service],
) -> None:
    """One port for all, for metrics too; where somebody has it at one of them, the refusal names that one."""
    service = make_service(config='[metrics]\nlisten = "localhost:0"\n')
    hosts = service.directory / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.0.2 localhost\n")
    command = service.command
    inside = f'mount --bind {hosts} /etc/hosts; exec "$@"'
    service.command = lambda *extra: ["unshare", "--mount", "sh", "-ec", inside, "sh", *command(*extra)]  # type: ignore[method-assign]
    service.address = "localhost:0"
    service.start("--log-level", "info")
    port = int(service.address.rpartition(":")[2])
    for address in ("127.0.0.1", "127.0.0.2"):
        with service.channel(address=f"{address}:{port}") as channel:
            JobWorkerServiceStub(channel).List(pb.ListRequest(), timeout=SECONDS)
    for kind in ("crt", "key"):
        (service.certs / f"server.{kind}").unlink()
    authority.write_server(str(service.certs), ["localhost"])
    os.kill(service.pid, signal.SIGHUP)
    service.await_log("the certificates are new")
    shown = {ssl.get_server_certificate((address, port)) for address in ("127.0.0.1", "127.0.0.2")}
    assert shown == {(service.certs / "server.crt").read_text()}
    assert service.stop() == 0
    with socket.create_server(("127.0.0.2", port)):
        done = subprocess.run(service.command(), capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 1
    assert (
        f"cannot listen on localhost:{port}: address already in use: 127.0.0.2:{port}, one of"
        in done.stderr.decode()
    )
