"""`pjw quota`: a client's limits, the present usage of its jobs, and its share of the machine."""

import argparse
from collections.abc import Iterator
from typing import Any

from pjw.cli.connection import connect
from pjw.cli.render import json_text, limits_members, printable
from pjw.cli.units import duration_in_words, limit_in_words, size_in_words
from pjw.model import LIMIT_WORDS, ClientQuota


def show_quota(arguments: argparse.Namespace) -> None:
    """Print the quota as a table, or as JSON."""
    with connect(arguments) as client:
        quota = client.quota(arguments.client)
    if arguments.format == "json":
        print(json_text(members(quota), indent=2))
        return
    for line in quota_lines(quota):
        print(line)


def quota_lines(quota: ClientQuota) -> Iterator[str]:
    """Yield lines of at most 80 columns: names and numbers of any size fit into them."""
    percent = 100 * quota.weight / quota.total_weight
    yield f"client  {printable(quota.client_name)}"
    if quota.drained:
        yield "state   drained: your operator has no job started now"
    busy = "of the processors while all clients with jobs are busy"
    yield f"weight  {quota.weight}: {percent:.3g} % {busy}"
    at_most = f", at most {quota.running_max}" if quota.running_max else ""
    yield f"jobs    {quota.running} running{at_most}"
    if quota.queued:
        at_most = f", at most {quota.queued_max}" if quota.queued_max else ""
        yield f"queue   {quota.queued} waiting{at_most}"
    at_most = f", at most {size_in_words(quota.stored_bytes_max)}" if quota.stored_bytes_max else ""
    yield f"stored  {size_in_words(quota.stored_bytes)}{at_most}"
    for each in quota.mounts:
        yield f"mount   {printable(each.name)}{', read-only' if each.read_only else ''}"
    if quota.gpus:
        yield f"gpus    {quota.gpus}"
    yield ""
    yield _row("", "NOW", "ALL JOBS", "ONE JOB", "UNASKED")
    use = quota.use
    yield _of_all(quota, "memory_max_bytes", size_in_words(use.memory_bytes))
    promised = size_in_words(quota.memory_promised_bytes)
    yield _row("promised", promised, _limit("memory_max_bytes", quota.memory_promised_max_bytes), "", "")
    yield _of_all(quota, "pids_max", str(use.pids))
    yield _of_all(quota, "cpu_max_millicores", "")
    yield _row("their time", duration_in_words(use.cpu_usage_usec / 1_000_000), "", "", "")
    for name, (label, _) in LIMIT_WORDS.items():
        # the others have a line above, with the use of all jobs together
        if not hasattr(quota.sums, name):
            yield _row(label, "", "", *_of_one(quota, name))


def _of_all(quota: ClientQuota, name: str, now: str) -> str:
    return _row(LIMIT_WORDS[name][0], now, _limit(name, getattr(quota.sums, name)), *_of_one(quota, name))


def _of_one(quota: ClientQuota, name: str) -> Iterator[str]:
    return (_limit(name, getattr(limits, name)) for limits in (quota.ceilings, quota.defaults))


def _row(name: str, *cells: str) -> str:
    return f"{name:<10}{''.join(f'{cell:>12}' for cell in cells)}".rstrip()


def _limit(name: str, value: int) -> str:
    return limit_in_words(name, value) if value else "any"


def members(quota: ClientQuota) -> dict[str, Any]:
    """Return the keys and values of a quota's JSON; 0 is "no limit"."""
    return {
        "clientName": quota.client_name,
        "weight": quota.weight,
        "totalWeight": quota.total_weight,
        "running": quota.running,
        "runningMax": quota.running_max,
        "queued": quota.queued,
        "queuedMax": quota.queued_max,
        "storedBytes": quota.stored_bytes,
        "storedBytesMax": quota.stored_bytes_max,
        "memoryPromisedBytes": quota.memory_promised_bytes,
        "memoryPromisedMaxBytes": quota.memory_promised_max_bytes,
        "use": {
            "memoryBytes": quota.use.memory_bytes,
            "pids": quota.use.pids,
            "cpuUsageUsec": quota.use.cpu_usage_usec,
        },
        "sums": limits_members(quota.sums),
        "ceilings": limits_members(quota.ceilings),
        "defaults": limits_members(quota.defaults),
        "mounts": [{"name": each.name, "readOnly": each.read_only} for each in quota.mounts],
        "gpus": quota.gpus,
        "drained": quota.drained,
    }
