"""Many nodes of a gateway in one process: real sessions and claims with real certificates, and no jobs.

`python -m benchmarks.simulated_nodes GATEWAY CERTS COUNT SECONDS` keeps the sessions until SIGTERM. A node
reports of a job that it claims that it has started, and after SECONDS that it has ended.
"""

import asyncio
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

import grpc

from pjw.cluster.v1 import cluster_pb2 as cpb
from pjw.cluster.v1.cluster_pb2_grpc import NodeServiceStub
from pjw.node.claims import Said
from pjw.v1 import job_worker_pb2 as pb
from pjw.version import version

CPU_MILLICORES: Final = 16_000
MEMORY_BYTES: Final = 64 * 1024**3
# The most handshakes at once.
_AT_ONCE: Final = 16
_OPTIONS: Final = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]


def name_of(number: int) -> str:
    """Return the name of a node."""
    return f"s{number:04}"


class SimulatedNode:
    """One node."""

    def __init__(self, name: str, gateway: str, certs: Path, seconds: float) -> None:
        self._name: Final = name
        self._gateway: Final = gateway
        self._certs: Final = certs
        self._seconds: Final = seconds
        self._count = 0
        self._tasks: Final[set[asyncio.Task[None]]] = set()

    async def run(self, connected: asyncio.Future[None], turns: asyncio.Semaphore) -> None:
        """Keep a session."""
        files = (f"node-{self._name}.key", f"node-{self._name}.crt")
        key, crt = ((self._certs / name).read_bytes() for name in files)
        tls = grpc.ssl_channel_credentials((self._certs / "ca.crt").read_bytes(), key, crt)
        async with grpc.aio.secure_channel(self._gateway, tls, _OPTIONS) as channel:
            stub: Any = NodeServiceStub(channel)
            said = Said(os.urandom(16).hex(), stub.FetchUpload)
            async with turns:
                answers = stub.Session(said.messages(self._hello(said.session))).__aiter__()
                welcome = (await anext(answers)).welcome
            connected.set_result(None)
            beating = asyncio.ensure_future(_beat(said, welcome.heartbeat_ms / 1000))
            async for response in answers:
                if response.HasField("assign"):
                    task = asyncio.ensure_future(self._job(stub, said, response.assign.uuid))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            beating.cancel()

    def _hello(self, session: str) -> cpb.SessionRequest:
        return cpb.SessionRequest(
            hello=cpb.Hello(
                node=self._name,
                session=session,
                boot_id="simulated",
                version=version(),
                # there is no gateway
                address="127.0.0.1:1",
                cpu_max_millicores=CPU_MILLICORES,
                memory_max_bytes=MEMORY_BYTES,
                uid_first=1_990_000_000,
                uid_count=65_536,
            )
        )

    async def _job(self, stub: Any, said: Said, uuid: str) -> None:  # noqa: ANN401  the stub of both
        granted = await stub.Claim(cpb.ClaimRequest(session=said.session, uuid=uuid))
        self._count += 1
        job = pb.Job(id=self._count, client_name=granted.client_name, state=pb.JOB_STATE_RUNNING)
        job.start.FromNanoseconds(time.time_ns())
        said.say(cpb.SessionRequest(started=cpb.Started(uuid=uuid, job=job)))
        await asyncio.sleep(self._seconds)
        job.state, job.reason, job.exit_code = pb.JOB_STATE_EXITED, pb.END_REASON_COMPLETED, 0
        job.end.FromNanoseconds(time.time_ns())
        said.say(cpb.SessionRequest(ended=cpb.Ended(uuid=uuid, job=job)))


async def _beat(said: Said, seconds: float) -> None:
    # not all at the same moment, as real ones
    await asyncio.sleep(seconds * os.urandom(1)[0] / 256)
    while True:
        said.say(cpb.SessionRequest(heartbeat=cpb.Heartbeat()))
        await asyncio.sleep(seconds)


async def _run(gateway: str, certs: Path, count: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    turns = asyncio.Semaphore(_AT_ONCE)
    connected: list[asyncio.Future[None]] = [loop.create_future() for _ in range(count)]
    nodes = [
        asyncio.ensure_future(SimulatedNode(name_of(number), gateway, certs, seconds).run(each, turns))
        for number, each in enumerate(connected)
    ]
    for node in nodes:
        # one that fails ends all
        node.add_done_callback(lambda _: ended.set())
    waiting: asyncio.Future[object] = asyncio.ensure_future(ended.wait())
    joined: asyncio.Future[object] = asyncio.ensure_future(asyncio.wait(connected))
    await asyncio.wait({joined, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
        print("connected", flush=True)
    await waiting
    for node in nodes:
        if node.done():
            node.result()
        node.cancel()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
