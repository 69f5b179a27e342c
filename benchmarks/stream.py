"""Measure the rate of output: finished, against gRPC alone and openssl; and live."""

import shutil
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks import followers, grpc_source, pjwd
from benchmarks.followers import Followers, Streamed
from benchmarks.processes import cpu_seconds
from benchmarks.report import Figure, Held, median
from tests.support.service import Service, wait_for

MB: Final = 10**6
GB: Final = 10**9
MIB: Final = 1024**2
COUNTS: Final = (1, 8, 50)
# the job, copies of its output, and room to spare
DISK: Final = 4
GRPCIO: Final = "grpcio from memory"
GRPCIO_GOAL: Final = 0.85
FINISHED: Final = "finished output"
LIVE_GOAL: Final = 0.70


def run(*, quick: bool) -> list[Figure]:
    """Measure all rows of the suite; in each round each contestant has one turn."""
    size, rounds = (256 * MIB, 3) if quick else (1024 * MIB, 5)
    # many followers get the last part of the output only
    shares = dict(zip(COUNTS, (size, size // 8, size // 32), strict=True))
    free = shutil.disk_usage(pjwd.DIRECTORY).free
    if free < DISK * size:
        raise RuntimeError(
            f"{pjwd.DIRECTORY} has {free // MIB} MiB free, and this needs {DISK * size // MIB}"
        )
    with ExitStack() as stack:
        service = stack.enter_context(pjwd.running())
        source, source_pid = stack.enter_context(grpc_source.running(service.certs, size))
        contestants: dict[tuple[str, int], Followers] = {}
        for count in COUNTS:
            for name, address, pid in (
                ("pjw", service.address, service.pid),
                ("grpcio", source, source_pid),
            ):
                running = followers.running(address, pid, service.certs, count)
                contestants[name, count] = stack.enter_context(running)
        job_id = pjwd.finished_job(service, f"head -c {size} /dev/zero", size)
        found = _Found()
        for turn in range(rounds + 1):
            if turn == 1:
                # connections are made and caches warm now
                found = _Found()
            for (name, count), several in contestants.items():
                share = shares[count]
                found.add((name, count), several.stream(job_id, size - share, share), count * share)
            _live(service, contestants["pjw", 1], size, found)
            _openssl(service, job_id, size, found)
        return _figures(found)


class _Found:
    """Return the rates and processor times of all rounds."""

    def __init__(self) -> None:
        self.rates: Final[defaultdict[object, list[float]]] = defaultdict(list)
        self.cpu: Final[defaultdict[object, list[float]]] = defaultdict(list)

    def add(self, key: object, streamed: Streamed, size: int) -> None:
        self.rates[key].append(size / streamed.seconds / MB)
        self.cpu[key].append(streamed.server_cpu / size * GB)


def _live(service: Service, follower: Followers, size: int, found: _Found) -> None:
    """Measure a follower from the start of the job on, and a write of all of it without pjw."""
    streamed = follower.stream(command=f"head -c {size} /dev/zero", size=size)
    found.add("live", streamed, size)
    wait_for(lambda: service.job(streamed.job_id).HasField("end"))
    pjwd.delete(service, streamed.job_id)
    path = service.directory / "written"
    began = time.perf_counter()
    subprocess.run(["sh", "-c", f"head -c {size} /dev/zero | cat > '{path}'"], check=True)
    written = time.perf_counter() - began
    assert path.stat().st_size == size
    path.unlink()
    finished = size / MB / found.rates["pjw", 1][-1]
    found.rates["written first"].append(size / MB / (written + finished))


def _openssl(service: Service, job_id: int, size: int, found: _Found) -> None:
    """Send the same file through openssl at both ends."""
    if shutil.which("openssl") is None:
        print("stream: no openssl here", file=sys.stderr)
        return
    certs = service.certs
    tls = ["-tls1_3", "-CAfile", str(certs / "ca.crt")]
    command = [
        "openssl",
        "s_server",
        "-accept",
        "127.0.0.1:0",
        "-WWW",
        "-Verify",
        "1",
        "-verify_return_error",
    ]
    command += ["-cert", str(certs / "server.crt"), "-key", str(certs / "server.key"), *tls]
    where = service.state / "jobs" / str(job_id)
    with subprocess.Popen(
        command, cwd=where, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        try:
            assert server.stdout is not None
            line = b""
            while not line.startswith(b"ACCEPT"):
                line = server.stdout.readline()
                if not line:
                    raise RuntimeError("openssl s_server does not start")
            port = int(line.split()[1].rsplit(b":", 1)[1])
            before = cpu_seconds(server.pid)
            seconds = _fetch(port, certs, tls, size)
            found.add("openssl", Streamed(seconds, cpu_seconds(server.pid) - before, 0, job_id), size)
        finally:
            server.kill()


def _fetch(port: int, certs: Path, tls: list[str], size: int) -> float:
    command = ["openssl", "s_client", "-quiet", "-connect", f"127.0.0.1:{port}", *tls]
    command += ["-cert", str(certs / "alice.crt"), "-key", str(certs / "alice.key")]
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(b"GET /output HTTP/1.0\r\n\r\n")
        client.stdin.flush()
        got, buffer = 0, bytearray(MIB)
        while count := client.stdout.raw.readinto(buffer):  # type: ignore[attr-defined]
            got += count
        seconds = time.perf_counter() - began
        client.kill()
    # and a header of HTTP
    if not size < got < size + 1000:
        raise RuntimeError(f"openssl sent {got} bytes in place of {size}")
    return seconds


def _figures(found: _Found) -> list[Figure]:
    figures = []
    rate = {key: median(values) for key, values in found.rates.items()}
    cpu = {key: median(values) for key, values in found.cpu.items()}
    for count in COUNTS:
        who = "1 follower" if count == 1 else f"{count} followers"
        ours, theirs = ("pjw", count), ("grpcio", count)
        figures += [
            _rate(who, rate[ours], GRPCIO, rate[theirs], GRPCIO_GOAL),
            _cpu(who, cpu[ours], GRPCIO, cpu[theirs]),
        ]
    finished = rate["pjw", 1]
    if "openssl" in rate:
        figures += [
            _rate("1 follower", finished, "openssl", rate["openssl"], held=Held.IF_THERE),
            _cpu("1 follower", cpu["pjw", 1], "openssl", cpu["openssl"], held=Held.IF_THERE),
        ]
    figures += [
        # CI holds it to the next ratio alone: on two cores the job's own writing takes a share of the
        # processor, and with a busy neighbour that share varies more than the bound
        _rate("live, 1 follower", rate["live"], FINISHED, finished, LIVE_GOAL, Held.NEVER),
        _rate("live, 1 follower", rate["live"], "written first", rate["written first"]),
        _cpu("live, 1 follower", cpu["live"], FINISHED, cpu["pjw", 1]),
    ]
    return figures


def _rate(
    who: str,
    value: float,
    against: str,
    reference: float,
    goal: float | None = None,
    held: Held = Held.ALWAYS,
) -> Figure:
    return Figure("stream", who, value, "MB/s", against, reference, goal, more_is_better=True, held=held)


def _cpu(who: str, value: float, against: str, reference: float, held: Held = Held.ALWAYS) -> Figure:
    return Figure("stream", f"{who}, server CPU", value, "s/GB", against, reference, held=held)
