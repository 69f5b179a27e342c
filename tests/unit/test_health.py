"""Health's answers at moments that a client cannot choose; tests/root/test_operator.py has the rest."""

import asyncio

from grpc_health.v1 import health_pb2 as pb

from pjw.server.authz import Caller
from pjw.server.health import Health

STATUS = pb.HealthCheckResponse
CALLER = Caller("alice", "alice")


def test_a_drain_while_the_first_answer_is_on_its_way() -> None:
    """Who was told SERVING is told NOT_SERVING too, also when the drain began before the next look."""

    async def watch() -> list[int]:
        health = Health()
        answers = health.watch(pb.HealthCheckRequest(), CALLER)
        told = [(await anext(answers)).status]
        drain = asyncio.ensure_future(health.drain())
        await asyncio.sleep(0)  # the drain has begun
        told += [answer.status async for answer in answers]
        await drain
        return told

    assert asyncio.run(watch()) == [STATUS.SERVING, STATUS.NOT_SERVING]
