"""A hostile network: whatever comes, with a certificate or without, pjwd goes on answering a good client.

Methods and messages are taken from the contract. What gRPC's own client would not send is made by hand
(tests/support/http2.py). `make fuzz` goes on for longer.
"""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pjw.v1 import job_worker_pb2 as pb
from tests.support.http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    call_fields,
    client_hello,
    fields,
    frame,
    split_address,
    tcp,
    tls,
)
from tests.support.service import METHODS, Service, ask, wait_for

MIB: Final = 1024**2
EXAMPLES: Final = 60
SECONDS: Final = float(os.environ.get("PJW_FUZZ_SECONDS", "0"))
# on two busy processors; alone it is milliseconds
ANSWER_SECONDS: Final = 20
DESCRIPTORS_MORE: Final = 8
MEMORY_MORE_BYTES: Final = 96 * MIB
LOG_MAX_BYTES: Final = MIB
# Any text may become a command, so jobs are small and short.
LIMITS: Final = (
    "cpu_max_millicores=200\nmemory_max_bytes=67108864\npids_max=16\n"
    "time_max_seconds=2\noutput_max_bytes=65536\n"
)
CONFIG: Final = f"stop_grace_seconds=1\n[limits]\n{LIMITS}[ceilings]\n{LIMITS}"
DOCUMENTED: Final = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
SERVICE: Final = pb.DESCRIPTOR.services_by_name["JobWorkerService"]


class GoodClient(threading.Thread):
    """Asks all the time, and is answered each time."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service: Final = service
        self._over: Final = threading.Event()
        self.failures: Final[list[str]] = []
        self.slowest_seconds = 0.0
        self.calls = 0

    def run(self) -> None:
        with self._service.stub("bob") as stub:
            over = False
            while not over:
                over = self._over.wait(0.02)
                begun = time.monotonic()
                try:
                    stub.List(pb.ListRequest(page_size=1), timeout=ANSWER_SECONDS)
                except grpc.RpcError as error:
                    self.failures.append(str(error))
                self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - begun)
                self.calls += 1

    def end(self) -> None:
        """Once more, and then no more."""
        self._over.set()
        self.join()


@pytest.fixture
def hostile(make_service: Callable[..., Service]) -> Iterator[Service]:
    """A service that is then attacked; meanwhile it answers, and afterwards it is as it was."""
    service = make_service(config=CONFIG).start()
    service.start_job("echo hello; sleep 1")
    descriptors, memory = service.descriptors(), resident(service)
    good = GoodClient(service)
    good.start()
    try:
        yield service
    finally:
        good.end()
    assert good.failures == [], (good.failures, good.calls, service.log.read_text())
    print(f"good client: {good.calls} calls, the slowest {good.slowest_seconds:.2f} s")
    wait_for(lambda: service.descriptors() <= descriptors + DESCRIPTORS_MORE, 60)
    assert resident(service) < memory + MEMORY_MORE_BYTES
    assert service.log.stat().st_size < LOG_MAX_BYTES
    assert "Traceback" not in service.log.read_text()


def resident(service: Service) -> int:
    """The server's memory in bytes."""
    with open(f"/proc/{service.pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def for_some_time(play: Callable[[], None]) -> None:
    """Once, or for as long as `make fuzz` says."""
    rounds, deadline = 0, time.monotonic() + SECONDS
    while rounds == 0 or time.monotonic() < deadline:
        play()
        rounds += 1
    print(f"{rounds * EXAMPLES} examples")


def bounded(play: Callable[..., None]) -> Callable[[], None]:
    """With the settings of all of these tests."""
    return settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))(play)


# --- messages, from a client with a certificate

INTEGERS: Final = st.sampled_from([0, 1, 2, 3, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)]) | st.integers(
    -9, 9
)
SCALARS: Final[dict[int, st.SearchStrategy[Any]]] = {
    FieldDescriptor.CPPTYPE_STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_INT32: INTEGERS.filter(lambda n: -(2**31) <= n < 2**31),
    FieldDescriptor.CPPTYPE_ENUM: INTEGERS.filter(lambda n: -(2**31) <= n < 2**31),
    FieldDescriptor.CPPTYPE_UINT32: INTEGERS.filter(lambda n: 0 <= n < 2**32),
    FieldDescriptor.CPPTYPE_INT64: INTEGERS,
    FieldDescriptor.CPPTYPE_UINT64: INTEGERS.filter(lambda n: n >= 0),
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 3) -> Message:
    """A message with any of its fields."""
    message: Message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        many = field.is_repeated
        for _ in range(draw(st.integers(0, 3)) if many else 1):
            if field.message_type is None:
                bytes_ = field.type == FieldDescriptor.TYPE_BYTES
                value = draw(st.binary(max_size=40) if bytes_ else SCALARS[field.cpp_type])
                getattr(message, field.name).append(value) if many else setattr(message, field.name, value)
            elif field.message_type.GetOptions().map_entry:
                text = SCALARS[FieldDescriptor.CPPTYPE_STRING]
                getattr(message, field.name).update(draw(st.dictionaries(text, text, max_size=3)))
            elif depth:
                inner = getattr(message, field.name)
                (inner.add() if many else inner).CopyFrom(draw(messages(field.message_type, depth - 1)))
    return message


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, bytes]:
    """A method and what it is sent: a message, one with bytes changed, cut or added, or anything."""
    method = draw(st.sampled_from(list(SERVICE.methods)))
    data = bytearray(draw(messages(method.input_type)).SerializeToString())
    match draw(st.integers(0, 5)):
        case 0:
            data = bytearray(draw(st.binary(max_size=200)))
        case 1 if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        case 2:
            data = data[: draw(st.integers(0, len(data)))]
        case 3:
            data += draw(st.binary(max_size=20))
        case _:
            pass
    return method.name, bytes(data)


def test_any_message(hostile: Service) -> None:
    """Every method answers any bytes with a status that its documentation names."""
    with hostile.channel() as channel:

        @bounded
        @given(calls())
        def play(call: tuple[str, bytes]) -> None:
            is_watch = call[0].startswith("Watch")
            code = code_of_watch(channel, *call) if is_watch else ask(channel, *call)[1]
            assert code in DOCUMENTED

        for_some_time(play)


def code_of_watch(channel: grpc.Channel, method: str, data: bytes) -> grpc.StatusCode:
    """The code of what has no end once it was let in: OK with its first answer."""
    start: Any = channel.unary_stream(f"/pjw.v1.JobWorkerService/{method}")
    call = start(data, timeout=ANSWER_SECONDS)
    try:
        # without an answer: a watch that ends once all was told
        next(call, None)
    except grpc.RpcError:
        code: grpc.StatusCode = call.code()
        return code
    call.cancel()
    return grpc.StatusCode.OK


def test_any_method_and_metadata(hostile: Service) -> None:
    """What is no method is UNIMPLEMENTED, and metadata changes nothing."""
    letters = st.characters(min_codepoint=33, max_codepoint=126)
    keys = st.from_regex(r"x[a-z0-9_.-]{0,20}", fullmatch=True).filter(lambda key: not key.endswith("-bin"))
    pairs = st.tuples(keys, st.text(letters, max_size=200)) | st.tuples(
        keys.map("{}-bin".format), st.binary(max_size=200)
    )
    names = st.text(letters, max_size=30).filter(lambda name: name not in dict(METHODS))
    with hostile.channel() as channel:

        @bounded
        @given(names, st.lists(pairs, max_size=5), st.binary(max_size=50))
        def play(name: str, metadata: list[tuple[str, str | bytes]], data: bytes) -> None:
            call: Any = channel.unary_unary(f"/{SERVICE.full_name}/{name}")
            with pytest.raises(grpc.RpcError) as caught:
                call(data, metadata=metadata, timeout=ANSWER_SECONDS)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            known: Any = channel.unary_unary(f"/{SERVICE.full_name}/List")
            known(b"", metadata=metadata, timeout=ANSWER_SECONDS)

        for_some_time(play)


# --- bytes and frames

ALL_DONE: Final = b"all done"


def play_frames(
    service: Service, data: bytes, *, answered: bool = False, seconds: float = ANSWER_SECONDS
) -> bytes:
    """Send frames; what comes back until all were read (or stream 1 is over), the end, or time is over."""
    got = b""
    with tls(service.address, service.certs) as connection:
        connection.settimeout(seconds)
        connection.sendall(PREFACE + frame(SETTINGS) + data + frame(PING, 0, 0, ALL_DONE))
        while not (stream_is_over(got) if answered else frame(PING, ACK, 0, ALL_DONE) in got):
            more = connection.recv(65_536)
            if not more:
                break
            got += more
    return got


def stream_is_over(got: bytes) -> bool:
    """Whether the server has ended or reset stream 1, or says that the connection is over."""
    while len(got) >= 9:
        size, kind, flags, stream = (
            int.from_bytes(got[:3], "big"),
            got[3],
            got[4],
            int.from_bytes(got[5:9], "big"),
        )
        ended = kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM)
        if len(got) >= 9 + size and (kind == GOAWAY or (stream == 1 and ended)):
            return True
        got = got[9 + size :]
    return False


def test_any_bytes_without_tls(hostile: Service) -> None:
    """Noise, plain HTTP/2, and handshakes that are cut short or changed, each left or reset."""
    hello = client_hello()
    cut = st.integers(0, len(hello)).map(lambda n: hello[:n])
    changed = st.tuples(st.integers(0, len(hello) - 1), st.binary(max_size=8)).map(
        lambda change: hello[: change[0]] + change[1] + hello[change[0] + len(change[1]) :]
    )
    plain = st.just(PREFACE + frame(SETTINGS) + frame(HEADERS, 5, 1, call_fields()))

    @bounded
    @given(st.binary(max_size=2000) | cut | changed | plain, st.booleans())
    def play(data: bytes, reset: bool) -> None:
        with tcp(hostile.address) as connection:
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(data)

    for_some_time(play)


def test_half_handshakes_that_stay(hostile: Service) -> None:
    """A hundred connections that never go on, of each half, hold up nobody."""
    hello = client_hello()
    held = []
    try:
        for part in (b"", hello[:20], hello[:-1], hello) * 25:
            held.append(socket.create_connection(split_address(hostile.address), ANSWER_SECONDS))
            held[-1].sendall(part)
        with hostile.stub("alice") as stub:
            assert stub.List(pb.ListRequest(), timeout=ANSWER_SECONDS).jobs
    finally:
        for connection in held:
            connection.close()


def test_a_call_without_a_certificate(hostile: Service) -> None:
    """In TLS 1.3 a client may speak before the server sees that it has no certificate: it is not answered."""

    @bounded
    @given(st.binary(max_size=200))
    def play(noise: bytes) -> None:
        got = b""
        with tls(hostile.address, hostile.certs, client=None) as connection:
            connection.sendall(PREFACE + frame(SETTINGS) + frame(HEADERS, 5, 1, call_fields()) + noise)
            while more := connection.recv(65_536):
                got += more
        assert got == b""

    for_some_time(play)


def test_a_call_by_hand(hostile: Service) -> None:
    """What the tests below send is understood: a call as it should be is answered."""
    call = frame(HEADERS, END_HEADERS, 1, call_fields()) + frame(DATA, END_STREAM, 1, bytes(5))
    assert b"echo hello" in play_frames(hostile, call, answered=True)


@pytest.mark.parametrize(
    "fields", [call_fields(b"\xff"), call_fields(b"List", (b"x", b"\xff"))], ids=["path", "value"]
)
def test_text_that_is_none(hostile: Service, fields: bytes) -> None:
    """gRPC's own server stops at such a path, and fills the log with tracebacks for such a value."""
    call = frame(HEADERS, END_HEADERS, 1, fields) + frame(DATA, END_STREAM, 1, bytes(5))
    assert stream_is_over(play_frames(hostile, call, answered=True))


FRAMES: Final = st.builds(
    frame,
    st.sampled_from(range(12)),
    st.integers(0, 255) | st.sampled_from([0, 1, 4, 5, 8]),
    st.sampled_from([0, 1, 1, 3, 2, 2**31 - 1, 2**31]),
    st.binary(max_size=60) | st.sampled_from([call_fields(), call_fields(b"Logs"), bytes(5), bytes(8)]),
    st.none() | st.none() | st.none() | st.sampled_from([0, 1, 2**14 + 1, 2**24 - 1]),
)


def test_any_frames(hostile: Service) -> None:
    """A client with a certificate that speaks no proper HTTP/2 is hung up on, and that is all."""

    @bounded
    @given(st.lists(FRAMES, max_size=12))
    def play(frames: list[bytes]) -> None:
        # one whose length is a lie swallows the ping: then nothing comes back
        play_frames(hostile, b"".join(frames), seconds=0.3)

    for_some_time(play)


def test_any_fields(hostile: Service) -> None:
    """Metadata and paths that gRPC's client would not send: no UTF-8, odd timeouts, encodings, too much."""
    names = st.sampled_from(
        [
            b"x",
            b"grpc-timeout",
            b"grpc-encoding",
            b"grpc-accept-encoding",
            b"x-bin",
            b"user-agent",
            b"cookie",
            b":path",
        ]
    )
    values = st.binary(max_size=60) | st.sampled_from(
        [b"99999999H", b"1n", b"gzip", b"\xff" * 100, b"x" * 9000]
    )
    bodies = st.binary(max_size=30) | st.sampled_from(
        [bytes(5), b"\1\0\0\0\0", b"\0\xff\xff\xff\xff", b"\1\0\0\0\2xx"]
    )

    @bounded
    @given(
        st.sampled_from([name.encode() for name, _ in METHODS]) | st.binary(max_size=20),
        st.lists(st.tuples(names, values), max_size=4),
        bodies,
    )
    def play(method: bytes, more: list[tuple[bytes, bytes]], body: bytes) -> None:
        play_frames(
            hostile,
            frame(HEADERS, END_HEADERS, 1, call_fields(method, *more)) + frame(DATA, END_STREAM, 1, body),
            answered=True,
            # gRPC leaves a call whose message never comes to its client's patience
            seconds=0.5,
        )

    for_some_time(play)


FLOODS: Final[dict[str, Callable[[], bytes]]] = {
    "calls that are reset": lambda: b"".join(
        frame(HEADERS, 4, stream, call_fields()) + frame(RST_STREAM, 0, stream, bytes(4))
        for stream in range(1, 4001, 2)
    ),
    "calls that are left": lambda: b"".join(
        frame(HEADERS, 4, n, call_fields(b"Logs")) for n in range(1, 4001, 2)
    ),
    "pings": lambda: frame(PING, 0, 0, bytes(8)) * 5000,
    "settings": lambda: frame(SETTINGS, 0, 0, b"\0\4\0\0\0\0") * 5000,
    "fields without an end": lambda: (
        frame(HEADERS, 0, 1, call_fields()) + frame(CONTINUATION, 0, 1, fields((b"x", b"y" * 8000))) * 500
    ),
    "empty data": lambda: frame(HEADERS, 4, 1, call_fields()) + frame(DATA, 0, 1) * 5000,
    "windows": lambda: frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 100,
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_a_flood(hostile: Service, flood: Callable[[], bytes]) -> None:
    """Thousands of frames that cost their sender nothing, over five connections, one after the other."""
    data = flood()
    for _ in range(5):
        play_frames(hostile, data)
