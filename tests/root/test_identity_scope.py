"""Who a certificate makes its owner, and that nobody sees, stops or reads another's jobs."""

import os
import random
import re
import signal
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import grpc
import pytest
from cryptography.x509 import ObjectIdentifier

from pjw.v1 import job_worker_pb2 as pb
from tests.support import certs_factory
from tests.support.certs_factory import CN, ODD_SUBJECTS, OID, Subject, issue
from tests.support.service import METHODS, Service, ask, wait_for

# The methods that name a job: for them another's job is answered like none.
NAMING: Final = ("Get", "Stop", "Logs", "Delete", "Wait", "GetUsageHistory", "Hold", "Release")
# A share of pairs has then a standard error of 0.013.
ROUNDS: Final = 1000


@pytest.fixture(scope="module")
def ca(service: Service) -> certs_factory.Made:
    """The service's own CA, which issues whatever a test wants."""
    return certs_factory.load(
        (service.certs / "ca.crt").read_bytes(), (service.certs / "ca.key").read_bytes()
    )


@contextmanager
def named(
    service: Service, ca: certs_factory.Made, directory: Path, subject: Subject, *, sans: tuple[str, ...] = ()
) -> Iterator[grpc.Channel]:
    """A connection of a client with that subject."""
    with service.channel(issue(ca, subject, sans=sans).write(directory, "client")) as channel:
        yield channel


def started(channel: grpc.Channel) -> pb.Job:
    """A short job of that client."""
    messages, code, said, *_ = ask(channel, "Start", pb.StartRequest(command="true").SerializeToString())
    assert code is grpc.StatusCode.OK, said
    return pb.StartResponse.FromString(messages[0]).job


@pytest.mark.parametrize(
    ("subject", "sans", "name"),
    [
        ([(CN, "carol")], (), "carol"),
        ([(CN, "carol")], ("localhost",), "carol"),
        ([(CN, "localhost"), (OID, "carol")], ("localhost",), "carol"),
        ([(CN, "mallory"), (OID, "carol")], (), "carol"),
        ([(CN, "carol.smith@example.org")], (), "carol.smith@example.org"),
        ([(CN, "c" * 64)], (), "c" * 64),
        ([(CN, "localhost")], ("localhost",), None),
        ([(CN, "localhost")], (), None),
        ([(CN, "build.example.org")], ("build.example.org",), None),
        ([], (), None),
    ],
)
def test_a_certificate_names_its_owner(
    service: Service,
    ca: certs_factory.Made,
    tmp_path: Path,
    subject: Subject,
    sans: tuple[str, ...],
    name: str | None,
) -> None:
    """clientName, a CN that is no host; else the key itself is the name."""
    with named(service, ca, tmp_path, subject, sans=sans) as channel:
        job = started(channel)
    if name is None:
        assert re.fullmatch(r"key-[0-9a-f]{32}", job.client_name)
    else:
        assert job.client_name == name


def test_the_operator_chooses_the_attribute_that_names_clients(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    """With an OID of the operator's own, that attribute is the name, and ours is no more."""
    oid = ObjectIdentifier("1.3.6.1.4.1.99999.1")
    own = make_service(clients=["alice"], config=f'client_name_oid = "{oid.dotted_string}"\n').start()
    issuer = certs_factory.load((own.certs / "ca.crt").read_bytes(), (own.certs / "ca.key").read_bytes())
    with named(own, issuer, tmp_path, [(CN, "localhost"), (oid, "carol"), (OID, "mallory")]) as channel:
        assert started(channel).client_name == "carol"
    with named(own, issuer, tmp_path, [(CN, "localhost"), (OID, "mallory")]) as channel:
        assert started(channel).client_name.startswith("key-")


def test_who_is_let_in_is_the_operator_s_to_say(make_service: Callable[..., Service], tmp_path: Path) -> None:
    """A name in a CN is refused by default; with a list of clients everybody else is, also after a reload."""
    tail: Subject = [(CN, "localhost/clientName=carol")]
    own = make_service(clients=["alice", "mallory"], config="").start()
    issuer = certs_factory.load((own.certs / "ca.crt").read_bytes(), (own.certs / "ca.key").read_bytes())
    with named(own, issuer, tmp_path, tail) as channel:
        _, code, said, *_ = ask(channel, "Start", pb.StartRequest(command="true").SerializeToString())
    assert (code, "client_name_in_cn" in said) == (grpc.StatusCode.UNAUTHENTICATED, True)
    own.stop()
    own.config = 'client_name_in_cn = true\nallowed_clients = ["alice", "carol"]\n'
    own.start()
    with named(own, issuer, tmp_path, tail) as channel:
        assert started(channel).client_name == "carol"
    _, code, said, *_ = own.answer("List", b"", "mallory")
    assert (code, said) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "mallory is not among the clients of this server",
    )
    own.await_log("client 'mallory' is refused: it is not among allowed_clients")
    job_id = own.start_job("exec sleep 1000")
    with own.stub("alice") as stub:
        follower = stub.Logs(pb.LogsRequest(id=job_id))
        own.config = 'client_name_in_cn = true\nallowed_clients = ["mallory"]\n'
        (own.directory / "pjwd.toml").write_text(own.config)
        os.kill(own.pid, signal.SIGHUP)
        with pytest.raises(grpc.RpcError) as caught:
            list(follower)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert own.answer("List", b"", "mallory")[1] is grpc.StatusCode.OK
    (own.directory / "pjwd.toml").write_text("")
    own.config = ""
    os.kill(own.pid, signal.SIGHUP)
    wait_for(lambda: own.answer("List", b"", "alice")[1] is grpc.StatusCode.OK)


def test_a_name_is_one_client_whatever_its_key(
    service: Service, ca: certs_factory.Made, tmp_path: Path
) -> None:
    """A renewed certificate keeps its jobs; one of the same host name and another key has none of them."""
    for subject, sees in (([(CN, "dave")], True), ([(CN, "localhost")], False)):
        with named(service, ca, tmp_path, subject) as first, named(service, ca, tmp_path, subject) as second:
            job = started(first)
            assert (ask(second, "Get", pb.GetRequest(id=job.id).SerializeToString())[1].name == "OK") == sees


def test_certificates_that_are_sent_along_name_nobody(
    service: Service, ca: certs_factory.Made, tmp_path: Path
) -> None:
    """Another client's good certificate behind one's own changes nothing; before it, nobody gets in."""
    own, other = issue(ca, [(CN, "grace")]), issue(ca, [(CN, "alice")])
    behind = certs_factory.Made(own.certificate, own.key, (other.certificate,))
    with service.channel(behind.write(tmp_path, "behind")) as channel:
        assert started(channel).client_name == "grace"
    # gRPC itself refuses a key that is not the first certificate's, before anything is sent
    before = certs_factory.Made(other.certificate, own.key, (own.certificate,))
    with service.channel(before.write(tmp_path, "before")) as channel:
        assert ask(channel, "List", b"", timeout=20)[:2] == ([], grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize("name", ODD_SUBJECTS)
def test_an_odd_name_is_refused_by_every_method(
    service: Service, ca: certs_factory.Made, tmp_path: Path, name: str
) -> None:
    """Slashes, newlines, 64 KiB, look-alikes: refused in printable words, and never called something else."""
    before = service.made()
    with named(service, ca, tmp_path, ODD_SUBJECTS[name]) as channel:
        for method, _ in METHODS:
            messages, code, said, *_ = ask(
                channel, method, pb.StartRequest(command="true").SerializeToString()
            )
            assert messages == []
            # a certificate of 64 KiB is too much for TLS already
            assert code is grpc.StatusCode.UNAUTHENTICATED or (
                name == "64 KiB" and code.name == "UNAVAILABLE"
            )
            assert name == "64 KiB" or said.startswith("cannot name the client: ")
            assert said.isascii() and said.isprintable() and len(said) < 300
    # nothing new; what jobs of other clients have left may go meanwhile
    ids, jobs, scratch, cgroups = service.made()
    assert ids == before[0]
    assert (set(jobs) | set(scratch)) <= {*before[1], *before[2]}
    assert set(cgroups) <= set(before[3])


def test_a_job_of_an_odd_name_can_be_neither_made_nor_reached_on_disk(service: Service) -> None:
    """Names become no paths: below the state directory there are ids alone."""
    found = [path.name for name in ("jobs", "scratch") for path in (service.state / name).iterdir()]
    # the directory of all sessions has that name
    assert all(name.isdecimal() for name in found if name != "sessions")


@pytest.mark.parametrize("method", NAMING)
@pytest.mark.parametrize("ended", [False, True], ids=["running", "ended"])
def test_another_clients_job_is_answered_like_none(service: Service, method: str, *, ended: bool) -> None:
    """Before an id exists and when it is another's, code, words and all metadata are the same to the byte."""
    with service.channel("bob") as bob:
        job_id = service.start_job("true") + 1
        request = pb.GetRequest(id=job_id).SerializeToString()  # the id is the first field of all of them
        none = ask(bob, method, request)
        assert service.start_job("echo secret" if ended else "echo secret; sleep 300") == job_id
        if ended:
            service.ok("logs", str(job_id))
        another = ask(bob, method, request)
        assert another == none
        assert another[0] == []
        assert (another[1], another[2]) == (grpc.StatusCode.NOT_FOUND, f"no job {job_id}")
    assert service.job(job_id).reason != pb.END_REASON_STOPPED
    assert service.ok("stop", str(job_id))


@pytest.mark.parametrize("method", NAMING)
def test_no_time_tells_another_clients_job_from_none(service: Service, method: str) -> None:
    """Of two answers, one about another's job and one about none, either is the slower one as often.

    Measured by the share of pairs in which the first kind is slower (Mann and Whitney): 0.5 when the two are
    alike. Where they are, ROUNDS samples miss the bound once in a million runs.
    """
    running, ended = service.start_job("sleep 300"), service.start_job("true")
    service.ok("logs", str(ended))
    kinds = {"running": running, "ended": ended, "none": 2**40}
    took: dict[str, list[int]] = {kind: [] for kind in kinds}
    with service.channel("bob") as bob:
        for _ in range(ROUNDS):
            # in any order, so that none of them always comes after the same one
            for kind in random.sample(list(kinds), len(kinds)):
                request = pb.GetRequest(id=kinds[kind]).SerializeToString()
                begin = time.perf_counter_ns()
                code = ask(bob, method, request)[1]
                took[kind].append(time.perf_counter_ns() - begin)
                assert code is grpc.StatusCode.NOT_FOUND
    service.ok("stop", str(running))
    slower = {kind: share_slower(took[kind], took["none"]) for kind in ("running", "ended")}
    assert all(abs(share - 0.5) < 0.065 for share in slower.values()), slower


def share_slower(one: list[int], other: list[int]) -> float:
    """The share of all pairs of samples in which the one took longer than the other."""
    ordered = sorted(other)
    pairs = sum(bisect_left(ordered, sample) + bisect_right(ordered, sample) for sample in one)
    return pairs / (2 * len(one) * len(other))


def test_the_table_of_scoped_methods_is_whole() -> None:
    """A new method must be sorted: it names a job, or it must be shown to be scoped otherwise."""
    # for the quota of another client: tests/root/test_shares.py; for what a submission waits for:
    # tests/root/test_queue_after.py; for sessions and ports: tests/root/test_cli_exec.py and test_forward.py
    # for watches: tests/root/test_watch.py; for workspaces and images: test_workspaces.py, test_images.py
    others = {"Start", "Submit", "List", "WatchUsage", "WriteInput", "GetQuota", "Exec", "Resize", "Forward"}
    assert {name for name, _ in METHODS} == {
        *NAMING,
        *others,
        "WatchJobs",
        "ListWorkspaces",
        "RemoveWorkspace",
        "LoadImage",
        "ListImages",
        "RemoveImage",
    }


def test_pjw_cannot_tell_another_clients_job_from_none(service: Service) -> None:
    """The command line says the same words with the same exit code."""
    job_id = service.start_job("sleep 300")
    for command in ("get", "stop", "logs"):
        mine = service.refused(command, "999999", client="bob")
        assert service.refused(command, str(job_id), client="bob") == (
            mine[0],
            mine[1].replace("999999", str(job_id)),
        )
    assert '"state": "running"' in service.ok("get", str(job_id))
    service.ok("stop", str(job_id))


def test_a_list_holds_ones_own_jobs_alone(service: Service, ca: certs_factory.Made, tmp_path: Path) -> None:
    """Two clients start jobs in turn, and each list has its own in order, page by page."""
    mine: dict[str, list[int]] = {"erin": [], "frank": []}
    with ExitStack() as stack:
        channels = {name: stack.enter_context(named(service, ca, tmp_path, [(CN, name)])) for name in mine}
        for _ in range(3):
            for name, channel in channels.items():
                mine[name].append(started(channel).id)
        for name, channel in channels.items():
            seen, token = [], ""
            while True:
                request = pb.ListRequest(page_size=2, page_token=token)
                page = pb.ListResponse.FromString(ask(channel, "List", request.SerializeToString())[0][0])
                seen += [job.id for job in page.jobs]
                assert {job.client_name for job in page.jobs} <= {name}
                token = page.next_page_token
                if not token:
                    break
            assert seen == mine[name]
        # a token of one's own, moved to another's ids, shows nothing of them
        request = pb.ListRequest(page_token=str(mine["frank"][0] - 1))
        page = pb.ListResponse.FromString(ask(channels["erin"], "List", request.SerializeToString())[0][0])
        assert {job.client_name for job in page.jobs} == {"erin"}


def test_two_clients_jobs_run_as_two_users(service: Service) -> None:
    """The name decides the uid: one client's jobs share it, another's have another."""
    uids = [
        service.ok("logs", str(service.start_job("id -u", client)), client=client)
        for client in ("alice", "alice", "bob")
    ]
    assert uids[0] == uids[1] != uids[2]
    assert all(int(uid) >= 1_900_000_000 for uid in uids)
