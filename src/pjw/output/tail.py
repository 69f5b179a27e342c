"""The beginning of the last lines of an output: read backwards, a block at a time, as tail(1) does."""

import asyncio
import os
from typing import Final

from pjw.output.log import READ_BYTES_MAX, OutputLog, read_at

BLOCK_BYTES: Final = READ_BYTES_MAX


async def start_of_tail(
    log: OutputLog, lines: int, offset: int = 0, turns: asyncio.Lock | None = None
) -> int:
    """Return the offset of the last *lines* lines of the present output, but not before *offset*.

    Bytes behind the last newline are a line as well. Readers that share *turns* search by turns.
    """
    turns = turns or asyncio.Lock()
    with log.open() as descriptor:
        size = end = os.fstat(descriptor).st_size
        if not 0 <= offset <= size:
            return offset
        if lines == 0:
            return size
        while end > offset:
            start = max(offset, end - BLOCK_BYTES)
            block = await _read_whole(descriptor, start, end)
            # the newline at the very end ends the last line, and divides it from nothing
            place = len(block) - 1 if end == size and block.endswith(b"\n") else len(block)
            newlines = block.count(b"\n", 0, place)
            if newlines >= lines:
                return start + _newline_from_end(block, place, lines) + 1
            lines -= newlines
            end = start
            # Other calls have their turn between two blocks, which may all be in the page cache: with many
            # readers searching, one block in all for each of these turns, and not one for each reader.
            async with turns:
                await asyncio.sleep(0)
    return offset


def _newline_from_end(block: bytes, end: int, number: int) -> int:
    """Return the place before *end* of the newline of that number, from the end. It must be there.

    By bisection, which is two looks at each byte: a search for one after the other, of a quarter of a
    million, would hold the event loop up for 40 ms.
    """
    start = 0
    while end - start > 1:
        middle = (start + end) // 2
        behind = block.count(b"\n", middle, end)
        if behind >= number:
            start = middle
        else:
            number -= behind
            end = middle
    return start


async def _read_whole(descriptor: int, start: int, end: int) -> bytes:
    # one read returns only the bytes in the page cache up to its first gap
    pieces: list[bytes] = []
    while start < end:
        got, data = await read_at(descriptor, start, end - start)
        if not got:
            break
        pieces.append(data)
        start += got
    return b"".join(pieces)
