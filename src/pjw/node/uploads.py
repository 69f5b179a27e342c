"""Brings the files that were sent with a job from the gateway to its node, before the job starts.

On the node they are an upload as any other: it goes with the start of its job, or a while after it came.
"""

from collections.abc import Callable
from typing import Any, Final

import grpc

from pjw.cluster.v1 import cluster_pb2 as pb
from pjw.errors import ServerUnreachableError
from pjw.rpc.status import error_of
from pjw.worker import Worker

# Calls FetchUpload; grpc.aio has no types.
Fetch = Callable[[pb.FetchUploadRequest], Any]

_GONE: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


async def bring(worker: Worker, fetch: Fetch, session: str, uuid: str, client_name: str) -> str:
    """The name of the upload on this node, once all of it is here.

    What an earlier attempt has brought is passed over. Raises ServerUnreachableError when the gateway goes,
    CopyError when it has no such files, and what `Worker.write_upload` raises.
    """
    call = fetch(pb.FetchUploadRequest(session=session, uuid=uuid))
    try:
        async with worker.write_upload(uuid, client_name) as writer:
            offset = 0
            async for piece in call:
                await writer.write(offset, piece.data)
                offset += len(piece.data)
            await writer.write(offset, b"", end=True)
    except grpc.aio.AioRpcError as error:
        if error.code() in _GONE:
            raise ServerUnreachableError(f"the gateway does not send the files of job {uuid} now") from None
        metadata = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
        raise error_of(error.code(), error.details() or "", metadata, {}) from None
    finally:
        call.cancel()
    return uuid
