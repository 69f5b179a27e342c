"""pjw-init and what it is to run: the environment, the working directory; and any signal that stops it."""

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.support.init_harness import ENVIRONMENT, Harness

FIRST = 33


# --- the environment


def test_the_environment_is_added_to(init: Harness) -> None:
    """A variable of the client is there, and replaces one of the same name, and only that."""
    job = init.run("env", env={"A": "1", "HOME": "/tmp", "HOM": "x", "EMPTY": "", "E": "a=b\nc ü"})
    expected = {**ENVIRONMENT, "A": "1", "HOME": "/tmp", "HOM": "x", "EMPTY": ""}
    for name, value in expected.items():
        assert f"{name}={value}\n" in job.text
    assert "E=a=b\nc ü\n" in job.text
    assert job.text.count("HOME=") == 1
    assert job.text.count("\n") == len(expected) + 2


def test_the_program_is_looked_up_in_the_client_s_path(init: Harness, visible: Path) -> None:
    """PATH of the client is what counts, an element that is relative to the working directory too."""
    (visible / "tool").write_text("#!/bin/sh\necho found by $PATH")
    (visible / "tool").chmod(0o755)
    assert init.run("tool", env={"PATH": str(visible)}).text == f"found by {visible}\n"
    assert init.run("tool", env={"PATH": "."}, workdir=str(visible)).text == "found by .\n"
    assert init.run("env", env={"PATH": "/nowhere"}).reports[-1] == f"failed exec {errno.ENOENT}"


def test_a_large_environment(init: Harness) -> None:
    """Half a megabyte in 5,000 variables arrives whole."""
    env = {f"V{n}": "x" * 90 for n in range(5_000)}
    job = init.run("env", env=env)
    assert set(job.text.splitlines()) >= {f"{name}={value}" for name, value in env.items()}


# --- the working directory


def test_the_working_directory(init: Harness) -> None:
    """The command begins there; without one in its own directory."""
    assert init.run("pwd", workdir="/tmp").text == "/tmp\n"
    assert init.run("pwd").text == "/run/job\n"


@pytest.mark.parametrize(
    ("workdir", "error"),
    [
        ("/nonexistent", errno.ENOENT),
        ("/etc/passwd", errno.ENOTDIR),
        ("/root", errno.EACCES),
        ("/" + "x" * 300, errno.ENAMETOOLONG),
    ],
)
def test_a_directory_that_cannot_be_entered(init: Harness, workdir: str, error: int) -> None:
    """It is an error of the start, seen with the rights of the job's user; nothing ran."""
    job = init.run("true", workdir=workdir)
    assert job.reports == ["cloned", f"failed workdir {error}"]
    assert job.status == []


def test_no_descriptor_leads_out(init: Harness, visible: Path) -> None:
    """/proc/self names neither a directory that init or its launcher had open, nor where they began."""
    directory = os.open(visible, os.O_RDONLY | os.O_DIRECTORY)
    hidden = ("--hide", str(visible))
    refused = {f"failed workdir {error}" for error in (errno.ENOTDIR, errno.ENOENT, errno.EACCES)}
    try:
        for fd in range(64):
            job = init.run("pwd", workdir=f"/proc/self/fd/{fd}", options=hidden, pass_fds=[directory])
            # 0 to 2 are no directories, 3 is the pipe that tells of this error, the rest is closed
            assert job.reports[-1] in refused
    finally:
        os.close(directory)
    assert init.run("pwd", workdir="/proc/self/cwd").text == "/run/job\n"


# --- signals


@pytest.mark.parametrize("number", [1, 2, 3, 9, 10, 12, 15])
def test_a_job_is_ended_by_the_signal_that_is_asked_for(init: Harness, number: int) -> None:
    """init sends the one whose number follows from its own, to every process, and records a stop."""
    job = init.start("/bin/sh", "-c", "sleep 1000 & exec sleep 1000")
    job.send(FIRST + number)
    assert job.wait().end == f"signaled {number} stopped"


def test_every_process_gets_the_signal(init: Harness) -> None:
    """Each of a tree sees it once, with its own number; the job that handles it ends as it likes."""
    script = (
        "import os, signal, time\n"
        "def seen(number, frame):\n"
        "    os.write(1, b'got %d\\n' % number); os._exit(7)\n"
        "signal.signal(signal.SIGUSR2, seen)\n"
        "if os.fork() == 0: os.setsid()\n"
        "os.write(1, b'ready\\n')\n"
        "while True: time.sleep(1000)\n"
    )
    job = init.start("/usr/bin/python3", "-I", "-S", "-c", script)
    job.wait_for_output("ready\nready\n")
    job.send(FIRST + signal.SIGUSR2)
    assert job.wait().end == "exited 7 stopped"
    assert 1 <= job.text.count("got 12\n") <= 2


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGSTOP, signal.SIGWINCH])
def test_a_signal_that_ends_nothing(init: Harness, number: int) -> None:
    """The job goes on, and is killed when that is asked for."""
    script = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'still here\\n'))\n"
        "os.write(1, b'ready\\n')\n"
        "while True: time.sleep(1000)\n"
    )
    job = init.start("/usr/bin/python3", "-I", "-S", "-c", script)
    job.wait_for_output("ready\n")
    job.send(FIRST + number)
    job.send(FIRST + signal.SIGUSR1)
    job.wait_for_output("still here\n")
    job.send(signal.SIGQUIT)
    assert job.wait().end == "signaled 9 stopped"


def test_a_job_cannot_send_init_a_signal(init: Harness) -> None:
    """Neither its processes nor what the kernel sends for them: init stops nothing for them."""
    script = (
        "import fcntl, os, signal\n"
        "refused = 0\n"
        "for number in range(1, 65):\n"
        "    try: os.kill(1, number)\n"
        "    except PermissionError: refused += 1\n"
        "r, w = os.pipe()\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\n"
        "fcntl.fcntl(r, 10, 34 + 8)\n"  # F_SETSIG: what would kill every process
        "fcntl.fcntl(r, fcntl.F_SETOWN, 1)\n"
        "os.write(w, b'x')\n"
        "print(refused)\n"
    )
    job = init.python(script)
    assert (job.text, job.end) == ("64\n", "exited 0 none")
