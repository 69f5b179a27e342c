"""`pjw nodes`: the machines of a cluster, through its gateway."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pjw.cli.commands import each, show_name
from pjw.cli.connection import find_settings, warn_of_ends
from pjw.cli.render import json_text, printable
from pjw.cli.units import duration_in_words, size_in_words

if TYPE_CHECKING:
    from pjw.client.cluster import Cluster, Node


def list_nodes(arguments: argparse.Namespace) -> None:
    """Print the names of nodes; at a terminal also their states and capacity."""
    with _connect(arguments) as cluster:
        found = cluster.nodes()
    form = arguments.format or ("table" if sys.stdout.isatty() else "names")
    if form == "json":
        print(json_text(list(map(members, found)), indent=2))
        return
    for line in table(found) if form == "table" else (node.name for node in found):
        print(line)


def drain(arguments: argparse.Namespace) -> int:
    """Have nodes get no more jobs, and print each name."""
    with _connect(arguments) as cluster:
        return each(arguments.names, cluster.drain, show_name)


def resume(arguments: argparse.Namespace) -> int:
    """Have nodes get jobs again, and print each name."""
    with _connect(arguments) as cluster:
        return each(arguments.names, cluster.resume, show_name)


def remove(arguments: argparse.Namespace) -> int:
    """Forget nodes that are gone for good, and print each name."""
    with _connect(arguments) as cluster:
        return each(arguments.names, cluster.remove, show_name)


def _connect(arguments: argparse.Namespace) -> "Cluster":
    # gRPC comes with it: faults of the settings are reported sooner
    from pjw.client.cluster import Cluster

    settings = find_settings(arguments)
    warn_of_ends(settings)
    return Cluster(settings.server, settings.ca_crt, settings.client_crt, settings.client_key)


def table(found: "Sequence[Node]") -> Iterator[str]:
    """Yield a line for each node, under a heading."""
    width = max(map(len, ("NAME", *(node.name for node in found))))
    head = f"{'NAME':<{width}} {'STATE':<8} {'JOBS':>5} {'PROCESSORS':>12} {'MEMORY':>19}"
    yield f"{head} {'VERSION':<9} ADDRESS"
    for node in found:
        processors = f"{node.cpu_millicores / 1000:g}/{_most(node.cpu_max_millicores / 1000)}"
        memory = f"{size_in_words(node.memory_bytes)}/{_size(node.memory_max_bytes)}"
        more = f" (silent for {duration_in_words(node.silent_seconds)})" if node.silent_seconds else ""
        if node.drained_there:
            more = " (drained there: pjwd resume)"
        yield (
            f"{printable(node.name):<{width}} {node.state:<8} {node.jobs:>5} {processors:>12} {memory:>19}"
            f" {printable(node.version):<9} {printable(node.address)}{more}"
        )


def _most(number: float) -> str:
    return f"{number:g}" if number else "any"


def _size(count: int) -> str:
    return size_in_words(count) if count else "any"


def members(node: "Node") -> dict[str, Any]:
    """Return the keys and values of a node's JSON."""
    return {
        "name": node.name,
        "state": node.state,
        "address": node.address,
        "version": node.version,
        "jobs": node.jobs,
        "cpuMillicores": node.cpu_millicores,
        "cpuMaxMillicores": node.cpu_max_millicores,
        "memoryBytes": node.memory_bytes,
        "memoryMaxBytes": node.memory_max_bytes,
        "silentSeconds": node.silent_seconds,
        "drainedThere": node.drained_there,
    }
