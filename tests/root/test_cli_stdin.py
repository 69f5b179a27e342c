"""`--stdin`, and the input of a job from the library: to the byte, whatever becomes of the connection."""

import asyncio
import hashlib
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

import pjw
from pjw import errors
from pjw.model import JobSpec
from tests.support.relay import Relay
from tests.support.service import BIN, Service
from tests.support.terminal import Terminal

MIB: Final = 1024 * 1024


def piped(service: Service, *arguments: str, data: bytes) -> "subprocess.CompletedProcess[bytes]":
    """Run pjw with something on its stdin."""
    return subprocess.run(
        [str(BIN / "pjw"), *arguments],
        env=service.environment(),
        input=data,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("size", [0, 1, 70_000, 9 * MIB])
def test_what_is_piped_in_is_what_the_job_reads(service: Service, size: int) -> None:
    """More than a window of it, too; and its end is the input's."""
    data = os.urandom(size)
    done = piped(service, "run", "--stdin", "-", "sha256sum", "-", data=data)
    assert (done.stdout.decode(), done.returncode) == (f"{hashlib.sha256(data).hexdigest()}  -\n", 0), (
        done.stderr
    )


def test_start_sends_a_file_and_prints_the_id(service: Service, tmp_path: Path) -> None:
    """The id alone; pjw is back when all was sent."""
    (tmp_path / "data").write_bytes(b"from a file\n")
    job_id = service.ok("start", "--stdin", str(tmp_path / "data"), "cat", "-")
    assert service.ok("logs", job_id.strip()) == "from a file\n"


@pytest.mark.parametrize(("path", "why"), [("/nonexistent/x", "no such file"), ("/", "is a directory")])
def test_a_file_that_cannot_be_read_is_named_and_starts_nothing(
    service: Service, path: str, why: str
) -> None:
    """Before a job waits for what never comes."""
    before = service.ok("list")
    code, words = service.refused("run", "--stdin", path, "cat", "-")
    assert code == 125
    assert words.startswith(f"pjw: error: cannot read --stdin {path}: {why}")
    assert service.ok("list") == before


def test_a_job_that_reads_no_more_ends_the_sending(service: Service) -> None:
    """`head -1` of an endless stdin: the job's end is the end."""
    done = subprocess.run(
        ["bash", "-c", f"yes line | {BIN}/pjw run --stdin - head -n 1"],
        env=service.environment(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"line\n", b"", 0)


def test_what_is_typed_is_read_line_by_line(service: Service) -> None:
    """A job at a terminal answers each line before the next; Ctrl-D ends it."""
    command = 'while read -r line; do echo "<$line>"; done; echo over'
    with Terminal([str(BIN / "pjw"), "run", "--stdin", "-", command], service.environment()) as run:
        run.type("one\r")
        run.wait_for("<one>")
        run.type("two\r")
        run.wait_for("<two>")
        run.type("\x04")
        assert run.wait_for_end() == 0
        assert run.text.rstrip().endswith("over")


def test_sending_is_seen_at_a_terminal(service: Service, tmp_path: Path) -> None:
    """How much, and how fast; nothing is left of it."""
    with (tmp_path / "data").open("wb") as file:
        file.truncate(64 * MIB)
    arguments = ["start", "--stdin", str(tmp_path / "data"), "while ! [ -e go ]; do sleep 0.05; done; wc -c"]
    # a disk takes all of it at once: so it is held up by who reads the pipe in its place
    os.mkfifo(tmp_path / "pipe")
    arguments[2] = str(tmp_path / "pipe")
    with Terminal([str(BIN / "pjw"), *arguments], service.environment()) as start:
        with (tmp_path / "pipe").open("wb", buffering=0) as pipe:
            pipe.write(b"x" * 2048)
            text = start.wait_for(": 2K sent, ")
        assert start.wait_for_end() == 0
        assert "sent" not in start.text
    job_id = text.split()[0]
    (service.state / "scratch" / job_id / "go").touch()
    assert service.ok("logs", job_id) == "2048\n"


def test_input_goes_on_when_the_server_is_killed(make_service: Callable[..., Service]) -> None:
    """Not a byte is lost or doubled, and whoever pipes notices nothing."""
    service = make_service().start()
    first, rest = os.urandom(3 * MIB), os.urandom(6 * MIB)
    with subprocess.Popen(
        [str(BIN / "pjw"), "run", "--stdin", "-", "sh", "-c", "head -c 1000000 | sha256sum; sha256sum"],
        env=service.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdin is not None and run.stdout is not None
        run.stdin.write(first)
        run.stdin.flush()
        # the job has had a part of it by then
        seen = run.stdout.readline()
        service.stop(signal.SIGKILL)
        service.start()
        run.stdin.write(rest)
        run.stdin.close()
        assert run.wait(60) == 0
        seen += run.stdout.read()
    # what head(1) had read beyond its bytes is its own affair: dd reads no more than it is told to
    assert seen.startswith(hashlib.sha256(first[:1_000_000]).hexdigest().encode())


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_input_goes_on_after_a_cut(service: Service, kind: str) -> None:
    """Both clients, in the middle of it."""
    pieces = [os.urandom(MIB) for _ in range(8)]
    told: list[int] = []
    with Relay(service.address) as relay:

        def source() -> Iterator[bytes]:
            for number, piece in enumerate(pieces):
                if number in (3, 6):
                    relay.cut()
                yield piece

        async def source_of_async() -> AsyncIterator[bytes]:
            for piece in source():
                yield piece
                await asyncio.sleep(0)

        async def send() -> tuple[int, bytes]:
            async with pjw.AsyncClient(relay.address, *service.files()) as client:
                job = await client.start(JobSpec(["sha256sum"], input=True))
                sent = await client.write_input(job.id, source_of_async(), told.append)
                return sent, b"".join([data async for data in client.logs(job.id)])

        if kind == "AsyncClient":
            sent, said = asyncio.run(send())
        else:
            with pjw.Client(relay.address, *service.files()) as client:
                job = client.start(JobSpec(["sha256sum"], input=True))
                sent = client.write_input(job.id, source(), told.append)
                said = b"".join(client.logs(job.id))
    assert said.split()[0].decode() == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert sent == told[-1] == 8 * MIB
    assert told == sorted(told)


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
def test_a_source_that_fails_ends_nothing_but_the_sending(service: Service, kind: str) -> None:
    """Its error is the caller's; the job waits for the rest, which may come later."""

    def broken() -> Iterator[bytes]:
        yield b"first "
        raise OSError("broken")

    async def async_of(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def send() -> bytes:
        async with pjw.AsyncClient(service.address, *service.files()) as client:
            job, other = await client.start(JobSpec(["cat"], input=True)), await client.start(JobSpec("true"))
            with pytest.raises(OSError, match="broken"):
                await client.write_input(job.id, async_of(broken()))
            await client.write_input(job.id, async_of(iter([b"first ", b"second"])))
            with pytest.raises(errors.JobStateError):
                await client.write_input(other.id, async_of(iter([b""])))
            return b"".join([data async for data in client.logs(job.id)])

    if kind == "AsyncClient":
        assert asyncio.run(send()) == b"first second"
        return
    with pjw.Client(service.address, *service.files()) as client:
        job, other = client.start(JobSpec(["cat"], input=True)), client.start(JobSpec("true"))
        with pytest.raises(OSError, match="broken"):
            client.write_input(job.id, broken())
        # its call is over, or it would end the next one
        assert f"pjw-input-{job.id}" not in {thread.name for thread in threading.enumerate()}
        client.write_input(job.id, [b"first ", b"second"])
        with pytest.raises(errors.JobStateError):
            client.write_input(other.id, [b""])
        assert b"".join(client.logs(job.id)) == b"first second"
