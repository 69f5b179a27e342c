"""A hostile client, as a process: threads that ask for starts in closed loops, whatever the answer.

    python -m tests.support.hammer ADDRESS CERTS CLIENT THREADS

Answers each line on stdin with "STARTED REFUSED": how many of both there have been.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Final

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from pjw.v1 import job_worker_pb2 as pb
from pjw.v1.job_worker_pb2_grpc import JobWorkerServiceStub


class Hammer:
    """One connection, many threads."""

    def __init__(self, address: str, certs: Path, client: str) -> None:
        files = [(certs / name).read_bytes() for name in ("ca.crt", f"{client}.key", f"{client}.crt")]
        options = [("grpc.ssl_target_name_override", "localhost")]
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*files), options)
        self._stub: Final = JobWorkerServiceStub(channel)
        self._lock: Final = threading.Lock()
        self.started = self.refused = 0

    def loop(self) -> None:
        """Ask for ever."""
        while True:
            try:
                self._stub.Start(pb.StartRequest(command="sleep 1000"))
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                with self._lock:
                    self.refused += 1
            else:
                with self._lock:
                    self.started += 1


def main() -> None:
    """Hammer until stdin ends."""
    address, certs, client, threads = sys.argv[1:]
    hammer = Hammer(address, Path(certs), client)
    for _ in range(int(threads)):
        threading.Thread(target=hammer.loop, daemon=True).start()
    for _ in sys.stdin:
        print(hammer.started, hammer.refused, flush=True)


if __name__ == "__main__":
    main()
