"""Server reflection: the contract, for clients that do not have the file. It tells nothing of jobs.

The library defines requests and answers; they pass our guard, as those of every other method do.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Final

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2 as pb
from grpc_reflection.v1alpha.reflection import aio

from pjw.server.authz import Caller
from pjw.server.guard import Answer, Guard

# One contract under two names: that of v1, which the library does not have, is v1alpha's to the last field.
NAMES: Final = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
_METHOD: Final = "ServerReflectionInfo"


def reflection_handlers(guard: Guard, services: Sequence[str]) -> list[grpc.GenericRpcHandler]:
    """Return the handlers of reflection, which lists *services* and itself."""
    _describe_v1()
    servicer = aio.ReflectionServicer((*services, *NAMES))

    async def reflect(
        requests: AsyncIterator[pb.ServerReflectionRequest],
        caller: Caller,
        answer: Answer[pb.ServerReflectionResponse],
    ) -> None:
        async with aclosing(servicer.ServerReflectionInfo(requests, None)) as responses:
            async for response in responses:
                await answer(response)

    handler = guard.bidi(reflect, pb.ServerReflectionRequest, "Reflect")
    return [grpc.method_handlers_generic_handler(name, {_METHOD: handler}) for name in NAMES]


def _describe_v1() -> None:
    # a client that walks through all listed services asks for this one's file too
    v1alpha = FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    v1 = text_format.Parse(str(v1alpha).replace("v1alpha", "v1"), FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(v1.SerializeToString())
