"""What pjwd writes down of the connections that pjwd-egress reports."""

import asyncio
import json
import socket

import pytest

from pjw.server.audit import connection_line
from pjw.worker import egress
from pjw.worker.egress import Connection, Connections
from pjw.worker.launcher_client import LauncherClient


class _Launcher(LauncherClient):
    """One that keeps the socket of pjwd-egress."""

    def __init__(self) -> None:
        pass

    async def request_egress(self, descriptor: int) -> None:
        self.reports = socket.socket(fileno=descriptor)


async def test_refusals_without_end_are_counted_and_not_all_written_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few of a client, and then how many were left out; another client has lines of its own."""
    monkeypatch.setattr(egress, "_LINES_AT_ONCE", 3)
    monkeypatch.setattr(egress, "_LINES_PER_SECOND", 0.0)
    launcher, connections, told = _Launcher(), Connections(), asyncio.Queue[Connection]()
    connections.told.append(told.put_nowait)
    await connections.begin(launcher)
    with launcher.reports:
        report = {"job": 7, "client": "alice", "host": "x.test", "port": 443, "result": "not_allowed"}
        for client in [*["alice"] * 10, "bob"]:
            launcher.reports.send(json.dumps({**report, "client": client}).encode())
        first = [await told.get() for _ in range(4)]
        assert [each.client_name for each in first] == ["alice"] * 3 + ["bob"]
        assert connections.counts["not_allowed"] == 11
        monkeypatch.setattr(egress, "_LINES_PER_SECOND", 1e9)
        launcher.reports.send(json.dumps(report).encode())
        later = await told.get()
        connections.close()
    assert (later.client_name, later.left_out) == ("alice", 7)
    assert json.loads(connection_line(later))["left_out"] == 7
    assert "left_out" not in json.loads(connection_line(first[0]))
