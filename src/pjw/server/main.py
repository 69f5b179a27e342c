"""pjwd: serve, check, certs. The command tree, and errors to exit codes."""

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import Final

from pjw.certs.bundle import BUNDLE_SUFFIX
from pjw.errors import ConfigError, PjwError

DEFAULT_LISTEN: Final = "localhost:50051"
DEFAULT_STATE_DIR: Final = "/var/lib/pjw"
EXIT_FAILED: Final = 1
LEAF_DAYS: Final = 365


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except PjwError as error:
        print(f"pjwd: error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The command tree."""
    parser = argparse.ArgumentParser(
        prog="pjwd", description="The pjw service: runs jobs for the clients of one certificate authority."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start the service, in the foreground; needs root")
    serve.set_defaults(run=_serve)
    serve.add_argument(
        "--listen",
        default=DEFAULT_LISTEN,
        metavar="HOST:PORT",
        help="default %(default)s; port 0 picks a free one",
    )
    serve.add_argument(
        "--ca-crt", required=True, metavar="FILE", help="the authority whose clients are let in"
    )
    serve.add_argument("--server-crt", required=True, metavar="FILE")
    serve.add_argument("--server-key", required=True, metavar="FILE")
    serve.add_argument(
        "--state-dir",
        default=DEFAULT_STATE_DIR,
        metavar="DIR",
        help="jobs and their output; default %(default)s",
    )
    serve.add_argument("--config", metavar="FILE", help="limits, users and more, in TOML")
    serve.add_argument(
        "--log-level",
        default="warning",
        choices=["debug", "info", "warning", "error"],
        help="default %(default)s",
    )

    check = commands.add_parser("check", help="tell what this host offers, and what is missing")
    check.set_defaults(run=_check)
    check.add_argument("--state-dir", default=DEFAULT_STATE_DIR, metavar="DIR", help="default %(default)s")

    certs = commands.add_parser("certs", help="make certificates")
    kinds = certs.add_subparsers(required=True, metavar="KIND")
    for kind, text, names in (
        (
            "init",
            "an authority, a certificate for this server, and one for each client that is named",
            "NAME",
        ),
        ("server", "a server certificate for the given host names and addresses", "HOST"),
        ("client", "a certificate for each client that is named", "NAME"),
    ):
        maker = kinds.add_parser(
            kind, help=text, description=f"Make {text}, in DIR. Nothing is ever overwritten."
        )
        maker.set_defaults(run=_certs, kind=kind)
        maker.add_argument(
            "--days", type=_days, default=LEAF_DAYS, metavar="N", help="valid so long; default %(default)s"
        )
        if kind != "server":
            maker.add_argument(
                "--server",
                type=_address,
                default=DEFAULT_LISTEN,
                metavar="HOST:PORT",
                help="where clients connect to, for their bundles; default %(default)s",
            )
        maker.add_argument("directory", metavar="DIR")
        maker.add_argument("names", nargs="+", metavar=names)
    return parser


def _days(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 36_500:
        raise argparse.ArgumentTypeError("must be a number of days from 1 to 36500")
    return int(text)


def _address(text: str) -> str:
    try:
        parse_address(text)
    except PjwError as error:
        raise argparse.ArgumentTypeError(f"{error}, {error.hint}") from None
    return text


def _serve(arguments: argparse.Namespace) -> int:
    from pjw.server.start import ServeOptions, serve

    host, port = parse_address(arguments.listen)
    return serve(
        ServeOptions(
            host=host,
            port=port,
            ca_crt=arguments.ca_crt,
            server_crt=arguments.server_crt,
            server_key=arguments.server_key,
            state_dir=arguments.state_dir,
            config=arguments.config,
            log_level=arguments.log_level,
        )
    )


def _check(arguments: argparse.Namespace) -> int:
    from pjw.server.check import check_host

    return check_host(arguments.state_dir)


def _certs(arguments: argparse.Namespace) -> int:
    from pjw.certs import authority

    directory, names, days = arguments.directory, arguments.names, arguments.days
    match arguments.kind:
        case "init":
            made = authority.init_set(
                directory, _own_names(), names, days=days, bundle_server=arguments.server
            )
        case "server":
            made = authority.write_server(directory, names, days=days)
        case _:
            made = []
            for name in names:
                made += authority.write_client(directory, name, days=days, bundle_server=arguments.server)
    for path in made:
        print(path)
    _tell_clients([path for path in made if path.endswith(BUNDLE_SUFFIX)])
    return 0


def _tell_clients(bundles: Sequence[str]) -> None:
    """What a client does with its bundle; on stderr, since stdout has the paths and nothing else."""
    for path in bundles:
        file = os.path.basename(path)
        client = file.removesuffix(BUNDLE_SUFFIX)
        print(
            f"\nfor {client}: copy {shlex.quote(path)} to where {client} works, unread by others",
            file=sys.stderr,
        )
        print(f"  then there: pjw context add default {shlex.quote(file)}", file=sys.stderr)


def _own_names() -> list[str]:
    names = ["localhost", "127.0.0.1", "::1"]
    own = socket.gethostname()
    # a container's name may be digits alone, which no certificate takes for a host name
    return [*names, own] if own not in names and not own.rpartition(".")[2].isdecimal() else names


def parse_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 address is in brackets. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(
            f"{text!r} is not HOST:PORT", hint="for example localhost:50051, or [::1]:0 for any free port"
        )
    return host, int(port)


if __name__ == "__main__":
    sys.exit(main())
