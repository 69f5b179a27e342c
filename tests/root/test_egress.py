"""Names on the network (F11): a real pjwd-egress, a host on loopback, and a resolver's file of our own.

The internet is 127.1.0.0/16, which the operator of this service lists; what lies beside it is private. Names
are those of a file that is /etc/hosts in the mounts of this pjwd alone. Most requests are made by connecting
to the job's proxy as `pjw forward` does, so no program need be in the job for them.
"""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import socketserver
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pjw import Client, Job, JobSpec, errors
from pjw.launcher.processes import status_of
from pjw.model import QueueSpec
from pjw.network import PROXY_PORT
from tests.root.conftest import finish
from tests.support.service import BIN, Service, wait_for
from tests.support.worker_harness import UIDS, python, uid_range

IDLE: Final = "exec sleep 1000"
DATABASE_PORT: Final = 5432
GET: Final = b"GET http://good.test/hello HTTP/1.1\r\nHost: good.test\r\n\r\n"
# connects by its name to a host, as a program that knows no proxy does
CONNECT: Final = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as connection:
        connection.sendall(sys.argv[3].encode())
        connection.shutdown(socket.SHUT_WR)
        print(b"".join(iter(lambda: connection.recv(65536), b"")).decode())
except OSError as error:
    print(type(error).__name__, error)
"""
LISTEN: Final = """
import socket
with socket.create_server(("127.0.0.1", 5432)) as listener:
    print("ready", flush=True)
    while True:
        with listener.accept()[0] as connection:
            connection.sendall(b"the database: " + connection.recv(100))
"""


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        """Give back what comes."""
        while data := self.request.recv(65536):
            self.request.sendall(data)


class World:
    """The hosts, the names, the service, and a job of alice's that is there for all tests."""

    def __init__(self, directory: Path) -> None:
        self.directory: Final = directory
        self.names: Final = directory / "hosts"
        self.files: Final = directory / "files"
        self.files.mkdir()
        (self.files / "hello").write_text("hello from the internet\n")
        self.address: Final = f"127.1.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
        self.name("good.test", self.address)
        self.servers: Final[list[socketserver.BaseServer]] = []
        handler: Any = lambda *args: _Files(*args, directory=str(self.files))  # noqa: E731
        self.serve(http.server.ThreadingHTTPServer((self.address, 80), handler))
        echo = socketserver.ThreadingTCPServer((self.address, 0), _Echo)
        self.serve(echo)
        self.echo_port: Final[int] = echo.server_address[1]
        for name in ("x.wild.test", "only-bob.test", "both.test"):
            self.name(name, self.address)
        for name, address in {
            "both.test": "127.2.0.1",
            "private.test": "10.0.0.1",
            "loopback.test": "127.0.0.1",
            "metadata.test": "169.254.169.254",
        }.items():
            self.name(name, address)
        self.service: Final = Service(directory, config=self.config())
        self.service.pjwd = self.directory / "pjwd"
        # in a mount namespace of its own, where /etc/hosts is our file; and without what the unit leaves out
        less = "setpriv --bounding-set=-net_bind_service"
        script = f'mount --bind {self.names} /etc/hosts && exec {less} {BIN}/pjwd "$@"'
        self.service.pjwd.write_text(f"#!/bin/sh\nexec unshare --mount sh -c '{script}' pjwd \"$@\"\n")
        self.service.pjwd.chmod(0o755)
        self.service.start()
        with self.service.client() as client:
            self.job: Job = client.start(self.spec(IDLE))

    def config(self) -> str:
        """The operator's file."""
        offered = ["good.test", f"good.test:{self.echo_port}", "*.wild.test", "both.test", "private.test"]
        offered += ["loopback.test", "metadata.test", self.address, f"both.test:{self.echo_port}"]
        offered += [f"good.test:{DATABASE_PORT}"]
        return (
            f'audit_log = "{self.directory}/audit.jsonl"\nlog_level = "info"\n'
            f"[job_users]\nuid_first = {uid_range()}\nuid_count = {UIDS}\n"
            f'[network]\nhosts = {json.dumps(offered)}\nprivate = ["127.1.0.0/16"]\nconnections_max = 8\n'
            '[network.by_name.bob]\nhosts = ["only-bob.test"]\n'
        )

    @property
    def allow(self) -> list[str]:
        """What alice's job asks for."""
        names = ["good.test", f"good.test:{self.echo_port}", "*.wild.test", "both.test", "private.test"]
        return [*names, "loopback.test", "metadata.test", self.address]

    def spec(self, command: str | list[str], **more: Any) -> JobSpec:
        """A job that asks for all of that."""
        return JobSpec(command, **{"allow": self.allow, **more})

    def name(self, name: str, address: str) -> None:
        """Have a name lead to an address too; in place, as it is the file that is mounted."""
        with self.names.open("a") as file:
            file.write(f"{address}\t{name}\n")

    def serve(self, server: socketserver.BaseServer) -> None:
        """Serve in a thread."""
        self.servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def ask(self, request: bytes = GET, job: int = 0) -> bytes:
        """Send this to the proxy of a job; all that comes back."""
        with self.service.client() as client:
            return b"".join(client.connect(job or self.job.id, PROXY_PORT, [request]))

    def status(self, request: bytes = GET, job: int = 0) -> int:
        """The status of the answer."""
        return int(self.ask(request, job).split(b" ", 2)[1])

    def answers(self, job: int = 0) -> bool:
        """Whether the job's proxy does its work now."""
        with contextlib.suppress(errors.PjwError, IndexError):
            return self.status(GET, job) == 200
        return False

    def egress(self) -> int:
        """The pid of pjwd-egress."""
        launcher = self.service.launcher_pid()
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        found = [
            pid for pid in map(int, children) if Path(f"/proc/{pid}/comm").read_text() == "pjwd-egress\n"
        ]
        return found[0] if found else 0

    def close(self) -> None:
        """End all of it."""
        finish(self.service)
        for server in self.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One for all tests here."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    directory.chmod(0o755)
    world = World(directory)
    yield world
    try:
        world.close()
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def client(world: World) -> Iterator[Client]:
    """Alice."""
    with world.service.client() as client:
        yield client


def say(client: Client, spec: JobSpec) -> str:
    """The output of a job that ends well."""
    done = client.run(spec)
    assert done.job.exit_status is not None
    assert done.job.exit_status.code == 0, done
    return done.output.decode()


# --- what a job reaches


def test_a_name_that_is_allowed(world: World) -> None:
    """By a request and by a tunnel."""
    got = world.ask()
    assert got.startswith(b"HTTP/1.1 200 ")
    assert got.endswith(b"hello from the internet\n")
    got = world.ask(b"CONNECT x.wild.test:80 HTTP/1.0\r\n\r\nGET /hello HTTP/1.0\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 200 Connection established\r\n\r\nHTTP/1.0 200 ")
    assert got.endswith(b"hello from the internet\n")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("good.test:80", 200),
        ("both.test:80", 200),
        ("other.test:80", 403),
        ("wild.test:80", 403),
        ("good.test:22", 403),
        ("private.test:80", 403),
        ("loopback.test:80", 403),
        ("metadata.test:80", 403),
        ("nobody.wild.test:80", 502),
        ("127.1.0.1:80", 403),
        ("169.254.169.254:80", 403),
        ("0.0.0.0:80", 403),
        ("2130771969:80", 400),
        ("0x7f010001:80", 400),
        ("[::ffff:127.1.0.1]:80", 400),
    ],
)
def test_what_may_be_connected_to(world: World, target: str, status: int) -> None:
    """Names that the job has asked for, whose addresses are the internet's."""
    assert world.status(f"CONNECT {target} HTTP/1.0\r\n\r\n".encode()) == status


def test_an_address_that_is_listed(world: World) -> None:
    """As it is written."""
    assert world.status(f"GET http://{world.address}/hello HTTP/1.1\r\nHost: a\r\n\r\n".encode()) == 200


def test_what_is_no_request(world: World) -> None:
    """HTTP/2, headers without end, and the rest of the unit tests' list in short."""
    assert world.status(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") == 505
    assert world.status(b"GET http://good.test/ HTTP/1.1\r\nX: " + b"x" * 100_000) == 431
    assert world.status(b"\0" * 100 + b"\r\n\r\n") == 400


def test_a_name_that_leads_elsewhere_then(world: World) -> None:
    """It is judged anew for each connection, and by the very address that is connected to."""
    request = b"GET http://moving.wild.test/hello HTTP/1.1\r\nHost: a\r\n\r\n"
    before = world.names.read_text()
    world.name("moving.wild.test", world.address)
    assert world.status(request) == 200
    world.names.write_text(f"{before}127.0.0.1\tmoving.wild.test\n")
    assert world.status(request) == 403
    world.names.write_text(before)


def test_a_job_finds_its_proxy(world: World, client: Client) -> None:
    """By variables, of which the client's own go first; so does a session. A job without names has none."""
    script = "echo $HTTP_PROXY $HTTPS_PROXY $http_proxy $https_proxy $NO_PROXY $no_proxy"
    proxy, own = f"http://127.0.0.1:{PROXY_PORT}", "localhost,127.0.0.1,::1"
    assert say(client, world.spec(script)) == f"{proxy} {proxy} {proxy} {proxy} {own} {own}\n"
    assert say(client, world.spec(script, env={"http_proxy": "x"})).split()[:3] == [proxy, proxy, "x"]
    assert client.run_in(world.job.id, JobSpec("echo $https_proxy")).output == f"{proxy}\n".encode()
    assert client.run_in(world.job.id, JobSpec("grep -c good.test /etc/hosts")).output == b"1\n"
    assert say(client, JobSpec(script)) == "\n"


def test_a_host_by_its_name(world: World, client: Client) -> None:
    """For a program that knows no proxy: a name with a port, at an address of the job's own; and no other."""
    port = str(world.echo_port)
    assert say(client, world.spec([*python(CONNECT), "good.test", port, "hello"])) == "hello\n"
    # one that takes privilege elsewhere
    low = JobSpec(
        [*python(CONNECT), "good.test", "80", "GET /hello HTTP/1.0\r\n\r\n"], allow=["good.test:80"]
    )
    assert say(client, low).endswith("hello from the internet\n\n")
    port_start = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start"
    assert say(client, JobSpec(port_start, allow=["good.test:80"])) == "1024\n"
    for host, where in (("good.test", "80"), (world.address, port), ("11.0.0.1", "80")):
        said = say(client, world.spec([*python(CONNECT), host, where, "hello"]))
        assert "Error" in said, (host, where, said)


def test_many_bytes_each_way(world: World, client: Client) -> None:
    """To the byte."""
    data = os.urandom(5_000_000)
    tunnel = f"CONNECT good.test:{world.echo_port} HTTP/1.0\r\n\r\n".encode()
    pieces = [data[at : at + 1_000_000] for at in range(0, len(data), 1_000_000)]
    got = b"".join(client.connect(world.job.id, PROXY_PORT, [tunnel, *pieces]))
    assert hashlib.sha256(got.partition(b"\r\n\r\n")[2]).digest() == hashlib.sha256(data).digest()


def test_a_relay_in_a_job_serves_that_job_alone(world: World, client: Client) -> None:
    """Another job has another network, whatever listens in the first."""
    say_proxy = [*python(CONNECT), "127.0.0.1", str(PROXY_PORT), GET.decode()]
    assert "hello from the internet" in say(client, world.spec(say_proxy))
    assert "ConnectionRefusedError" in say(client, JobSpec(say_proxy))


@contextlib.contextmanager
def tunnels(world: World, count: int) -> Iterator[list[bytes]]:
    """So many of the job at once; the first line that each was answered with."""
    done, lines, threads = threading.Event(), [], []

    def pieces() -> Iterator[bytes]:
        yield f"CONNECT good.test:{world.echo_port} HTTP/1.0\r\n\r\n".encode()
        done.wait(60)

    def hold(answered: threading.Semaphore) -> None:
        with world.service.client() as client, contextlib.suppress(errors.PjwError):
            for answer in client.connect(world.job.id, PROXY_PORT, pieces()):
                lines.append(answer)
                answered.release()

    answered = threading.Semaphore(0)
    for _ in range(count):
        threads.append(threading.Thread(target=hold, args=(answered,)))
        threads[-1].start()
        assert answered.acquire(timeout=60)
    try:
        yield lines
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_many_connections(world: World) -> None:
    """A job has so many at once; the next is told so, and has its turn when one has ended."""
    with tunnels(world, 8) as lines:
        assert all(line.startswith(b"HTTP/1.1 200 ") for line in lines)
        assert b" 200 " not in world.ask()
    wait_for(world.answers)


# --- programs


def test_curl(world: World, client: Client) -> None:
    """It finds the proxy by itself."""
    if not Path("/usr/bin/curl").exists():
        pytest.skip("no curl on this machine")
    assert say(client, world.spec("curl -fsS http://good.test/hello")) == "hello from the internet\n"
    assert say(client, world.spec("curl -sS -o /dev/null -w '%{http_code}' http://other.test/")) == "403"


def test_pip(world: World, client: Client) -> None:
    """A package of an index on an allowed name, into the job's own directory."""
    bundled = [*Path(sys.base_prefix).glob("lib/python3*/ensurepip/_bundled/pip-*.whl")]
    if not bundled or not Path("/usr/bin/python3").exists():
        pytest.skip("no pip on this machine that a job could run")
    pip = shutil.copy(bundled[0], world.directory)
    index = world.files / "simple" / "made-up"
    index.mkdir(parents=True)
    wheel(index)
    link = "<!DOCTYPE html><html><body><a href='made_up-1-py3-none-any.whl'>made_up-1</a></body></html>"
    (index / "index.html").write_text(link)
    script = (
        f"PYTHONPATH={pip} /usr/bin/python3 -m pip install -q --no-cache-dir --target here"
        " --disable-pip-version-check"
        " --index-url http://good.test/simple/ --trusted-host good.test made-up 2>&1"
        " && PYTHONPATH=here /usr/bin/python3 -c 'import made_up; print(made_up.word)'"
    )
    assert say(client, world.spec(script)).splitlines()[-1] == "installed"


def wheel(directory: Path, name: str = "made_up") -> str:
    """A package of one module; the name of its file."""
    import zipfile

    file = f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(directory / file, "w") as archive:
        archive.writestr(f"{name}.py", "word = 'installed'\n__version__ = '1'\n")
        info = f"{name}-1.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file


def test_git(world: World, client: Client) -> None:
    """A clone over http."""
    if not Path("/usr/bin/git").exists():
        pytest.skip("no git on this machine")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    source = world.directory / "source"

    def git(*words: str) -> None:
        subprocess.run(["git", *who, *words], env=environment, check=True, capture_output=True)

    git("init", str(source))
    (source / "file").write_text("content\n")
    git("-C", str(source), "add", "file")
    git("-C", str(source), "commit", "-m", "one")
    git("clone", "--bare", str(source), str(world.files / "made.git"))
    git("-C", str(world.files / "made.git"), "update-server-info")
    assert say(client, world.spec("git clone -q http://good.test/made.git && cat made/file")) == "content\n"


def test_npm(world: World, client: Client) -> None:
    """A package of a registry on an allowed name; the registry leads to its archive there, too."""
    if not shutil.which("npm", path="/usr/bin"):
        pytest.skip("no npm on this machine")
    package = json.dumps({"name": "made-up", "version": "1.0.0", "main": "index.js"})
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, text in (("package.json", package), ("index.js", "module.exports = 'installed'")):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    (world.files / "made-up-1.0.0.tgz").write_bytes(archive.getvalue())
    registry = world.files / "npm"
    registry.mkdir()
    found = {"tarball": "http://good.test/made-up-1.0.0.tgz", "shasum": _sha1(archive.getvalue())}
    version = {**json.loads(package), "dist": found}
    about = {"name": "made-up", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
    (registry / "made-up").write_text(json.dumps(about))
    script = (
        "npm install --registry http://good.test/npm/ --no-audit --no-fund --no-update-notifier"
        " --loglevel=error made-up >&2 && node -p \"require('made-up')\""
    )
    limits = {"memory_max_bytes": 1 << 30}
    assert say(client, world.spec(script, limits=limits)).splitlines()[-1] == "installed"


def _sha1(data: bytes) -> str:
    # npm's own sum of older days, which it still asks for
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def database(world: World) -> Iterator[None]:
    """PostgreSQL on the host that names lead to, as a user of its own."""
    [*found] = Path("/usr/lib/postgresql").glob("*/bin")
    if not found or not shutil.which("psql"):
        pytest.skip("no PostgreSQL on this machine")
    data = world.directory / "database"
    data.mkdir()
    shutil.chown(data, "nobody")
    as_nobody = ["setpriv", "--reuid=nobody", "--clear-groups"]
    make = [f"{found[-1]}/initdb", "-D", str(data), "-U", "alice", "-A", "trust", "--no-sync", "--locale=C"]
    subprocess.run([*as_nobody, *make], cwd=data, check=True, capture_output=True)
    serve = [
        f"{found[-1]}/postgres",
        "-D",
        str(data),
        "-h",
        world.address,
        "-p",
        str(DATABASE_PORT),
        "-k",
        "",
    ]
    server = subprocess.Popen([*as_nobody, *serve], cwd=data, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        assert any("ready to accept connections" in line for line in server.stderr)
        yield
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def test_psql(world: World, client: Client) -> None:
    """It knows no proxy, and finds the database by its name and port; without the port there is no name."""
    ask = "psql -h good.test -U alice -d postgres -tAc 'select 6 * 7' 2>&1"
    with database(world):
        assert say(client, JobSpec(ask, allow=[f"good.test:{DATABASE_PORT}"])) == "42\n"
        assert "could not translate host name" in say(client, JobSpec(f"{ask}; true", allow=["good.test"]))


# --- what is offered


def test_what_the_operator_does_not_offer(world: World, client: Client) -> None:
    """The start is refused with the name, in each way to start, and nothing is made."""
    words = "cannot allow only-bob.test: this server does not offer it to alice"
    before = world.service.made()
    for spec in (
        JobSpec("true", allow=["only-bob.test"]),
        JobSpec("true", allow=["only-bob.test"], queue=QueueSpec()),
    ):
        with pytest.raises(errors.InvalidJobError, match=words):
            client.start(spec)
    code, said = world.service.refused("run", "--allow", "only-bob.test", "true")
    assert (code, f"pjw: error: {words}\nhint: it offers good.test, " in said) == (1, True), said
    assert world.service.refused("run", "--allow", "a_b c", "true")[1].startswith(
        "pjw: error: 'a_b c' is no name"
    )
    assert world.service.made() == before
    request = GET.replace(b"good", b"only-bob").decode()
    spec = JobSpec([*python(CONNECT), "127.0.0.1", str(PROXY_PORT), request], allow=["only-bob.test"])
    with world.service.client("bob") as bob:
        assert b"200 OK" in bob.run(spec).output


def test_the_fields_are_told(world: World, client: Client) -> None:
    """Of a job, of one out of the queue, of an element; as JSON too."""
    shown = json.loads(world.service.ok("get", str(world.job.id)))
    assert (shown["allow"], shown["link"]) == (list(world.job.allow), "")
    assert list(world.job.allow) == world.allow
    queued = client.start(
        JobSpec("true", allow=["good.test"], link="x", queue=QueueSpec(array="1-16", held=True))
    )
    assert (queued.allow, queued.link) == (("good.test",), "x")
    client.release(queued.id)
    client.wait(queued.id)
    elements = [job for job in client.list() if job.array_id == queued.id]
    assert {(job.allow, job.link, job.succeeded) for job in elements} == {(("good.test",), "x", True)}


def test_connections_are_written_down(world: World) -> None:
    """In the log, in the audit log and in a counter, with job, client, host, port and result."""
    world.status(b"CONNECT other.test:443 HTTP/1.0\r\n\r\n")
    words = f"connection of job {world.job.id} of alice to other.test port 443: not_allowed"
    world.service.await_log(words)
    expected = {"client": "alice", "method": "Connection", "job_id": world.job.id, "host": "other.test"}
    log = world.directory / "audit.jsonl"

    def written() -> bool:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return any({**line, **expected, "port": 443, "result": "not_allowed"} == line for line in lines)

    wait_for(written)


def test_the_process_is_nobody(world: World) -> None:
    """No root, no capabilities, no new privileges, a filter; none of our files."""
    pid = world.egress()
    uids = {int(uid) for uid in status_of(pid, b"Uid")}
    assert len(uids) == 1
    assert uids.isdisjoint({0, int(status_of(world.service.pid, b"Uid")[0])})
    assert [int(word, 16) for name in (b"CapEff", b"CapPrm", b"CapBnd") for word in status_of(pid, name)] == [
        0
    ] * 3
    assert status_of(pid, b"NoNewPrivs") == [b"1"]
    assert status_of(pid, b"Seccomp") == [b"2"]
    links = [os.readlink(f"/proc/{pid}/fd/{each}") for each in os.listdir(f"/proc/{pid}/fd")]
    assert not any(link.startswith(str(world.service.state)) for link in links)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ("", 0, "ok       names on the network: 1, for which pjwd-egress connects as uid "),
        ('user = "no-such-user"', 1, "missing  no user is called 'no-such-user' on this host"),
        ('user = "root"', 1, "missing  pjwd-egress must not run as user id 0, which is root"),
    ],
)
def test_check_says_who_connects(tmp_path: Path, more: str, code: int, words: str) -> None:
    """Or what is missing for that; without an offer nothing."""
    file = tmp_path / "pjwd.toml"
    file.write_text(f'[network]\nhosts = ["pypi.org"]\n{more}\n')
    options = [f"--{name}={tmp_path}/{name}" for name in ("ca-crt", "server-crt", "server-key")]
    done = subprocess.run(
        [BIN / "pjwd", "check", "--config", file, f"--state-dir={tmp_path}", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert any(line.startswith(words) for line in done.stdout.splitlines()), done.stdout
    assert code <= done.returncode


# --- deaths


def test_the_proxy_is_killed(world: World) -> None:
    """The job lives, what connects meanwhile waits, and a later connection works, within two seconds."""
    with tunnels(world, 1):
        former = world.egress()
        os.kill(former, signal.SIGKILL)
        began = time.monotonic()
        assert world.status() == 200
        assert time.monotonic() - began < promised()
    assert world.egress() not in (0, former)
    with world.service.client() as client:
        assert not client.get(world.job.id).state.final


@pytest.mark.parametrize("what", ["launcher", "server", "both", "stop"])
def test_pjwd_is_killed_or_restarted(world: World, what: str) -> None:
    """The job keeps its names, its link and its hosts."""
    if what == "stop":
        world.service.stop()
    else:
        world.service.kill(what)
    world.service.start()
    began = time.monotonic()
    wait_for(world.answers)
    assert time.monotonic() - began < promised()
    with world.service.client() as client:
        tunnel = [*python(CONNECT), "good.test", str(world.echo_port), "hello"]
        assert client.run_in(world.job.id, JobSpec(tunnel)).output == b"hello\n"


def test_names_that_the_operator_takes_back(world: World, client: Client) -> None:
    """While a job has them: pjwd starts, and the job has its other names where it found them before."""
    ports = [f"{host}:{world.echo_port}" for host in ("both.test", "good.test")]
    job = client.start(JobSpec(IDLE, allow=[*ports, "good.test", "*.wild.test"])).id
    former = world.service.config
    assert former is not None

    def hears(host: str) -> bytes:
        return client.run_in(job, JobSpec([*python(CONNECT), host, str(world.echo_port), "hello"])).output

    wild = b"CONNECT x.wild.test:80 HTTP/1.0\r\n\r\n"
    assert hears("good.test") == hears("both.test") == b"hello\n"
    assert world.status(wild, job) == 200
    try:
        # one is nobody's any more, and one another client's
        less = former.replace(f', "{ports[0]}"', "").replace('"*.wild.test", ', "")
        world.service.config = less.replace('["only-bob.test"]', '["only-bob.test", "*.wild.test"]')
        assert world.service.stop() == 0
        world.service.start()
        wait_for(lambda: world.answers(job))
        assert hears("good.test") == b"hello\n"
        assert hears("both.test").startswith(b"ConnectionRefusedError")
        assert world.status(wild, job) == 403
        # all names of all jobs
        world.service.config = former.partition("[network]")[0]
        assert world.service.stop() == 0
        world.service.start()
        assert hears("good.test").startswith(b"ConnectionRefusedError")
    finally:
        world.service.config = former
        world.service.stop()
        world.service.start()
    wait_for(world.answers)
    client.stop(job)


def test_the_end_of_a_job_is_that_of_its_connections(world: World, client: Client) -> None:
    """The host sees it, and nothing of the job is left."""
    job = client.start(world.spec(IDLE))
    pieces = iter([f"CONNECT good.test:{world.echo_port} HTTP/1.0\r\n\r\n".encode(), b"early"])
    answers = client.connect(job.id, PROXY_PORT, _then_wait(pieces))
    # the proxy opens the pipes after its answer, and before the first bytes of the host
    came = b""
    while not came.endswith(b"early"):
        came += next(answers)
    assert came.startswith(b"HTTP/1.1 200 ")
    directory = f"/proc/{world.egress()}/fd"
    count = len(os.listdir(directory))
    client.stop(job.id, grace=0)
    # its listeners, two sockets, two pipes; those of jobs before it may go meanwhile, too
    wait_for(lambda: len(os.listdir(directory)) <= count - 8)
    with contextlib.suppress(errors.PjwError):
        list(answers)


@functools.cache
def promised() -> float:
    """Two seconds; where an interpreter alone takes long to start, some times as long as that."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-I", "-c", "import asyncio, h11, pjw.egress.proxy"], check=True)
    return max(2.0, 8 * (time.monotonic() - began))


def _then_wait(pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield from pieces
    threading.Event().wait(5)


# --- jobs that share a network


def test_a_database_beside_its_tests(world: World, client: Client) -> None:
    """Jobs of one client with the same link share a network, each with its own names; others see none."""
    ask = [*python(CONNECT), "127.0.0.1", "5432", "query"]
    listener = client.start(world.spec(python(LISTEN), link="tests"))
    assert next(iter(client.logs(listener.id))) == b"ready\n"
    assert say(client, JobSpec(ask, link="tests")) == "the database: query\n"
    for spec in (JobSpec(ask), JobSpec(ask, link="other")):
        assert "ConnectionRefusedError" in say(client, spec)
    with world.service.client("bob") as bob:
        assert b"ConnectionRefusedError" in bob.run(JobSpec(ask, link="tests")).output
    get = "import os, urllib.request as r; print(os.environ['http_proxy'], r.urlopen('http://good.test/hello').read())"
    said = say(client, world.spec(python(get), link="tests"))
    assert "127.0.0.1" not in said.split()[0]
    assert "hello from the internet" in said
    # who joined knows nothing of the first one's end
    second = client.start(JobSpec(IDLE, link="tests"))
    client.stop(listener.id, grace=0)
    listening = client.start(JobSpec(python(LISTEN), link="tests"))
    assert next(iter(client.logs(listening.id))) == b"ready\n"
    assert client.run_in(second.id, JobSpec(ask)).output == b"the database: query\n"
    world.service.kill("both")
    world.service.start()
    with world.service.client() as again:
        assert say(again, JobSpec(ask, link="tests")) == "the database: query\n"
        for job in (second, listening):
            again.stop(job.id, grace=0)


def test_a_linked_job_that_is_where_another_one_s_proxy_would_be(world: World, client: Client) -> None:
    """The second is refused, and told whose listener that is."""
    everywhere = LISTEN.replace("127.0.0.1", "").replace("5432", str(PROXY_PORT))
    first = client.start(JobSpec(python(everywhere), link="full"))
    assert next(iter(client.logs(first.id))) == b"ready\n"
    with pytest.raises(
        errors.JobStateError, match=r"listen at 127\.\S+: a job with the same link listens"
    ) as refused:
        client.start(world.spec("true", link="full"))
    assert refused.value.hint == "end that listener, or give this job another --link"
    assert client.run(JobSpec("true", link="full")).job.succeeded
    client.stop(first.id, grace=0)


def test_jobs_that_begin_at_once_share_one_network(make_service: Callable[..., Service]) -> None:
    """The first of them makes it, though nobody knows its init yet; without any offer of the operator's."""
    uid_first = uid_range()
    config = f"waiting_inits = 0\n[job_users]\nuid_first = {uid_first}\nuid_count = {UIDS}\n"
    service = make_service(config=config).start()
    found: list[bytes] = []

    def start() -> None:
        with service.client() as client:
            job = client.start(JobSpec("readlink /proc/self/ns/net; exec sleep 100", link="one"))
            found.append(next(iter(client.logs(job.id))))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found))) == (6, 1)
    with (
        service.client() as client,
        pytest.raises(errors.InvalidJobError, match=r"it offers no name|not offer"),
    ):
        client.start(JobSpec("true", allow=["good.test"]))
