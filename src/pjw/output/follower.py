"""follow(): any offset to the end of a job's output, for any number of readers."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from typing import Final

from pjw.errors import OffsetError, WorkerClosedError
from pjw.output.log import FramePrefix, OutputLog, Piece, check_whole, no_head, read_at

# A stalled stream holds about 4 chunks in gRPC and the kernel, so a reader begins with small
# ones and earns larger ones (the best size for one stream here) by keeping up.
CHUNK_BYTES_MIN: Final = 64 * 1024
CHUNK_BYTES_MAX: Final = 256 * 1024
KEEPS_UP_SECONDS: Final = 0.1


async def follow(
    log: OutputLog, offset: int = 0, head: FramePrefix = no_head, *, present_only: bool = False
) -> AsyncGenerator[bytes, None]:
    """Yield every byte from *offset* on, each chunk behind its head; return once the output has ended.

    With *present_only* return at the end of the output that is there when it is called, ended or not. Raises
    OffsetError when *offset* lies beyond the end of the output, OutputLostError when another process has cut
    the file short, and WorkerClosedError when the worker closes before the end. No polling: waits on inotify.
    A slow reader costs the others nothing: bytes stay in the file until it asks.
    """
    loop = asyncio.get_running_loop()
    with log.open() as descriptor, log.changes() as changed:
        size = os.fstat(descriptor).st_size
        # a job may write faster than its readers read
        end = size if present_only else sys.maxsize
        if not 0 <= offset <= size:
            raise OffsetError(f"cannot read output from byte {offset}: it has {size} bytes", size=size)
        chunk_bytes = CHUNK_BYTES_MIN
        while True:
            # Look at `ended`, and clear the event, before the read. The job may write its
            # last bytes while we read; this order makes the read after the look a complete
            # one, and a write after the read, or after its size was seen, sets the event again.
            ended = log.ended or present_only
            changed.clear()
            while True:
                most = min(chunk_bytes, end - offset)
                piece = log.shared(offset, most, head)
                if piece is None:
                    count, chunk = await read_at(descriptor, offset, most, head)
                    piece = Piece(offset, head, count, chunk, os.fstat(descriptor).st_size)
                    log.share(piece)
                if not piece.length:
                    break
                offset += piece.length
                yielded = loop.time()
                yield piece.chunk
                if loop.time() - yielded > KEEPS_UP_SECONDS:
                    chunk_bytes = CHUNK_BYTES_MIN
                elif piece.length == chunk_bytes:
                    chunk_bytes = min(2 * chunk_bytes, CHUNK_BYTES_MAX)
                # not a short read, which is not always one up to the end
                if piece.size <= offset:
                    break
            if ended:
                check_whole(descriptor, offset)
                return
            if piece.size < offset:
                check_whole(descriptor, offset)
            if log.abandoned:
                raise WorkerClosedError("the worker was closed; the job goes on")
            await changed.wait()
