"""`pjw mcp` and the official client of the package mcp: what an agent's program does, on a real pjwd."""

import asyncio
import base64
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import CallToolResult, TextContent

from tests.support.service import BIN, CALL_SECONDS, Service, wait_for

PJW: Final = str(BIN / "pjw")


@asynccontextmanager
async def agent(service: Service, *, client: str = "alice", **env: str) -> AsyncIterator[Client]:
    """The program of an agent, which has started `pjw mcp`."""
    environment = service.environment(client) | env
    server = StdioServerParameters(command=PJW, args=["mcp"], env=environment)
    async with Client(stdio_client(server)) as connected:
        yield connected


async def called(agent: Client, tool: str, **arguments: Any) -> CallToolResult:
    """The answer of a tool."""
    answer = await agent.call_tool(tool, arguments)
    assert isinstance(answer, CallToolResult)
    return answer


async def texts(agent: Client, tool: str, **arguments: Any) -> list[str]:
    """What a tool answers: our words, and apart from them the output."""
    answer = await called(agent, tool, **arguments)
    assert not answer.is_error, answer
    return [part.text for part in answer.content if isinstance(part, TextContent)]


async def refused(agent: Client, tool: str, **arguments: Any) -> str:
    """What a tool says of a call that fails."""
    answer = await called(agent, tool, **arguments)
    [part] = answer.content
    assert answer.is_error
    assert isinstance(part, TextContent)
    assert "Traceback" not in part.text
    return part.text


def id_in(words: str) -> str:
    """The id of the command that an answer is about."""
    found = re.match(r"(?:Job|Command) ([0-9/]+) ", words)
    assert found, words
    return found[1]


async def test_run(service: Service) -> None:
    """Both outputs, where and with what it begins; an exit code is a result."""
    async with agent(service) as connected:
        words, output = await texts(
            connected, "run", command="echo out; echo err >&2; pwd; echo $A; exit 3", env={"A": "b c"}
        )
        assert re.fullmatch(
            r"Job [0-9]+ ended after [0-9]s: exit code 3\.\nIts output, bytes 0 to 21, is what follows\.",
            words,
        )
        assert output == "out\nerr\n/run/job\nb c\n"
        [words] = await texts(connected, "run", command="exit 0", name="quiet", workdir="/tmp")
        assert re.fullmatch(r"Job [0-9]+ \(quiet\) ended after [0-9]s: exit code 0\.\nNo output\.", words)


async def test_a_long_command_yields_and_goes_on(service: Service) -> None:
    """Run answers in time with the id; poll goes on at the byte, and by a name; stop ends it."""
    async with agent(service) as connected:
        command = "echo one; while [ ! -e go ]; do sleep 0.05; done; echo two; exec sleep 600"
        words, output = await texts(connected, "run", command=command, wait_seconds=1, name="long")
        job = id_in(words)
        assert (output, f'poll(job="{job}", offset=4) waits for more' in words) == ("one\n", True)
        assert words.startswith(f"Job {job} (long) has not ended: running. ")
        assert (await texts(connected, "put", job=job, path="go", content=""))[0].startswith(
            "Put go into job "
        )
        words, output = await texts(connected, "poll", job=int(job), offset=4, wait_seconds=2)
        assert (output, id_in(words)) == ("two\n", job)
        words, output = await texts(connected, "poll", job="long", offset=-3, wait_seconds=1)
        assert (output, "bytes 5 to 8" in words) == ("wo\n", True)
        [words] = await texts(connected, "stop", job=job)
        assert re.fullmatch(
            rf"Job {job} \(long\) ended after \ds: exit code 143, job {job} was stopped\.", words
        )
        # the end can be asked for as often as one likes
        words, output = await texts(connected, "poll", job=job)
        assert (output, "exit code 143" in words) == ("one\ntwo\n", True)


async def test_output_is_bounded_and_cut_between_characters(service: Service) -> None:
    """Whoever follows the offsets has every character, and every byte of it once."""
    async with agent(service) as connected:
        command = "i=0; while [ $i -lt 100 ]; do printf 'a€😀'; i=$((i+1)); done"
        words, output = await texts(connected, "run", command=command, max_bytes=301)
        job, pieces, end = id_in(words), [output], 0
        while found := re.search(r"poll\(job=\"[0-9]+\", offset=([0-9]+)\) goes on", words):
            assert len(pieces[-1].encode()) <= 301
            end = int(found[1])
            words, output = await texts(connected, "poll", job=job, offset=end, max_bytes=301)
            pieces.append(output)
        assert "".join(pieces) == "a€😀" * 100
        assert (len(pieces), end > 0, "exit code 0" in words) == (3, True, True)


async def test_bytes_that_are_no_text(service: Service) -> None:
    """They are shown as such, and hold up nothing."""
    async with agent(service) as connected:
        _, output = await texts(connected, "run", command=r"printf 'a\377\000b\303'")
        assert output == "a\ufffd\0b\ufffd"


async def test_commands_inside_a_job(service: Service) -> None:
    """They share its files; they yield, are polled and stopped as jobs are."""
    async with agent(service) as connected:
        job = id_in((await texts(connected, "run", command="exec sleep 600", wait_seconds=1))[0])
        await texts(connected, "put", job=job, path="src/hello.sh", content="echo hé >&2; exit 4\n")
        words, output = await texts(connected, "run", command="sh src/hello.sh", in_job=job)
        assert (output, words.startswith(f"Command {job}/3 ended: exit code 4.\n")) == ("hé\n", True)
        words, output = await texts(
            connected, "run", command="echo begun; exec sleep 600", in_job=job, wait_seconds=1
        )
        inside = id_in(words)
        assert (output, inside) == ("begun\n", f"{job}/4")
        assert "exit code" in (await texts(connected, "stop", job=inside))[0]
        await texts(connected, "stop", job=job, grace_seconds=0)


async def test_files(service: Service) -> None:
    """To the byte and in parts; whole or not there; errors in words."""
    data = os.urandom(200_000)
    async with agent(service) as connected:
        job = id_in((await texts(connected, "run", command="exec sleep 600", wait_seconds=1))[0])
        content = base64.b64encode(data).decode()
        await texts(connected, "put", job=job, path="a/b c/-d", content=content, base64=True, executable=True)
        _, output = await texts(connected, "run", command="stat -c %a,%s 'a/b c/-d'; ls 'a/b c'", in_job=job)
        assert output == "755,200000\n-d\n"
        # another content, with the same mode
        await texts(connected, "put", job=job, path="a/b c/-d", content=content, base64=True)
        _, output = await texts(connected, "run", command="stat -c %a 'a/b c/-d'", in_job=job)
        assert output == "755\n"
        got, offset, words = b"", 0, ""
        while offset < len(data):
            words, output = await texts(
                connected, "get", job=job, path="a/b c/-d", offset=offset, max_bytes=100_000, base64=True
            )
            got += base64.b64decode(output)
            offset = len(got)
        assert (got, "offset=" in words) == (data, False)
        await texts(connected, "put", job=job, path="text", content="a€b")
        assert await texts(connected, "get", job=job, path="/run/job/text") == [
            f"/run/job/text of job {job} has 5 bytes; bytes 0 to 5 are what follows.", "a€b"
        ]  # fmt: skip
        for tool, path, said in (
            ("get", "none", f"error: cannot get none from job {job}: there is no such file"),
            ("get", "a", f"error: cannot get a from job {job}: it is a directory"),
            (
                "get",
                "a/b c/-d",
                "error: cannot get a/b c/-d as text: it is not UTF-8\nhint: get it with base64=true",
            ),
            ("put", "a", f"error: cannot put a into job {job}: it is a directory"),
        ):  # fmt: skip
            content_of = {"content": "x"} if tool == "put" else {}
            assert await refused(connected, tool, job=job, path=path, **content_of) == said
        said = await refused(connected, "put", job=job, path="/etc/passwd", content="x")
        assert said.startswith(f"error: cannot put /etc/passwd into job {job}: ")
        said = await refused(connected, "put", job=job, path="b", content="x" * (1024 * 1024 + 1))
        assert said.startswith("error: cannot put b: 1048577 bytes; at most 1048576 go at once\nhint: ")
        said = await refused(connected, "put", job=job, path="b", content="*", base64=True)
        assert said.startswith("error: cannot put b: the content is not base64")
        await texts(connected, "stop", job=job, grace_seconds=0)
        assert await refused(connected, "get", job=job, path="text") == (
            f"error: cannot enter job {job}: it is exited"
        )


async def test_files_need_no_program_of_the_job(service: Service) -> None:
    """Put and get take two processes, and a shell that did the same would need more."""
    job = service.ok("start", "--pids", "4", "--", "/bin/sleep", "600").strip()
    async with agent(service) as connected:
        await texts(connected, "put", job=job, path="/tmp/a/b", content="text\n")
        assert (await texts(connected, "get", job=job, path="/tmp/a/b", offset=2))[1] == "xt\n"
    service.ok("stop", "--grace", "0", job)


async def test_list(service: Service) -> None:
    """The newest first, one's own alone."""
    async with agent(service, client="bob") as connected:
        assert await texts(connected, "list", running=True) == ["There are no jobs that have not ended."]
        first = id_in((await texts(connected, "run", command="printf 'a\nb'"))[0])
        second = id_in((await texts(connected, "run", command="exec sleep 600", wait_seconds=1))[0])
        words, lines = await texts(connected, "list", limit=2)
        assert words == "The 2 newest jobs; there may be more, newest first:"
        newest, older = lines.splitlines()
        assert newest == f"Job {second} has not ended: running. Command: exec sleep 600"
        assert re.fullmatch(rf"Job {first} ended after [0-9]s: exit code 0\. Command: printf 'a\\nb'", older)
        words, lines = await texts(connected, "list", running=True)
        assert (words, id_in(lines)) == ("All jobs that have not ended, newest first:", second)
        await texts(connected, "stop", job=second, grace_seconds=0)
    async with agent(service) as connected:
        assert await refused(connected, "poll", job=second) == f"error: no job {second}"


async def test_errors_have_hints(service: Service) -> None:
    """And are results of tools, for the model to read."""
    async with agent(service) as connected:
        assert await refused(connected, "poll", job="no-such-name") == "error: no job no-such-name"
        assert (await refused(connected, "stop", job="7/x")).startswith("error: '7/x' is no job\nhint: ")
        assert "memory" in await refused(connected, "run", command="true", memory="much")
        assert (await refused(connected, "run", command="true", workdir="/none")).startswith(
            "error: cannot enter the working directory /none: "
        )
        said = await refused(connected, "run", command="true", wait_seconds=0)
        assert "wait_seconds" in said
        job = id_in((await texts(connected, "run", command="true"))[0])
        assert "it has 0 bytes" in await refused(connected, "poll", job=job, offset=99)
    # nobody listens there
    async with agent(service, PJW_SERVER="127.0.0.1:1") as connected:
        assert await refused(connected, "list") == (
            "error: cannot connect to 127.0.0.1:1: connection refused\nhint: is pjwd running there?"
        )


@pytest.mark.parametrize("inside", [False, True], ids=["a job", "inside a job"])
async def test_a_cancelled_run_stops_its_command(service: Service, *, inside: bool) -> None:
    """As soon as the agent takes its call back; a poll that is taken back stops nothing."""
    async with agent(service) as connected:
        job = id_in((await texts(connected, "run", command="exec sleep 600", wait_seconds=1))[0])
        arguments = {"in_job": job} if inside else {}
        marker = f"cancelled-{'inside' if inside else 'job'}"
        command = f"trap 'exit 7' TERM HUP; echo {marker}; while :; do sleep 0.05; done"
        before = len(service.job_cgroups())
        call = asyncio.ensure_future(called(connected, "run", command=command, wait_seconds=300, **arguments))

        def processes() -> int:
            found = subprocess.run(["pgrep", "-fc", f"echo {marker}"], capture_output=True, check=False)
            return int(found.stdout)

        await asyncio.to_thread(wait_for, processes)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.to_thread(wait_for, lambda: not processes())
        await asyncio.to_thread(wait_for, lambda: len(service.job_cgroups()) <= before)
        call = asyncio.ensure_future(called(connected, "poll", job=job, wait_seconds=300))
        # the server answers in turn: then it has read the poll before
        await texts(connected, "list")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert "has not ended" in (await texts(connected, "poll", job=job, wait_seconds=1))[0]
        await texts(connected, "stop", job=job, grace_seconds=0)


class Raw:
    """`pjw mcp` and lines of JSON, for what the official client does not do."""

    def __init__(self, service: Service) -> None:
        self.process: Final = subprocess.Popen(
            [PJW, "mcp"],
            env=service.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.send(
            "initialize",
            1,
            protocolVersion="2025-06-18",
            capabilities={},
            clientInfo={"name": "test", "version": "1"},
        )
        self.receive(1)
        self.send("notifications/initialized")

    def send(self, method: str, number: int | None = None, **params: Any) -> None:
        """Write a request, or without a number a notification."""
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        if number is not None:
            message["id"] = number
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def receive(self, number: int) -> Any:
        """The answer of this number; every line is JSON."""
        assert self.process.stdout is not None
        while message := json.loads(self.process.stdout.readline()):
            if message.get("id") == number:
                return message
        raise AssertionError

    def begin_run(self, service: Service, command: str) -> str:
        """Call run, which is not answered for long; the id of its job, when that runs."""
        before = service.ok("list").split()
        self.send("tools/call", 2, name="run", arguments={"command": command, "wait_seconds": 300})
        wait_for(lambda: len(service.ok("list").split()) > len(before))
        [job] = set(service.ok("list").split()) - set(before)
        return job


@pytest.mark.parametrize("how", ["stdin ends", "SIGTERM", "SIGINT", "SIGHUP"])
def test_the_end_of_the_agent(service: Service, how: str) -> None:
    """It ends pjw mcp. What the agent was not told of is stopped, what it was told of goes on."""
    raw = Raw(service)
    raw.send("tools/call", 7, name="run", arguments={"command": "exec sleep 600", "wait_seconds": 1})
    [part] = raw.receive(7)["result"]["content"]
    told = id_in(part["text"])
    untold = raw.begin_run(service, "exec sleep 600")
    if how == "stdin ends":
        _, stderr = raw.process.communicate(timeout=CALL_SECONDS)
        assert raw.process.returncode == 0
    else:
        number = signal.Signals[how]
        raw.process.send_signal(number)
        assert raw.process.wait(CALL_SECONDS) == 128 + number
        _, stderr = raw.process.communicate(timeout=CALL_SECONDS)
    assert stderr == b""
    assert service.pjw("wait", untold).stdout == b"143\n"
    assert json.loads(service.ok("get", told))["state"] == "running"
    service.ok("stop", "--grace", "0", told)


def test_a_killed_agent(service: Service, tmp_path: Path) -> None:
    """SIGKILL of the program of the agent ends pjw mcp too: it has no more of its pipes."""
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([{PJW!r}, 'mcp'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env=service.environment(), stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    assert select.select([pidfd], [], [], CALL_SECONDS)[0]
    os.close(pidfd)


def test_at_a_terminal(service: Service) -> None:
    """A person is told what it is for."""
    assert service.at_terminal("mcp", columns=200).splitlines() == [
        "pjw: error: cannot serve agents: stdin is not a pipe; the program of the agent starts this command",
        "hint: for Claude Code: claude mcp add pjw -- pjw mcp",
    ]


def test_without_a_certificate(service: Service, tmp_path: Path) -> None:
    """It is an error of pjw's, as for every command, before anything is served."""
    done = subprocess.run(
        [PJW, "mcp"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("pjw: error: no --ca-crt is given\nhint: ")
    assert service.refused("mcp", "--all")[0] == 2
