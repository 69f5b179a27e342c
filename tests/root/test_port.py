"""Attackers of the port, with a certificate and without, and a victim beside them (S3, S4).

What is asserted are deadlines that a busy machine keeps; `make attack` compares speeds.
"""

import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import grpc
import pytest

from pjw.client.aio import AsyncClient
from pjw.v1 import job_worker_pb2 as pb
from tests.support import http2, pjwd_with
from tests.support.service import Service, wait_for

ATTACKER: Final = "mallory"
SECONDS: Final = 6
# Alone it is milliseconds, and was seconds beside each of these attacks.
TYPICAL_SECONDS: Final = 0.5
SLOWEST_SECONDS: Final = 5
CLIENTS: Final = ("alice", "bob", ATTACKER)


@contextmanager
def attack(service: Service, name: str, seconds: float = SECONDS) -> Iterator[None]:
    """An attacker beside the block, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.support.http2",
        name,
        service.address,
        str(service.certs),
        str(seconds),
    ]
    with subprocess.Popen([*command, ATTACKER], stdout=subprocess.PIPE) as attacker:
        yield
        assert attacker.stdout is not None
        print(name, attacker.stdout.read().decode().strip())
    assert attacker.returncode == 0


def be_a_victim(service: Service, seconds: float) -> tuple[list[float], list[float]]:
    """Call for a while; how long each `Get` took, and how long a new connection with a start."""
    gets, starts, over = [], [], time.monotonic() + seconds
    job_id = service.start_job("true", "bob")
    with service.stub("bob") as stub:
        while time.monotonic() < over:
            for _ in range(20):
                begun = time.monotonic()
                stub.Get(pb.GetRequest(id=job_id), timeout=60, wait_for_ready=True)
                gets.append(time.monotonic() - begun)
            begun = time.monotonic()
            with service.stub("bob") as another:
                another.Start(pb.StartRequest(command="true"), timeout=60, wait_for_ready=True)
            starts.append(time.monotonic() - begun)
    print(
        f"Get: {statistics.median(gets):.4f} s, {max(gets):.3f} s; start: {statistics.median(starts):.3f} s"
    )
    return gets, starts


@pytest.mark.parametrize("name", ["idle", "half", "hello", "reset", "pipelined", "ping", "settings"])
def test_a_victim_beside_an_attacker(make_service: Callable[..., Service], name: str) -> None:
    """S3, S4: whatever one client does to the port, the calls, connections and starts of another go on."""
    service = make_service(clients=CLIENTS).start()
    with attack(service, name):
        gets, starts = be_a_victim(service, SECONDS - 2)
    assert statistics.median(gets) < TYPICAL_SECONDS, gets
    assert statistics.median(starts) < 4 * TYPICAL_SECONDS, starts
    assert max(*gets, *starts) < SLOWEST_SECONDS


def test_a_connection_that_shows_no_certificate_is_closed(make_service: Callable[..., Service]) -> None:
    """S4: a handshake has a deadline, whether it was begun or not."""
    service = make_service(config="[port]\nhandshake_seconds = 1\n").start()
    for first in (b"", http2.client_hello()):
        with http2.tcp(service.address) as connection:
            connection.sendall(first)
            begun = time.monotonic()
            while connection.recv(65_536):
                pass
            assert time.monotonic() - begun < 15


def test_connections_leave_descriptors_for_starts(make_service: Callable[..., Service]) -> None:
    """S4: where a process may have few, connections do not take them all, and nothing of it is logged raw."""
    service = make_service(config="[port]\nunproven_max = 4000\nunproven_per_address_max = 4000\n")
    service.change = pjwd_with.few_descriptors
    service.start()
    with service.stub("alice") as stub:
        stub.List(pb.ListRequest())
        held: list[socket.socket] = []
        try:
            address = http2.split_address(service.address)
            held += [socket.create_connection(address, 5) for _ in range(500)]
            for _ in range(5):
                stub.Start(pb.StartRequest(command="true"), timeout=60)
            assert service.descriptors() < 500
        finally:
            for connection in held:
                connection.close()
    assert "E1" not in service.log.read_text()


def test_an_idle_flood_is_thinned_out(make_service: Callable[..., Service]) -> None:
    """S4: from one address so many connections may show no certificate; the log tells of more."""
    config = "[port]\nunproven_per_address_max = 20\nhandshake_seconds = 60\n"
    service = make_service(config=config + '[metrics]\nlisten = "127.0.0.1:0"\n')
    service.start()
    before = service.descriptors()
    # at every level, when any free port was asked for (U15)
    metrics = re.search(r"metrics on (\S+)", service.log.read_text())
    assert metrics is not None
    held = [socket.create_connection(http2.split_address(service.address), 5) for _ in range(100)]
    try:
        service.await_log("show no certificate")
        wait_for(lambda: service.descriptors() <= before + 25)
        with urllib.request.urlopen(f"http://{metrics[1]}/metrics", timeout=SECONDS) as answer:
            closed = re.search(rb'connections_closed_total\{reason="unproven"\} (\S+)', answer.read())
        assert closed is not None
        assert 70 < float(closed[1]) <= 80
    finally:
        for connection in held:
            connection.close()


def test_rapid_reset_is_cut_off(make_service: Callable[..., Service]) -> None:
    """S3: a client that begins calls and cancels them loses its connection, and others for a while."""
    service = make_service(clients=CLIENTS).start()
    with attack(service, "reset", 20):
        wait_for(lambda: f"client '{ATTACKER}'" in service.log.read_text(), 20)
        with pytest.raises(grpc.RpcError) as caught, service.stub(ATTACKER) as stub:
            stub.List(pb.ListRequest(), timeout=20)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        service.start_job("true", "bob")
    # the penalty ends
    wait_for(lambda: service.answer("List", b"", ATTACKER)[1] is grpc.StatusCode.OK, 70)


def test_connections_of_one_client(make_service: Callable[..., Service]) -> None:
    """S4: a client has so many at once, is told so, and others do not notice."""
    service = make_service(config="[clients]\nconnections_max = 3\n").start()
    opened = [service.stub("alice") for _ in range(4)]
    stubs = [each.__enter__() for each in opened]
    try:
        for stub in stubs[:3]:
            stub.List(pb.ListRequest(), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            stubs[3].List(pb.ListRequest(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 connections at once" in (caught.value.details() or "")
        assert service.answer("List", b"", "bob")[1] is grpc.StatusCode.OK
    finally:
        for each in opened:
            each.__exit__(None, None, None)
    # closed ones do not count
    for _ in range(8):
        assert service.answer("List", b"")[1] is grpc.StatusCode.OK


async def test_one_client_follows_more_than_a_connection_bears(make_service: Callable[..., Service]) -> None:
    """Streams for each connection are few, and the library makes as many connections as it needs."""
    service = make_service(config="[port]\nstreams_per_connection_max = 10\n").start()
    job_id = service.start_job("echo hello; sleep 1000")
    async with AsyncClient(service.address, *service.files()) as client:
        streams = [client.logs(job_id) for _ in range(50)]
        for stream in streams:
            assert await anext(stream) == b"hello\n"
        for stream in streams:
            await stream.aclose()
        await client.stop(job_id, grace=0)
