"""The operator's side of a real pjwd: health, reflection, metrics, logs, check, and a configuration anew."""

import json
import os
import random
import re
import select
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client.parser import text_string_to_metric_families

from pjw.certs import authority
from pjw.server import connections
from pjw.server import metrics as metrics_module
from pjw.v1 import job_worker_pb2 as pb
from tests.support.disks import disk_with_queue
from tests.support.service import Service, reloaded, wait_for
from tests.support.uploads import upload

ROOT: Final = Path(__file__).parents[2]
SERVICE: Final = "pjw.v1.JobWorkerService"
SECONDS: Final = 60
SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING


def free_port() -> int:
    """A port of loopback that nobody has, and nobody is given who takes any."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first // 2, first)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="module")
def port() -> int:
    """Where the metrics are."""
    return free_port()


@pytest.fixture
def watched(make_service: Callable[..., Service], port: int) -> Service:
    """A service with metrics, and three clients."""
    config = f'[metrics]\nlisten = "127.0.0.1:{port}"\n[clients]\nrunning_max = 3\n'
    return make_service(clients=("alice", "bob", "carol"), config=config).start()


def unary(channel: grpc.Channel, method: str, request: Any, kind: Any) -> Any:
    """Call a method of another service than ours."""
    call: Any = channel.unary_unary(
        method,
        request_serializer=lambda each: each.SerializeToString(),
        response_deserializer=kind.FromString,
    )
    return call(request, timeout=SECONDS)


def check_health(channel: grpc.Channel, name: str = "") -> int:
    """Ask once."""
    request = health_pb2.HealthCheckRequest(service=name)
    answer = unary(channel, "/grpc.health.v1.Health/Check", request, health_pb2.HealthCheckResponse)
    return int(answer.status)


def watch_health(channel: grpc.Channel, name: str = "") -> Any:
    """Ask to be told."""
    call: Any = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=lambda each: each.SerializeToString(),
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return call(health_pb2.HealthCheckRequest(service=name), timeout=SECONDS)


def reflect(channel: grpc.Channel, version: str, *requests: Any) -> list[Any]:
    """Ask for the contract."""
    call: Any = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda each: each.SerializeToString(),
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return list(call(iter(requests), timeout=SECONDS))


def scraped(port: int) -> dict[tuple[str, tuple[str, ...]], float]:
    """What a Prometheus would read: values by name and the values of labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SECONDS) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# --- health and reflection


@pytest.mark.parametrize("name", ["", SERVICE, "grpc.health.v1.Health"])
def test_health_is_told_from_start_to_drain(make_service: Callable[..., Service], name: str) -> None:
    """SERVING while it serves; at SIGTERM who watches is told NOT_SERVING before the stream ends."""
    service = make_service().start()
    with service.channel() as channel:
        assert check_health(channel, name) == SERVING
        watch = watch_health(channel, name)
        assert next(watch).status == SERVING
        assert service.stop() == 0
        assert [answer.status for answer in watch] == [NOT_SERVING]
        assert watch.code() is grpc.StatusCode.OK


def test_the_health_of_what_is_not_there(service: Service) -> None:
    """As the protocol has it: NOT_FOUND for who checks, SERVICE_UNKNOWN for who watches."""
    with service.channel() as channel:
        with pytest.raises(grpc.RpcError) as caught:
            check_health(channel, "nosuch")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = watch_health(channel, "nosuch")
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_gives_the_contract(service: Service, version: str) -> None:
    """The list of services, and the file that a client needs to call ours."""
    asked = reflection_pb2.ServerReflectionRequest
    with service.channel() as channel:
        services, file, nothing = reflect(
            channel,
            version,
            asked(list_services=""),
            asked(file_containing_symbol=SERVICE),
            asked(file_by_filename="x"),
        )
    names = {each.name for each in services.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health", f"grpc.reflection.{version}.ServerReflection"} <= names
    assert pb.DESCRIPTOR.serialized_pb in file.file_descriptor_response.file_descriptor_proto
    assert nothing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_each_service_that_reflection_lists_is_described(service: Service) -> None:
    """Clients that show all of them give up at one that is not."""
    asked = reflection_pb2.ServerReflectionRequest
    with service.channel() as channel:
        [listed] = reflect(channel, "v1", asked(list_services=""))
        names = [each.name for each in listed.list_services_response.service]
        answers = reflect(channel, "v1", *(asked(file_containing_symbol=name) for name in names))
    assert len(names) == 4
    undescribed = [
        name for name, answer in zip(names, answers, strict=True) if answer.HasField("error_response")
    ]
    assert undescribed == []


def test_who_is_not_let_in_learns_nothing(make_service: Callable[..., Service]) -> None:
    """Without a certificate there is no connection; with a revoked one no answer."""
    service = make_service(clients=("alice",))
    revoked, aside = service.directory / "revoked", service.directory / "aside"
    authority.write_client(str(service.certs), "bob")
    aside.mkdir()
    for name in ("bob.crt", "bob.key"):
        (service.certs / name).rename(aside / name)
    files = (str(aside / "bob.crt"), str(aside / "bob.key"))
    serial = subprocess.run(
        ["openssl", "x509", "-in", files[0], "-noout", "-serial"],
        capture_output=True,
        check=True,
    ).stdout
    revoked.write_bytes(serial)
    service.config = f'revoked = "{revoked}"\n'
    service.start()
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    with service.channel(None) as nobody, service.channel(files) as bob:
        for channel, code in ((nobody, grpc.StatusCode.UNAVAILABLE), (bob, grpc.StatusCode.UNAUTHENTICATED)):
            for call in (
                lambda channel=channel: check_health(channel),
                lambda channel=channel: list(watch_health(channel)),
                lambda channel=channel: reflect(channel, "v1", asked),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call()
                assert caught.value.code() is code


# --- metrics


def test_metrics_tell_what_happened(watched: Service, port: int) -> None:
    """Starts, ends, refusals, calls, followers and bytes, as they were.

    What a caller asked for that cannot be is no failure of the service.
    """
    with ExitStack() as stack:
        alice, bob = (stack.enter_context(watched.stub(name)) for name in ("alice", "bob"))
        ids = [alice.Start(pb.StartRequest(command="sleep 100")).job.id for _ in range(3)]
        printed = bob.Start(pb.StartRequest(command="printf 1234567")).job.id
        assert b"".join(each.data for each in bob.Logs(pb.LogsRequest(id=printed))) == b"1234567"
        bob.Start(pb.StartRequest(command="sleep 100", name="web"))
        for stub, request in (
            (alice, pb.StartRequest(command="true")),
            (bob, pb.StartRequest(argv=pb.Argv(arguments=["/nosuch"]))),
            (bob, pb.StartRequest()),
            (bob, pb.StartRequest(command="true", name="web")),
            (bob, pb.StartRequest(command="true", workdir="/nosuch")),
        ):
            with pytest.raises(grpc.RpcError):
                stub.Start(request)
        follower = alice.Logs(pb.LogsRequest(id=ids[0]))
        wait_for(lambda: scraped(port)["pjw_followers", ()] == 1)
        wait_for(lambda: scraped(port)["pjw_jobs", ("ended",)] == 1)
        told = scraped(port)
        assert (told["pjw_jobs", ("running",)], told["pjw_calls_under_way", ("Logs",)]) == (4, 1)
        assert {key[1][0]: told[key] for key in told if key[0] == "pjw_starts_total"} == {
            "started": 5, "refused": 4, "not_executable": 1, "cancelled": 0, "failed": 0,
        }  # fmt: skip
        assert told["pjw_start_duration_seconds_count", ()] == 5
        assert 0 < told["pjw_start_duration_seconds_sum", ()] < SECONDS
        assert told["pjw_calls_total", ("RESOURCE_EXHAUSTED", "Start")] == 1
        assert told["pjw_calls_rejected_total", ("running_max",)] == 1
        assert told["pjw_calls_rejected_total", ("invalid",)] == 1
        assert told["pjw_call_duration_seconds_count", ("Start",)] == 10
        assert ("pjw_call_duration_seconds_count", ("Logs",)) not in told
        assert told["pjw_jobs_ended_total", ("completed",)] == 1
        assert told["pjw_output_streamed_bytes_total", ()] == told["pjw_stored_bytes", ()] == 7
        running = {key[1][0]: told[key] for key in told if key[0] == "pjw_client_running_jobs"}
        assert running == {"alice": 3, "bob": 1}
        assert told["pjw_client_stored_bytes", ("bob",)] == 7
        assert (told["pjw_connections", ("called",)], told["pjw_connections", ("unproven",)]) == (2, 0)
        assert told["pjw_connections_accepted_total", ()] >= 2
        assert {key: told[key] for key in told if key[0] == "pjw_connections_closed_total"} == {
            ("pjw_connections_closed_total", (cause,)): 0 for cause in connections.CAUSES
        }
        assert told["pjw_limit", ("running_max",)] == 3
        assert told["pjw_launcher_up", ()] == 1
        assert 0 < told["pjw_disk_free_bytes", ()] <= told["pjw_disk_size_bytes", ()]
        alice.Stop(pb.StopRequest(id=ids[0], grace=Duration()))
        list(follower)
        wait_for(lambda: scraped(port)["pjw_jobs_ended_total", ("stopped",)] == 1)


def packaged_queries() -> tuple[list[str], str]:
    """The expressions of the dashboard, and the file of the alerts."""
    dashboard = json.loads((ROOT / "packaging/grafana/pjw.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return asked, (ROOT / "packaging/prometheus/pjw.rules.yml").read_text()


def test_the_dashboard_and_the_alerts_ask_for_what_is_there(watched: Service, port: int) -> None:
    """Every metric in packaging/ is in a scrape, or is one of Prometheus's own."""
    watched.start_job("true")
    there = {name for name, _ in scraped(port)} | {"up"}
    asked, rules = packaged_queries()
    assert len(asked) > 20
    names = set(re.findall(r"\b(?:pjw|process)_\w+", "\n".join([*asked, rules])))
    assert len(names) > 15
    assert names - there == set()
    documented = (ROOT / "docs/monitoring.md").read_text()
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in there if name.startswith("pjw_")}
    assert [name for name in families if f"`{name}`" not in documented] == []


def test_what_alerts_wait_for_is_counted_from_0(watched: Service, port: int) -> None:
    """An increase() sees nothing of a counter that begins at 1: what alerts ask for is there before."""
    there = scraped(port)
    counters = re.findall(r'(pjw_\w+_total)\{\w+=~?"([^"]+)"\}', packaged_queries()[1])
    wanted = [(name, value) for name, values in counters for value in values.split("|")]
    assert len(wanted) >= 5
    for name, value in wanted:
        found = [there[key] for key in there if key[0] == name and value in key[1]]
        assert (name, value, found and set(found)) == (name, value, {0})
    reasons = {key[1][0] for key in there if key[0] == "pjw_calls_rejected_total"}
    assert reasons >= {"running_max", "not_allowed", "input_bytes_max"}


def test_who_does_not_read_metrics_keeps_nobody_waiting(watched: Service, port: int) -> None:
    """Calls go on beside idle connections; there are never more than a few, and later ones are closed."""
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(20)]
        with watched.stub() as stub:
            stub.List(pb.ListRequest(), timeout=SECONDS)
        threads = [
            Path(f"/proc/{watched.pid}/task/{task}") for task in os.listdir(f"/proc/{watched.pid}/task")
        ]
        assert len(threads) < 100
        closed = 0
        for each in idle[metrics_module.SCRAPES_MAX :]:
            each.settimeout(SECONDS)
            closed += each.recv(1) == b""
        assert closed == 20 - metrics_module.SCRAPES_MAX
        # at once, and not when all are let go of
        assert select.select(idle[: metrics_module.SCRAPES_MAX], [], [], 0)[0] == []
    # those that were idle make room when they leave
    wait_for(lambda: can_scrape(port))


def test_who_asks_for_metrics_byte_by_byte_is_let_go_of(watched: Service, port: int) -> None:
    """However often it sends one: in time there is room for others."""
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            for _ in range(metrics_module.SCRAPES_MAX)
        ]

        def can_scrape_beside() -> bool:
            for each in slow:
                with suppress(OSError):
                    each.send(b"G")
            return can_scrape(port)

        assert not can_scrape_beside()
        wait_for(can_scrape_beside, 2 * metrics_module.CONNECTION_SECONDS)


def can_scrape(port: int) -> bool:
    """Whether metrics can be had now."""
    try:
        return bool(scraped(port))
    except OSError:
        return False


def test_metrics_that_others_reach_are_warned_of(make_service: Callable[..., Service]) -> None:
    """By serve and by check: there is no TLS. And a port in use is named."""
    port = free_port()
    config = f'[metrics]\nlisten = "0.0.0.0:{port}"\n'
    service = make_service(config=config).start()
    assert scraped(port)["pjw_launcher_up", ()] == 1
    words = f"other hosts may reach the metrics at 0.0.0.0:{port}, without TLS or a password"
    assert f"WARNING: {words}" in service.log.read_text()
    command = service.command()
    command[1] = "check"
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    assert f"warning  {words}" in done.stdout.decode()
    second = make_service(config=config)
    done = subprocess.run(second.command(), capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 1
    assert f"cannot listen on 0.0.0.0:{port} for metrics: address already in use" in done.stderr.decode()


def test_a_removed_key_is_named_at_the_start_and_at_a_reload(make_service: Callable[..., Service]) -> None:
    """pjwd starts with the file of before an upgrade, and says what to delete."""
    removed = "[clients]\nstarts_burst = 1000\n"
    words = "clients.starts_burst was removed in 0.1.0 and has no effect; delete it: "
    service = make_service(config=removed).start()
    assert words in service.log.read_text()
    assert any(words in line for line in reloaded(service, removed + "running_max = 9\n"))


def test_what_root_alone_may_read(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pjwd that is installed below such a directory, as /root is, serves, with metrics too."""
    service = make_service(config=f'[metrics]\nlisten = "127.0.0.1:{(port := free_port())}"\n')
    hidden = service.directory / "hidden"
    hidden.mkdir(0o700)
    (hidden / "venv").symlink_to(sys.prefix)
    _, *options = service.command()
    command = [str(hidden / "venv/bin/python"), "-m", "pjw.server.main", *options]
    monkeypatch.setattr(service, "command", lambda: command)
    service.start()
    assert f"{hidden}/" in Path(f"/proc/{service.pid}/cmdline").read_text()
    assert service.ok("logs", service.ok("start", "echo done").strip()) == "done\n"
    assert scraped(port)["pjw_launcher_up", ()] == 1


# --- logs, check, reload


def test_the_log_is_json_in_each_line(make_service: Callable[..., Service]) -> None:
    """From the first line to the last, also of a start that fails."""
    service = make_service()
    command = service.command("--log-format", "json", "--log-level", "info")
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())
        assert first["message"].startswith("ready on 127.0.0.1:")
        process.terminate()
        rest = [json.loads(line) for line in process.stderr]
    assert process.returncode == 0
    assert rest[-1]["message"] == "stopping; 0 jobs go on"
    (service.certs / "server.key").unlink()
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 1
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert "cannot read private key" in said[0]["message"]


def checked(service: Service, *extra: str) -> tuple[int, str]:
    """`pjwd check` with the options of serve; its exit code, what it says."""
    command = service.command(*extra)
    command[1] = "check"
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    assert done.stderr == b""
    return done.returncode, done.stdout.decode()


@pytest.mark.parametrize(("usec", "warned"), [(75_000, True), (2000, False)])
def test_check_warns_of_long_write_back(
    make_service: Callable[..., Service], usec: int, *, warned: bool
) -> None:
    """Where the kernel queues writes for so long that they hold up the service; it names the setting."""
    with disk_with_queue(64, {"wbt_lat_usec": str(usec)}) as disk:
        text = checked(make_service(config=f'scratch_dir = "{disk}"\n'))[1]
        number = disk.stat().st_dev
        device = os.path.basename(os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"))
        assert (f"disk {device}: jobs' writes may hold up" in text) is warned, text
        assert (f"echo 2000 > /sys/block/{device}/queue/wbt_lat_usec" in text) is warned, text


def test_check_judges_the_configuration(make_service: Callable[..., Service]) -> None:
    """All is well, before a start and while pjwd runs; and nothing is made."""
    service = make_service(config="")
    audit = service.directory / "audit.jsonl"
    service.config = f'audit_log = "{audit}"\nlisten = "127.0.0.1:{free_port()}"\n'
    code, text = checked(service)
    assert f"warning  the key of the authority, {service.certs}/ca.key, is on this machine" in text
    (service.certs / "ca.key").rename(service.directory / "moved")
    assert "key of the authority" not in checked(service)[1]
    assert (code, "missing" in text, audit.exists(), service.state.exists()) == (0, False, False, False), text
    good = (
        "configuration ",
        "certificate ",
        "audit log ",
        "all jobs: ",
        "disk: ",
        "address 127.0.0.1:0: free",
    )
    for words in good:
        assert re.search(rf"^ok +{re.escape(words)}", text, re.MULTILINE), text
    service.start()
    code, text = checked(service)
    assert (code, f"cannot listen on {service.address}: address already in use; a pjwd serves" in text) == (
        0,
        True,
    ), text
    assert text.endswith("\nthis host can run pjwd\n")


# A root directory that is no mount point, of what this host has.
CHROOT: Final = """
set -e
mount --make-rprivate /
mount -t tmpfs none "$1"
mkdir "$1/root"
for each in /*; do
    if [ -L "$each" ]; then cp -a "$each" "$1/root"
    elif [ -d "$each" ]; then mkdir "$1/root$each"; mount --rbind "$each" "$1/root$each"; fi
done
exec chroot "$1/root" "$2" check --state-dir /var/lib/pjw-test-none
"""
PLACES: Final = {
    "a user namespace": (["unshare", "--user", "--map-root-user", "--mount"], "this is a user namespace"),
    "a chroot": (["unshare", "--mount", "sh", "-c", CHROOT, "sh"], "the root directory is no mount point"),
}


@pytest.mark.parametrize("place", PLACES)
def test_check_says_where_no_job_can_be_made(service: Service, tmp_path: Path, place: str) -> None:
    """B6: which step of a trial fails, and what to do."""
    command, hint = PLACES[place]
    rest = [str(tmp_path), str(service.pjwd)] if place == "a chroot" else [str(service.pjwd), "check"]
    done = subprocess.run([*command, *rest], capture_output=True, text=True, timeout=SECONDS, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 1, done
    found = re.search(
        r"^missing  no job can be made here: pjw-init: cannot .*\n +hint: (.*)$", done.stdout, re.MULTILINE
    )
    assert found is not None, done
    assert found[1].startswith(hint)


BROKEN: Final[dict[str, tuple[str, str]]] = {
    "no TOML": ("a = ", "it is not TOML"),
    "an unknown key": ("colour = 1", "unknown field `colour`"),
    "no user": ('user = "nosuchuser"', "no user is called 'nosuchuser'"),
    "no directory of the log": (
        'audit_log = "/nosuch/audit"',
        "cannot open the audit log /nosuch/audit: no such",
    ),
    "no list": ('revoked = "/nosuch"', "cannot read revocation list /nosuch"),
    "a limit above its ceiling": ("[ceilings]\npids_max = 3", "above its ceiling"),
    "no address of metrics": ("[metrics]\nlisten = '[::1:9464'", "is not HOST:PORT"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_check_finds_what_would_keep_serve_from_serving(
    make_service: Callable[..., Service], kind: str
) -> None:
    """Each fault is one that serve ends with, in the same words, and the exit code is 1."""
    config, words = BROKEN[kind]
    service = make_service(config=config)
    code, text = checked(service)
    assert code == 1
    [line] = [line for line in text.splitlines() if line.startswith("missing")]
    assert words in line
    assert text.endswith("\nthis host cannot run pjwd as it is\n")
    done = subprocess.run(service.command(), capture_output=True, timeout=SECONDS, check=False)
    assert (done.returncode, words in done.stderr.decode()) == (1, True)


def test_check_looks_at_certificates_and_ports(make_service: Callable[..., Service]) -> None:
    """A key that fits nothing, a certificate that ends soon, a key that others read, a port in use."""
    service = make_service()
    other = service.directory / "other"
    authority.init_directory(str(other))
    authority.write_server(str(other), ["localhost"], days=3)
    code, text = checked(service, "--server-key", str(other / "server.key"))
    assert (code, "does not belong to the certificate" in text) == (1, True)
    files = ["--ca-crt", str(other / "ca.crt"), "--server-crt", str(other / "server.crt")]
    (other / "server.key").chmod(0o644)
    code, text = checked(service, *files, "--server-key", str(other / "server.key"))
    assert code == 0
    assert re.search(r"^warning +certificate .*server.crt, valid until .*\n +hint: ", text, re.MULTILINE)
    assert re.search(r"^warning +others may read the private key", text, re.MULTILINE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, text = checked(service, "--listen", address)
    assert (code, f"cannot listen on {address}: address already in use" in text) == (1, True)


@pytest.fixture
def reloading(make_service: Callable[..., Service]) -> Service:
    """A service with a configuration that may change."""
    return make_service(config="[clients]\nrunning_max = 1\n").start()


def test_a_configuration_is_taken_without_a_restart(reloading: Service) -> None:
    """Quotas, limits, roles and retention hold at once; jobs and streams go on."""
    with reloading.stub() as alice, reloading.stub("bob") as bob:
        job_id = alice.Start(pb.StartRequest(command="sleep 100")).job.id
        follower = alice.Logs(pb.LogsRequest(id=job_id))
        with pytest.raises(grpc.RpcError, match="alice has reached the maximum of running jobs, 1"):
            alice.Start(pb.StartRequest(command="true"))
        with pytest.raises(grpc.RpcError, match="may not use List"):
            bob.List(pb.ListRequest(all_clients=True))
        said = reloaded(
            reloading,
            "stop_grace_seconds = 0\n[clients]\nrunning_max = 2\n[limits]\npids_max = 77\n"
            '[roles]\nviewers = ["bob"]\n[retention]\njobs_per_client = 1\n',
        )
        assert said == [
            "INFO: reload: the configuration is new: stop_grace_seconds, retention, roles, clients, limits"
        ]
        second = alice.Start(pb.StartRequest(command="trap '' TERM; sleep 100 & wait; wait")).job
        assert second.limits.pids_max == 77
        assert len(bob.List(pb.ListRequest(all_clients=True)).jobs) == 2
        # no grace period: the default one is longer than this call may take
        assert alice.Stop(pb.StopRequest(id=second.id), timeout=8).job.HasField("end")
        alice.Stop(pb.StopRequest(id=job_id))
        list(follower)
        wait_for(lambda: len(alice.List(pb.ListRequest()).jobs) == 1)


def test_who_has_lost_a_role_does_not_look_on(make_service: Callable[..., Service]) -> None:
    """What lasts ends with the role that it takes; what is one's own goes on."""
    service = make_service(config='[roles]\nadmins = ["alice"]\nviewers = ["bob"]\n').start()
    with service.stub() as alice, service.stub("bob") as bob:
        job_id = alice.Start(pb.StartRequest(command="echo mine; sleep 100")).job.id
        lasting: list[Any] = [
            bob.WatchUsage(pb.WatchUsageRequest(all_clients=True), timeout=SECONDS),
            bob.Logs(pb.LogsRequest(id=job_id, all_clients=True), timeout=SECONDS),
        ]
        others: list[Any] = [
            alice.WatchUsage(pb.WatchUsageRequest(all_clients=True)),
            bob.WatchUsage(pb.WatchUsageRequest()),
        ]
        for call in (*lasting, *others):
            next(call)
        reloaded(service, '[roles]\nviewers = ["alice"]\n')
        for call in lasting:
            with pytest.raises(
                grpc.RpcError, match=r"bob may not use .* on the jobs of every client"
            ) as refused:
                list(call)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        for call in others:
            next(call)
            call.cancel()


def test_a_longer_input_is_taken_without_a_restart(make_service: Callable[..., Service]) -> None:
    """By the calls that begin afterwards."""
    service = make_service(config="[clients]\ninput_bytes_max = 10\n").start()
    with service.stub() as stub:
        job_id = stub.Start(pb.StartRequest(command="cat", input=True)).job.id
        with pytest.raises(grpc.RpcError, match="longer than 10 bytes"):
            upload(stub, job_id, bytes(20))
        said = reloaded(service, "[clients]\ninput_bytes_max = 20\n")
        assert said == ["INFO: reload: the configuration is new: clients"]
        assert upload(stub, job_id, bytes(20)).ended


def test_keys_that_take_a_restart_are_named(reloading: Service) -> None:
    """They are left as they were, and the others are taken."""
    said = reloaded(
        reloading,
        "waiting_inits = 0\nlisten = 'localhost:1'\n[clients]\nrunning_max = 2\n[ceilings]\npids_max = 600\n",
    )
    # an option goes before the file: --listen was given
    assert said == [
        "WARNING: reload: these keys need a restart: waiting_inits, ceilings",
        "INFO: reload: the configuration is new: clients",
    ]


@pytest.mark.parametrize(
    "config",
    [
        "a = ",
        "colour = 1",
        "[limits]\nnosuch = 1",
        "[roles]\nadmins = ['a b']",
        # U5: of keys that need a restart, which it would refuse
        "[ceilings]\npids_max = 3",
        "[metrics]\nlisten = 'nonsense'",
        "[job_users]\nuid_first = 4294967294",
        "visible_paths = ['/tmp']",
    ],
)
def test_a_configuration_that_cannot_be_changes_nothing(reloading: Service, config: str) -> None:
    """The log says why, and the old one holds."""
    said = reloaded(reloading, "[clients]\nrunning_max = 9\n" + config if config[0] == "[" else config)
    assert said[0].startswith("ERROR: reload: kept the old configuration: ")
    with reloading.stub() as alice:
        alice.Start(pb.StartRequest(command="sleep 100"))
        with pytest.raises(grpc.RpcError, match="alice has reached the maximum of running jobs, 1"):
            alice.Start(pb.StartRequest(command="true"))
