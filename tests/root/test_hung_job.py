"""A job that hangs is looked into, and helped, as its user would do it at a terminal (issue 15)."""

import json
import re
import signal

from tests.support.service import BIN, Service
from tests.support.terminal import Terminal

# It waits for a lock that it has itself, and says nothing.
HANGS = "echo building; mkdir lock; while ! mkdir lock 2>/dev/null; do sleep 0.2; done; echo built"
SHELL = ("-e", "PS1=ready> ", "bash", "--norc", "--noprofile", "-i")


def test_a_user_finds_why_a_job_hangs_and_helps_it(service: Service) -> None:
    """Its output, its processes, its files by a shell in it; it goes on, and its own end is what counts."""
    job = service.ok("start", "--name", "build", HANGS).strip()
    assert service.ok("logs", "--no-follow", "build") == "building\n"
    with Terminal(
        [str(BIN / "pjw"), "exec", "-it", *SHELL[:2], "build", *SHELL[2:]], service.environment()
    ) as terminal:
        terminal.wait_for("ready>")
        # who runs, and what it does: the same line again and again
        terminal.type("ps -e -o pid,user,args\r")
        terminal.wait_until(lambda text: re.search(r"^ +2 \S+ +/bin/sh -c .*mkdir lock", text, re.MULTILINE))
        # only this job's processes are there, and all of them are its user's but init and who waits for us
        terminal.type("clear; ps -e -o user= | sort | uniq -c | wc -l\r")
        terminal.wait_until(lambda text: re.search(r"^2$", text, re.MULTILINE))
        terminal.type("clear; tr '\\0' '\\n' </proc/2/environ | grep PJW; ls -d */\r")
        terminal.wait_for(f"PJW_JOB_ID={job}", "lock/")
        # the cause, and the cure; the shell ends with the job
        terminal.type("rmdir lock\r")
        assert terminal.wait_for_end() == 128 + signal.SIGKILL
        assert f"session 1 of job {job} was ended, by the end of its job" in terminal.text
    assert service.ok("wait", "build") == "0\n"
    assert service.ok("logs", "build") == "building\nbuilt\n"
    ended = json.loads(service.ok("get", job))
    assert (ended["exitCode"], ended["reason"]) == (0, "completed")


def test_a_user_sees_where_a_python_job_hangs(service: Service) -> None:
    """It writes its stack when it is asked to; the answer comes by the output of the job."""
    program = (
        "import faulthandler, signal, threading\n"
        "faulthandler.register(signal.SIGUSR1)\n"
        "def wait_for_the_mirror(): threading.Event().wait()\n"
        "print('ready', flush=True)\n"
        "wait_for_the_mirror()\n"
    )
    job = service.ok("start", "/usr/bin/python3", "-I", "-S", "-c", program).strip()
    with service.popen("logs", job) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"ready\n"
        assert service.ok("exec", job, "kill -USR1 2") == ""
        seen = b""
        while b"wait_for_the_mirror" not in seen:
            line = follower.stdout.readline()
            assert line, seen
            seen += line
        service.ok("stop", job)
        follower.communicate()
