"""What systemd is told, on a real datagram socket: states, and that all is well only while it is."""

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pjw.errors import LauncherGoneError
from pjw.server.systemd import Notifier


class Systemd:
    """The other end: a socket, and the environment that names it."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(30)
        self.environment = {"NOTIFY_SOCKET": address}

    def heard(self) -> dict[str, str]:
        """The next message."""
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))

    def silent(self) -> bool:
        """Whether no message waits."""
        try:
            self.socket.setblocking(False)
            self.socket.recv(4096)
        except BlockingIOError:
            return True
        return False


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    """A socket of each kind that systemd may use."""
    made = Systemd(f"@pjw-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify"))
    with made.socket:
        yield made


def test_states_are_told(systemd: Systemd) -> None:
    """Start, reload with its time, and end."""
    notifier = Notifier(systemd.environment)
    notifier.ready("serving")
    assert systemd.heard() == {"READY": "1", "STATUS": "serving"}
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    heard = systemd.heard()
    assert heard["RELOADING"] == "1"
    assert before <= int(heard["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.stopping()
    assert systemd.heard()["STOPPING"] == "1"


async def test_the_watchdog_hears_twice_in_each_interval_while_the_launcher_answers(systemd: Systemd) -> None:
    """Each time after a question, and nothing once that stays without an answer."""
    notifier = Notifier({**systemd.environment, "WATCHDOG_USEC": "400000", "WATCHDOG_PID": str(os.getpid())})
    asked = 0
    hung = asyncio.Event()

    async def alive() -> None:
        nonlocal asked
        asked += 1
        if asked == 4:
            hung.set()
            await asyncio.Event().wait()

    began = time.monotonic()
    watch = asyncio.ensure_future(notifier.watch(alive, lambda: "fine"))
    async with asyncio.timeout(30):
        await hung.wait()
    # the pauses between four questions
    assert time.monotonic() - began >= 0.6
    assert [systemd.heard() for _ in range(3)] == [{"WATCHDOG": "1", "STATUS": "fine"}] * 3
    assert systemd.silent()
    watch.cancel()


async def test_a_launcher_that_has_gone_ends_the_watch(systemd: Systemd) -> None:
    """The server ends for that, and needs no traceback for it."""
    notifier = Notifier({**systemd.environment, "WATCHDOG_USEC": "400000"})

    async def alive() -> None:
        raise LauncherGoneError("gone")

    async with asyncio.timeout(30):
        await notifier.watch(alive, lambda: "fine")
    assert systemd.silent()


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "400000", "WATCHDOG_PID": "1"}],
    ids=["none", "nonsense", "another's"],
)
async def test_no_watchdog_no_messages(systemd: Systemd, environment: dict[str, str]) -> None:
    """Without an interval that is meant for this process nothing is asked and nothing said."""
    async with asyncio.timeout(30):
        await Notifier({**systemd.environment, **environment}).watch(_never, lambda: "")
    assert systemd.silent()


async def _never() -> None:
    raise AssertionError("asked")


async def test_without_systemd_nothing_is_told() -> None:
    """Started by hand there is nobody to tell."""
    notifier = Notifier({"WATCHDOG_USEC": "400000"})
    notifier.ready("")
    await notifier.watch(_never, lambda: "")


def test_a_systemd_that_is_gone_or_full_holds_nobody_up(
    systemd: Systemd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be sent is said in the log."""
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).stopping()
    assert "cannot notify systemd: no such file or directory (ENOENT)" in caplog.text
    notifier = Notifier(systemd.environment)
    for _ in range(2000):
        notifier.stopping()
    assert "(EAGAIN)" in caplog.text
