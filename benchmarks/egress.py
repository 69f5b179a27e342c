"""Names on the network: the rate of bytes from a host into a job, and the cost of idle jobs with names.

The reference is the same program, which gets the same bytes from the same host over loopback alone. The
program times both in turns, from its first byte to its last.
"""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks import pjwd, processes
from benchmarks.report import Figure, Held, median
from pjw import Client, JobSpec
from tests.support.service import Service

SUITE: Final = "egress"
MIB: Final = 1024**2
RATE_GOAL: Final = 0.5
MEMORY_BOUND: Final = 20 * MIB
# the address of the host, which the operator lists by this range; its name is the address itself
HOST: Final = "127.1.77.1"
# connects to the host, through the proxy if there is one, and prints the bytes a second
READER: Final = f"""
import os, socket, time
proxy, port, size = os.environ.get("http_proxy"), int(os.environ["HOST_PORT"]), int(os.environ["HOST_BYTES"])
if proxy:
    there, _, number = proxy.removeprefix("http://").partition(":")
    connection = socket.create_connection((there, int(number)))
    connection.sendall(b"CONNECT {HOST}:%d HTTP/1.0\\r\\n\\r\\n" % port)
    assert connection.recv(39) == b"HTTP/1.1 200 Connection established\\r\\n\\r\\n"
else:
    connection = socket.create_connection(("{HOST}", port))
buffer = bytearray(1 << 18)
came, began = connection.recv_into(buffer), time.perf_counter()
while came < size:
    got = connection.recv_into(buffer)
    assert got, came
    came += got
print(size / (time.perf_counter() - began))
"""
PYTHON: Final = ("/usr/bin/python3", "-I", "-S", "-c", READER)


def run(*, quick: bool) -> list[Figure]:
    """Measure both rows, on a separate service."""
    size, rounds, many = (256 * MIB, 3, 200) if quick else (1024 * MIB, 7, 1000)
    with _host(size) as port:
        more = f'[network]\nhosts = ["{HOST}:{port}"]\nprivate = ["{HOST}/32"]\n'
        with pjwd.running(more=more) as service, service.client() as client:
            return [_rate(client, port, size, rounds), _memory(service, client, port, many)]


def _rate(client: Client, port: int, size: int, rounds: int) -> Figure:
    environment = {"HOST_PORT": str(port), "HOST_BYTES": str(size)}
    spec = JobSpec(
        PYTHON,
        allow=[f"{HOST}:{port}"],
        env=environment,
        limits={"cpu_max_millicores": 1000 * (os.cpu_count() or 1)},
    )
    by_proxy, alone = [], []
    for _ in range(rounds):
        done = client.run(spec)
        if not done.job.succeeded:
            raise RuntimeError(f"the job that reads from the host failed: {done.output.decode()}")
        by_proxy.append(float(done.output))
        alone.append(float(subprocess.check_output(PYTHON, env=environment)))
    return Figure(
        SUITE,
        "bytes a second from a host into a job",
        median(by_proxy) / MIB,
        "MiB/s",
        "loopback alone",
        median(alone) / MIB,
        RATE_GOAL,
        more_is_better=True,
        # three programs in a row need free processors, which a busy machine lacks
        held=Held.NEVER,
    )


def _memory(service: Service, client: Client, port: int, many: int) -> Figure:
    pid = _egress_pid(service)
    spec = JobSpec(["sleep", "3600"], allow=[f"{HOST}:{port}"])
    client.start(spec)
    time.sleep(1)
    before = processes.pss_bytes(pid)
    for _ in range(many):
        client.start(spec)
    time.sleep(1)
    grown = max(0, processes.pss_bytes(pid) - before)
    bound = MEMORY_BOUND * many / 1000
    name = f"memory of pjwd-egress for {many:,} idle jobs"
    return Figure(SUITE, name, grown / MIB, "MiB", "bound", bound / MIB, 1.0, held=Held.NEVER)


def _egress_pid(service: Service) -> int:
    launcher = service.launcher_pid()
    children = map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())
    return next(pid for pid in children if Path(f"/proc/{pid}/comm").read_text() == "pjwd-egress\n")


@contextmanager
def _host(size: int) -> Iterator[int]:
    """Give a host that sends bytes to each client; its port."""
    data = memoryview(bytes(1 << 20))

    def serve(connection: socket.socket) -> None:
        with connection:
            left = size
            while left:
                left -= connection.send(data[: min(left, len(data))])

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server((HOST, 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
