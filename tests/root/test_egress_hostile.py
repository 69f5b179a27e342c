"""Names on the network in the hands of a broken or hostile server: the launcher gives what root offered."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from pjw.launcher.protocol import Adopt, Adopted, Done, Egress, Kill, Launched, Refused, Terminate
from tests.root.test_launcher_hostile import Peer, connect
from tests.support.service import wait_for
from tests.support.worker_harness import Bench

__all__ = ["connect"]

POLICY: Final[dict[str, Any]] = {
    "egress_uid": 2_147_400_001,
    "egress_hosts": ("good.test", "*.wild.test:8443"),
    "egress_connections_max": 8,
    "egress_connections_total_max": 16,
}
REFUSED: Final = {
    "offered to nobody": ("other.test",),
    "another port": ("good.test:22",),
    "a wider pattern": ("*.test:8443",),
    "written in another way": ("GOOD.test",),
    "twice": ("good.test", "good.test"),
    "no name": ("good.test/../",),
    "an option": ("--uid",),
    "too many": tuple(f"a{number}.wild.test:8443" for number in range(17)),
}


@pytest.fixture
def egress(connect: Callable[..., Peer]) -> Iterator[Peer]:
    """A launcher whose pjwd-egress was started."""
    peer = connect(**POLICY)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert peer.ask(Egress(), [theirs.fileno()]) == Done()
        yield peer


def refused(reply: object, kind: str = "invalid") -> str:
    """The words of a refusal of that kind."""
    assert isinstance(reply, Refused), reply
    assert reply.kind == kind, reply
    return reply.operation


@pytest.mark.parametrize("allow", REFUSED.values(), ids=REFUSED)
def test_names_that_root_has_not_offered(bench: Bench, egress: Peer, allow: tuple[str, ...]) -> None:
    """Neither for a new job nor for one that runs; nothing is made."""
    refused(egress.launch(1, allow=allow))
    refused(egress.ask(Adopt(1, allow=allow)))
    assert bench.remains() == []
    assert isinstance(egress.launch(1, allow=("good.test", "x.wild.test:8443")), Launched)


def test_links_that_are_none(egress: Peer) -> None:
    """A link is a word."""
    for link in ("/proc/1/ns/net", "..", "a/b", "x" * 64):
        refused(egress.launch(1, link=link))
        refused(egress.ask(Adopt(1, link=link)))


def test_the_process_is_started_once_and_where_something_is_offered(
    connect: Callable[..., Peer], bench: Bench
) -> None:
    """With a socket; a job with names needs it."""
    without = connect()
    ours, theirs = socket.socketpair()
    with ours, theirs, ExitStack() as stack:
        refused(without.ask(Egress(), [theirs.fileno()]))
        without.hang_up()
        peer = connect(**POLICY)
        refused(peer.launch(1, allow=("good.test",)), "state")
        file = os.memfd_create("no socket")
        stack.callback(os.close, file)
        refused(peer.ask(Egress(), [file]))
        assert peer.ask(Egress(), [theirs.fileno()]) == Done()
        refused(peer.ask(Egress(), [theirs.fileno()]), "state")
    assert bench.remains() == []


def network(bench: Bench, job_id: int) -> str:
    """The network namespace of a job."""
    return os.readlink(f"/proc/{bench.init_pid(job_id)}/ns/net")


def test_a_link_of_another_user(bench: Bench, egress: Peer, connect: Callable[..., Peer]) -> None:
    """Whatever the server says of a job, its network is for jobs of the user that it was launched for."""
    for job_id, uid in ((1, egress.uid), (2, egress.uid + 1), (3, egress.uid)):
        assert isinstance(egress.launch(job_id, uid=uid, link="tests"), Launched)
    assert network(bench, 1) == network(bench, 3)
    assert network(bench, 1) != network(bench, 2)
    assert isinstance(egress.launch(4, uid=egress.uid + 1, link="other"), Launched)
    # a later launcher goes by the owner of the job's own directory, and by what it is told at first
    egress.hang_up()
    later = connect()
    for job_id in (1, 2, 3, 4):
        later.jobs.append(job_id)
        assert isinstance(later.ask(Adopt(job_id, link="tests")), Adopted)
    assert isinstance(later.launch(5, link="tests"), Launched)
    assert isinstance(later.launch(6, uid=later.uid + 2, link="tests"), Launched)
    assert network(bench, 5) == network(bench, 1)
    assert network(bench, 6) not in {network(bench, job_id) for job_id in (1, 2, 3, 4, 5)}


def test_kills_without_end(bench: Bench, egress: Peer) -> None:
    """The launcher answers all along, and loses no descriptor; a job that ends gives its own back."""

    def process() -> int:
        children = Path(f"/proc/{egress.pid}/task/{egress.pid}/children").read_text().split()
        for pid in children:
            # a child that was killed goes between the two looks
            with suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{pid}/comm").read_text() == "pjwd-egress\n":
                    return int(pid)
        return 0

    assert isinstance(egress.launch(1, allow=("good.test", "x.wild.test:8443")), Launched)
    former = 0
    for _ in range(3):
        wait_for(lambda: process() not in (0, former))  # noqa: B023  called at once
        former = process()
        os.kill(former, signal.SIGKILL)
        assert egress.ask(Terminate(1, signal.SIGWINCH)) == Done()
    wait_for(lambda: process() not in (0, former))
    before = egress.open_descriptors()
    # init, its status file, and two listeners
    assert egress.ask(Kill(1, init_too=True)) == Done()
    wait_for(lambda: egress.open_descriptors() <= before - 2)
