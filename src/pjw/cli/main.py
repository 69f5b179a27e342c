"""pjw as a program: one command, its exit code, and failures of stdout."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Final, NoReturn

from pjw.cli.exits import EXIT_INTERRUPTED, INSTALL_MCP, INSTALL_TOP, complain
from pjw.cli.parser import build_parser
from pjw.errors import ConfigError, PjwError
from pjw.given import require_arguments
from pjw.process import (
    EXIT_CLOSED_PIPE,
    ReaderGoneError,
    checked_stdout,
    open_standard_descriptors,
    require_stdout,
    unblock_signals,
)

_TOP: Final = ("show top", "textual", INSTALL_TOP)
_MCP: Final = ("serve agents", "mcp", INSTALL_MCP)
# For each missing package: the command that cannot run, the extra to install, and how. textual brings rich,
# and mcp the others.
_EXTRAS: Final = {"rich": _TOP, "textual": _TOP, "anyio": _MCP, "mcp": _MCP, "pydantic": _MCP}


def run() -> NoReturn:
    """Run one command as the program `pjw`, and exit."""
    unblock_signals()
    code = main()
    for stream in (sys.stdout, sys.stderr):
        # a success has flushed its output already; an error after a failure changes nothing
        with suppress(OSError):
            if stream is not None:
                stream.flush()
    # The connection is closed and all is written. To take modules and gRPC's threads apart one by one, as the
    # interpreter would, frees nothing that the kernel does not, and takes 15 % of a whole `pjw get`.
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    open_standard_descriptors()
    try:
        with checked_stdout():
            return _run(argv)
    except PjwError as error:
        return complain(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except ReaderGoneError:
        return EXIT_CLOSED_PIPE


def _run(argv: Sequence[str] | None) -> int:
    if "_ARGCOMPLETE" in os.environ:
        from pjw.cli.completion import complete

        complete(build_parser())
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser(words)
    _prepare_stdout()
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    require_arguments(parser, arguments)
    if arguments.all and arguments.starts:
        parser.error("--all is for jobs that are there; a job that you start is yours")
    return _carry_out(arguments)


def _carry_out(arguments: argparse.Namespace) -> int:
    """Import the module of the command, and only that; run the command's function."""
    module, _, function = arguments.run.rpartition(".")
    try:
        found = import_module(f"pjw.cli.{module}")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        doing, package, install = extra
        raise ConfigError(f"cannot {doing}: the package {package} is not installed", hint=install) from None
    code: int | None = getattr(found, function)(arguments)
    return code or 0


def _prepare_stdout() -> None:
    """Refuse a closed stdout before anything is started or stopped; JSON is UTF-8 in any locale."""
    require_stdout()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


if __name__ == "__main__":
    run()
