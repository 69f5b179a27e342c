"""`pjw workspace`: the directories that outlive jobs."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from pjw.cli.commands import each, show_name
from pjw.cli.connection import connect
from pjw.cli.render import json_text, printable, time_text
from pjw.cli.units import duration_in_words, size_in_words
from pjw.model import Workspace


def list_workspaces(arguments: argparse.Namespace) -> None:
    """Print the names of workspaces; at a terminal also their figures and when they were used."""
    with connect(arguments) as client:
        found = client.workspaces()
    form = arguments.format or ("table" if sys.stdout.isatty() else "names")
    if form == "json":
        print(json_text(list(map(members, found)), indent=2))
        return
    names = [_name(workspace, with_client=arguments.all) for workspace in found]
    for line in table(found, names) if form == "table" else names:
        print(line)


def _name(workspace: Workspace, *, with_client: bool) -> str:
    """Return a workspace's name in lists: a client's name has no slash."""
    return f"{printable(workspace.client_name)}/{workspace.name}" if with_client else workspace.name


def remove_workspaces(arguments: argparse.Namespace) -> int:
    """Remove workspaces one by one, and print each name; go on when one cannot be removed."""
    with connect(arguments) as client:
        return each(arguments.names, client.remove_workspace, show_name)


def table(found: Sequence[Workspace], names: Sequence[str]) -> Iterator[str]:
    """Yield a line for each workspace, with these names, under a heading."""
    now = datetime.now(UTC)
    width = max(map(len, ("NAME", *names)))
    yield f"{'NAME':<{width}} {'SIZE':>8} {'FILES':>9} {'JOBS':>6}  USED"
    for workspace, name in zip(found, names, strict=True):
        ago = duration_in_words(max(0.0, (now - workspace.used).total_seconds()))
        size = size_in_words(workspace.bytes)
        yield f"{name:<{width}} {size:>8} {workspace.inodes:>9} {workspace.jobs:>6}  {ago} ago"


def members(workspace: Workspace) -> dict[str, Any]:
    """Return the keys and values of a workspace's JSON."""
    return {
        "name": workspace.name,
        "made": time_text(workspace.made),
        "used": time_text(workspace.used),
        "bytes": workspace.bytes,
        "inodes": workspace.inodes,
        "jobs": workspace.jobs,
        "clientName": workspace.client_name,
    }
