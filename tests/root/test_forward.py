"""Connections to ports within jobs: by the library, the clients and `pjw forward`."""

import asyncio
import hashlib
import os
import re
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import pytest

import pjw
from pjw import errors
from pjw.worker import Worker
from tests.root.test_cli_exec import client_of, settings_of
from tests.support.service import Service
from tests.support.worker_harness import Bench, python, start_said

MIB = 1024 * 1024
# answers each connection with the digest of what came, and as much again
SERVER = """
import hashlib, socket, sys, threading
family, host = (socket.AF_INET6, "::1") if len(sys.argv) > 1 else (socket.AF_INET, "127.0.0.1")
listener = socket.socket(family)
listener.bind((host, 8080))
listener.listen(100)
print("ready", flush=True)
def serve(connection):
    digest, size = hashlib.sha256(), 0
    while data := connection.recv(65536):
        digest.update(data)
        size += len(data)
    connection.sendall(digest.hexdigest().encode() + b"x" * size)
    connection.close()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""


def digest(data: bytes) -> bytes:
    """What the server answers."""
    return hashlib.sha256(data).hexdigest().encode() + b"x" * len(data)


@pytest.fixture
def job(service: Service) -> Iterator[str]:
    """A job that listens."""
    found = service.ok("start", *python(SERVER)).strip()
    with service.popen("logs", found) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"ready\n"
        logs.terminate()
    yield found
    service.ok("stop", "--grace", "0", found)


no_ipv6 = pytest.mark.skipif(
    not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 in user mode Linux; the host of CI runs this"
)


@pytest.mark.parametrize("address", [[], pytest.param(["6"], marks=no_ipv6)], ids=["127.0.0.1", "::1"])
async def test_a_connection(bench: Bench, worker: Worker, address: list[str]) -> None:
    """To the job's own loopback interface, to the byte; nothing of it stays."""
    job = await start_said(worker, [*python(SERVER), *address], b"ready\n")
    loop = asyncio.get_running_loop()
    data = os.urandom(3 * MIB)
    with await worker.connect(job.id, 8080) as connection:
        sending = asyncio.ensure_future(loop.sock_sendall(connection, data))
        await sending
        connection.shutdown(socket.SHUT_WR)
        got = b""
        while piece := await loop.sock_recv(connection, MIB):
            got += piece
    assert got == digest(data)
    # init, the command; who connected has gone
    assert len((bench.cgroups(job.id)[0] / "cgroup.procs").read_text().split()) == 2


async def test_what_cannot_be_connected_to(worker: Worker) -> None:
    """A port where nobody listens, no port, another's job, an ended one."""
    job = await start_said(worker, "echo ready; sleep 600", b"ready\n", "alice")
    with pytest.raises(errors.JobStateError, match=f"port 81 of job {job.id}: connection refused"):
        await worker.connect(job.id, 81, "alice")
    for port in (0, 65_536, -1):
        with pytest.raises(errors.InvalidJobError):
            await worker.connect(job.id, port, "alice")
    with pytest.raises(errors.JobNotFoundError):
        await worker.connect(job.id, 81, "bob")
    await worker.stop(job.id, 0)
    with pytest.raises(errors.JobStateError, match="it is exited"):
        await worker.connect(job.id, 81, "alice")


def test_by_the_client(service: Service, job: str) -> None:
    """Whole, in both directions; and what is refused."""
    data = os.urandom(3 * MIB)
    with client_of(service) as client:
        pieces = [data[at : at + 100_000] for at in range(0, len(data), 100_000)]
        assert b"".join(client.connect(job, 8080, pieces)) == digest(data)
        with pytest.raises(errors.JobStateError, match="connection refused"):
            list(client.connect(job, 9))
        with pytest.raises(errors.InvalidJobError):
            list(client.connect(job, 0))
    with client_of(service, "bob") as other, pytest.raises(errors.JobNotFoundError):
        list(other.connect(job, 8080))


async def test_by_the_asynchronous_client(service: Service, job: str) -> None:
    """The same, awaited."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"words"

    async with (
        pjw.AsyncClient(*settings_of(service)) as client,
        aclosing(client.connect(job, 8080, pieces())) as answers,
    ):
        assert b"".join([data async for data in answers]) == digest(b"words")


def test_a_port_of_this_machine(service: Service, job: str) -> None:
    """Each who connects has a connection of their own; it ends with the job."""
    with service.popen("forward", job, "0:8080") as running:
        assert running.stdout is not None
        match = re.fullmatch(
            rb"127\.0\.0\.1:(\d+) leads to port 8080 of job %s\n" % job.encode(), running.stdout.readline()
        )
        assert match
        port, answers = int(match[1]), {}

        def ask(number: int) -> None:
            data = os.urandom(number * 100_000)
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                got = b"".join(iter(lambda: connection.recv(MIB), b""))
            answers[number] = got == digest(data)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == dict.fromkeys(range(8), True)
        service.ok("stop", "--grace", "0", job)
        assert running.communicate(timeout=60)[1] == f"pjw: job {job} has ended\n".encode()
        assert running.returncode == 0


def test_a_forward_that_nobody_answers(service: Service, job: str) -> None:
    """Is told, and the others go on; Ctrl-C ends it."""
    with service.popen("forward", job, "0:9") as running:
        assert running.stdout is not None
        port = int(running.stdout.readline().split(b":")[1].split()[0])
        with socket.create_connection(("127.0.0.1", port)) as connection, pytest.raises(ConnectionResetError):
            connection.recv(1)
        running.send_signal(signal.SIGINT)
        words = running.communicate(timeout=60)[1]
        assert (
            f"pjw: cannot connect to port 9 of job {job}: connection refused (ECONNREFUSED)\n".encode()
            in words
        )
        assert running.returncode == 130
    assert service.refused("forward", job, "x")[0] == 2
