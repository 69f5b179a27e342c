"""pjwd check, the part about a configuration: what would keep `pjwd serve` from serving with it.

Judged by what serve itself uses. Nothing is made, opened for writing or listened on for longer than a moment.
"""

import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509

from pjw.certs.checks import describe_time
from pjw.certs.credentials import load_server_credentials
from pjw.certs.files import key_exposure
from pjw.certs.revocation import load_revocation_list
from pjw.errors import ConfigError, PjwError, describe_errno
from pjw.server.address import (
    fault_of_address,
    metrics_address_of,
    parse_address,
    shown_address,
    traces_endpoint_of,
)
from pjw.server.config import ServerConfig, load_config
from pjw.server.start import hidden_paths, server_files, server_uid

# good, to be looked at (None), or missing; in words; what to do
Finding = tuple[bool | None, str, str | None]

EXPIRES_SOON: Final = timedelta(days=30)
DISK_FREE_MINIMUM: Final = 1024**3


def configuration_findings(path: str | None, options: Mapping[str, object]) -> Iterator[Finding]:
    """Each thing of a configuration that serve needs."""
    try:
        config = load_config(path, options)
        files = server_files(config, os.path.abspath(path) if path else None)
        config.worker_settings(hidden_paths(config, files))
    except ConfigError as error:
        yield False, str(error), error.hint
        return
    yield True, f"configuration {path}" if path else "configuration: options and defaults", None
    yield from _attempt(lambda: f"server user: uid {server_uid(config.user)}")
    try:
        credentials = load_server_credentials(files.ca_crt, files.server_crt, files.server_key)
    except ConfigError as error:
        yield False, str(error), error.hint
    else:
        yield from _certificates((files.server_crt, credentials.crt_pem), (files.ca_crt, credentials.ca_pem))
        if exposure := key_exposure(files.server_key, os.stat(files.server_key)):
            yield None, exposure, None
    if revoked := config.revoked:
        yield from _attempt(
            lambda: f"revocation list {revoked}: {len(load_revocation_list(revoked))} certificates"
        )
    if config.audit_log is not None:
        yield _audit_log(config.audit_log)
    if config.traces.endpoint is not None:
        yield from _attempt(lambda: f"traces to {traces_endpoint_of(config.traces)}")
    yield _disk_space(config.state_dir)
    yield from _ports(config)


def _attempt(look: Callable[[], str]) -> Iterator[Finding]:
    try:
        yield True, look(), None
    except PjwError as error:
        yield False, str(error), error.hint


def _certificates(*files: tuple[str, bytes]) -> Iterator[Finding]:
    for path, pem in files:
        end = min(each.not_valid_after_utc for each in x509.load_pem_x509_certificates(pem))
        text = f"certificate {path}, valid until {describe_time(end)}"
        soon = end - datetime.now(UTC) < EXPIRES_SOON
        yield (None, text, "make a new one soon; a reload (SIGHUP) takes it") if soon else (True, text, None)


def _audit_log(path: str) -> Finding:
    directory = os.path.dirname(path)
    try:
        os.stat(directory)
        regular = stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError as error:
        if error.filename == directory:
            return (
                False,
                f"cannot open the audit log {path}: {describe_errno(error.errno or 0)}",
                "make its directory",
            )
        regular = True  # serve makes it
    except OSError as error:
        return False, f"cannot open the audit log {path}: {describe_errno(error.errno or 0)}", None
    if not regular:
        return False, f"cannot open the audit log {path}: it is no regular file", None
    return True, f"audit log {path}", None


def _disk_space(state_dir: str) -> Finding:
    there = nearest(state_dir)
    disk = os.statvfs(there)
    free = disk.f_frsize * disk.f_bavail
    text = f"disk: {free / 1024**3:.1f} GiB free under {there}"
    if free < DISK_FREE_MINIMUM:
        return None, text, "jobs wait when the disk is full; bound what is kept below [retention]"
    return True, text, None


def _ports(config: ServerConfig) -> Iterator[Finding]:
    try:
        addresses = [parse_address(config.listen), metrics_address_of(config.metrics)]
    except ConfigError as error:
        yield False, str(error), error.hint
        return
    running = _is_served(config.state_dir)
    for address in addresses:
        if address is None:
            continue
        text = shown_address(*address)
        fault = None if address[1] == 0 else fault_of_address(*address)
        if fault is None:
            yield True, f"address {text}: free", None
        elif running:
            yield True, f"address {text}: {fault}; a pjwd serves {config.state_dir} now", None
        else:
            yield False, f"cannot listen on {text}: {fault}", "ss -ltnp tells who does; or configure another"


def _is_served(state_dir: str) -> bool:
    """Whether a launcher holds the state directory."""
    try:
        descriptor = os.open(
            os.path.join(state_dir, "launcher.lock"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        )
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def nearest(path: str) -> str:
    """The directory that is there, of a path that need not be."""
    there = os.path.realpath(path)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    return there
