"""Requests that can never work get a clear answer, and leave nothing half-made."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Final

import grpc
import pytest

from pjw.rpc.status import INTERNAL_TEXT
from pjw.v1 import job_worker_pb2 as pb
from tests.support.service import Service, ask

INVALID: Final = grpc.StatusCode.INVALID_ARGUMENT
MIB: Final = 1024 * 1024


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field on the wire, built by hand: protobuf itself refuses bad text."""
    size, length = len(payload), b""
    while size >= 0x80:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + payload


@pytest.fixture
def unchanged(service: Service) -> Iterator[Service]:
    """The service, which must have the same jobs, files and cgroups after the test."""
    before = service.made()
    yield service
    assert service.made() == before


@pytest.mark.parametrize("words", [[], [""], [" \t\n "], ["--"], ["--", ""], ["", "x"]])
def test_an_empty_or_blank_command_is_refused_by_pjw(unchanged: Service, words: list[str]) -> None:
    """Nothing to run, in every way of typing it."""
    assert unchanged.refused("start", *words) == (1, "pjw: error: the command is empty\n")


@pytest.mark.parametrize("command", [b"echo \xff", b"\xc3", b"echo \xed\xa0\x80"])
def test_invalid_utf_8_on_the_command_line_is_refused(unchanged: Service, command: bytes) -> None:
    """Bytes that are no text cannot be shown again as JSON, so they are no command."""
    words = (1, "pjw: error: the command is not valid UTF-8\n")
    assert unchanged.refused("start", command) == words
    assert unchanged.refused("start", "echo", command) == words


def test_a_long_argument_is_refused_by_pjw_where_the_kernel_allows_it_to_be_typed(unchanged: Service) -> None:
    """A megabyte over several arguments; execve itself refuses more than 128 KiB in one."""
    code, said = unchanged.refused("start", *["x" * 100_000] * 10)
    assert (code, said) == (
        1,
        "pjw: error: the command is 1000010 bytes long with all its arguments; at most 524288 are allowed\n",
    )
    with pytest.raises(OSError, match="Argument list too long"):
        unchanged.pjw("start", "x" * MIB)


def test_a_program_of_a_long_or_odd_name_is_refused_in_short_and_printable_words(unchanged: Service) -> None:
    """The name is cut for the header that carries it, and escaped for the terminal that shows it."""
    code, said = unchanged.refused("start", "x" * 100_000, "y")
    assert (code, said) == (
        126,
        f"pjw: error: cannot execute {'x' * 200}...: file name too long (ENAMETOOLONG)\n",
    )
    code, said = unchanged.refused("start", "\033[31mno\nsuch", "y")
    assert (code, said.count("\n"), "\033" in said) == (127, 1, False)


@pytest.mark.parametrize(
    ("program", "words", "number"),
    [("/nonexistent", "no such file or directory (ENOENT)", 2), ("/etc", "permission denied (EACCES)", 13)],
)
def test_what_cannot_be_executed_has_a_code_of_its_own(
    unchanged: Service, program: str, words: str, number: int
) -> None:
    """On the wire it is neither INTERNAL nor UNKNOWN nor an id, and the errno comes as a number."""
    request = pb.StartRequest(argv=pb.Argv(arguments=[program])).SerializeToString()
    messages, code, said, _, trailing = unchanged.answer("Start", request)
    assert (messages, code) == ([], grpc.StatusCode.FAILED_PRECONDITION)
    assert said == f"cannot execute {program}: {words}"
    assert str(number) in dict(trailing).values()


def test_a_list_of_long_commands_is_whole(make_service: Callable[..., Service]) -> None:
    """20 MB of commands come in pages that every client can take, in order and with none left out."""
    service = make_service(clients=["alice"]).start()
    request = pb.StartRequest(argv=pb.Argv(arguments=["true", *["x" * 100_000] * 5]))
    with service.stub() as stub:
        ids = [stub.Start(request).job.id for _ in range(40)]
        page = stub.List(pb.ListRequest())
        assert 0 < page.ByteSize() < 4 * MIB
        assert page.next_page_token
    assert service.ok("list").split() == [str(job_id) for job_id in ids]


def test_the_longest_command_works(service: Service) -> None:
    """The limits are those that are documented: at the limit a command runs, one byte more is refused."""
    longest = "echo " + "x" * (131_071 - 5)
    assert len(service.ok("logs", service.ok("start", longest).strip())) == 131_071 - 4
    code, words = service.answer("Start", pb.StartRequest(command=longest + "x").SerializeToString())[1:3]
    assert (code, words) == (
        INVALID,
        "an argument of the command is 131072 bytes long; the kernel takes at most 131071",
    )


REQUESTS: Final = {
    "nothing": ("Start", b"", INVALID, "the command is empty"),
    "empty command": ("Start", field(1, b""), INVALID, "the command is empty"),
    "blank command": ("Start", field(1, b" \n\t"), INVALID, "the command is empty"),
    "unicode blank": ("Start", field(1, "\u2003\u00a0".encode()), INVALID, "the command is empty"),
    "empty argv": ("Start", field(2, b""), INVALID, "the command is empty"),
    "argv of an empty program": ("Start", field(2, field(1, b"")), INVALID, "the command is empty"),
    "1 MiB command": (
        "Start",
        field(1, b"x" * MIB),
        INVALID,
        "an argument of the command is 1048576 bytes long; ",
    ),
    "1 MiB argv": (
        "Start",
        field(2, field(1, b"x" * 99_999) * 11),
        INVALID,
        "the command is 1100000 bytes long ",
    ),
    "a million arguments": ("Start", field(2, field(1, b"") * MIB), INVALID, "the command is empty"),
    "many arguments": (
        "Start",
        field(2, field(1, b"x") * 700_000),
        INVALID,
        "the command is 1400000 bytes long",
    ),
    "5 MiB command": ("Start", field(1, b"x" * 5 * MIB), grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
    "NUL in a command": ("Start", field(1, b"echo \0 x"), INVALID, "the command has a NUL in it"),
    "NUL in an argument": (
        "Start",
        field(2, field(1, b"echo") + field(1, b"\0")),
        INVALID,
        "the command has a NUL",
    ),
    "invalid UTF-8": ("Start", field(1, b"echo \xff"), INVALID, "the request is not a valid message"),
    "invalid UTF-8 in an argument": (
        "Start",
        field(2, field(1, b"\xff")),
        INVALID,
        "the request is not a valid",
    ),
    "a surrogate": ("Start", field(1, b"\xed\xa0\x80"), INVALID, "the request is not a valid message"),
    "garbage": ("Start", b"\xff\xff\xff\xff", INVALID, "the request is not a valid message"),
    "a message cut short": ("Start", b"\x0a\x7fecho", INVALID, "the request is not a valid message"),
    "garbage for Get": ("Get", b"\xff", INVALID, "the request is not a valid message"),
    "garbage for Logs": ("Logs", b"\xff", INVALID, "the request is not a valid message"),
    "a page token of text": (
        "List",
        field(2, b"abc"),
        INVALID,
        "the page token is not one that this server gave",
    ),
    "a page token below 0": (
        "List",
        field(2, b"-1"),
        INVALID,
        "the page token is not one that this server gave",
    ),
    "a page token too long": (
        "List",
        field(2, b"9" * 99),
        INVALID,
        "the page token is not one that this server",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_message_on_the_wire_is_refused(unchanged: Service, name: str) -> None:
    """What pjw would never send: the code, the words, and nothing else comes back."""
    method, request, code, words = REQUESTS[name]
    messages, got, said, _, trailing = unchanged.answer(method, request)
    assert (messages, got) == ([], code)
    assert said.startswith(words)
    assert not any(word in said for word in ("Traceback", "Exception", "/work", ".py"))
    assert [key for key, _ in trailing if key not in ("pjw-error", "pjw-hint")] == []


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"memory_max_bytes": -1}, "limit memory_max_bytes must be a whole number from 0 to 2^62, not -1"),
        ({"memory_max_bytes": 1000}, "limit memory_max_bytes must be at least 2097152, not 1000"),
        ({"pids_max": 1}, "limit pids_max must be at least 2, not 1"),
        (
            {"cpu_max_millicores": 2**63 - 1},
            "limit cpu_max_millicores must be a whole number from 0 to 2^62, not ",
        ),
    ],
)
def test_an_impossible_limit_is_refused(unchanged: Service, limits: dict[str, int], words: str) -> None:
    """Limits that no cgroup could hold never come as far as one."""
    request = pb.StartRequest(command="true", limits=pb.Limits(**limits))
    _, code, said, *_ = unchanged.answer("Start", request.SerializeToString())
    assert (code, said.startswith(words)) == (INVALID, True), said


@pytest.mark.parametrize("seconds", [-1, 86_401, 2**62])
def test_an_impossible_grace_period_is_refused(service: Service, seconds: int) -> None:
    """A stop with a senseless grace period stops nothing."""
    job_id = service.start_job("sleep 300")
    request = pb.StopRequest(id=job_id)
    request.grace.seconds = seconds
    _, code, said, *_ = service.answer("Stop", request.SerializeToString())
    assert (code, said) == (INVALID, "the grace period must be from 0 to 86400 seconds")
    assert service.job(job_id).state == pb.JOB_STATE_RUNNING
    service.ok("stop", str(job_id))


@pytest.mark.parametrize(
    ("command", "method"), [("get", "Get"), ("stop", "Stop"), ("logs", "Logs"), ("rm", "Delete")]
)
@pytest.mark.parametrize("job_id", [0, -1, 999_999, 2**53, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 10**99])
def test_an_id_of_no_job_is_not_found(service: Service, command: str, method: str, job_id: int) -> None:
    """Unknown, negative and larger than any id can be: all are simply no job."""
    if -(2**63) <= job_id < 2**63:
        request = pb.GetRequest(id=job_id).SerializeToString()  # the id is the first field of all of them
        messages, code, said, *_ = service.answer(method, request)
        assert (messages, code, said) == ([], grpc.StatusCode.NOT_FOUND, f"no job {job_id}")
    if job_id in (-1, 999_999, 2**63, 10**99):  # a process each: a few will do
        assert service.refused(command, str(job_id)) == (1, f"pjw: error: no job {job_id}\n")


@pytest.mark.parametrize(
    "text", ["", " ", "1.0", "1e3", "0x1", "+1", "1__0", "1_", "--1", "-", "１", "٣", "1 2", "x/y", "9" * 101]
)
def test_what_is_neither_an_id_nor_a_name_is_wrong_usage(service: Service, text: str) -> None:
    """A mistyped id is caught before any connection; only the digits 0 to 9 are digits."""
    code, said = service.refused("get", text, PJW_SERVER="127.0.0.1:1")
    assert code == 2
    assert re.search(
        r"is neither a job's id, which is a whole number, nor its name|are required: JOB|unrecog", said
    )


@pytest.mark.parametrize("offset", [-1, 6, 2**63 - 1, -(2**63)])
def test_an_offset_outside_the_output_is_out_of_range(service: Service, offset: int) -> None:
    """Beyond the end or before the start: said, instead of an empty stream that looks like an end."""
    job_id = service.start_job("echo 1234")
    service.ok("logs", str(job_id))
    request = pb.LogsRequest(id=job_id, offset=offset).SerializeToString()
    messages, code, said, *_ = service.answer("Logs", request)
    assert (messages, code) == ([], grpc.StatusCode.OUT_OF_RANGE)
    assert said == f"cannot read output from byte {offset}: it has 5 bytes"


def test_an_unknown_method_is_unimplemented(service: Service) -> None:
    """A newer client learns that this server is older."""
    assert service.answer("Frobnicate", b"")[1] is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Start", pb.StartRequest(command="true")),
        ("Submit", pb.SubmitRequest(jobs=[pb.QueuedJob(start=pb.StartRequest(command="true"))])),
        ("Exec", pb.ExecRequest(id=1, command="true")),
    ],
)
def test_a_job_of_a_newer_client_is_not_made_another(
    service: Service, method: str, request_: pb.StartRequest | pb.SubmitRequest | pb.ExecRequest
) -> None:
    """A setting that this server does not know is not left out in silence."""
    newer = request_.SerializeToString() + b"\x98\x3f\x01"
    messages, code, said, *_ = service.answer(method, newer)
    name = f"{method}Request"
    assert (messages, code, said) == (
        [],
        grpc.StatusCode.INVALID_ARGUMENT,
        f"this server does not know field 1011 of {name}",
    )


def test_a_page_size_of_any_kind_is_answered(service: Service) -> None:
    """Pages of one, and the largest for sizes that make no sense, hold the same jobs."""
    service.start_job("true")
    service.start_job("true")
    with service.stub() as stub:
        every = [job.id for job in stub.List(pb.ListRequest()).jobs]
        for size in (-1, 2**31 - 1, -(2**31)):
            assert [job.id for job in stub.List(pb.ListRequest(page_size=size)).jobs] == every
        paged, token = [], ""
        while True:
            page = stub.List(pb.ListRequest(page_size=1, page_token=token))
            paged += [job.id for job in page.jobs]
            token = page.next_page_token
            if not token:
                break
        assert paged == every


def test_what_goes_wrong_inside_is_not_told(service: Service) -> None:
    """An output that cannot be opened is the server's fault: a fixed text, the path in its log alone."""
    job_id = service.start_job("echo lost")
    service.ok("logs", str(job_id))
    output = service.state / "jobs" / str(job_id) / "output"
    output.chmod(0)
    os.chown(output, 0, 0)
    _, code, said, _, trailing = service.answer("Logs", pb.LogsRequest(id=job_id).SerializeToString())
    assert (code, said, trailing) == (grpc.StatusCode.INTERNAL, INTERNAL_TEXT, [])
    assert service.refused("logs", str(job_id)) == (
        125,
        f"pjw: error: the server failed: {INTERNAL_TEXT} (INTERNAL)\n",
    )
    service.await_log("cannot open the output")


def test_the_service_is_unharmed_by_raw_garbage(service: Service) -> None:
    """Bytes that are no TLS, and a flood of broken calls over one connection, disturb nobody."""
    host, port = service.address.split(":")
    subprocess.run(
        ["bash", "-c", f"head -c 65536 /dev/zero >/dev/tcp/{host}/{port}"], check=False, capture_output=True
    )
    with service.channel() as channel:
        for _ in range(50):
            assert ask(channel, "Start", b"\xff")[1] is INVALID
    assert service.ok("logs", service.ok("start", "echo fine").strip()) == "fine\n"
