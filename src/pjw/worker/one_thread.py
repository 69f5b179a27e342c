"""A thread that calls one function after the other, for an event loop that must not wait for a disk.

concurrent.futures has this too, but makes two futures for a call, joined by two locks and three callbacks.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")
# called on the event loop with the result of a call, or with the error that it raised
_Done = Callable[[Any, BaseException | None], None]
# The result of a call whose end other code will report.
TOLD_LATER: Final = object()


class OneThread:
    """Calls functions in their order. The thread begins with the first of them."""

    def __init__(self, name: str) -> None:
        self._name: Final = name
        # the loop, the function, and its callback; None ends the thread
        self._calls: Final[
            SimpleQueue[tuple[asyncio.AbstractEventLoop, Callable[[], object], _Done] | None]
        ] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[[], object], done: _Done) -> None:
        """Have *function* called, and then *done* by the running event loop, unless it gives TOLD_LATER."""
        if self._thread is None:
            # a daemon: without a call of `close` it keeps no process from ending
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put((asyncio.get_running_loop(), function, done))

    async def run(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Call *function*; return its result, or raise its error.

        It is not called when the caller was cancelled before its turn came.
        """
        future: asyncio.Future[_R] = asyncio.get_running_loop().create_future()

        def called() -> _R | None:
            return None if future.cancelled() else function(*args, **kwargs)

        def done(result: _R, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.call(called, done)
        return await future

    def close(self) -> None:
        """Wait until all requested calls are done, and end the thread."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            loop, function, done = call
            result, error = None, None
            try:
                result = function()
            except BaseException as raised:  # noqa: BLE001  it goes to the caller
                error = raised
            if result is not TOLD_LATER:
                # RuntimeError: the loop has ended, and no caller waits
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(done, result, error)
            # not held until the next call comes
            del call, loop, function, done, result, error
