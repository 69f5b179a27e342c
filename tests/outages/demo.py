"""`make cluster-demo`: a cluster from nothing, a first session with it, and a node whose power is cut.

What it shows as typed is what it runs. `scripts/apart` runs it, and removes all that it leaves.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from pjw.node import holds
from tests.outages.network import Machine, Switch, children
from tests.support.slurm import Slurm, SlurmNode

NODES: Final = ("n1", "n2", "n3")
GATEWAY: Final = "gw.example.org"
LOST_AFTER_SECONDS: Final = 10
GATEWAY_TOML: Final = """\
listen = "0.0.0.0:50051"
user = "daemon"
state_dir = "{directory}/state"
[gateway]
crt = "{directory}/gate.crt"
key = "{directory}/gate.key"
engine = "{engine}"
heartbeat_seconds = 1
lost_after_seconds = {lost_after}
[roles]
viewers = ["john"]
"""
SLURM_TOML: Final = """\
[gateway.slurm]
bin = "{slurm.bin}"
conf = "{slurm.conf}"
hold = "{hold}"
"""
NODE_TOML: Final = """\
listen = "{address}:50051"
state_dir = "{directory}/state"
server_crt = "{directory}/node-{name}.crt"
server_key = "{directory}/node-{name}.key"
[cluster]
gateway = "{gateway}:50051"
{hold}[roles]
gateways = ["gate"]
[job_users]
uid_first = 1990000000
uid_count = 65536
"""
CLOCK: Final = "while :; do date; sleep 1; done"


class Daemon:
    """A pjwd on a machine, in a directory of the machine's."""

    def __init__(self, machine: Machine, words: str) -> None:
        self.machine: Final = machine
        self._words: Final = words
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        print(f"\n{self.machine.name}$ {self._words} &", flush=True)
        # a session of its own: Ctrl-C ends the demo
        self._process = subprocess.Popen(
            [*self.machine.enter, f"--wdns={self.machine.directory}", *self._words.split()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            print(line, end="", flush=True)
            if line.startswith("pjwd: ready on "):
                return
        raise SystemExit(f"demo: error: pjwd on {self.machine.name} did not start")

    def stop(self) -> None:
        """End it in good order."""
        assert self._process is not None
        [pid] = children(self._process.pid)
        os.kill(pid, signal.SIGTERM)
        self.over()

    def over(self) -> None:
        """It has ended, or is about to."""
        assert self._process is not None
        self._process.communicate()


def say(text: str) -> None:
    """Print what happens, apart from what is typed."""
    print(f"\n# {text}", flush=True)


def show(command: str) -> None:
    """Print a command as it would be typed, and run it."""
    print(f"\n$ {command}", flush=True)
    code = subprocess.run(["sh", "-c", command], check=False).returncode
    if code:
        raise SystemExit(f"this command ended with {code}")


def put(machine: Machine, config: str, text: str, *files: str) -> None:
    """Write a configuration into a machine's directory, and copy certificates beside it."""
    (machine.directory / config).write_text(text)
    for name in files:
        target = machine.directory / name
        target.touch(mode=0o600)
        target.write_bytes(Path("certs", name).read_bytes())


def await_nodes(count: int) -> None:
    """Wait until so many nodes are up."""
    deadline = time.monotonic() + 60
    command = ("pjw", "nodes", "--format", "json")
    while subprocess.run(command, capture_output=True, check=True).stdout.count(b'"up"') < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def main() -> int:
    """Run it; the exit code."""
    directory, engine = Path(os.environ["PJW_APART"]), os.environ.get("ENGINE") or "slurm"
    os.chdir(directory)
    Switch()
    machines = {
        name: Machine(name, number, directory / name) for number, name in enumerate(("gw", *NODES), 1)
    }
    hosts = [f"{machine.address} {name}.example.org" for name, machine in machines.items()]
    Path("hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
    subprocess.run(("mount", "--bind", "hosts", "/etc/hosts"), check=True)
    say("A switch and four machines, gw, n1, n2 and n3: each is a network namespace,")
    print("# with processes and mounts of its own. Nothing of this host is changed.")
    show(f"pjwd certs init certs --server {GATEWAY}:50051 john")
    show("pjwd certs client certs gate")
    show(f"for node in {' '.join(NODES)}; do pjwd certs node certs $node; done")
    gw = machines["gw"]
    for machine in machines.values():
        machine.on()
    text = GATEWAY_TOML.format(directory=gw.directory, engine=engine, lost_after=LOST_AFTER_SECONDS)
    slurm = started_slurm(machines) if engine == "slurm" else None
    if slurm is not None:
        text += SLURM_TOML.format(slurm=slurm, hold=slurm.directory / "pjw-hold")
    put(gw, "gateway.toml", text, "ca.crt", "server.crt", "server.key", "gate.crt", "gate.key")
    # the gateway reads its files again as the user that it becomes
    gw.directory.chmod(0o711)
    for path in gw.directory.iterdir():
        shutil.chown(path, "daemon")
    for name in NODES:
        node = machines[name]
        text = NODE_TOML.format(
            name=name,
            gateway=GATEWAY,
            address=node.address,
            directory=node.directory,
            hold='hold_user = "daemon"\n' if slurm is not None else "",
        )
        put(node, "pjwd.toml", text, "ca.crt", f"node-{name}.crt", f"node-{name}.key")
    say("On gw, gateway.toml:")
    print((gw.directory / "gateway.toml").read_text(), end="")
    gateway = Daemon(gw, "pjwd gateway --config gateway.toml")
    gateway.start()
    say("On each node, here on n1, pjwd.toml:")
    print((machines["n1"].directory / "pjwd.toml").read_text(), end="")
    daemons = {name: Daemon(machines[name], "pjwd serve --config pjwd.toml") for name in NODES}
    for daemon in daemons.values():
        daemon.start()

    say("From another machine on that switch:")
    print(f"\n$ export PJW_SERVER={GATEWAY}:50051 PJW_CA_CRT=certs/ca.crt \\")
    print("    PJW_CLIENT_CRT=certs/john.crt PJW_CLIENT_KEY=certs/john.key")
    for name in ("PJW_SERVER", "PJW_CA_CRT", "PJW_CLIENT_CRT", "PJW_CLIENT_KEY", "PJW_CONTEXT"):
        os.environ.pop(name, None)
    os.environ |= {
        "PJW_SERVER": f"{GATEWAY}:50051",
        "PJW_CA_CRT": "certs/ca.crt",
        "PJW_CLIENT_CRT": "certs/john.crt",
        "PJW_CLIENT_KEY": "certs/john.key",
    }
    await_nodes(len(NODES))
    show("pjw nodes --format table")
    show("pjw start 'echo \"hello world\"'")
    show(f"pjw start '{CLOCK}'")
    show(f"pjw start '{CLOCK}'")
    show("pjw list")
    show("pjw logs 1")
    show("pjw get 1")
    show("pjw stop 2 | head -n 8")

    if slurm is not None:
        say("Of all this Slurm knows a place for each job:")
        show("squeue --format='%i %j %u %T %N'")
    machine = cut_power(daemons)
    if slurm is not None:
        begin_slurmd(slurm, machine)

    say("Everything is stopped.")
    for daemon in (*daemons.values(), gateway):
        daemon.stop()
    if slurm is not None:
        slurm.close()
    for machine in machines.values():
        machine.off()
    return 0


def started_slurm(machines: dict[str, Machine]) -> Slurm:
    """A Slurm with its controller on gw, from Debian's packages, which are not installed."""
    say("Slurm, from Debian's packages, which are unpacked and not installed:")
    print("# slurmctld on gw, and slurmd on each node.")
    gw = machines["gw"]
    slurm = Slurm(
        [SlurmNode(name, machines[name].address) for name in NODES], address=gw.address, prefix=gw.enter
    )
    shutil.copyfile(Path(holds.__file__).with_name("pjw-hold"), slurm.directory / "pjw-hold")
    (slurm.directory / "pjw-hold").chmod(0o755)
    slurm.start_munge()
    slurm.start_controller()
    for name in NODES:
        begin_slurmd(slurm, machines[name])
    slurm.await_states(dict.fromkeys(NODES, "idle"))
    os.environ["SLURM_CONF"] = str(slurm.conf)
    os.environ["PATH"] += f":{slurm.bin}"
    show("sinfo")
    return slurm


def begin_slurmd(slurm: Slurm, machine: Machine) -> None:
    """Start the slurmd of a machine, which has just booted."""
    slurm.nodes[machine.name] = replace(slurm.nodes[machine.name], prefix=machine.enter)
    slurm.start_node(machine.name)


def cut_power(nodes: dict[str, Daemon]) -> Machine:
    """Cut the power of the node of job 3 while its output is followed; its machine, which is up again."""
    say("Job 3 runs. Its output is followed, and then its node has no power.")
    shown = subprocess.run(("pjw", "get", "3"), capture_output=True, text=True, check=True).stdout
    found = re.search(r'"node": "(\w+)"', shown)
    assert found is not None
    node = nodes[found[1]]
    print("\n$ pjw logs 3", flush=True)
    with subprocess.Popen(("pjw", "logs", "3"), stdout=subprocess.PIPE, text=True) as logs:
        assert logs.stdout is not None
        for number, line in enumerate(logs.stdout, 1):
            print(line, end="", flush=True)
            if number == 5:
                break
        node.machine.cut_power(node.machine.directory / "state")
        began = time.monotonic()
        node.over()
        print(f"# the power of {node.machine.name} is cut", flush=True)
        for line in logs.stdout:
            print(line, end="", flush=True)
    took = time.monotonic() - began
    if logs.returncode != 1:
        raise SystemExit(f"pjw logs ended with {logs.returncode}")
    print(f"# this was told after {took:.1f} s (lost_after_seconds = {LOST_AFTER_SECONDS})")
    show("pjw get 3 | head -n 8")
    show("pjw get 3 | grep detail")
    show("pjw nodes --format table")
    say(f"{node.machine.name} boots again: what it had written can be read.")
    node.machine.on()
    node.start()
    await_nodes(len(nodes))
    show("pjw logs 3 | tail -n 2")
    show("pjw list --state lost")
    return node.machine


if __name__ == "__main__":
    sys.exit(main())
