"""Nobody takes what pjwd says (B1): that holds up neither a call nor its end."""

import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from tests.support.service import Service

SECONDS = 30


def read_until(reading: int, pattern: bytes) -> bytes:
    """All that is said up to a pattern."""
    seen = b""
    while not re.search(pattern, seen):
        assert select.select([reading], [], [], SECONDS)[0], seen
        seen += os.read(reading, 65536)
    return seen


def fill(writing: int) -> None:
    """Leave no room in a pipe."""
    # another open file description of the same pipe: pjwd's own stays as it is
    descriptor = os.open(f"/proc/self/fd/{writing}", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x" * 4096)
    with suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x")
    os.close(descriptor)


def test_a_full_pipe_holds_nothing_up(make_service: Callable[..., Service]) -> None:
    """Calls, a reload and the end go on; what was said meanwhile comes when somebody reads again."""
    service = make_service(clients=["alice"])
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    service.process = subprocess.Popen(
        service.command("--log-level", "info"), stdin=subprocess.DEVNULL, stdout=writing, stderr=writing
    )
    said = read_until(reading, rb"pjwd: ready on (\S+)\n")
    service.address = re.search(rb"ready on (\S+)", said)[1].decode()  # type: ignore[index]
    fill(writing)
    # each is a line of the log
    for _ in range(3):
        os.kill(service.pid, signal.SIGHUP)
        assert service.ok("list") == ""
    job_id = service.ok("start", "exec sleep 1000").strip()
    service.ok("stop", job_id)
    read_until(reading, rb"pjwd: INFO: reload: the certificates [^\n]+\n")
    fill(writing)
    os.kill(service.pid, signal.SIGHUP)
    assert service.stop() == 0
    for descriptor in (reading, writing):
        os.close(descriptor)


def test_a_full_pipe_does_not_keep_a_refusal_from_ending(make_service: Callable[..., Service]) -> None:
    """Neither the server's nor its launcher's: both have something to say at their end."""
    service = make_service(clients=["alice"])
    reading, writing = os.pipe()
    fill(writing)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    launcher = ["sh", "-c", 'exec "$@" 3<&0 </dev/null', "sh", sys.executable, "-I", "-m", "pjw.launcher"]
    with (
        subprocess.Popen(
            service.command("--server-key", "/none"), stdin=subprocess.DEVNULL, stderr=writing
        ) as pjwd,
        subprocess.Popen(launcher, stdin=theirs.fileno(), stderr=writing) as launched,
    ):
        ours.send(b"garbage")
        assert [pjwd.wait(SECONDS), launched.wait(SECONDS)] == [1, 1]
    ours.close()
    theirs.close()
    for descriptor in (reading, writing):
        os.close(descriptor)
