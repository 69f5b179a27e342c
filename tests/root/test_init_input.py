"""pjw-init and what a job reads: a file that grows, its end, and who reads no more."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.init_harness import JOB_UID, Harness, Running
from tests.support.service import wait_for
from tests.support.uploads import some_bytes

MIB = 1024**2
# holds all the instances of inotify that a user may have, until its stdin ends
TAKE_INSTANCES = """
import ctypes, os, resource, sys
libc, most = ctypes.CDLL(None), int(open("/proc/sys/fs/inotify/max_user_instances").read())
resource.setrlimit(resource.RLIMIT_NOFILE, (most + 100, most + 100))
os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
while libc.inotify_init1(0) >= 0:
    pass
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An input of which there is nothing yet."""
    file = tmp_path / "input"
    file.touch(mode=0o600)
    return file


def start(init: Harness, file: Path, script: str, **how: Any) -> Running:
    """Start a script that reads a file, locked as the server locks it."""
    descriptor = os.open(file, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        options = ("--input-fd", str(descriptor))
        return init.start("/bin/sh", "-c", script, options=options, pass_fds=[descriptor], **how)
    finally:
        os.close(descriptor)


def append(file: Path, data: bytes) -> None:
    """As the server does."""
    with file.open("ab") as opened:
        opened.write(data)


def end(file: Path) -> None:
    """As the server does."""
    file.chmod(0o400)


def is_read(file: Path) -> bool:
    """Whether init still has the file, as the server looks."""
    with file.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 5 * MIB])
def test_a_whole_file(init: Harness, file: Path, size: int) -> None:
    """What is there at the start, to the byte."""
    append(file, some_bytes(size))
    end(file)
    job = start(init, file, "cat").wait()
    assert (job.output, job.end) == (some_bytes(size), "exited 0 none")


def test_a_file_that_grows(init: Harness, file: Path) -> None:
    """Each piece when it comes, and the end alone when nothing comes with it."""
    job = start(init, file, "cat; echo end")
    for number in range(20):
        append(file, f"line {number}\n".encode())
        job.wait_for_output(f"line {number}\n")
    assert "end" not in job.text
    end(file)
    assert job.wait().text == "".join(f"line {number}\n" for number in range(20)) + "end\n"


def test_a_reader_that_takes_its_time(init: Harness, file: Path) -> None:
    """The pipe fills, and is filled again, while the job writes as well."""
    data = some_bytes(MIB)
    append(file, data)
    job = start(init, file, "for n in 1 2 3 4 5 6 7 8; do head -c 131072; echo; done; cat")
    end(file)
    expected = b"".join(data[at : at + 131_072] + b"\n" for at in range(0, MIB, 131_072))
    assert job.wait().output == expected


def test_input_that_has_not_ended_holds_the_job(init: Harness, file: Path) -> None:
    """Only the mark is an end; a stop ends the job all the same."""
    append(file, b"half")
    job = start(init, file, "cat; echo end")
    job.wait_for_output("half")
    job.send(15)
    assert job.wait().end == "signaled 15 stopped"
    assert job.text == "half"


def test_a_job_that_closes_its_stdin(init: Harness, file: Path) -> None:
    """init lets go of the file, by which the server knows; also while there is more to read, or nothing."""
    for number, data in enumerate((bytes(MIB), b"x")):
        input_file = file.with_name(f"input-{number}")
        input_file.touch(mode=0o600)
        append(input_file, data)
        job = start(init, input_file, "head -c 1 >/dev/null; exec <&-; echo closed; exec sleep 300")
        job.wait_for_output("closed\n")
        wait_for(lambda: not is_read(input_file))  # noqa: B023
        job.send(15)
        job.wait()


def test_input_is_let_go_of_at_its_end(init: Harness, file: Path) -> None:
    """When all is in the pipe, while the job goes on."""
    append(file, b"all\n")
    job = start(init, file, "cat; exec sleep 300")
    assert is_read(file)
    end(file)
    wait_for(lambda: not is_read(file))
    job.wait_for_output("all\n")
    job.send(15)
    assert job.wait().text == "all\n"


def test_the_job_has_the_pipe_and_nothing_else(init: Harness, file: Path) -> None:
    """It may open it anew, and finds neither the file nor the watch of it."""
    append(file, b"by name")
    end(file)
    job = start(init, file, "cat /dev/stdin; echo; readlink /proc/self/fd/0; ls /proc/self/fd | wc -l").wait()
    text, name, count = job.text.splitlines()
    assert (text, name[:5], count) == ("by name", "pipe:", "4")


def test_a_user_without_watches(init: Harness, file: Path) -> None:
    """They count as the job's user's, never as root's; that there are none left is why the start failed."""
    command = [sys.executable, "-I", "-S", "-c", TAKE_INSTANCES, str(JOB_UID)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as taker:
        assert taker.stdin is not None and taker.stdout is not None
        assert taker.stdout.readline() == b"taken\n"
        job = start(init, file, "cat")
        taker.stdin.close()
    assert job.reports[-1] == "failed input 24"
