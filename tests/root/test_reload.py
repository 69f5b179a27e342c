"""SIGHUP on a real pjwd: new certificates for who comes, revoked clients out at once, nobody else harmed."""

import json
import os
import select
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from cryptography import x509

from pjw.certs import authority
from pjw.v1 import job_worker_pb2 as pb
from pjw.worker.settings import WAITING_INITS
from tests.support import certs_factory
from tests.support.certs_factory import CN, Made, issue
from tests.support.service import Service, reloaded, wait_for, waiting_inits

REVOKED: Final = "the client certificate has been revoked"
FILES: Final = ("ca.crt", "server.crt", "server.key")
TICKS: Final = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done"


class Reloading:
    """A service, its files, and what its log says of reloads."""

    def __init__(self, service: Service) -> None:
        self.service: Final = service
        self.revoked: Final = service.directory / "revoked"
        self.ca: Final = authority_of(service.certs)
        self._first: Final = {name: (service.certs / name).read_bytes() for name in FILES}

    def reload(self, words: str = "revo") -> list[str]:
        """Send SIGHUP; what the log says of certificates and the list, once it has said *words* of that."""
        start = self.service.log.stat().st_size
        os.kill(self.service.pid, signal.SIGHUP)
        wait_for(lambda: words in self.said(start) and self.said(start).endswith("\n"))
        # test_operator.py is about the configuration
        return [line for line in self.said(start).splitlines() if "configuration is the same" not in line]

    def said(self, start: int = 0) -> str:
        """What the log has from an offset on."""
        return self.service.log.read_bytes()[start:].decode()

    def revoke(self, *names: str) -> list[str]:
        """Make the list anew, as the documentation has it, and reload."""
        self.write_list(*names)
        # not what an earlier reload says that was still under way
        return self.reload(f"{len(names)} certificates are revoked")

    def write_list(self, *names: str) -> None:
        """Make the list anew."""
        lines = b"".join(serial_line(self.service.certs / f"{name}.crt") for name in names)
        self.replace(self.revoked, b"# who is not let in any more\n" + lines)

    def replace(self, path: Path, data: bytes) -> None:
        """Put a new file in the place of an old one, of the same mode, at once."""
        new = path.with_name("new")
        new.touch(mode=0o600)
        new.write_bytes(data)
        new.rename(path)

    def install(self, made: Made, ca: Made | None = None) -> None:
        """Put a server's certificate, its key and perhaps its CA in the place of what is there."""
        certs = self.service.certs
        if ca is not None:
            self.replace(certs / "ca.crt", ca.crt_pem)
        self.replace(certs / "server.crt", made.crt_pem)
        self.replace(certs / "server.key", made.key_pem)

    def restore(self) -> None:
        """Put the first certificates and key back, whatever is there."""
        certs = self.service.certs
        certs.chmod(0o700)
        for name, data in self._first.items():
            if (certs / name).is_dir():
                (certs / name).rmdir()
            self.replace(certs / name, data)

    def shown(self) -> int:
        """The serial number of the certificate that the server shows to a new connection."""
        return shown(self.service)


def authority_of(certs: Path) -> Made:
    """The CA of a service."""
    return certs_factory.load((certs / "ca.crt").read_bytes(), (certs / "ca.key").read_bytes())


def serial_line(crt: Path) -> bytes:
    """The one command that gives a line of the list."""
    return subprocess.run(
        ["openssl", "x509", "-in", str(crt), "-noout", "-serial"], check=True, capture_output=True
    ).stdout


def shown(service: Service, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> int:
    """The serial number of the server's certificate, by a handshake with alice's good one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(service.certs / "alice.crt", service.certs / "alice.key")
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    host, port = service.address.split(":")
    with (
        socket.create_connection((host, int(port)), 30) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        der = tls.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


@pytest.fixture
def reloading(make_service: Callable[..., Service]) -> Iterator[Reloading]:
    """A service with an empty revocation list; in the end everybody is let in again."""
    service = make_service()
    (service.directory / "revoked").touch()
    service.config = f'revoked = "{service.directory}/revoked"\n'
    reloading = Reloading(service.start())
    yield reloading
    reloading.restore()
    reloading.revoke()


def outcome(call: Callable[[], object]) -> tuple[grpc.StatusCode, str] | None:
    """How a call was refused; None when it was not."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return None


def numbers(stream: Any, count: int) -> list[int]:
    """The next numbers, and perhaps more, that a job of TICKS has written: it writes whole lines."""
    seen: list[int] = []
    while len(seen) < count:
        seen += map(int, next(stream).data.split())
    return seen


@contextmanager
def calling(call: Callable[[], object]) -> Iterator[Callable[[], int]]:
    """Two threads that call again and again, and how many calls were made; one that fails fails the test."""
    ended = threading.Event()
    made = [0, 0]

    def loop(place: int) -> None:
        while not ended.is_set():
            call()
            made[place] += 1

    def least() -> int:
        for each in loops:
            if each.done():
                each.result()
        return min(made)

    with ThreadPoolExecutor(2) as pool:
        loops = [pool.submit(loop, place) for place in range(2)]
        try:
            wait_for(least)
            yield least
        finally:
            ended.set()
        for each in loops:
            each.result()


# --- certificates


def test_certificates_rotate_under_a_stream_and_new_clients(reloading: Reloading) -> None:
    """While clients connect in a loop the certificate changes five times: no call fails, none is cut."""
    service, ca = reloading.service, reloading.ca
    job_id = service.start_job(TICKS)

    def connect() -> None:
        with service.stub("bob") as stub:
            stub.List(pb.ListRequest(), timeout=60)

    with service.stub() as stub, service.stub() as idle:
        idle.List(pb.ListRequest())
        stream = stub.Logs(pb.LogsRequest(id=job_id), timeout=300)
        seen = numbers(stream, 1)
        with calling(connect) as made:
            for _ in range(5):
                server = certs_factory.server(ca)
                reloading.install(server)
                said = reloading.reload()
                assert said[0] == "pjwd: INFO: reload: the certificates are new"
                goal = made() + 2
                wait_for(lambda goal=goal: made() >= goal)  # type: ignore[misc]
                assert reloading.shown() == server.certificate.serial_number
                seen += numbers(stream, 5)
        assert outcome(lambda: idle.List(pb.ListRequest(), timeout=60)) is None
        stub.Stop(pb.StopRequest(id=job_id))
        for message in stream:
            seen += [int(line) for line in message.data.split()]
    assert seen == list(range(1, len(seen) + 1))
    assert service.ok("logs", str(job_id)).split() == [str(number) for number in seen]


def test_tls_1_2_is_refused_after_a_reload(reloading: Reloading) -> None:
    """The setting that leaves 1.2 no suite holds for what is loaded later, too."""
    reloading.install(certs_factory.server(reloading.ca))
    reloading.reload()
    assert reloading.shown() != 0
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        shown(reloading.service, ssl.TLSVersion.TLSv1_2)


def test_a_key_of_another_kind_is_taken(reloading: Reloading) -> None:
    """From ECDSA to RSA and back, and a file that holds a certificate and its key."""
    for key in (certs_factory.rsa_key(2048), None):
        server = certs_factory.server(reloading.ca, key=key)
        reloading.install(server)
        assert "the certificates are new" in reloading.reload()[0]
        assert reloading.shown() == server.certificate.serial_number
        assert reloading.service.ok("list") == ""


def test_a_new_authority_keeps_what_runs_and_lets_its_own_in(reloading: Reloading, tmp_path: Path) -> None:
    """Streams and connections of the old one go on; new handshakes are for the new one's clients alone."""
    service = reloading.service
    job_id = service.start_job(TICKS)
    with service.stub() as stub:
        stream = stub.Logs(pb.LogsRequest(id=job_id), timeout=300)
        seen = numbers(stream, 1)
        new = certs_factory.make_ca("new")
        reloading.install(certs_factory.server(new), new)
        assert "the certificates are new" in reloading.reload()[0]
        seen += numbers(stream, 20)
        assert seen == list(range(1, len(seen) + 1))
        assert outcome(lambda: stub.Get(pb.GetRequest(id=job_id), timeout=60)) is None
        refused = outcome(lambda: service.job(job_id))
        assert refused is not None
        assert refused[0] is grpc.StatusCode.UNAVAILABLE
        alice = issue(new, [(CN, "alice")]).write(tmp_path, "alice")
        with service.stub(alice) as later:
            assert later.Get(pb.GetRequest(id=job_id), timeout=60).job.id == job_id
        # what is cut off at once is cut off by the list
        assert "running calls ended: 1" in reloading.revoke("alice")[1]
        assert outcome(lambda: list(stream)) == (grpc.StatusCode.UNAUTHENTICATED, REVOKED)
    reloading.restore()
    assert "the certificates are new" in reloading.revoke()[0]
    assert service.ok("list") == f"{job_id}\n"


def test_a_session_of_an_authority_that_was_taken_away_is_not_resumed(reloading: Reloading) -> None:
    """A ticket from before the reload brings nobody past the new CA, where no certificate is shown."""
    service = reloading.service
    session = service.directory / "session"
    command = ["openssl", "s_client", "-connect", service.address, "-alpn", "h2", "-servername", "localhost"]
    command += ["-cert", str(service.certs / "alice.crt"), "-key", str(service.certs / "alice.key")]

    def connect(*options: str) -> bytes:
        # the ticket comes behind the handshake, with the first bytes of HTTP/2
        with subprocess.Popen(
            [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            seen = b""
            while b"Max Early Data" not in seen and (data := os.read(process.stdout.fileno(), 65_536)):
                seen += data
            process.stdin.close()
            return seen

    connect("-sess_out", str(session))
    assert b"\nReused, TLSv1.3" in connect("-sess_in", str(session))
    new = certs_factory.make_ca("new")
    reloading.install(certs_factory.server(new), new)
    reloading.reload()
    assert b"\nReused, TLSv1.3" not in connect("-sess_in", str(session))


def _broken(reloading: Reloading, kind: str) -> None:
    certs, ca = reloading.service.certs, reloading.ca
    server = certs_factory.server(ca)
    match kind:
        case "key of another":
            reloading.replace(certs / "server.crt", server.crt_pem)
        case "expired":
            made = issue(ca, eku=certs_factory.SERVER, end=-certs_factory.DAY / 2, sans=["localhost"])
            reloading.install(made)
        case "other authority":
            reloading.install(certs_factory.server(certs_factory.make_ca("other")))
        case "client's":
            reloading.install(issue(ca))
        case "cut short":
            reloading.install(server)
            reloading.replace(certs / "server.key", server.key_pem[:100])
        case "empty":
            reloading.replace(certs / "server.crt", b"")
        case "missing":
            (certs / "server.key").unlink()
        case "directory":
            (certs / "ca.crt").unlink()
            (certs / "ca.crt").mkdir()
        case "fifo":
            (certs / "server.crt").unlink()
            os.mkfifo(certs / "server.crt")
        case "too long":
            reloading.replace(certs / "server.crt", server.crt_pem + b"\n" * 2**20)
        case "writable directory":
            reloading.install(server)
            certs.chmod(0o777)


BROKEN: Final = {
    "key of another": "server.key: it does not belong to the certificate ",
    "expired": "server.crt: it expired on ",
    "other authority": "server.crt: it was not issued by the CA in ",
    "client's": "server.crt: it is not for serverAuth",
    "cut short": "server.key: it is cut short: its PRIVATE KEY has no end",
    "empty": "server.crt: it has no PEM certificate in it",
    "missing": "server.key: no such file or directory (ENOENT)",
    "directory": "ca.crt: it is not a regular file",
    "fifo": "server.crt: it is not a regular file",
    "too long": "server.crt: it is longer than 1048576 bytes",
    "writable directory": " again: others than root may change what is in ",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_keep_the_old_ones(reloading: Reloading, kind: str) -> None:
    """Nothing of a set with a fault is taken; the log says which, and a revocation works all the same."""
    service, before = reloading.service, reloading.shown()
    with service.stub("bob") as bob:
        bob.List(pb.ListRequest())
        _broken(reloading, kind)
        said = reloading.revoke("bob")
        assert said[0].startswith("pjwd: ERROR: reload: kept the old certificates: cannot ")
        assert BROKEN[kind] in said[0]
        assert said[-1] == "pjwd: INFO: reload: 1 certificates are revoked; running calls ended: 0"
        assert reloading.shown() == before
        refused = (grpc.StatusCode.UNAUTHENTICATED, REVOKED)
        assert outcome(lambda: bob.List(pb.ListRequest(), timeout=60)) == refused
    reloading.restore()
    assert "the certificates are the same as before" in reloading.revoke()[0]
    assert service.ok("list") == ""


# --- revocation


def test_a_revoked_client_is_out_at_once_and_in_again(reloading: Reloading) -> None:
    """Its streams and calls end, its open connection is of no use; others notice nothing."""
    service = reloading.service
    mine, other = service.start_job(TICKS), service.start_job(TICKS, "bob")
    refused = (grpc.StatusCode.UNAUTHENTICATED, REVOKED)
    with service.stub() as alice, service.stub("bob") as bob, ThreadPoolExecutor() as pool:
        streams = [alice.Logs(pb.LogsRequest(id=mine), timeout=300) for _ in range(3)]
        silent = alice.Start(pb.StartRequest(command="sleep 600")).job.id
        waiting = alice.Logs(pb.LogsRequest(id=silent), timeout=300)
        waiting.initial_metadata()
        its = bob.Logs(pb.LogsRequest(id=other), timeout=300)
        for stream in streams:
            numbers(stream, 1)
        seen = numbers(its, 1)
        assert reloading.revoke("alice")[1] == (
            "pjwd: INFO: reload: 1 certificates are revoked; running calls ended: 4"
        )
        for stream in (*streams, waiting):
            assert pool.submit(outcome, partial(list, stream)).result(60) == refused
        for call in (
            partial(alice.List, pb.ListRequest()),
            partial(alice.Stop, pb.StopRequest(id=mine)),
            partial(alice.Start, pb.StartRequest(command="true")),
        ):
            assert outcome(partial(call, timeout=60)) == refused
        assert outcome(lambda: list(alice.Logs(pb.LogsRequest(id=mine), timeout=60))) == refused
        assert outcome(lambda: service.job(mine)) == refused
        seen += numbers(its, 20)
        assert seen == list(range(1, len(seen) + 1))
        assert outcome(lambda: bob.Get(pb.GetRequest(id=other), timeout=60)) is None
        reloading.revoke("bob")
        assert alice.Get(pb.GetRequest(id=mine), timeout=60).job.id == mine
        numbers(alice.Logs(pb.LogsRequest(id=mine), timeout=60), 1)
        assert outcome(lambda: list(its)) == refused


def test_a_stop_that_waits_is_ended_and_its_job_all_the_same(reloading: Reloading) -> None:
    """A unary call is cut off like a stream; what it began is done."""
    service = reloading.service
    job_id = service.start_job("trap '' TERM; echo ready; while :; do sleep 0.1; done")
    with service.stub() as stub, ThreadPoolExecutor() as pool:
        numbers_seen = next(stub.Logs(pb.LogsRequest(id=job_id), timeout=60)).data
        assert numbers_seen == b"ready\n"
        request = pb.StopRequest(id=job_id)
        request.grace.seconds = 5
        reloading.write_list("alice")
        stop = pool.submit(outcome, lambda: stub.Stop(request, timeout=60))
        wait_for(lambda: stub.Get(pb.GetRequest(id=job_id)).job.state == pb.JOB_STATE_STOPPING)
        reloading.reload()
        assert stop.result(60) == (grpc.StatusCode.UNAUTHENTICATED, REVOKED)
    reloading.revoke()
    wait_for(lambda: service.job(job_id).HasField("end"))


def test_pjw_logs_ends_with_an_error_and_does_not_come_back(reloading: Reloading) -> None:
    """A user whose certificate is revoked in mid-stream is told so, with what came before on stdout."""
    service = reloading.service
    job_id = service.start_job("echo hello; sleep 600")
    with service.popen("logs", str(job_id)) as pjw:
        assert pjw.stdout is not None
        assert pjw.stdout.readline() == b"hello\n"
        reloading.revoke("alice")
        out, words = pjw.communicate(timeout=60)
    assert (pjw.returncode, out, words.decode()) == (1, b"", f"pjw: error: {REVOKED}\n")
    assert service.refused("list") == (1, f"pjw: error: {REVOKED}\n")


def test_a_list_that_cannot_be_read_keeps_the_old_one(reloading: Reloading) -> None:
    """A bad line, no file: who was out stays out, and the log names file and line."""
    service, path = reloading.service, reloading.revoked
    reloading.revoke("bob")
    stays = "pjwd: ERROR: reload: kept the old revocation list: cannot "
    for data, words in (
        (b"01\njohn\n", f"read revocation list {path}: line 2: 'john' is neither"),
        (None, f"open {path}: no such file or directory (ENOENT)"),
    ):
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        said = reloading.reload()
        assert said[1].startswith(stays + words)
        assert service.refused("list", client="bob") == (1, f"pjw: error: {REVOKED}\n")
        assert service.ok("list") == ""
        path.touch()


def test_the_list_holds_from_the_start(make_service: Callable[..., Service]) -> None:
    """It is read before anything listens; without the file, or with a bad line, nothing does."""
    service = make_service()
    path = service.directory / "revoked"
    service.config = f'revoked = "{path}"\n'
    for data, words in ((None, f"{path}: no such file"), (b"\nx\n", f"{path}: line 2: 'x' is neither")):
        if data is not None:
            path.write_bytes(data)
        done = subprocess.run(service.command(), capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (1, b"")
        assert f"pjwd: error: cannot read revocation list {words}" in done.stderr.decode()
    path.write_bytes(serial_line(service.certs / "bob.crt"))
    service.start()
    assert service.refused("list", client="bob") == (1, f"pjw: error: {REVOKED}\n")
    assert service.ok("list") == ""
    path.write_bytes(b"")
    Reloading(service).reload()


def test_what_no_reload_could_read_is_told(make_service: Callable[..., Service]) -> None:
    """U6: such a list is refused, as nobody could be revoked by it; other files are warned of."""
    service = make_service()
    others = service.directory / "others"
    others.mkdir(0o777)
    others.chmod(0o777)
    (others / "revoked").touch()
    (others / "server.key").write_bytes((service.certs / "server.key").read_bytes())
    service.config = f'revoked = "{others}/revoked"\n'
    done = subprocess.run(service.command(), capture_output=True, timeout=60, check=False)
    words = (
        f"no reload could read the revocation list: cannot open {others}/revoked again: others than root may"
    )
    assert (done.returncode, words in done.stderr.decode()) == (1, True)
    command = service.command()
    command[1] = "check"
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, f"missing  {words}" in done.stdout.decode()) == (1, True)
    service.config = f'server_key = "{others}/server.key"\n'
    place = service.command().index("--server-key")
    command = service.command()
    command[1] = "check"
    del command[place : place + 2]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    warned = f"warning  a restart can open {others}/server.key, but no reload can: cannot open "
    assert (done.returncode, warned in done.stdout.decode()) == (0, True), done.stdout


def test_a_byte_order_mark_is_no_obstacle(reloading: Reloading) -> None:
    """B5: gRPC gets what was checked, so "the certificates are new" is true."""
    before = reloading.shown()
    (reloading.service.certs / "server.crt").unlink()
    (reloading.service.certs / "server.key").unlink()
    authority.write_server(str(reloading.service.certs), ["localhost"])
    for name in ("ca.crt", "server.crt", "server.key"):
        path = reloading.service.certs / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert reloading.reload()[0] == "pjwd: INFO: reload: the certificates are new"
    assert reloading.shown() != before
    # and so does a start
    reloading.service.stop()
    reloading.service.start()
    assert reloading.service.ok("list") == ""


# --- the signal


def test_without_a_list_nothing_is_said_of_one(make_service: Callable[..., Service]) -> None:
    """A service with no list configured reloads its certificates alone."""
    service = make_service().start()
    os.kill(service.pid, signal.SIGHUP)
    service.await_log("the certificates are the same as before\n")
    assert "revo" not in service.log.read_text()


def test_a_storm_of_signals(reloading: Reloading) -> None:
    """A thousand SIGHUPs beside calls: none fails, the last state of the files holds, nothing is kept."""
    service = reloading.service
    reloading.reload()
    before = service.descriptors(), len(os.listdir(f"/proc/{service.launcher_pid()}/fd"))
    server = certs_factory.server(reloading.ca)

    def call() -> None:
        assert service.ok("list") == ""

    with calling(call):
        for number in range(1000):
            os.kill(service.pid, signal.SIGHUP)
            if number == 500:
                reloading.install(server)
        reloading.revoke("bob")
        wait_for(lambda: reloading.shown() == server.certificate.serial_number)
    assert service.refused("list", client="bob") == (1, f"pjw: error: {REVOKED}\n")
    reloading.revoke()
    wait_for(lambda: before >= (service.descriptors(), len(os.listdir(f"/proc/{service.launcher_pid()}/fd"))))


def test_a_stopped_launcher_holds_nobody_up(reloading: Reloading) -> None:
    """With the launcher stopped a reload waits, and calls do not; when it goes on, so does the reload."""
    service, launcher = reloading.service, reloading.service.launcher_pid()
    job_id = service.start_job(TICKS)
    server = certs_factory.server(reloading.ca)
    with service.stub() as stub:
        stream = stub.Logs(pb.LogsRequest(id=job_id), timeout=300)
        seen = numbers(stream, 1)
        os.kill(launcher, signal.SIGSTOP)
        try:
            reloading.install(server)
            start = service.log.stat().st_size
            os.kill(service.pid, signal.SIGHUP)
            for _ in range(10):
                started = time.monotonic()
                stub.List(pb.ListRequest(), timeout=60)
                assert time.monotonic() - started < 10
                seen += numbers(stream, 1)
            assert reloading.said(start) == ""
            assert reloading.shown() != server.certificate.serial_number
        finally:
            os.kill(launcher, signal.SIGCONT)
        wait_for(lambda: "revoked;" in reloading.said(start))
        assert reloading.shown() == server.certificate.serial_number
        assert seen == list(range(1, len(seen) + 1))


def test_a_terminal_that_hangs_up_ends_nothing(make_service: Callable[..., Service]) -> None:
    """Its SIGHUP comes to server and launcher: one reloads, the other goes on, and jobs do not notice."""
    service = make_service()
    ours, theirs = os.openpty()
    with ExitStack() as stack:
        stack.callback(os.close, ours)
        log = stack.enter_context(service.log.open("ab"))
        # setsid makes the terminal that of pjwd, which keeps its pid
        service.process = subprocess.Popen(
            ["setsid", "--ctty", *service.command()],
            stdin=theirs,
            stdout=log,
            stderr=log,
        )
        os.close(theirs)
        service.await_log("pjwd: ready on ")
        service.address = service.log.read_text().split("pjwd: ready on ")[1].strip()
        launcher = service.launcher_pid()
        assert os.getpgid(launcher) == os.getsid(service.pid) == service.pid
        job_id = service.start_job(TICKS)
    again = "the certificates are the same as before\n"
    wait_for(lambda: again in service.log.read_text())
    # the kernel's way when a shell is in front: the whole group in the foreground, the launcher too
    os.killpg(os.getpgid(launcher), signal.SIGHUP)
    wait_for(lambda: service.log.read_text().count(again) == 2)
    assert service.launcher_pid() == launcher
    pidfd = os.pidfd_open(launcher)
    try:
        assert not select.select([pidfd], [], [], 0)[0]
    finally:
        os.close(pidfd)
    with service.stub() as stub:
        numbers(stub.Logs(pb.LogsRequest(id=job_id), timeout=60), 3)
    assert service.start_job("true") == job_id + 1


def test_a_job_cannot_read_a_key_that_was_replaced(reloading: Reloading) -> None:
    """Neither one that ran before nor one that comes after: the mode of the new key is the old one's."""
    service, key = reloading.service, reloading.service.certs / "server.key"
    job_id = service.start_job(f"until [ -e go ]; do sleep 0.05; done; cat {key}; echo $?")
    reloading.install(certs_factory.server(reloading.ca))
    reloading.reload()
    (service.state / "scratch" / str(job_id) / "go").touch()
    later = service.start_job(f"cat {key}; echo $?")
    for each in (job_id, later):
        text = service.ok("logs", str(each))
        assert "PRIVATE KEY" not in text
        assert text.endswith("\n1\n")


def test_what_pjwd_certs_makes_later_is_taken(reloading: Reloading) -> None:
    """The command of the documentation, and a reload."""
    certs = reloading.service.certs
    for name in ("server.crt", "server.key"):
        (certs / name).unlink()
    authority.write_server(str(certs), ["localhost", "127.0.0.1"])
    assert "the certificates are new" in reloading.reload()[0]
    assert reloading.service.ok("list") == ""


def test_a_new_grace_period_holds_for_a_shutdown(make_service: Callable[..., Service]) -> None:
    """Of a job that starts after the reload, also with an init that has waited since before it."""
    service = make_service(config="stop_grace_seconds = 600\n").start()
    service.ok("wait", service.ok("start", "true").strip())
    wait_for(lambda: len(waiting_inits(service.state)) == WAITING_INITS)
    assert any("stop_grace_seconds" in line for line in reloaded(service, "stop_grace_seconds = 1\n"))
    job_id = service.start_job("trap '' TERM; echo up; while :; do sleep 0.05; done")
    with service.popen("logs", str(job_id)) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"up\n"
        # as systemd does when the host goes down
        os.kill(service.init_pid(job_id), signal.SIGTERM)
        assert reader.wait(30) == 0
    assert json.loads(service.ok("get", str(job_id)))["reason"] == "stopped"
