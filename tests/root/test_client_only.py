"""A client without the packages of the service, on a system like ours and on one like Windows."""

import json
import subprocess
from pathlib import Path
from typing import Final

import pytest

from pjw.certs import authority
from tests.support import client_only
from tests.support.service import CALL_SECONDS, Service, wait_for


class Client:
    """The command line of somebody who has nothing but a bundle."""

    def __init__(self, programs: Path, home: Path) -> None:
        self.programs: Final = programs
        self.home: Final = home

    def run(self, *arguments: str, stdin: bytes = b"", **env: str) -> "subprocess.CompletedProcess[bytes]":
        """Run pjw to its end, without a terminal."""
        done = subprocess.run(
            [self.programs / "pjw", *arguments],
            env=client_only.environment(self.home) | env,
            input=stdin,
            capture_output=True,
            timeout=CALL_SECONDS,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done

    def ok(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run pjw, which must succeed and say nothing on stderr; its output."""
        done = self.run(*arguments, stdin=stdin)
        assert (done.returncode, done.stderr) == (0, b""), (arguments, done)
        return done.stdout.decode()


@pytest.fixture(scope="module", params=[False, True], ids=["here", "as on Windows"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a client alone."""
    return client_only.install(tmp_path_factory.mktemp("client") / "venv", as_windows=request.param)


@pytest.fixture
def bundle(service: Service, tmp_path: Path) -> Path:
    """The bundle of a client of the service."""
    authority.write_client(str(service.certs), tmp_path.name, bundle_server=service.address)
    return service.certs / f"{tmp_path.name}.pjw"


@pytest.fixture
def client(programs: Path, tmp_path: Path, bundle: Path) -> Client:
    """A client with a context of the service."""
    client = Client(programs, tmp_path)
    done = client.run("context", "add", "default", str(bundle))
    assert done.returncode == 0, done
    return client


def test_a_session(client: Client) -> None:
    """Start, list, get, logs, wait, stop, rm: as the README has them."""
    job = client.ok("start", "--name", "hello", 'echo "hello world"').strip()
    assert client.ok("wait", job) == "0\n"
    assert client.ok("logs", "hello") == "hello world\n"
    assert json.loads(client.ok("get", job))["name"] == "hello"
    other = client.ok("start", "trap 'exit 7' USR1; echo ready; while :; do sleep 0.01; done").strip()
    assert client.ok("list").split() == [job, other]
    with subprocess.Popen(
        [client.programs / "pjw", "logs", other],
        env=client_only.environment(client.home),
        stdout=subprocess.PIPE,
    ) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"ready\n"
        stopped = json.loads(client.ok("stop", "--signal", "USR1", other))
    assert (stopped["exitCode"], logs.returncode) == (7, 0)
    assert client.ok("rm", job, other).split() == [job, other]
    assert client.ok("list") == ""


def test_run_without_a_terminal(client: Client) -> None:
    """Its output on both streams, its input, its exit code."""
    done = client.run("run", "--split-stderr", "-i", "cat; echo oops >&2; exit 3", stdin=b"a\r\nb\x1a\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"a\r\nb\x1a\n", b"oops\n")


def test_contexts(client: Client, bundle: Path) -> None:
    """They are added, listed, shown, chosen and removed; a bundle also comes by stdin and by a variable."""
    assert client.ok("context", "add", "other", "-", stdin=bundle.read_bytes()).startswith("other: ")
    assert client.ok("context", "list") == "default\nother\n"
    assert f"client:       {bundle.stem}\n" in client.ok("context", "show", "other")
    assert client.run("context", "use", "other").returncode == 0
    assert client.ok("context", "rm", "default", "other") == "default\nother\n"
    assert client.ok("context", "list") == ""
    assert client.run("list", PJW_BUNDLE=bundle.read_text()).returncode == 0
    assert not list(client.home.glob(".config/pjw/contexts/*"))


def test_stats_have_no_plots(client: Client) -> None:
    """The numbers are there, and what brings the plots is named."""

    def samples(job: str) -> int:
        return len(json.loads(client.ok("stats", "--format", "json", job))["samples"])

    job = client.ok("start", "sleep 600").strip()
    # a plot is of two points at least
    wait_for(lambda: samples(job) > 1)
    client.ok("stop", "--grace", "0", job)
    done = client.run("stats", job)
    assert (done.returncode, done.stderr) == (
        0,
        b"pjw: without plots: the package plotext is not installed; pip install 'pjw-client[top]'\n",
    )
    assert b"CPU        " in done.stdout
    assert b"percent" not in done.stdout
    assert samples(job) > 1


def test_the_library(client: Client) -> None:
    """The same, from a program."""
    program = "import pjw\nwith pjw.Client.from_context() as client: print(client.run('echo hi').output)"
    done = subprocess.run(
        [client.programs / "python", "-c", program],
        env=client_only.environment(client.home),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"b'hi\\n'\n", b"")
