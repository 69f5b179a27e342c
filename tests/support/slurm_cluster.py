"""A cluster on loopback whose engine is a real Slurm: `support.cluster` with `support.slurm` below it."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from pjw.node import holds
from tests.support.cluster import Cluster, NodeService
from tests.support.service import wait_for
from tests.support.slurm import USER, Apart, Slurm, SlurmNode

WARM_SECONDS: Final = 2.0


class SlurmCluster(Cluster):
    """A gateway, nodes, and the Slurm that gives their places."""

    def __init__(
        self, directory: Path, *, nodes: int = 2, settings: Mapping[str, object] | None = None, keys: str = ""
    ) -> None:
        """*settings* change slurm.conf, *keys* are more lines of [gateway.slurm]."""
        names = [f"n{number + 1}" for number in range(nodes)]
        self._stack: Final = ExitStack()
        try:
            self.apart: Final = {name: Apart() for name in names}
            for each in self.apart.values():
                self._stack.callback(each.close)
            self.slurm: Final = Slurm([self.slurm_node(name) for name in names], settings=settings)
            self._stack.callback(self.slurm.close)
            self.slurm.start()
            # where every user finds it
            hold = self.slurm.directory / "pjw-hold"
            shutil.copyfile(Path(holds.__file__).with_name("pjw-hold"), hold)
            hold.chmod(0o755)
            config = f'[gateway.slurm]\nbin = "{self.slurm.bin}"\nconf = "{self.slurm.conf}"\n'
            config += f'hold = "{hold}"\n{keys}'
            if "warm_seconds" not in keys:
                config += f"warm_seconds = {WARM_SECONDS}\n"
            super().__init__(directory, nodes=nodes, gateway_config=config, engine="slurm")
        except BaseException:
            self._stack.close()
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def slurm_node(self, name: str) -> SlurmNode:
        """What Slurm knows of a node."""
        return SlurmNode(name, prefix=self.apart[name].prefix, features=f"of-{name}")

    def change_gateway(self, config: str) -> str:
        """The configuration of the gateway: it is a user whom Slurm knows."""
        return f'user = "{USER}"\n{config}'

    def prepare(self, node: NodeService) -> None:
        """Have a node take Slurm's places, and be where its slurmd is."""
        assert node.config is not None
        node.config = node.config.replace("[cluster]\n", f'[cluster]\nhold_user = "{USER}"\n')
        node.prefix = self.apart[node.name].prefix

    def idle(self) -> None:
        """Stop every job, let the places go, and have everything there: for the next test."""
        for what, start in (("munged", self.slurm.start_munge), ("slurmctld", self.slurm.start_controller)):
            if not self.slurm.is_running(what):
                start()
        for name in self.slurm.nodes:
            if not self.slurm.is_running(f"slurmd-{name}"):
                self.slurm.start_node(name)
            if "drain" in self.slurm.states().get(name, ""):
                self.slurm.ok("scontrol", "update", f"nodename={name}", "state=resume")
        super().idle()
        self.slurm.ok("scancel", f"--user={USER}")
        await_no_places(self)

    def close(self) -> None:
        """End all."""
        with self._stack:
            super().close()


@contextmanager
def slurm_cluster(**options: object) -> Iterator[SlurmCluster]:
    """A cluster on Slurm, in a directory of its own."""
    directory = Path(tempfile.mkdtemp(prefix="pjw-test-", dir="/var/lib"))
    made = SlurmCluster(directory, **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        print(made.slurm.logs())
        made.close()


def await_no_places(cluster: SlurmCluster) -> None:
    """Wait until no place is held, warm or other."""
    wait_for(lambda: not cluster.slurm.jobs())
