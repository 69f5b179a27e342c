"""News to systemd about a service with Type=notify (sd_notify(3)); none where it did not start us."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from pjw.errors import LauncherGoneError, describe_errno

log: Final = logging.getLogger(__name__)


class Notifier:
    """One datagram for each message, to the socket that the environment names."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        path = environment.get("NOTIFY_SOCKET", "")
        self._address: Final = "\0" + path[1:] if path.startswith("@") else path
        self._watchdog_seconds: Final = _watchdog_seconds(environment) if path else 0.0

    def ready(self, status: str) -> None:
        """Tell that the service serves: after its start, or after a reload."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Tell that a reload has begun; `ready` ends it."""
        # systemd tells by the time which reload is meant
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """Tell that the service ends."""
        self._send("STOPPING=1", "STATUS=draining")

    async def watch(self, alive: Callable[[], Awaitable[None]], status: Callable[[], str]) -> None:
        """Say twice in each interval of the watchdog that all is well, if *alive* returns; until cancelled.

        This runs on the event loop, so a loop that hangs says nothing either.
        """
        if not self._watchdog_seconds:
            return
        try:
            while True:
                await alive()
                self._send("WATCHDOG=1", f"STATUS={status()}")
                await asyncio.sleep(self._watchdog_seconds / 2)
        except LauncherGoneError:
            return  # the server is about to end for that, and says so itself

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            # A full queue of systemd's must not hold us up: lost news is sent again.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify:
                notify.connect(self._address)
                notify.send("\n".join(lines).encode())
        except OSError as error:
            log.warning("cannot notify systemd: %s", describe_errno(error.errno or 0))


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or pid not in ("", str(os.getpid())):
        return 0.0
    return int(usec) / 1e6
