"""`pjw context`: services by name, so that no user types certificates twice.

A context is a table [contexts.NAME] of the user's file, and a directory `contexts/NAME` beside that file with
the certificates and the key, which no other user can read. The file is replaced as a whole, and parts written
by hand stay.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Final

from pjw.certs.bundle import read_bundle
from pjw.certs.files import InMemory, NewFile, key_exposure, write_new
from pjw.cli.render import printable
from pjw.client.config import chosen_context, config_path, read_config
from pjw.errors import ConfigError, describe_errno

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

# Names that are valid both for a directory and as a bare key of TOML.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
CA_CRT: Final = "ca.crt"
CLIENT_CRT: Final = "client.crt"
CLIENT_KEY: Final = "client.key"
LOCK: Final = "contexts.lock"
# far longer than a change takes
LOCK_SECONDS: Final = 30


def list_contexts(arguments: argparse.Namespace) -> None:
    """Print the names; at a terminal also the servers, and which one is the current context."""
    config = read_config()
    names = sorted(config.contexts)
    if not sys.stdout.isatty():
        print("".join(f"{name}\n" for name in names), end="")
        return
    width = max(map(len, ("NAME", *names)))
    print(f"  {'NAME':<{width}}  SERVER")
    for name in names:
        mark = "*" if name == (arguments.context or chosen_context(config)) else " "
        print(f"{mark} {name:<{width}}  {printable(config.contexts[name].get('server', ''))}")


def use_context(arguments: argparse.Namespace) -> None:
    """Make a context the current one."""
    with _locked():
        read_config().context(arguments.name)
        document = _document()
        document["current"] = arguments.name
        _write(document)
    _tell_current(arguments.name)


def add_context(arguments: argparse.Namespace) -> None:
    """Make a context of a bundle; the first one is the current one at once."""
    name, path = arguments.name, arguments.bundle
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"cannot add context {name[:80]!r}: a name is up to 63 letters, digits, '_' and '-'"
        )
    if path == "-":
        if sys.stdin is None:
            raise ConfigError("cannot read a bundle from stdin: it is closed")
        path = InMemory("-", sys.stdin.buffer.read())
    bundle = read_bundle(path)
    if not isinstance(path, InMemory) and (exposure := key_exposure(path, os.stat(path))):
        print(f"pjw: warning: {exposure}", file=sys.stderr)
    with _locked() as directory:
        config = read_config()
        if name in config.contexts and not arguments.replace:
            raise ConfigError(
                f"cannot add context {name}: it is there already",
                hint=f"give --replace, or remove it: pjw context rm {name}",
            )
        place, made = _place(directory, name), _place(directory, f".{name}.new")
        # remove the leftovers of an interrupted `add` or `rm`
        _remove_tree(made)
        if name not in config.contexts:
            _remove_tree(place)
        credentials = bundle.credentials
        files = (
            NewFile(CLIENT_KEY, credentials.key_pem, 0o600),
            NewFile(CLIENT_CRT, credentials.crt_pem, 0o600),
            NewFile(CA_CRT, credentials.ca_pem, 0o600),
        )
        _make_directory(os.path.dirname(place))
        try:
            write_new(made, files)
            names = (CA_CRT, CLIENT_CRT, CLIENT_KEY)
            _refuse_what_cannot_connect(path, [os.path.join(made, file) for file in names])
            paths = [os.path.join(place, file) for file in names]
            _remove_tree(place)
            os.rename(made, place)
            document = _document()
            table = {"server": arguments.server or bundle.server}
            table |= zip(("ca_crt", "client_crt", "client_key"), paths, strict=True)
            document.setdefault("contexts", {})[name] = table
            first = config.current is None
            if first:
                document["current"] = name
            _write(document)
        except BaseException:
            _remove_tree(made)
            if name not in config.contexts:
                _remove_tree(place)
            raise
    print(f"{name}: {table['server']}")
    if first:
        _tell_current(name)


def show_context(arguments: argparse.Namespace) -> None:
    """Print a context's server, identity, expiry and files."""
    # only `show` reads a certificate
    from pjw.certs.checks import describe_time, parse_certificates
    from pjw.certs.files import read_certificates
    from pjw.certs.identity import NameRules, identity_of

    config = read_config()
    name = arguments.name or arguments.context or chosen_context(config)
    if name is None:
        raise ConfigError("no context is the current one", hint="choose one: pjw context use NAME")
    context = config.context(name)
    lines = {"name": name, **context}
    if crt := context.get("client_crt"):
        pem = read_certificates(crt)
        try:
            [certificate, *_] = parse_certificates(pem)
        except ValueError as error:
            raise ConfigError(f"cannot read certificate {crt}: {error}") from error
        lines |= {
            "client": identity_of(pem, NameRules(in_common_name=True)).client_name,
            "valid until": describe_time(certificate.not_valid_after_utc),
        }
    for key, value in lines.items():
        print(f"{key + ':':<13} {printable(value)}")
    if key_path := context.get("client_key"):
        with suppress(OSError):
            if exposure := key_exposure(key_path, os.stat(key_path)):
                print(f"pjw: warning: {exposure}", file=sys.stderr)


def remove_contexts(arguments: argparse.Namespace) -> None:
    """Forget contexts, with the certificates and keys that `add` has stored for them."""
    with _locked() as directory:
        config = read_config()
        for name in arguments.names:
            config.context(name)
        document = _document()
        for name in dict.fromkeys(arguments.names):
            del document["contexts"][name]
        if config.current in arguments.names:
            del document["current"]
        # the table first: each context in it must have its files
        _write(document)
        for name in arguments.names:
            # any other name belongs to a table written by hand: it has no directory, and may be a path
            if _NAME.fullmatch(name):
                _remove_tree(_place(directory, name))
    for name in dict.fromkeys(arguments.names):
        print(name)


def context_names() -> Sequence[str]:
    """Return all names, for completion."""
    return sorted(read_config().contexts)


def _tell_current(name: str) -> None:
    print(f"{name} is the current context", file=sys.stderr)
    if (other := os.environ.get("PJW_CONTEXT")) and other != name:
        print(f"pjw: warning: PJW_CONTEXT={printable(other)} takes precedence", file=sys.stderr)


def _refuse_what_cannot_connect(bundle: str, paths: Sequence[str]) -> None:
    # only `add` needs it
    from pjw.certs.credentials import diagnose_client

    ca_crt, client_crt, client_key = paths
    if fault := diagnose_client(ca_crt, client_crt, client_key):
        # the files are gone by the time the user reads this
        for path, what in zip(paths, (CA_CRT, CLIENT_CRT, CLIENT_KEY), strict=True):
            fault = fault.replace(path, what)
        raise ConfigError(f"cannot use bundle {bundle}: {fault}")


def _place(directory: str, name: str) -> str:
    return os.path.join(directory, "contexts", name)


def _document() -> "TOMLDocument":
    # it keeps the comments of the file; only a change needs it
    import tomlkit

    try:
        with open(config_path(), encoding="utf-8") as file:
            return tomlkit.parse(file.read())
    except FileNotFoundError:
        return tomlkit.document()


@contextmanager
def _locked() -> Iterator[str]:
    """Give the directory of the user's file, for one change at a time.

    The lock is SQLite's, the only one in the standard library for every system. It ends with the process.
    """
    # only a change needs it
    import sqlite3

    directory = os.path.dirname(config_path())
    _make_directory(directory)
    path = os.path.join(directory, LOCK)
    try:
        # we make the file, so that a failure has an errno and no other user can open it
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with closing(sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            yield directory
    except sqlite3.Error as error:
        busy = error.sqlite_errorcode == sqlite3.SQLITE_BUSY
        why = f"another pjw has held it for {LOCK_SECONDS} s" if busy else error
        raise ConfigError(f"cannot lock {path}: {why}") from error
    except OSError as error:
        path = error.filename or directory
        raise ConfigError(f"cannot write {path}: {describe_errno(error.errno or 0)}") from error


def _make_directory(path: str) -> None:
    # os.makedirs gives the mode to the last one only
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        _make_directory(parent)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"cannot make directory {path}: {describe_errno(error.errno or 0)}") from error


def _remove_tree(path: str) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(path)


def _write(document: "TOMLDocument") -> None:
    """Replace the user's file; a concurrent reader has the old one or the new one."""
    # as above
    import tomlkit

    # a link, such as one into a repository of dotfiles, stays a link
    path = os.path.realpath(config_path())
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".config.toml.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(tomlkit.dumps(document))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
