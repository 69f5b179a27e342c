"""The times of output: cuts output by the records that a job's init appends (init/output.c)."""

import os
import struct
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

from pjw.output.follower import follow
from pjw.output.log import OutputLog, read_at

# A time (nanoseconds of CLOCK_REALTIME), and the output's length read until then, in the machine's byte
# order.
RECORD: Final = struct.Struct("=qQ")
_RECORDS_READ: Final = 1024


async def follow_with_times(
    log: OutputLog, offset: int = 0, *, present_only: bool = False
) -> AsyncGenerator[tuple[bytes, int | None], None]:
    """Follow as `follow`, but cut at each record; yield bytes and their time, in ns since 1970.

    The time is None where it was not recorded (an older init), or a power cut took it.
    """
    with log.open_times() as descriptor:
        times = None if descriptor is None else _Times(descriptor)
        async with aclosing(follow(log, offset, present_only=present_only)) as chunks:
            async for chunk in chunks:
                if times is None:
                    yield chunk, None
                    continue
                # Output without a record yet was written within the last interval between records. Look at
                # `ended` first: init writes the last record before that.
                ended = log.ended
                for data, ns in await times.cut(chunk, offset):
                    yield data, time.time_ns() if ns is None and not ended else ns
                offset += len(chunk)


async def start_of_time(log: OutputLog, ns: int) -> int | None:
    """Return the offset of the first byte written at *ns* or later, in nanoseconds since 1970.

    Output that has no record yet counts as written now. None when the times were not recorded.
    """
    with log.open() as output, log.open_times() as descriptor:
        if not os.fstat(output).st_size:
            return 0
        return None if descriptor is None else await _Times(descriptor).first_since(ns)


class _Times:
    """The records of one output, read forward; invalid ones, as after a power cut, are skipped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: Final = descriptor
        self._records: list[tuple[int, int]] = []
        # of `_records`, and of all
        self._place = 0
        self._next = 0
        self._sought = False

    async def cut(self, data: bytes, offset: int) -> list[tuple[bytes, int | None]]:
        """Cut *data*, which lies at *offset*, into pieces written at one time each; None: not recorded."""
        if not self._sought:
            self._next = await self._first_behind(offset)
            self._sought = True
        pieces: list[tuple[bytes, int | None]] = []
        start, end = offset, offset + len(data)
        while start < end:
            record = await self._record_of(start)
            ns, stop = record if record is not None else (None, end)
            stop = min(stop, end)
            pieces.append((data[start - offset : stop - offset], ns))
            start = stop
        return pieces

    async def _record_of(self, offset: int) -> tuple[int, int] | None:
        while True:
            while self._place < len(self._records):
                record = self._records[self._place]
                if record[1] > offset:
                    return record
                self._place += 1
            self._records, self._place = await self._read(self._next, _RECORDS_READ), 0
            self._next += len(self._records)
            if not self._records:
                return None

    async def first_since(self, ns: int) -> int:
        """Return the offset where output of *ns* or later begins: the end of the record before it."""
        number = await self._first(lambda record: record[0] >= ns)
        before = await self._read(number - 1, 1) if number else []
        return before[0][1] if before else 0

    async def _first_behind(self, offset: int) -> int:
        """Return the number of the first record of the bytes after *offset*."""
        return await self._first(lambda record: record[1] > offset) if offset else 0

    async def _first(self, fits: Callable[[tuple[int, int]], bool]) -> int:
        """Return the number of the first record that fits, by bisection; all later records must fit too."""
        low, high = 0, os.fstat(self._descriptor).st_size // RECORD.size
        while low < high:
            middle = (low + high) // 2
            record = await self._read(middle, 1)
            if record and fits(record[0]):
                high = middle
            else:
                low = middle + 1
        return low

    async def _read(self, number: int, count: int) -> list[tuple[int, int]]:
        size = RECORD.size
        got, data = await read_at(self._descriptor, number * size, count * size)
        return list(RECORD.iter_unpack(data[: got - got % size]))
