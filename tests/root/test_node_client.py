"""A client that shares no code with pjw: Node's @grpc/grpc-js, over mutual TLS.

What pjw and pjwd get wrong together, neither of them would notice; another implementation of gRPC, TLS and
protobuf does. Without npm these tests are skipped: `make check`, which CI runs first, demands it.
"""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.service import CALL_SECONDS, Service

ROOT: Final = Path(__file__).parents[2]
CLIENTS: Final = ROOT / "tests" / "clients"

pytestmark = pytest.mark.skipif(
    shutil.which("npm") is None,
    reason="no npm on this system: the Node client needs Node.js 18 or newer with npm"
    " (on Debian: sudo apt-get install npm, then scripts/install test)",
)


def node(service: Service, *arguments: str, stdin: str = "") -> str:
    """Run a program of Node with the certificates of alice; its output."""
    # Node warns of a server that is named by its address: RFC 6066 has only names for SNI
    server = service.address.replace("127.0.0.1", "localhost")
    done = subprocess.run(
        ["node", *arguments],
        cwd=CLIENTS,
        env={**service.environment(), "PJW_SERVER": server},
        input=stdin,
        capture_output=True,
        timeout=CALL_SECONDS,
        check=False,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def session(service: Service, *way: str) -> dict[str, dict[str, Any]]:
    """What each step of the session saw."""
    steps = [json.loads(line) for line in node(service, "session.mjs", *way).splitlines()]
    return {step.pop("step"): step for step in steps}


def check(seen: dict[str, dict[str, Any]]) -> None:
    """What a client must have seen, whichever way it learned the contract."""
    job = seen["start"]["job"]
    assert (job["state"], job["client_name"]) == ("JOB_STATE_RUNNING", "alice")
    # a string in JSON, as in the seed
    assert isinstance(job["id"], str)
    assert job["id"].isdecimal()
    assert bytes.fromhex(seen["logs"]["hex"]) == bytes(range(256))
    entered = seen["exec"]
    assert entered["output"].endswith("44 102\r\ngot words\r\n")
    assert (entered["session"]["exit_code"], entered["session"]["state"]) == (3, "JOB_STATE_EXITED")
    assert seen["exec of what is not there"]["details"].startswith("cannot execute /no/such: ")
    left, back = seen["attach"]["first"], seen["attach"]["second"]
    # what was typed, and what was shown, before and after: nothing twice, and nothing missing
    assert [(each["offset"], each["output"]) for each in (left, back)] == [
        ("0", "got one\r\n"),
        ("4", "44 102\r\nthen two\r\n"),
    ]
    assert seen["attach"]["session"]["exit_code"] == 4
    assert seen["forward"] == {"output": "WORDS"}
    assert seen["forward to nobody"]["code"] == "FAILED_PRECONDITION"
    assert "connection refused" in seen["forward to nobody"]["details"]
    stopped = seen["stop"]["job"]
    assert (stopped["state"], stopped["reason"], stopped["signal"]) == (
        "JOB_STATE_EXITED",
        "END_REASON_STOPPED",
        signal.SIGTERM,
    )
    assert seen["get"]["job"] == stopped
    changes = seen["changes"]
    assert [each["job"]["state"] for each in changes["all"]] == ["JOB_STATE_QUEUED", "JOB_STATE_EXITED"]
    assert changes["rest"] == changes["all"][1:]
    assert isinstance(changes["rest"][0]["sequence"], str)
    assert stopped["exit_code"] == 128 + signal.SIGTERM
    assert stopped["output_bytes"] == "256"

    held = seen["submit"]["job"]
    assert (held["state"], held["priority"], held["held"]) == ("JOB_STATE_QUEUED", 7, True)
    assert held.get("start") is None
    assert seen["hold"]["job"] == held
    cancelled = seen["stop in the queue"]["job"]
    assert (cancelled["state"], cancelled["reason"]) == ("JOB_STATE_EXITED", "END_REASON_CANCELLED")
    assert cancelled.get("start") is None
    assert "exit_code" not in cancelled
    assert seen["release of what has ended"] == {
        "code": "FAILED_PRECONDITION",
        "details": f"cannot release job {held['id']}: it does not wait in the queue (any more)",
        "hint": [],
    }
    assert seen["delete of what runs"] == {
        "code": "FAILED_PRECONDITION",
        "details": f"cannot remove job {job['id']}: it has not ended",
        "hint": [f"pjw stop {job['id']}"],
    }
    # 2^53 + 1: a client that makes a number of it asks for another job
    assert seen["get of none"] == {"code": "NOT_FOUND", "details": "no job 9007199254740993", "hint": []}
    assert seen["start of nothing"]["code"] == "INVALID_ARGUMENT"
    assert seen["start of what is not there"]["code"] == "FAILED_PRECONDITION"
    assert seen["start of what is not there"]["details"].startswith("cannot execute /no/such: ")
    # gRPC sends no alert: whom the handshake refuses finds its connection closed
    assert seen["without a certificate"]["code"] == "UNAVAILABLE"


def test_a_session_by_the_proto(service: Service) -> None:
    """Start, exec, attach, forward, logs, stop, get, bytes and errors, by nothing but the .proto file."""
    check(session(service, "proto", str(ROOT / "src")))


def test_a_session_by_reflection(service: Service) -> None:
    """The same with nothing but what the server says of itself."""
    check(session(service, "reflection"))


def test_the_program_of_the_documents(service: Service) -> None:
    """What docs/node.md shows runs as it stands, and says what it says."""
    [program] = re.findall(r"```js\n(.*?)```", (ROOT / "docs" / "node.md").read_text(), re.DOTALL)
    assert 'includeDirs: ["proto"]' in program
    program = program.replace('["proto"]', json.dumps([str(ROOT / "src")]))
    *dates, end, missing = node(service, "--input-type=module", "-", stdin=program).splitlines()
    assert len(dates) >= 3
    assert re.fullmatch(rf"job \d+: JOB_STATE_EXITED END_REASON_STOPPED, signal {signal.SIGTERM:d}", end)
    assert missing == "NOT_FOUND: no job 9007199254740993"
