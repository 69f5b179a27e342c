"""Secrets of jobs that wait in the queue: files of their own, for as long as the jobs may be started.

jobs/secrets/TOKEN   0600: a JSON object of names with values. The table has the token, which tells nothing;
                     so neither a copy of it nor a backup has a secret.
"""

import json
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Final

from pjw.errors import InvalidJobError, KernelError
from pjw.model import JobSpec
from pjw.worker.sparse_directory import SparseDirectory

_SECRETS: Final = "secrets"
_WORDS: Final = "secrets of a job"


class SecretFiles:
    """Makes, reads and removes secrets. Calls that wait for the disk belong in a thread."""

    def __init__(self, jobs: str) -> None:
        """Use *jobs*, the directory of the files of jobs."""
        self._all: Final = SparseDirectory(f"{jobs}/{_SECRETS}")

    def keep(self, specs: Collection[JobSpec]) -> dict[int, str]:
        """Store the secrets of jobs, on the disk when this returns; return the token of each, by its place.

        Equal ones have a file together. Raises OSError; nothing stays behind then.
        """
        tokens: dict[int, str] = {}
        known: dict[str, str] = {}
        try:
            for place, spec in enumerate(specs):
                if spec.secrets:
                    text = json.dumps(dict(spec.secrets), sort_keys=True)
                    if text not in known:
                        known[text] = self._write(text)
                    tokens[place] = known[text]
            if known:
                self._sync()
        except OSError:
            for token in known.values():
                self.remove(token)
            raise
        return tokens

    def _write(self, text: str) -> str:
        token = os.urandom(16).hex()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with self._all.adding():
            descriptor = os.open(self._path(token), flags, 0o600)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self.remove(token)
            raise
        return token

    def _sync(self) -> None:
        for path in (self._all.path, os.path.dirname(self._all.path)):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def read(self, token: str) -> Mapping[str, str]:
        """Return the secrets of a job. Raises InvalidJobError when they are gone, and KernelError."""
        try:
            with open(self._path(token), encoding="utf-8") as file:
                found: Mapping[str, str] = json.load(file)
        except (FileNotFoundError, ValueError):
            raise InvalidJobError(
                "its secrets are gone: a backup has none, and the service was restored from one;"
                " put the job into the queue again"
            ) from None
        except OSError as error:
            raise KernelError("read the", _WORDS, error.errno or 0) from error
        return found

    def remove(self, token: str) -> None:
        """Remove secrets that no job needs any more. Raises OSError."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(token))
        self._all.tidy()

    def found(self) -> set[str]:
        """Return the tokens of all secrets."""
        return set(self._all.names())

    def _path(self, token: str) -> str:
        return f"{self._all.path}/{token}"
