"""grpc.health.v1: whether this server takes calls. For any client that is let in; it tells no job."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2 as pb

from pjw.errors import UnknownServiceError
from pjw.server.authz import Caller
from pjw.server.guard import Guard
from pjw.server.service import SERVICE_NAME

HEALTH_NAME: Final = pb.DESCRIPTOR.services_by_name["Health"].full_name
# "" is the server as a whole
_SERVICES: Final = frozenset({"", SERVICE_NAME, HEALTH_NAME})
# A watcher hears of the end in a moment; one that does not read is not waited for.
_FAREWELL_SECONDS: Final = 1

_Status = pb.HealthCheckResponse.ServingStatus


class Health:
    """SERVING from the start to the drain, for the server and its services alike."""

    def __init__(self) -> None:
        self._draining: Final = asyncio.Event()
        self._watchers = 0
        self._unwatched: Final = asyncio.Event()
        self._unwatched.set()

    def handlers(self, guard: Guard) -> grpc.GenericRpcHandler:
        """Check and Watch, behind the guard."""
        return grpc.method_handlers_generic_handler(
            HEALTH_NAME,
            {
                "Check": guard.unary(self.check, pb.HealthCheckRequest, "HealthCheck"),
                "Watch": guard.stream(self.watch, pb.HealthCheckRequest, "HealthWatch"),
            },
        )

    async def check(self, request: pb.HealthCheckRequest, caller: Caller) -> pb.HealthCheckResponse:
        """Return the present state of the server."""
        if request.service not in _SERVICES:
            raise UnknownServiceError("no such service is here")
        return pb.HealthCheckResponse(status=self._status())

    async def watch(
        self, request: pb.HealthCheckRequest, caller: Caller
    ) -> AsyncGenerator[pb.HealthCheckResponse, None]:
        """Yield the present state of the server, and once more when that changes."""
        known = request.service in _SERVICES
        self._watchers += 1
        self._unwatched.clear()
        try:
            if not known:
                yield pb.HealthCheckResponse(status=_Status.SERVICE_UNKNOWN)
                await self._draining.wait()
                return
            told = self._status()
            yield pb.HealthCheckResponse(status=told)
            # the status that was sent, not the present one: the drain may have begun while it was on its way
            if told == _Status.SERVING:
                await self._draining.wait()
                yield pb.HealthCheckResponse(status=self._status())
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._unwatched.set()

    async def drain(self) -> None:
        """Be NOT_SERVING for good; return when the watchers know."""
        self._draining.set()
        try:
            async with asyncio.timeout(_FAREWELL_SECONDS):
                await self._unwatched.wait()
        except TimeoutError:
            return

    def _status(self) -> Any:  # noqa: ANN401  an enum's number, which has its own type only in the stubs
        return _Status.NOT_SERVING if self._draining.is_set() else _Status.SERVING
