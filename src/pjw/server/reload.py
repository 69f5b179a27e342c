"""SIGHUP: pjwd reads the operator's files again, judges them, and takes all or nothing.

Certificates are one thing, the configuration another and the revocation list a third: a certificate
that has expired must not keep a revocation from its effect. We reopen the audit log, since the operator may
have moved it away. Connections and streams go on; a new handshake
sees the new certificates, the next call of any client the new list.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

import grpc
import msgspec

from pjw.certs.checks import describe_time, ends_soon, first_end
from pjw.certs.credentials import load_server_credentials
from pjw.certs.files import ServerCredentials, ServerFiles, key_exposure, read_descriptor
from pjw.certs.revocation import load_revocation_list
from pjw.errors import ConfigError, KernelError, LauncherGoneError, PjwError
from pjw.server.audit import AuditLog
from pjw.server.backend import Backend
from pjw.server.config import RELOADED, ServerConfig, config_of, parse_values, removed_keys
from pjw.server.guard import Guard
from pjw.server.log_setup import set_level
from pjw.server.plan import plan_of
from pjw.server.sandbox import descriptors_for
from pjw.server.systemd import Notifier
from pjw.worker import WorkerSettings

# Warns in the log before a certificate of the server expires: at the start, at a reload, and once a day.

DAY_SECONDS: Final = 86_400


def warn_of_ends(credentials: ServerCredentials) -> None:
    """Warn of each certificate of the server that expires within two weeks, or has expired."""
    for what, pem in (("server's certificate", credentials.crt_pem), ("authority", credentials.ca_pem)):
        end = first_end(pem)
        if ends_soon(end):
            log.warning(
                "the %s expires on %s, and then nobody can connect: renew it (pjwd certs renew), and reload",
                what,
                describe_time(end),
            )


async def warn_each_day(credentials: Callable[[], ServerCredentials]) -> None:
    """Call warn_of_ends once a day, for as long as the server runs."""
    while True:
        warn_of_ends(credentials())
        await asyncio.sleep(DAY_SECONDS)


log: Final = logging.getLogger(__name__)
# A signal requests a reload, and this is its only answer: it is logged at every level.
log.setLevel(logging.INFO)


class Reloader:
    """The operator's files, as a running server reads them again."""

    def __init__(
        self,
        files: ServerFiles,
        credentials: ServerCredentials,
        config: ServerConfig,
        options: Mapping[str, object],
        settings: WorkerSettings,
        guard: Guard,
        worker: Backend,
        notifier: Notifier,
        accepted: Callable[[], None],
        audit: AuditLog | None = None,
    ) -> None:
        self._accepted: Final = accepted
        self._audit: Final = audit
        self._files: Final = files
        self._options: Final = options
        self._guard: Final = guard
        self._worker: Final = worker
        self._notifier: Final = notifier
        self._asked: Final = asyncio.Event()
        # The number of reloads of each of them, by result. Every series exists from the start: a monitor sees
        # no increase in a counter that begins at 1.
        self.counts: Final[Counter[tuple[str, str]]] = Counter(
            {
                (what, result): 0
                for what, there in (
                    ("certificates", files.server_crt),
                    ("configuration", files.config),
                    ("revocation_list", files.revoked),
                    ("audit_log", audit),
                )
                if there
                for result in ("ok", "failed")
            }
        )
        self.config = config
        self.credentials = credentials
        self._settings = settings
        self._configuration = _configuration(credentials)

    def tls(self) -> grpc.ServerCredentials:
        """Return the credentials for one address: each handshake uses the newest certificates."""
        handed = self._configuration

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            # A thread of gRPC's calls this at the beginning of each handshake, never twice at once.
            nonlocal handed
            self._accepted()
            if handed is self._configuration:
                return None
            handed = self._configuration
            return handed

        # the stubs do not know that None may be fetched: "as before"
        return grpc.dynamic_ssl_server_credentials(
            handed,
            fetch,  # type: ignore[arg-type]
            require_client_authentication=True,
        )

    def ask(self) -> None:
        """Have the files read again; asked during a reload, once more after it."""
        self._asked.set()

    async def run(self, status: Callable[[], str]) -> None:
        """Reload at each request, until cancelled; *status* is for systemd."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._notifier.reloading()
            await self._attempt("certificates", self._reload_certificates)
            if path := self._files.config:
                await self._attempt("configuration", partial(self._reload_config, path))
            if revoked := self._files.revoked:
                await self._attempt("revocation list", partial(self._reload_revoked, revoked))
            if self._audit is not None:
                await self._attempt("audit log", partial(self._reopen_audit_log, self._audit))
            self._notifier.ready(status())

    async def _attempt(self, what: str, reload: Callable[[], Awaitable[None]]) -> None:
        result = "failed"
        try:
            await reload()
            result = "ok"
        except LauncherGoneError:
            pass  # the server is about to end for that, and says so itself
        except PjwError as error:
            log.error("reload: kept the old %s: %s", what, error)
            if error.hint:
                log.error("reload: hint: %s", error.hint)
        except Exception:
            log.exception("reload: kept the old %s", what)
        finally:
            self.counts[what.replace(" ", "_"), result] += 1

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
        if credentials == self.credentials:
            log.info("reload: the certificates are the same as before")
            return
        self.credentials = credentials
        self._configuration = _configuration(credentials)
        log.info("reload: the certificates are new")
        warn_of_ends(credentials)

    async def _reload_config(self, path: str) -> None:
        data = await self._read(path, "configuration")
        values = parse_values(path, data)
        new = config_of(path, values, self._options)
        # judge all keys, as a start does, also those that a reload does not take
        plan_of(new, path)
        for words in removed_keys(values):
            log.warning("reload: %s", words)
        old = self.config
        changed = [key for key in new.__struct_fields__ if getattr(new, key) != getattr(old, key)]
        taken = {key: getattr(new, key) for key in changed if key in RELOADED}
        config = msgspec.structs.replace(old, **taken)
        wanted = config.worker_settings(())
        # The launcher got its policy once, so requests to it stay within the old one.
        settings = replace(
            self._settings,
            default_limits=wanted.default_limits,
            stop_grace_seconds=wanted.stop_grace_seconds,
            retention=wanted.retention,
            quotas=wanted.quotas,
            disk=wanted.disk,
            queue=wanted.queue,
            mounts=wanted.mounts,
            shares=wanted.shares,
            memory_overcommit=wanted.memory_overcommit,
        )
        self._worker.reconfigure(settings)
        self._guard.reconfigure(config)
        set_level(config.log_level)
        self.config, self._settings = config, settings
        if config.mounts or old.mounts:
            try:
                await self._worker.reload_mounts()
            except (ConfigError, KernelError) as error:
                # no job gets a mount unless both processes offer it
                log.error("reload: the launcher kept the old mounts: %s", error)
        # Last, as it waits for the launcher: clients that were shut out must not have that long.
        for words in await self._worker.give_shares():
            log.warning("reload: %s", words)
        if descriptors_for(config) > descriptors_for(old):
            log.warning("reload: more descriptors, for these clients and jobs, need a restart")
        if left := [key for key in changed if key not in RELOADED]:
            log.warning("reload: these keys need a restart: %s", ", ".join(left))
        if taken:
            log.info("reload: the configuration is new: %s", ", ".join(taken))
        else:
            log.info("reload: the configuration is the same as before")

    async def _reload_revoked(self, path: str) -> None:
        data = await self._read(path, "revocation list")
        revoked = load_revocation_list(path, lambda *_: data)
        ended = self._guard.revoke(revoked)
        log.info("reload: %d certificates are revoked; running calls ended: %d", len(revoked), ended)

    async def _reopen_audit_log(self, audit: AuditLog) -> None:
        audit.reopen(await self._worker.open_audit_log())
        log.info("reload: the audit log is open again")

    async def _read(self, path: str, what: str) -> bytes:
        # We are not root any more, and keys are root's; the launcher opens the files named in its greeting
        # then.
        descriptor = await self._worker.open_operator_file(self._files.paths.index(path))
        if path == self._files.server_key and (exposure := key_exposure(path, os.fstat(descriptor))):
            log.warning("%s", exposure)
        return await asyncio.to_thread(read_descriptor, descriptor, path, what)


def _configuration(credentials: ServerCredentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(credentials.key_pem, credentials.crt_pem)], root_certificates=credentials.ca_pem
    )
