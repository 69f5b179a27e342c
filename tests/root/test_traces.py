"""Traces of a real pjwd, sent by OTLP over gRPC to a collector that is here."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from pjw.v1 import job_worker_pb2 as pb
from tests.service import Service, wait_for

SECONDS: Final = 60
TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT: Final = "00f067aa0ba902b7"
METHOD: Final = "pjw.v1.JobWorkerService/"
# every span by itself, and a try of a second for each
AT_ONCE: Final = {
    "PATH": os.environ["PATH"],
    "OTEL_BSP_SCHEDULE_DELAY": "20",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans, or refuses them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[Resource] = []
        self.refusing = False
        self.refused = 0
        self.server: Final = grpc.server(ThreadPoolExecutor(2))
        add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add(self, self.server)
        self.port: Final = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  the contract's name
        if self.refusing:
            self.refused += 1
            context.abort(grpc.StatusCode.INTERNAL, "not today")
        for resource in request.resource_spans:
            self.resources.append(resource.resource)
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, method: str) -> list[Span]:
        """The spans of a method."""
        return [span for span in self.spans if span.name == method]


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector on loopback."""
    collector = Collector()
    yield collector
    collector.server.stop(None).wait()


def config(port: int) -> str:
    """What the operator writes."""
    return f'[traces]\nendpoint = "http://127.0.0.1:{port}"\n'


@pytest.fixture
def traced(collector: Collector, make_service: Callable[..., Service]) -> Service:
    """A service that sends each span at once."""
    return make_service(config=config(collector.port)).start(env=AT_ONCE)


def plain(attributes: Any) -> dict[str, str | int]:
    """Attributes as they are meant."""

    def value(each: KeyValue) -> str | int:
        return each.value.string_value if each.value.HasField("string_value") else each.value.int_value

    return {each.key: value(each) for each in attributes}


def parent(flags: str = "01", trace: str = TRACE) -> tuple[tuple[str, str], ...]:
    """The metadata of a caller that traces."""
    return (("traceparent", f"00-{trace}-{PARENT}-{flags}"),)


def test_each_call_is_a_span(make_service: Callable[..., Service], collector: Collector) -> None:
    """Below the span of its caller if it has one; those that wait are sent at the end of pjwd."""
    service = make_service(config=config(collector.port)).start()
    with service.channel() as channel, service.stub() as stub, service.stub("bob") as bob:
        before = time.time_ns()
        job_id = stub.Start(pb.StartRequest(command="echo secret"), metadata=parent()).job.id
        assert b"".join(each.data for each in stub.Logs(pb.LogsRequest(id=job_id))) == b"secret\n"
        stub.Wait(pb.WaitRequest(id=job_id), timeout=SECONDS)
        with pytest.raises(grpc.RpcError):
            bob.Get(pb.GetRequest(id=job_id))
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        check(health_pb2.HealthCheckRequest().SerializeToString(), timeout=SECONDS)
        after = time.time_ns()
    assert service.stop() == 0

    [start], [logs] = collector.named(METHOD + "Start"), collector.named(METHOD + "Logs")
    [refused], [health] = collector.named(METHOD + "Get"), collector.named("HealthCheck")
    assert plain(start.attributes) == {
        "rpc.system.name": "grpc",
        "rpc.method": METHOD + "Start",
        "rpc.response.status_code": "OK",
        "pjw.client": "alice",
        "pjw.job_id": job_id,
    }
    assert (start.trace_id.hex(), start.parent_span_id.hex()) == (TRACE, PARENT)
    assert (logs.parent_span_id, logs.trace_id.hex() == TRACE) == (b"", False)
    assert plain(logs.attributes)["pjw.job_id"] == job_id
    told = plain(refused.attributes)
    assert (told["pjw.client"], told["error.type"], told["pjw.job_id"]) == ("bob", "NOT_FOUND", job_id)
    # the caller's fault is none of the server
    assert refused.status == Status()
    assert plain(health.attributes)["pjw.client"] == "alice"
    for span in collector.spans:
        assert span.kind == Span.SPAN_KIND_SERVER
        assert before <= span.start_time_unix_nano < span.end_time_unix_nano <= after + 10**9
    resource = plain(collector.resources[0].attributes)
    assert (resource["service.name"], set(resource)) == ("pjwd", {"service.name", "service.version"})
    assert b"secret" not in b"".join(span.SerializeToString() for span in collector.spans)
    assert "WARNING" not in service.log.read_text()


def test_what_callers_say_of_their_own_traces(traced: Service, collector: Collector) -> None:
    """Who is not sampled has no span; what is no parent is passed over, and the log has nothing of it."""
    said: list[Any] = [
        parent("00"),
        (("traceparent", ""),),
        (("traceparent", "x" * 2000),),
        parent(trace="g" * 32),
        (*parent(), *parent(trace="0" * 32)),
        (("traceparent-bin", b"\xff\x00"), ("tracestate", "a=b")),
        (*parent(), ("tracestate", ",=;" * 500)),
        (*parent(), ("tracestate", ",".join(f"a{n}=b" for n in range(100)))),
    ]
    with traced.stub() as stub:
        for each in said:
            stub.List(pb.ListRequest(), metadata=each, timeout=SECONDS)
    wait_for(lambda: len(collector.spans) == 7)
    spans = sorted(collector.spans, key=lambda span: span.start_time_unix_nano)
    assert [span.parent_span_id.hex() for span in spans] == [""] * 5 + [PARENT] * 2
    assert [span.trace_state for span in spans] == [""] * 7
    assert len(traced.log.read_text().splitlines()) == 1


def test_a_collector_that_refuses_is_one_line(traced: Service, collector: Collector) -> None:
    """However often it does; and one when it takes spans again."""
    collector.refusing = True
    with traced.stub() as stub:

        def refused() -> bool:
            stub.List(pb.ListRequest(), timeout=SECONDS)
            return collector.refused > 3

        wait_for(refused)
        assert collector.spans == []
        collector.refusing = False
        stub.Get(pb.GetRequest(id=traced.start_job("true")), timeout=SECONDS)
    wait_for(lambda: "taken again" in traced.log.read_text())
    _, lost, again = traced.log.read_text().splitlines()
    assert lost.startswith("pjwd: ERROR: traces are lost, calls go on: Failed to export traces to 127.0.0.1:")
    assert "not today" in lost
    assert again == "pjwd: ERROR: traces are taken again"


def test_a_collector_that_is_away_is_one_line(make_service: Callable[..., Service]) -> None:
    """Calls go on, and so does what comes after a restart of it."""
    with socket.socket() as nobody:
        # bound, and nobody listens
        nobody.bind(("127.0.0.1", 0))
        service = make_service(config=config(nobody.getsockname()[1])).start(env=AT_ONCE)
        with service.stub() as stub:

            def told() -> bool:
                stub.List(pb.ListRequest(), timeout=SECONDS)
                return "traces are lost" in service.log.read_text()

            wait_for(told)
        assert service.stop() == 0
    [_, line] = service.log.read_text().splitlines()
    assert "onnection refused" in line


def test_a_collector_that_hangs_holds_up_neither_calls_nor_the_end(
    make_service: Callable[..., Service],
) -> None:
    """It is waited for at the end, but not for as long as it would be."""
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        service = make_service(config=config(hanging.getsockname()[1]))
        service.start(env={**AT_ONCE, "OTEL_EXPORTER_OTLP_TIMEOUT": "1000"})
        with service.stub() as stub:
            stub.List(pb.ListRequest(), timeout=SECONDS)
            taken, _ = hanging.accept()
            for _ in range(10):
                stub.List(pb.ListRequest(), timeout=SECONDS)
        # fails after 30 seconds, which is what it would take by default
        assert service.stop() == 0
        taken.close()
    assert service.log.read_text().count("traces are lost") == 1


def test_what_root_alone_may_read(
    collector: Collector, make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pjwd that is installed below such a directory, as /root is, serves, with metrics and traces, too."""
    service = make_service(config=f'{config(collector.port)}[metrics]\nlisten = "127.0.0.1:0"\n')
    hidden = service.directory / "hidden"
    hidden.mkdir(0o700)
    (hidden / "venv").symlink_to(sys.prefix)
    _, *options = service.command()
    command = [str(hidden / "venv/bin/python"), "-m", "pjw.server.main", *options]
    monkeypatch.setattr(service, "command", lambda: command)
    service.start(env=AT_ONCE)
    assert f"{hidden}/" in Path(f"/proc/{service.pid}/cmdline").read_text()
    assert service.ok("logs", service.ok("start", "echo done").strip()) == "done\n"
    wait_for(lambda: collector.named(METHOD + "Logs"))


def run(service: Service, **env: str) -> tuple[int, str]:
    """Run pjwd, which ends by itself; its exit code, what it said."""
    done = subprocess.run(
        service.command(),
        env={"PATH": os.environ["PATH"], **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout.decode()


def test_without_the_package(make_service: Callable[..., Service], tmp_path: Path) -> None:
    """Neither serve nor check goes on, and both say what to install."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry'] = None\n")
    service = make_service(config=config(4317))
    words = "traces.endpoint is set, but OpenTelemetry is not installed beside pjwd\n"
    code, said = run(service, PYTHONPATH=str(tmp_path))
    assert (code, said) == (1, f"pjwd: error: {words}hint: pip install 'pjw[traces]'\n")
    command = service.command()
    command[1] = "check"
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, check=False)
    assert done.returncode == 1
    assert f"missing  {words}         hint: pip install 'pjw[traces]'\n" in done.stdout.decode()
    done = subprocess.run(command, capture_output=True, check=False)
    assert b"\nok       traces to http://127.0.0.1:4317\n" in done.stdout


def test_a_variable_that_cannot_be(make_service: Callable[..., Service]) -> None:
    """It is told, with no traceback."""
    service = make_service(config=config(4317))
    code, said = run(service, OTEL_EXPORTER_OTLP_TRACES_COMPRESSION="zip")
    assert code == 1
    assert said.startswith("pjwd: error: cannot send traces to http://127.0.0.1:4317: ")
    assert said.endswith("\nhint: look at the variables OTEL_* of pjwd\n")
