"""pjw: the command tree; one function for each command; errors to exit codes."""

import argparse
import errno
import gc
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

from pjw.cli.settings import DEFAULT_SERVER, find_settings
from pjw.cli.terminal import columns
from pjw.errors import (
    ConfigError,
    LaunchError,
    PjwError,
    ProtocolError,
    ServerFailedError,
    ServerUnreachableError,
    describe_errno,
)

if TYPE_CHECKING:
    from pjw.client.sync import Client

EXIT_REFUSED: Final = 1
EXIT_USAGE: Final = 2
EXIT_FAILED: Final = 125
EXIT_NOT_EXECUTABLE: Final = 126
EXIT_NOT_FOUND: Final = 127
EXIT_INTERRUPTED: Final = 130
# 128 + SIGPIPE, as of a program that the signal ended: the reader has gone, and wants no more.
EXIT_CLOSED_PIPE: Final = 141

_EPILOG: Final = """\
exit codes: 0 done, 1 refused, 2 wrong usage, 125 pjw failed (no server, no certificate),
126 not executable, 127 no such program, 130 interrupted

Every option can also be set as PJW_SERVER, PJW_CA_CRT, PJW_CLIENT_CRT, PJW_CLIENT_KEY, or in
~/.config/pjw/config.toml.
"""


def run() -> NoReturn:
    """The program `pjw`: one command, and out."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        # a success has flushed its output already; what goes wrong after a failure changes nothing
        with suppress(OSError):
            if stream is not None:
                stream.flush()
    # The connection is closed and all is written. To take modules and gRPC's threads apart one by one, as the
    # interpreter would, frees nothing that the kernel does not, and takes 15 % of a whole `pjw get`.
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.all and arguments.run is _start:
        parser.error("--all is for list, get, stop, logs and rm; a job that you start is yours")
    try:
        _prepare_stdout()
        settings = find_settings(arguments)
        files = settings.ca_crt, settings.client_crt, settings.client_key
        with _client_class()(settings.server, *files, all_clients=arguments.all) as client:
            arguments.run(client, arguments)
            sys.stdout.flush()
    except PjwError as error:
        _complain(error)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return EXIT_CLOSED_PIPE
    except OSError as error:
        # all other system calls that fail are worded where they are made
        print(f"pjw: error: cannot write to stdout: {describe_errno(error.errno or 0)}", file=sys.stderr)
        _abandon_stdout()
        return EXIT_FAILED
    return 0


def _client_class() -> "type[Client]":
    """The client, which imports gRPC: `pjw --help` need not wait for that."""
    # What is imported stays. To look for garbage in it, at every 700 objects or once at the end, takes
    # a tenth of a whole `pjw get`: hence frozen as well.
    gc.disable()
    try:
        from pjw.client.sync import Client
    finally:
        gc.freeze()
        gc.enable()
    return Client


def _complain(error: PjwError) -> None:
    print(f"pjw: error: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def _prepare_stdout() -> None:
    """Refuse a closed stdout before anything is started or stopped; JSON is UTF-8 in any locale."""
    if sys.stdout is None:
        raise ConfigError("cannot write to stdout: it is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def _abandon_stdout() -> None:
    # The interpreter would complain about the same descriptor when it flushes at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_code_of(error: PjwError) -> int:
    """The exit code for an error."""
    match error:
        case LaunchError(errno=errno.ENOENT):
            return EXIT_NOT_FOUND
        case LaunchError():
            return EXIT_NOT_EXECUTABLE
        case ServerUnreachableError() | ServerFailedError() | ConfigError() | ProtocolError():
            return EXIT_FAILED
        case _:
            return EXIT_REFUSED


class _Parser(argparse.ArgumentParser):
    """Formatters that are told the width: argparse makes one for each argument, which would import shutil."""

    def __init__(
        self,
        *,
        formatter: type[argparse.HelpFormatter] = argparse.HelpFormatter,
        **options: Any,  # noqa: ANN401  argparse's own
    ) -> None:
        super().__init__(formatter_class=partial(formatter, width=columns() - 2), **options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pjw",
        description="Run commands on a machine with pjwd: isolated, limited, their output streamed.",
        epilog=_EPILOG,
        formatter=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--server", metavar="HOST:PORT", help=f"default {DEFAULT_SERVER}")
    parser.add_argument("--ca-crt", metavar="FILE", help="the authority of the server's certificate")
    parser.add_argument("--client-crt", metavar="FILE", help="your certificate")
    parser.add_argument("--client-key", metavar="FILE", help="your key")
    parser.add_argument(
        "--all",
        action="store_true",
        help="the jobs of every client, not only yours; your operator must allow it",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="list your jobs: their ids, or a table at a terminal")
    command.set_defaults(run=_list)

    command = commands.add_parser("get", help="show a job as JSON")
    command.set_defaults(run=_get)
    command.add_argument("id", type=_job_id, metavar="ID")

    command = commands.add_parser(
        "start",
        help="start a job and print its id",
        usage="pjw start CMD | pjw start [--] PROGRAM ARG...",
        description="Start a job and print its id. One argument is a shell command, run by /bin/sh -c;"
        " several are a program and its arguments, executed as they are.",
    )
    command.set_defaults(run=_start)
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")

    command = commands.add_parser("stop", help="stop a job, wait for its end, and show it as JSON")
    command.set_defaults(run=_stop)
    command.add_argument("id", type=_job_id, metavar="ID")

    command = commands.add_parser("rm", help="forget ended jobs, with their output; prints each id")
    command.set_defaults(run=_rm)
    command.add_argument("ids", type=_job_id, nargs="+", metavar="ID")

    command = commands.add_parser("logs", help="stream a job's output from its first byte until the job ends")
    command.set_defaults(run=_logs)
    command.add_argument("id", type=_job_id, metavar="ID")
    return parser


def _job_id(text: str) -> int:
    # int() alone would take "1_0", " 1 " and digits of other scripts
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdecimal() or len(digits) > 100:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a job id, which is a whole number")
    return int(text)


def _list(client: "Client", arguments: argparse.Namespace) -> None:
    if sys.stdout.isatty():
        from pjw.cli.render import job_table

        for line in job_table(client.list(), with_clients=arguments.all):
            print(line)
    else:
        for job in client.list():
            print(job.id)


def _get(client: "Client", arguments: argparse.Namespace) -> None:
    from pjw.cli.render import job_json

    print(job_json(client.get(arguments.id)))


def _start(client: "Client", arguments: argparse.Namespace) -> None:
    from pjw.model import JobSpec

    words = arguments.command
    if words[:1] == ["--"]:
        words = words[1:]
    print(client.start(JobSpec(words[0] if len(words) == 1 else words)).id)


def _stop(client: "Client", arguments: argparse.Namespace) -> None:
    from pjw.cli.render import job_json

    print(job_json(client.stop(arguments.id)))


def _rm(client: "Client", arguments: argparse.Namespace) -> None:
    failed: PjwError | None = None
    for job_id in arguments.ids:
        try:
            client.delete(job_id)
            print(job_id, flush=True)
        except PjwError as error:
            failed = error
            _complain(error)
    if failed is not None:
        raise SystemExit(exit_code_of(failed))


def _logs(client: "Client", arguments: argparse.Namespace) -> None:
    # straight to the descriptor: no decoding, and each chunk is out before we wait for the next
    for data in client.logs(arguments.id):
        view = memoryview(data)
        while view:
            view = view[os.write(sys.stdout.fileno(), view) :]


if __name__ == "__main__":
    run()
