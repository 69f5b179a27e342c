"""The reason why a connection of a job fails."""

from typing import Final


class Failure(Exception):  # noqa: N818  the name of a result, not of an error class
    """A result as the server counts it (worker/egress.py), a status of HTTP, and words for the client."""

    def __init__(self, result: str, status: int, words: str) -> None:
        super().__init__(words)
        self.result: Final = result
        self.status: Final = status
