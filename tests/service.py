"""A real pjwd on loopback with its own certificates and state, and a real pjw to talk to it."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from pjw.certs import authority
from pjw.launcher.policy import instance_name

BIN: Final = Path(sys.executable).parent
START_SECONDS: Final = 60
CALL_SECONDS: Final = 60


class Service:
    """pjwd in a directory: `certs/` (ca, server, and a client for each name), `state/`, `pjwd.log`."""

    def __init__(self, directory: Path, clients: Sequence[str] = ("alice", "bob"), config: str | None = None) -> None:
        self.directory: Final = directory
        self.certs: Final = directory / "certs"
        self.state: Final = directory / "state"
        self.log: Final = directory / "pjwd.log"
        self.config = config
        self.address = "127.0.0.1:0"
        self.process: subprocess.Popen[bytes] | None = None
        authority.init_directory(str(self.certs))
        authority.write_server(str(self.certs), ["localhost", "127.0.0.1"])
        for name in clients:
            authority.write_client(str(self.certs), name)

    def command(self, *extra: str) -> list[str]:
        """The command line of `pjwd serve`."""
        certs = self.certs
        command = [str(BIN / "pjwd"), "serve", "--listen", self.address, "--state-dir", str(self.state)]
        command += ["--ca-crt", str(certs / "ca.crt")]
        command += ["--server-crt", str(certs / "server.crt"), "--server-key", str(certs / "server.key")]
        if self.config is not None:
            path = self.directory / "pjwd.toml"
            path.write_text(self.config)
            command += ["--config", str(path)]
        return [*command, *extra]

    def start(self, *extra: str, env: dict[str, str] | None = None) -> Self:
        """Start pjwd, and wait until it says that it is ready; a restart keeps the port."""
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(*extra), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env
            )
        deadline = time.monotonic() + START_SECONDS
        pidfd = os.pidfd_open(self.process.pid)
        try:
            while True:
                text = self.log.read_bytes()[start:].decode()
                if ready := re.search(r"^pjwd: ready on (\S+:\d+)$", text, re.MULTILINE):
                    self.address = ready[1]
                    return self
                # a file has no event that says "a line was written"; its writer's end has one
                if select.select([pidfd], [], [], 0.02)[0] or time.monotonic() > deadline:
                    raise AssertionError(f"pjwd did not become ready:\n{text}")
        finally:
            os.close(pidfd)

    @property
    def pid(self) -> int:
        """The server's pid."""
        assert self.process is not None
        return self.process.pid

    def launcher_pid(self) -> int:
        """The launcher's pid: the server's child."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        [launcher] = [int(pid) for pid in children if b"pjw.launcher" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return launcher

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End pjwd with a signal; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.process = None
        return code

    def environment(self, client: str = "alice") -> dict[str, str]:
        """What pjw needs to know, as environment variables."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "PJW_SERVER": self.address,
            "PJW_CA_CRT": str(self.certs / "ca.crt"),
            "PJW_CLIENT_CRT": str(self.certs / f"{client}.crt"),
            "PJW_CLIENT_KEY": str(self.certs / f"{client}.key"),
        }

    def pjw(
        self, *arguments: str | bytes, client: str = "alice", timeout: float = CALL_SECONDS, **env: str
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run pjw to its end."""
        return subprocess.run(
            [str(BIN / "pjw"), *arguments],
            env={**self.environment(client), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    def ok(self, *arguments: str, client: str = "alice", timeout: float = CALL_SECONDS) -> str:
        """Run pjw, which must succeed and say nothing on stderr; its output, as text."""
        done = self.pjw(*arguments, client=client, timeout=timeout)
        assert (done.returncode, done.stderr) == (0, b""), (arguments, done)
        return done.stdout.decode()

    def popen(self, *arguments: str, client: str = "alice") -> "subprocess.Popen[bytes]":
        """Start pjw; the caller ends it."""
        return subprocess.Popen(
            [str(BIN / "pjw"), *arguments],
            env=self.environment(client),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def job_cgroups(self) -> list[Path]:
        """Every cgroup of a job of this service, whatever the version."""
        return job_cgroups(self.state)


def job_cgroups(state_dir: Path) -> list[Path]:
    """Every cgroup of a job that belongs to a state directory."""
    instance = instance_name(os.path.realpath(state_dir))
    found = []
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        if os.path.basename(directory) == instance:
            found += [Path(directory) / name for name in names]
    return found
