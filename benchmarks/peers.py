"""Other programs that start a command in its own namespaces, called as by a user.

Each is a command line that is timed as a whole process by floor.c, in the same way as the floor itself. From
outside nobody sees when it executes the command. So for a start we have it execute told.c, a static program
that first writes a byte to its stdout. The peer's start is the time until that byte is there: 0.05 to 0.3 ms
after the exec. A whole life is that of `true`.

They give a command less than a job of pjw has (bwrap and unshare neither limits nor a separate user, none of
them a seccomp filter and a scratch directory), so they have the easier task.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from benchmarks.floor import TOLD, Floor, Run
from pjw.model import Limits

NAME: Final = f"pjw-bench-{os.getpid()}"
BWRAP: Final = "bwrap --unshare-all"
NSPAWN: Final = "systemd-nspawn"
# Debian's crun refuses a host with cgroup v1 that has v2 mounted too, so it gets a view without that.
_UNIFIED: Final = "/sys/fs/cgroup/unified"
_WITHOUT_UNIFIED: Final = ["unshare", "--mount", "sh", "-c", f'umount {_UNIFIED} && exec "$@"', "sh"]

# at each run systemd's tools print messages about cleaning up
QUIET: Final = MappingProxyType({"SYSTEMD_LOG_LEVEL": "crit"})
_PROPAGATED: Final = Path("/run/systemd/nspawn/propagate", NAME)

CommandLine = Callable[[str], list[str]]


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that is ready to be measured, one run at a time."""

    name: str
    telling: Floor
    whole: Floor

    def run(self) -> Run:
        """Return the seconds until the command ran, and, of another run, until `true` and the peer ended."""
        return Run(self.telling.run().start, self.whole.run().end)


@contextmanager
def open_peers(directory: Path, floor: Path, told: Path, *only: str) -> Iterator[list[Peer]]:
    """Give every available peer, or *only* those; stderr names each missing one."""
    with ExitStack() as stack:
        runtimes = {f"{tool} run": stack.enter_context(_oci(tool, directory)) for tool in ("crun", "runc")}
        stack.callback(_forget_nspawn)
        nspawn: dict[str, CommandLine] = {NSPAWN: lambda command: _nspawn(directory, command)}
        peers = []
        for name, command_line in {**runtimes, **_SIMPLE, **nspawn}.items():
            if only and name not in only:
                continue
            tool = name.split()[0]
            if why := why_missing(tool):
                print(f"no {name} beside pjw: {why}", file=sys.stderr)
                continue
            around = within(tool)
            telling, whole = (
                command_line(command) for command in (str(told), shutil.which("true") or "/bin/true")
            )
            if why := why_not([*around, *whole]):
                print(f"no {name} beside pjw: {why}", file=sys.stderr)
                continue
            floors = (
                stack.enter_context(Floor(floor, letters, words, within=around, environment=QUIET))
                for letters, words in ((TOLD, telling), ("-", whole))
            )
            peers.append(Peer(name, *floors))
        yield peers


@contextmanager
def open_exec(directory: Path, floor: Path, command: str) -> Iterator[Floor | None]:
    """Give `crun exec` of a command in a running container; None, with the reason on stderr, without it."""
    name, bundle = f"{NAME}-exec", directory / "crun-exec"
    crun = [*within("crun"), "crun", "--root", str(directory / "crun-exec-state")]
    with ExitStack() as stack:
        why = why_missing("crun")
        if why is None:
            _write_bundle(bundle, shutil.which("sleep") or "/bin/sleep", name, "3600")
            stack.callback(
                subprocess.run, [*crun, "delete", "--force", name], capture_output=True, check=False
            )
            why = _why_not_detached([*crun, "run", "--detach", "--bundle", str(bundle), name], directory)
        if why is not None:
            print(f"no crun exec beside pjw: {why}", file=sys.stderr)
            yield None
            return
        words = [*crun[len(within("crun")) :], "exec", name, command]
        yield stack.enter_context(Floor(floor, "-", words, within=within("crun"), environment=QUIET))


def why_not(command: Sequence[str]) -> str | None:
    """Return a peer's own error message if it cannot run here; None if it can."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode == 0:
        return None
    words = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    return words[-1] if words else f"it ends with {done.returncode}"


def _why_not_detached(command: Sequence[str], directory: Path) -> str | None:
    """Do the same for one that leaves a container behind, which would hold a pipe open."""
    path = directory / "detached.log"
    with path.open("wb") as log:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        ).returncode
    return None if code == 0 else (path.read_text().strip().splitlines() or [f"it ends with {code}"])[-1]


def why_missing(tool: str) -> str | None:
    """Return why a peer is not installed here; None if it is."""
    if tool == "systemd-run" and not os.path.isdir("/run/systemd/system"):
        return "systemd is not PID 1 here"
    return None if shutil.which(tool) else "it is not installed"


def within(tool: str) -> Sequence[str]:
    """Return the words to run a peer with here."""
    return _WITHOUT_UNIFIED if tool == "crun" and os.path.ismount(_UNIFIED) else ()


_SIMPLE: Final[dict[str, CommandLine]] = {
    BWRAP: lambda command: [
        *("bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", command),
    ],
    "unshare -pmniuC": lambda command: ["unshare", "-pmniuC", "--fork", "--mount-proc", command],
    "firejail --net=none": lambda command: [
        *("firejail", "--quiet", "--noprofile", "--net=none", "--ipc-namespace", "--read-only=/"),
        *("--caps.drop=all", "--nonewprivs", command),
    ],
    "systemd-run --wait": lambda command: [
        *("systemd-run", "--wait", "--pipe", "--collect", "--quiet", "--property=ProtectSystem=strict"),
        *("--property=PrivateNetwork=yes", "--property=PrivateIPC=yes", "--property=PrivateTmp=yes"),
        *("--property=MemoryMax=512M", "--property=TasksMax=512", "--property=CPUQuota=100%", command),
    ],
}


@contextmanager
def _oci(tool: str, directory: Path) -> Iterator[CommandLine]:
    """Give the command line of an OCI runtime, with a bundle for each command; nothing of it is left."""
    name, state = f"{NAME}-{tool}", directory / tool
    arguments = [tool, "--root", str(state)]

    def command_line(command: str) -> list[str]:
        bundle = state.with_name(f"{tool}-{Path(command).name}")
        _write_bundle(bundle, command, name)
        return [*arguments, "run", "--bundle", str(bundle), name]

    try:
        yield command_line
    finally:
        # a container that did not end by itself is a failure already, so this one need not succeed
        if state.exists() and any(path.name == name for path in state.iterdir()):
            subprocess.run([*within(tool), *arguments, "delete", "--force", name], check=False)


def _write_bundle(bundle: Path, command: str, name: str, *arguments: str) -> None:
    inside = _write_root(bundle / "rootfs", command)
    (bundle / "config.json").write_text(json.dumps(bundle_config([inside, *arguments], name)))


def _write_root(rootfs: Path, command: str) -> str:
    """Make a root for a command, with a place for each mount; return the command's path in it."""
    for place in ("usr", "proc", "dev", "tmp", "bench"):
        (rootfs / place).mkdir(parents=True)
    for link in ("bin", "lib", "lib64"):
        if os.path.islink(f"/{link}"):
            (rootfs / link).symlink_to(f"usr/{link}")
    # besides true from /usr: the programs that the benchmark has built
    inside = command if command.startswith(("/usr/", "/bin/")) else f"/bench/{Path(command).name}"
    if inside != command:
        shutil.copy(command, rootfs / "bench")
    return inside


def _nspawn(directory: Path, command: str) -> list[str]:
    """Give systemd-nspawn without the bus of systemd, with a root for the command."""
    root = directory / f"{NSPAWN}-{Path(command).name}"
    inside = _write_root(root, command)
    # places of its mounts, since it cannot make a directory in a read-only root
    for place in ("run", "sys", "etc", "var", "root"):
        (root / place).mkdir()
    return [
        *(NSPAWN, "--quiet", "--register=no", "--keep-unit", "--console=pipe", "--private-network"),
        *("--directory", str(root), "--read-only", "--bind-ro=/usr", "--timezone=off", "--resolv-conf=off"),
        *(f"--machine={NAME}", inside),
    ]


def _forget_nspawn() -> None:
    # it removes this itself only from a tmpfs
    with suppress(FileNotFoundError):
        _PROPAGATED.rmdir()


def bundle_config(argv: Sequence[str], name: str) -> dict[str, Any]:
    """Return the configuration of an OCI container with the limits and namespaces of a job."""
    limits = Limits()
    quiet = ["nosuid", "nodev"]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 65534, "gid": 65534},
            "args": [*argv],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {},
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "job",
        "mounts": [
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro", *quiet]},
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["noexec", *quiet]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": quiet},  # noqa: S108
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "network", "ipc", "uts", "cgroup")],
            "cgroupsPath": f"/{name}",
            "resources": {
                "memory": {"limit": limits.memory_max_bytes},
                "cpu": {"quota": limits.cpu_max_millicores * 100, "period": 100_000},
                "pids": {"limit": limits.pids_max},
            },
        },
    }
