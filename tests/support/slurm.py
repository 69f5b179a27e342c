"""A real Slurm: munged, slurmctld and a slurmd for each node, from Debian's packages, which stay uninstalled.

All that it writes is in one directory, and its ports are its own. Each process is started behind a prefix
command (`ip netns exec n1`, `nsenter …`), so that nodes can have namespaces of their own.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from tests.support.service import wait_for

UNPACK: Final = Path(__file__).resolve().parents[2] / "scripts" / "slurm-unpack"
# A user of the host's whom Slurm knows by name: the gateway runs as that one, and so do its holds.
USER: Final = "daemon"
_CALL_SECONDS: Final = 30


@cache
def unpacked() -> Path:
    """The directory of the unpacked Slurm; with nothing there yet, it is downloaded."""
    done = subprocess.run([str(UNPACK)], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return Path(done.stdout.strip())


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@dataclass(frozen=True, slots=True)
class SlurmNode:
    """A node of Slurm: where its slurmd is, and what comes before its command line."""

    name: str
    address: str = "127.0.0.1"
    prefix: Sequence[str] = ()
    cpus: int = 3
    memory_mb: int = 4096
    # in Slurm's words, such as "fast"; empty: none
    features: str = ""


class Slurm:
    """One controller and its nodes; `start` begins all, `close` ends all, and holds that are left."""

    def __init__(
        self,
        nodes: Sequence[SlurmNode],
        *,
        address: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Write slurm.conf, which *settings* change. *address* and *prefix* are the controller's."""
        self.bin: Final = unpacked() / "bin"
        self.nodes: Final = {node.name: node for node in nodes}
        self.prefix = prefix
        parent = os.environ.get("PJW_APART", "/var/lib")
        self.directory: Final = Path(tempfile.mkdtemp(prefix="pjw-slurm-", dir=parent))
        self.directory.chmod(0o755)
        self.conf: Final = self.directory / "slurm.conf"
        self.running: Final[dict[str, subprocess.Popen[bytes]]] = {}
        for name in ("state", "spool", "munge", "key", "log"):
            (self.directory / name).mkdir(mode=0o700 if name == "key" else 0o755)
        (self.directory / "key" / "munge.key").write_bytes(os.urandom(128))
        (self.directory / "key" / "munge.key").chmod(0o400)
        self.conf.write_text(self._configuration(address, settings or {}))

    def _configuration(self, address: str, settings: Mapping[str, object]) -> str:
        here = self.directory
        keys: dict[str, object] = {
            "ClusterName": "pjw",
            "SlurmctldHost": f"{socket.gethostname().partition('.')[0]}({address})",
            "SlurmctldPort": free_port(),
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "StateSaveLocation": here / "state",
            "SlurmdSpoolDir": here / "spool" / "%n",
            "SlurmctldPidFile": here / "slurmctld.pid",
            "SlurmdPidFile": here / "slurmd-%n.pid",
            "PluginDir": (unpacked() / "plugins").read_text().split()[0],
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={here / 'munge' / 'socket'}",
            "CredType": "cred/munge",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "MpiDefault": "none",
            "MailProg": "/bin/true",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "sched_min_interval=0,batch_sched_delay=0,bf_interval=1",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            # what the host really has is another matter
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 2,
            "SlurmdTimeout": 60,
            "KillWait": 30,
            # how long Slurm's programs wait for a controller that is dead
            "MessageTimeout": 5,
            **settings,
        }
        lines = [f"{key}={value}" for key, value in keys.items()]
        host = socket.gethostname().partition(".")[0]
        lines += [
            f"NodeName={node.name} NodeHostname={host} NodeAddr={node.address} Port={free_port()}"
            f" CPUs={node.cpus} RealMemory={node.memory_mb} State=UNKNOWN"
            + (f" Features={node.features}" if node.features else "")
            for node in self.nodes.values()
        ]
        lines.append("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        # and one for each node
        lines += [f"PartitionName=only-{name} Nodes={name} MaxTime=INFINITE State=UP" for name in self.nodes]
        return "\n".join([*lines, ""])

    # --- processes

    def start(self) -> None:
        """Start everything, and wait until every node can have jobs."""
        self.start_munge()
        self.start_controller()
        for name in self.nodes:
            self.start_node(name)
        self.await_states(dict.fromkeys(self.nodes, "idle"))

    def start_munge(self) -> None:
        """Start munged, with which Slurm's processes know each other."""
        here = self.directory
        (here / "munge" / "socket").unlink(missing_ok=True)
        options = {"socket": "munge/socket", "key-file": "key/munge.key", "pid-file": "munge/pid"}
        options |= {"log-file": "log/munged", "seed-file": "key/seed"}
        given = [f"--{option}={here / path}" for option, path in options.items()]
        self._begin("munged", ["munged", "--foreground", "--force", *given])
        wait_for((here / "munge" / "socket").exists)

    def start_controller(self) -> None:
        """Start slurmctld, and wait until it answers."""
        self._begin("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)], self.prefix)
        wait_for(lambda: self.call("scontrol", "ping").returncode == 0)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        command = ["slurmd", "-D", "-N", name, "-f", str(self.conf), "-d", str(self.bin / "slurmstepd")]
        self._begin(f"slurmd-{name}", command, self.nodes[name].prefix)

    def end(self, what: str, number: int = signal.SIGTERM) -> None:
        """End "munged", "slurmctld" or "slurmd-NODE" with a signal; holds of a node go on."""
        process = self.running.pop(what)
        process.send_signal(number)
        process.wait(_CALL_SECONDS)

    def is_running(self, what: str) -> bool:
        """Whether one of these is there."""
        return what in self.running and self.running[what].poll() is None

    def _begin(self, what: str, command: Sequence[str], prefix: Sequence[str] = ()) -> None:
        with (self.directory / "log" / what).open("ab") as log:
            self.running[what] = subprocess.Popen(
                [*prefix, str(self.bin / command[0]), *command[1:]],
                env=self.environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    # --- commands

    def environment(self) -> dict[str, str]:
        """What Slurm's programs need."""
        return {"PATH": f"{self.bin}:/usr/sbin:/usr/bin:/sbin:/bin", "SLURM_CONF": str(self.conf)}

    def call(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run one of Slurm's programs as root."""
        return subprocess.run(
            [str(self.bin / program), *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_CALL_SECONDS,
        )

    def ok(self, program: str, *arguments: str) -> str:
        """The same, which must succeed; its output."""
        done = self.call(program, *arguments)
        assert done.returncode == 0, (program, arguments, done)
        return done.stdout

    def states(self) -> dict[str, str]:
        """The states of the nodes, in Slurm's words."""
        rows = self.call("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.splitlines()
        return {name: state.rstrip("*") for name, _, state in (row.partition(" ") for row in rows)}

    def await_states(self, wanted: Mapping[str, str]) -> None:
        """Wait until nodes are in these states."""
        try:
            wait_for(lambda: wanted.items() <= self.states().items())
        except AssertionError:
            raise AssertionError(f"{self.states()} is not {wanted}:\n{self.logs()}") from None

    def jobs(self) -> list[tuple[str, str, str]]:
        """Slurm's jobs: id, name, state."""
        rows = self.ok("squeue", "--noheader", "--format=%A|%j|%T").splitlines()
        return [(number, name, state) for number, name, state in (row.split("|") for row in rows)]

    def logs(self) -> str:
        """The ends of all logs."""
        found = sorted((self.directory / "log").iterdir())
        return "\n".join(f"--- {each.name}\n{each.read_text(errors='replace')[-3000:]}" for each in found)

    def close(self) -> None:
        """End all; nothing of it is left."""
        for what in sorted(self.running, reverse=True):
            with suppress(subprocess.TimeoutExpired):
                # slurmd does not take its jobs along
                self.end(what, signal.SIGTERM if what == "munged" else signal.SIGKILL)
        for pid in self._left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self._left())
        shutil.rmtree(self.directory)

    def _left(self) -> list[int]:
        """Processes of this Slurm's: slurmstepd and what it runs, which have no parent of ours."""
        mark = f"SLURM_CONF={self.conf}".encode()
        found = []
        for each in Path("/proc").iterdir():
            if each.name.isdigit():
                with suppress(OSError):
                    if mark in (each / "environ").read_bytes().split(b"\0"):
                        found.append(int(each.name))
        return found


@contextmanager
def slurm(nodes: Sequence[SlurmNode], **options: object) -> Iterator[Slurm]:
    """A Slurm that runs."""
    made = Slurm(nodes, **options)  # type: ignore[arg-type]
    try:
        made.start()
        yield made
    except BaseException:
        print(made.logs())
        raise
    finally:
        made.close()


class Apart:
    """A mount namespace with a /run/pjw of its own, for a pjwd and a slurmd that are one node of many."""

    def __init__(self) -> None:
        os.makedirs("/run/pjw", exist_ok=True)
        script = "mount -t tmpfs -o mode=755 tmpfs /run/pjw && echo && exec cat"
        self._process: Final = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"\n"

    @property
    def prefix(self) -> tuple[str, ...]:
        """What has a command run in it."""
        return ("nsenter", f"--mount=/proc/{self._process.pid}/ns/mnt", "--")

    def close(self) -> None:
        """Let go of it."""
        self._process.communicate(timeout=_CALL_SECONDS)
