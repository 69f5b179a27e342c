"""The cluster on machines, and the table of what the tests have measured."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Final

import pytest

from tests.outages.cluster import MachineCluster, machine_cluster
from tests.outages.network import Switch
from tests.outages.slurm import SlurmMachineCluster

# ENGINE=pool leaves Slurm out
ENGINES: Final = [os.environ["ENGINE"]] if os.environ.get("ENGINE") else ["pool", "slurm"]
_ROWS: Final[list[tuple[str, str, str, str]]] = []


def pytest_configure() -> None:
    """Make Ctrl-C work: scripts/apart runs us in its background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is here, unless this is a namespace of ours."""
    for item in items:
        if "PJW_APART" not in os.environ and item.path.parent == config.rootpath / "tests" / "outages":
            item.add_marker(pytest.mark.skip(reason="needs machines: make test-cluster"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the rows for docs/cluster.md."""
    if _ROWS:
        terminalreporter.section("measured")
        terminalreporter.write_line("| fault | seconds until told | gap of the follower | output |")
        terminalreporter.write_line("| --- | --- | --- | --- |")
        for row in _ROWS:
            terminalreporter.write_line(f"| {' | '.join(row)} |")


Measured = Callable[..., None]


@pytest.fixture(scope="session")
def measured() -> Measured:
    """Notes a row of the table."""

    def note(fault: str, output: str, *, told: float | None = None, gap: float | None = None) -> None:
        seconds = ["" if figure is None else f"{figure:.1f} s" for figure in (told, gap)]
        _ROWS.append((fault, seconds[0], seconds[1], output))

    return note


@pytest.fixture(scope="session")
def switch() -> Switch:
    """The switch of all machines."""
    return Switch()


@pytest.fixture(scope="module", params=ENGINES)
def made(switch: Switch, request: pytest.FixtureRequest) -> Iterator[MachineCluster]:
    """One cluster of each engine for all tests of a module."""
    del switch
    with machine_cluster(SlurmMachineCluster if request.param == "slurm" else MachineCluster) as made:
        yield made


@pytest.fixture
def cluster(made: MachineCluster) -> Iterator[MachineCluster]:
    """The same, whole again after each test."""
    yield made
    made.idle()
