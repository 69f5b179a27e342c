"""SIGHUP: the operator's files are read again, judged, and taken whole or not at all.

Certificates are one thing and the revocation list another: a certificate that has expired
must not keep a revocation from its effect. Connections and streams go on; a new handshake
sees the new certificates, the next call of anybody the new list.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Final

import grpc

from pjw.certs.credentials import load_server_credentials
from pjw.certs.files import ServerCredentials, ServerFiles, key_exposure, read_descriptor
from pjw.certs.revocation import load_revocation_list
from pjw.errors import LauncherGoneError, PjwError
from pjw.server.guard import Guard
from pjw.worker import Worker

log: Final = logging.getLogger(__name__)
# A reload is asked for by a signal, and this is its only answer: it is told at every level.
log.setLevel(logging.INFO)


class Reloader:
    """What a running server takes from the operator's files."""

    def __init__(
        self, files: ServerFiles, credentials: ServerCredentials, guard: Guard, worker: Worker
    ) -> None:
        self._files: Final = files
        self._guard: Final = guard
        self._worker: Final = worker
        self._asked: Final = asyncio.Event()
        self._credentials = credentials
        self._handed = self._configuration = _configuration(credentials)

    def tls(self) -> grpc.ServerCredentials:
        """What to listen with: each handshake is done with the certificates of that moment."""
        # the stubs do not know that None may be fetched: "as before"
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._fetch,  # type: ignore[arg-type]
            require_client_authentication=True,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        # Called by a thread of gRPC's, which does one handshake at a time.
        current = self._configuration
        if current is self._handed:
            return None
        self._handed = current
        return current

    def ask(self) -> None:
        """Have the files read again; asked during a reload, once more after it."""
        self._asked.set()

    async def run(self) -> None:
        """Reload as often as it is asked for, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self._attempt("certificates", self._reload_certificates)
            if revoked := self._files.revoked:
                await self._attempt("revocation list", lambda: self._reload_revoked(revoked))

    async def _attempt(self, what: str, reload: Callable[[], Awaitable[None]]) -> None:
        try:
            await reload()
        except LauncherGoneError:
            pass  # the server is about to end for that, and says so itself
        except PjwError as error:
            log.error("reload: kept the old %s: %s", what, error)
            if error.hint:
                log.error("reload: hint: %s", error.hint)
        except Exception:
            log.exception("reload: kept the old %s", what)

    async def _reload_certificates(self) -> None:
        files = self._files
        contents = {
            files.ca_crt: await self._read(files.ca_crt, "certificate"),
            files.server_crt: await self._read(files.server_crt, "certificate"),
            files.server_key: await self._read(files.server_key, "private key"),
        }
        # in a thread: to check a large RSA key takes a tenth of a second
        credentials = await asyncio.to_thread(
            load_server_credentials,
            files.ca_crt,
            files.server_crt,
            files.server_key,
            read=lambda path, _: contents[path],
        )
        if credentials == self._credentials:
            log.info("reload: the certificates are the same as before")
            return
        self._credentials = credentials
        self._configuration = _configuration(credentials)
        log.info("reload: the certificates are new")

    async def _reload_revoked(self, path: str) -> None:
        data = await self._read(path, "revocation list")
        revoked = load_revocation_list(path, lambda *_: data)
        ended = self._guard.revoke(revoked)
        log.info("reload: %d certificates are revoked; running calls ended: %d", len(revoked), ended)

    async def _read(self, path: str, what: str) -> bytes:
        # We are not root any more, and keys are root's; the launcher opens what it was told of then.
        descriptor = await self._worker.open_operator_file(self._files.paths.index(path))
        if path == self._files.server_key and (exposure := key_exposure(path, os.fstat(descriptor))):
            log.warning("%s", exposure)
        return await asyncio.to_thread(read_descriptor, descriptor, path, what)


def _configuration(credentials: ServerCredentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(credentials.key_pem, credentials.crt_pem)], root_certificates=credentials.ca_pem
    )
