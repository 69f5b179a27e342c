"""A line on loopback that can be cut: between a client and a server, and at any moment."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Final, Self


class Relay:
    """Forwards bytes between whoever connects to `address` and the server; a context manager."""

    def __init__(self, server: str) -> None:
        host, port = server.rsplit(":", 1)
        self._server: Final = (host, int(port))
        self._listener: Final = socket.create_server(("127.0.0.1", 0))
        self.address: Final = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: Final[list[tuple[socket.socket, socket.socket]]] = []
        self._answers: Final = threading.Event()
        self._answers.set()
        self._accepting: Final = threading.Thread(target=self._accept)
        self._moving: Final[list[threading.Thread]] = []

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # close() alone would leave accept() waiting
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.cut()
        for thread in self._moving:
            thread.join()

    def hold_answers(self) -> None:
        """From now on requests reach the server, and no answer comes back."""
        self._answers.clear()

    def cut(self) -> None:
        """Hang up at both ends; a new connection is whole again."""
        pairs = [*self._pairs]
        self._pairs.clear()
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._answers.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._server)
            except OSError:
                client.close()
                continue
            self._pairs.append((client, server))
            for source, target in ((client, server), (server, client)):
                thread = threading.Thread(target=self._move, args=(source, target, source is server))
                thread.start()
                self._moving.append(thread)

    def _move(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._answers.is_set() or not answers:
                    target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
        source.close()
