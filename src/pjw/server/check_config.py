"""pjwd check, the part about a configuration: the faults that would keep `pjwd serve` from serving.

The checks are serve's own. Nothing is made, opened for writing or listened on for longer than a moment.
"""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from pjw.certs.authority import CA_KEY
from pjw.certs.checks import describe_time, ends_soon, first_end
from pjw.certs.credentials import load_server_credentials
from pjw.certs.files import ServerFiles, key_exposure
from pjw.certs.revocation import load_revocation_list
from pjw.errors import ConfigError, PjwError, describe_errno
from pjw.launcher.cdi import read_devices
from pjw.launcher.lock import is_locked
from pjw.server.address import held_addresses, metrics_exposure, shown_address
from pjw.server.boot import server_uid
from pjw.server.config import ServerConfig, config_of, read_values, removed_keys
from pjw.server.plan import RELOAD_HINT, check_reloads, plan_of
from pjw.worker.host import resources

# good, to be looked at (None), or missing; in words; the remedy
Finding = tuple[bool | None, str, str | None]

DISK_FREE_MINIMUM: Final = 1024**3


def configuration_findings(path: str | None, options: Mapping[str, object]) -> Iterator[Finding]:
    """Yield each need of serve on a configuration."""
    try:
        values = read_values(path)
        config = config_of(path, values, options)
        plan = plan_of(config, os.path.abspath(path) if path else None)
    except ConfigError as error:
        yield False, str(error), error.hint
        return
    files = plan.files
    yield True, f"configuration {path}" if path else "configuration: options and defaults", None
    yield from ((None, words, None) for words in removed_keys(values))
    yield from _attempt(lambda: f"server user: uid {server_uid(config.user, config.state_dir)}")
    try:
        credentials = load_server_credentials(files.ca_crt, files.server_crt, files.server_key)
    except ConfigError as error:
        yield False, str(error), error.hint
    else:
        yield from _certificates((files.server_crt, credentials.crt_pem), (files.ca_crt, credentials.ca_pem))
        if exposure := key_exposure(files.server_key, os.stat(files.server_key)):
            yield None, exposure, None
    yield from _authority_key(files.ca_crt)
    yield from _read_again(files, config.audit_log)
    if config.audit_log is not None:
        yield _audit_log(config.audit_log)
    if plan.metrics is not None and (exposure := metrics_exposure(*plan.metrics)):
        yield None, exposure, "listen on a loopback address, such as 127.0.0.1:9464"
    yield from _mounts(config)
    yield from _gpus(config)
    yield _sums(config)
    yield from map(_disk_space, filter(None, (config.state_dir, config.scratch_dir)))
    yield from _ports(config.state_dir, plan.listen, plan.metrics)


def _attempt(look: Callable[[], str]) -> Iterator[Finding]:
    try:
        yield True, look(), None
    except PjwError as error:
        yield False, str(error), error.hint


def _certificates(*files: tuple[str, bytes]) -> Iterator[Finding]:
    for path, pem in files:
        end = first_end(pem)
        text = f"certificate {path}, valid until {describe_time(end)}"
        hint = "make a new one soon; a reload (SIGHUP) takes it"
        yield (None, text, hint) if ends_soon(end) else (True, text, None)


def _authority_key(ca_crt: str) -> Iterator[Finding]:
    path = os.path.join(os.path.dirname(ca_crt), CA_KEY)
    if os.path.lexists(path):
        yield (
            None,
            f"the key of the authority, {path}, is on this machine: a person with it can be any client",
            "move it to the machine where you make certificates, and keep no copy here",
        )


def _read_again(files: ServerFiles, audit_log: str | None) -> Iterator[Finding]:
    """Yield findings about the revocation list, and about the files that a reload can read."""
    try:
        count = len(load_revocation_list(files.revoked)) if files.revoked else 0
        # only root can open files as the launcher does
        unread = check_reloads(files, audit_log) if os.geteuid() == 0 else None
    except ConfigError as error:
        yield False, str(error), error.hint
        return
    if files.revoked:
        yield True, f"revocation list {files.revoked}: {count} certificates", None
    if unread:
        yield None, unread, RELOAD_HINT


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


def _mounts(config: ServerConfig) -> Iterator[Finding]:
    """Yield findings about the operator's mounts; a missing path may come later, and never stops pjwd."""
    for name, mount in config.mounts.items():
        text = f"mount {name}: {mount.path}"
        real = os.path.realpath(mount.path)
        try:
            there = stat.S_ISDIR(os.stat(mount.path).st_mode)
        except OSError as error:
            yield None, f"{text}: {describe_errno(error.errno or 0)}", "no job can have it until it is there"
            continue
        if not there:
            yield None, f"{text} is no directory", "no job can have it"
        elif real != mount.path:
            yield None, f"{text} leads through a link, so no job can have it", f'path = "{real}"'
        else:
            how = "read-only" if mount.read_only else "writable"
            yield True, f"{text}, {how}, for {', '.join(mount.clients) or 'nobody'}", None


def _gpus(config: ServerConfig) -> Iterator[Finding]:
    """Yield findings about the CDI files; a driver may load later, so none keeps pjwd from serving."""
    kind, clients = config.gpus.kind, ", ".join(config.gpus.clients) or "nobody"
    if not kind:
        return
    try:
        devices = read_devices(kind, config.gpus.cdi_dirs)
    except PjwError as error:
        yield None, f"GPUs: {error}", error.hint
        return
    if not devices:
        yield (
            None,
            f"GPUs: no {kind} in {', '.join(config.gpus.cdi_dirs)}",
            "nvidia-ctk cdi generate --format=json --output=/etc/cdi/nvidia.json",
        )
        return
    yield True, f"GPUs {kind}: {', '.join(device.name for device in devices)}, for {clients}", None
    for device in devices:
        for node in sorted(device.own.nodes | device.common.nodes):
            try:
                is_there = stat.S_ISCHR(os.lstat(node).st_mode)
            except OSError as error:
                yield (
                    None,
                    f"GPU {device.name}: {node}: {describe_errno(error.errno or 0)}",
                    "no job can have it",
                )
                continue
            if not is_there:
                yield None, f"GPU {device.name}: {node} is no character device", "no job can have it"


def _sums(config: ServerConfig) -> Finding:
    """Describe the most that all jobs, and one client by default, may use, and the unbounded resources."""
    sums, whole = config.host.sums(), resources()
    limits, _, _ = config.effective_limits()
    jobs = config.clients.running_max
    own = config.clients.shares().default.sums
    memory = min(filter(None, (limits.memory_max_bytes * jobs, own.memory_max_bytes)), default=0)
    pids = min(filter(None, (limits.pids_max * jobs, own.pids_max)), default=0)
    text = (
        f"all jobs: {_gib(sums.memory_max_bytes)} of {_gib(whole.memory_max_bytes)} memory,"
        f" {sums.pids_max or 'any number'} of {whole.pids_max} processes;"
        f" one client by default: {_gib(memory)}, {pids or 'any number'}"
    )
    if config.memory_overcommit:
        text += f"; memory is promised {config.memory_overcommit:g} times"
    unbounded = [
        name
        for name, promised in (("memory_max_bytes", memory), ("pids_max", pids))
        if not getattr(sums, name) and not 0 < promised <= getattr(whole, name)
    ]
    if unbounded:
        return None, text, f"one client may take all of the host: set {' and '.join(unbounded)} below [host]"
    return True, text, None


def _gib(count: int) -> str:
    return f"{count / 1024**3:.1f} GiB" if count else "any"


def _disk_space(state_dir: str) -> Finding:
    there = nearest(state_dir)
    disk = os.statvfs(there)
    free = disk.f_frsize * disk.f_bavail
    text = f"disk: {free / 1024**3:.1f} GiB free under {there}"
    if free < DISK_FREE_MINIMUM:
        return None, text, "jobs wait when the disk is full; bound what is kept below [retention]"
    return True, text, None


def _ports(state_dir: str, *addresses: tuple[str, int] | None) -> Iterator[Finding]:
    running = is_locked(state_dir)
    for address in addresses:
        if address is None:
            continue
        text = shown_address(*address)
        try:
            with held_addresses(*address):
                yield True, f"address {text}: free", None
        except ConfigError as error:
            if running:
                yield True, f"{error}; a pjwd serves {state_dir} now", None
            else:
                yield False, str(error), error.hint or "`ss -ltnp` shows its process; or use another"


def nearest(path: str) -> str:
    """Return the nearest existing directory of a path that need not exist."""
    there = os.path.realpath(path)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    return there
