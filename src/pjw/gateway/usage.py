"""The present usage of jobs, as their nodes answer."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from pjw.errors import PjwError
from pjw.gateway.dial import Dial
from pjw.gateway.nodes import Node, Nodes
from pjw.gateway.placements import Placed
from pjw.model import ClientQuota, GroupUse, Job, Mount, UsageSample
from pjw.rpc.convert import quota_from_message, sample_from_message
from pjw.v1 import job_worker_pb2 as pb

# We leave out a node that takes longer: a client that asks for a job wants more than its usage.
_SECONDS: Final = 2.0
# We ask for this many jobs of a cluster at a time.
_AT_ONCE: Final = 32


async def with_usage(dial: Dial, nodes: Nodes, placed: Placed, job: Job) -> Job:
    """Return a running job with its usage and its node's other facts; *job* itself if the node is silent."""
    answer = await _asked(dial, nodes.known.get(placed.placement.node), placed, _SECONDS)
    if placed.ended.is_set():
        return placed.job
    if answer is None:
        return job
    sample = sample_from_message(answer.usage_now) if answer.HasField("usage_now") else None
    return replace(job, usage_now=sample, detail=answer.detail or job.detail)


async def usage_now(
    dial: Dial, nodes: Nodes, placed: Sequence[Placed], seconds: float
) -> Mapping[int, UsageSample]:
    """Return what jobs use, by their ids, without the jobs whose nodes do not answer in time."""
    turns = asyncio.Semaphore(_AT_ONCE)
    samples: dict[int, UsageSample] = {}

    async def ask(each: Placed) -> None:
        async with turns:
            answer = await _asked(dial, nodes.known.get(each.placement.node), each, seconds)
        if answer is not None and answer.HasField("usage_now"):
            samples[each.job.id] = sample_from_message(answer.usage_now)

    await asyncio.gather(*map(ask, placed))
    return samples


async def nodes_quota(dial: Dial, nodes: Nodes, client_name: str) -> tuple[GroupUse, tuple[Mount, ...], int]:
    """Sum up what a client's jobs use on all nodes, and the mounts and GPUs that these have for it."""
    turns = asyncio.Semaphore(_AT_ONCE)

    async def ask(node: Node) -> ClientQuota | None:
        async with turns:
            try:
                answer: pb.GetQuotaResponse = await dial.call(
                    node, "GetQuota", pb.GetQuotaRequest(), client_name, _SECONDS
                )
            except PjwError:
                return None
        return quota_from_message(answer)

    connected = [node for node in nodes.known.values() if node.session is not None]
    found = [each for each in await asyncio.gather(*map(ask, connected)) if each is not None]
    use = GroupUse(
        sum(each.use.memory_bytes for each in found),
        sum(each.use.pids for each in found),
        sum(each.use.cpu_usage_usec for each in found),
    )
    mounts = {mount.name: mount for each in found for mount in each.mounts}
    return use, tuple(mount for _, mount in sorted(mounts.items())), sum(each.gpus for each in found)


async def _asked(dial: Dial, node: Node | None, placed: Placed, seconds: float) -> pb.Job | None:
    node_job_id = placed.placement.node_job_id
    if node is None or node.session is None or not node_job_id:
        return None
    try:
        answer: pb.GetResponse = await dial.call(
            node, "Get", pb.GetRequest(id=node_job_id), placed.job.client_name, seconds
        )
    except PjwError:
        return None
    return answer.job
