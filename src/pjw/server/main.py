"""pjwd: serve, gateway, check, backup, drain, certs and more. The command tree, and errors to exit codes."""

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Final

from pjw.certs.bundle import BUNDLE_SUFFIX
from pjw.errors import PjwError
from pjw.given import DEFAULT_ADDRESS, require_arguments
from pjw.process import (
    EXIT_CLOSED_PIPE,
    ReaderGoneError,
    checked_stdout,
    open_standard_descriptors,
    require_stdout,
)
from pjw.server.log_setup import FORMATS, LEVELS

# the environment variable that takes the place of --listen
LISTEN_VARIABLE: Final = "PJWD_LISTEN"
# the file that packaging/pjwd.service reads
_UNIT_CONFIG: Final = "/etc/pjw/pjwd.toml"
EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130
LEAF_DAYS: Final = 365
# options that are keys of the configuration, too
PATHS: Final = ("ca_crt", "server_crt", "server_key", "state_dir")
OPTIONS: Final = ("listen", *PATHS, "log_level", "log_format")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    open_standard_descriptors()
    try:
        with checked_stdout():
            parser = build_parser()
            arguments = parser.parse_args(argv)
            require_arguments(parser, arguments)
        serves = arguments.run in (_serve, _gateway)
        if not serves:
            require_stdout()
        # serve prints nothing, and an error that it does not word is a bug
        with nullcontext() if serves else checked_stdout():
            return int(arguments.run(arguments))
    except PjwError as error:
        print(f"pjwd: error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except ReaderGoneError:
        return EXIT_CLOSED_PIPE


def build_parser() -> argparse.ArgumentParser:
    """Build the command tree."""
    parser = argparse.ArgumentParser(
        prog="pjwd", description="The pjw service: runs jobs for the clients of one certificate authority."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version, and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="start the service, in the foreground; needs root",
        description="Run jobs on this machine for clients, or for the gateway whose node it is"
        " (cluster.gateway in the configuration).",
    )
    serve.set_defaults(run=_serve)
    _add_options(serve)

    gateway = commands.add_parser(
        "gateway",
        help="start the gateway of a cluster, in the foreground; needs no root",
        description="Serve the jobs of many machines, each of which runs pjwd as a node of this gateway"
        " (cluster.gateway in its configuration). The gateway runs no jobs itself.",
    )
    gateway.set_defaults(run=_gateway)
    _add_options(gateway)

    check = commands.add_parser(
        "check",
        help="tell what this host offers, and what is missing",
        description="Tell what this host offers and what is missing; with a configuration or certificates,"
        " also what keeps pjwd from serving with them. Nothing is changed. The exit code is 1 when"
        " something is missing.",
    )
    check.set_defaults(run=_check)
    _add_options(check)

    config = commands.add_parser("config", help="show the configuration")
    shows = config.add_subparsers(required=True, metavar="COMMAND")
    show = shows.add_parser(
        "show",
        help="every key, its value and where that is from",
        description="Print every key with the value that `pjwd serve` would use with the same options, where"
        " that is from (default, file, option), and what it means.",
    )
    show.set_defaults(run=_config_show)
    show.add_argument("--format", default="toml", choices=["toml", "json"], help="default %(default)s")
    _add_options(show)

    backup = commands.add_parser(
        "backup",
        help="copy the state directory, while pjwd runs or is stopped; needs root",
        description="Copy the jobs and their output to DIR, which is new or empty. A pjwd can start from"
        " this backup. Then jobs that run now are lost; the backup has their output until now. The backup"
        " has no configuration, certificates or keys, since some are secret and all change seldom. Nor does"
        " it have the audit log, or the scratch directories and input of running jobs.",
    )
    backup.set_defaults(run=_backup)
    _add_config(backup)
    _add_state_dir(backup)
    backup.add_argument("directory", metavar="DIR")

    end_jobs = commands.add_parser(
        "end-jobs",
        help="end the jobs of a pjwd that has been stopped; needs root",
        description="End the jobs that go on after pjwd was stopped: send SIGTERM, later SIGKILL, to every"
        " process of each. A pjwd that starts again finds them stopped. Refuses while a pjwd serves them.",
    )
    end_jobs.set_defaults(run=_end_jobs)
    _add_config(end_jobs)
    _add_state_dir(end_jobs)
    end_jobs.add_argument(
        "--grace",
        type=_seconds,
        default=10,
        metavar="SECONDS",
        help="how long jobs have until SIGKILL; default %(default)s",
    )

    for verb, run, text, more in (
        (
            "drain",
            _drain,
            "start no more jobs on this machine; needs root",
            " Jobs that run go on, and those in the queue wait, also over restarts, until `pjwd resume`.",
        ),
        ("resume", _resume, "start jobs on this machine again, after pjwd drain; needs root", ""),
    ):
        action = commands.add_parser(
            verb, help=text, description=f"{text.removesuffix('; needs root').capitalize()}.{more}"
        )
        action.set_defaults(run=run)
        _add_config(action)
        _add_state_dir(action)
        if verb == "drain":
            action.add_argument("--wait", action="store_true", help="return when no job is left")

    _add_image(commands)
    certs = commands.add_parser("certs", help="make, show, renew and revoke certificates")
    kinds = certs.add_subparsers(required=True, metavar="KIND")
    for kind, text, names in (
        (
            "init",
            "an authority, a certificate for this server, and one for each client that is named",
            "NAME",
        ),
        ("server", "a server certificate for the given host names and addresses", "HOST"),
        ("client", "a certificate for each client that is named", "NAME"),
        ("node", "a certificate for a node of a cluster, good for the given hosts too", "HOST"),
    ):
        maker = kinds.add_parser(
            kind, help=text, description=f"Make {text}, in DIR. Nothing is ever overwritten."
        )
        maker.set_defaults(run=_certs, kind=kind)
        _add_days(maker)
        if kind in ("init", "client"):
            maker.add_argument(
                "--server",
                type=_address,
                default=DEFAULT_ADDRESS,
                metavar="HOST[:PORT]",
                help="where clients connect to, for their bundles"
                + (" and the server's certificate" if kind == "init" else "")
                + "; default %(default)s",
            )
        maker.add_argument("directory", metavar="DIR")
        if kind == "node":
            maker.add_argument("node", metavar="NAME")
        maker.add_argument("names", nargs="*" if kind == "node" else "+", metavar=names)
    _add_upkeep(kinds)
    return parser


def _add_image(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    image = commands.add_parser(
        "image", help="import, list and remove images, which jobs of all clients can have"
    )
    kinds = image.add_subparsers(required=True, metavar="ACTION")
    action = kinds.add_parser(
        "import",
        help="take an image by a name, and print its digest; needs root",
        description="Take an image by a name: oci:DIR[:TAG] (an OCI layout), docker-archive:FILE[:TAG]"
        " (docker save), oci-archive:FILE[:TAG], tar:FILE or dir:DIR (a root). Owners, set-id bits, devices"
        " and extended attributes are left out. Running jobs keep an older image of this name. It works"
        " whether pjwd runs or not.",
    )
    action.set_defaults(run=_image_import)
    action.add_argument("name", metavar="NAME")
    action.add_argument("source", metavar="KIND:PATH")
    listed = kinds.add_parser("ls", help="list the images; needs root", description="List the images.")
    listed.set_defaults(run=_image_ls)
    listed.add_argument("--format", choices=("table", "json"), default="table", help="default %(default)s")
    removed = kinds.add_parser(
        "rm",
        help="remove images; needs root",
        description="Take the names from images. pjw removes the files of one when no job uses it any more.",
    )
    removed.set_defaults(run=_image_rm)
    removed.add_argument("names", metavar="NAME", nargs="+")
    for command in (action, listed, removed):
        _add_config(command)
        _add_state_dir(command)


def _state_dir(arguments: argparse.Namespace) -> str:
    from pjw.server.config import load_config

    return load_config(arguments.config, _options(arguments)).state_dir


def _image_import(arguments: argparse.Namespace) -> int:
    from pjw.server.images import import_image

    print(import_image(_state_dir(arguments), arguments.name, arguments.source))
    return 0


def _image_ls(arguments: argparse.Namespace) -> int:
    from pjw.server.images import listed

    for line in listed(_state_dir(arguments), arguments.format):
        print(line)
    return 0


def _image_rm(arguments: argparse.Namespace) -> int:
    from pjw.server.images import remove_images

    remove_images(_state_dir(arguments), arguments.names)
    return 0


def _add_days(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--days", type=_days, default=LEAF_DAYS, metavar="N", help="valid so long; default %(default)s"
    )


def _add_upkeep(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    renew = kinds.add_parser(
        "renew",
        help="new certificates for the keys of the server or of clients",
        description="Replace the certificates of `server` or of clients by new ones, for the same keys and"
        " names, and make the bundles anew. The old ones stay next to them as NAME.SERIAL.crt, still valid.",
    )
    renew.set_defaults(run=_certs_renew)
    _add_days(renew)
    revoke = kinds.add_parser(
        "revoke",
        help="add the certificates of clients to a revocation list",
        description="Add all certificates of these clients in DIR to a revocation list. It"
        " counts once `revoked` in the configuration names it and pjwd has read it: systemctl reload pjwd.",
    )
    revoke.set_defaults(run=_certs_revoke)
    shown = kinds.add_parser("list", help="show the certificates in a directory, with owner and end")
    shown.set_defaults(run=_certs_list)
    for command in (revoke, shown):
        command.add_argument("--list", metavar="FILE", help="the revocation list; default DIR/revoked")
    for command in (renew, revoke, shown):
        command.add_argument("directory", metavar="DIR")
    for command in (renew, revoke):
        command.add_argument("names", nargs="+", metavar="NAME")


class _Version(argparse.Action):
    # To look the version up takes as long as all else that is done here.
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        from pjw.version import version

        require_stdout()
        print(f"pjwd {version()}")
        parser.exit()


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="limits, users and more, in TOML")


def _add_state_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument("--state-dir", metavar="DIR", help="jobs and their output; default /var/lib/pjw")


def _add_options(command: argparse.ArgumentParser) -> None:
    _add_config(command)
    for name, metavar, text in (
        ("listen", "HOST:PORT", f"default {DEFAULT_ADDRESS}; port 0 picks a free one"),
        ("ca-crt", "FILE", "the authority whose clients are let in"),
        ("server-crt", "FILE", "the server's certificate"),
        ("server-key", "FILE", "its private key"),
    ):
        command.add_argument(f"--{name}", metavar=metavar, help=text)
    _add_state_dir(command)
    command.add_argument("--log-level", choices=LEVELS, help="default warning")
    command.add_argument("--log-format", choices=FORMATS, help="lines for people, or JSON; default text")


def _options(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the configuration keys given on the command line; paths are relative to this directory."""
    options: dict[str, object] = {}
    for key in OPTIONS:
        value = getattr(arguments, key, None)
        if key == "listen" and value is None:
            # drop-ins of older packages set the address this way
            value = os.environ.get(LISTEN_VARIABLE)
        if value is not None:
            options[key] = os.path.abspath(value) if key in PATHS else value
    return options


def _days(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 36_500:
        raise argparse.ArgumentTypeError("must be a number of days from 1 to 36500")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError("must be a number of seconds from 0 to 86400")
    return seconds


def _address(text: str) -> str:
    from pjw.given import server_address

    try:
        return server_address(text)
    except PjwError as error:
        raise argparse.ArgumentTypeError(f"{error}; {error.hint}") from None


def _serve(arguments: argparse.Namespace) -> int:
    from pjw.server.boot import serve

    return serve(arguments.config, _options(arguments))


def _gateway(arguments: argparse.Namespace) -> int:
    # by name: it stands above this room, and is loaded for nothing else
    serve = import_module("pjw.gateway.boot").serve
    return int(serve(arguments.config, _options(arguments)))


def _check(arguments: argparse.Namespace) -> int:
    from pjw.server.check import check

    _name_the_unread(arguments.config)
    return check(arguments.config, _options(arguments))


def _name_the_unread(path: str | None) -> None:
    """Say that the unit's configuration counts only when it is named: operators with one ask about that."""
    if path is None and os.path.exists(_UNIT_CONFIG):
        print(f"pjwd: {_UNIT_CONFIG} is not read: --config {_UNIT_CONFIG} does", file=sys.stderr)


def _config_show(arguments: argparse.Namespace) -> int:
    from pjw.server.config import config_of, read_values, removed_keys
    from pjw.server.effective import as_json, as_toml, settings_of

    path, options = arguments.config, _options(arguments)
    _name_the_unread(path)
    values = read_values(path)
    settings = settings_of(config_of(path, values, options), values, options)
    for words in removed_keys(values):
        print(f"pjwd: warning: {words}", file=sys.stderr)
    print(as_json(settings) if arguments.format == "json" else as_toml(settings, path), end="")
    return 0


def _backup(arguments: argparse.Namespace) -> int:
    from pjw.server.backup import back_up
    from pjw.server.config import load_config

    config = load_config(arguments.config, _options(arguments))
    made = back_up(config.state_dir, arguments.directory)
    print(made.path)
    print(
        f"pjwd: {made.jobs} jobs, {made.running} of which have not ended; not in the backup: configuration,"
        " certificates, keys, audit log",
        file=sys.stderr,
    )
    return 0


def _end_jobs(arguments: argparse.Namespace) -> int:
    from pjw.server.config import load_config
    from pjw.server.end_jobs import end_jobs

    config = load_config(arguments.config, _options(arguments))
    print(f"jobs ended: {end_jobs(config.state_dir, arguments.grace)}")
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    from pjw.server.config import load_config
    from pjw.server.drain import drain

    drain(load_config(arguments.config, _options(arguments)), wait=arguments.wait)
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    from pjw.server.config import load_config
    from pjw.server.drain import resume

    resume(load_config(arguments.config, _options(arguments)))
    return 0


def _certs(arguments: argparse.Namespace) -> int:
    from pjw.certs import authority
    from pjw.given import host_of

    directory, names, days = arguments.directory, arguments.names, arguments.days
    match arguments.kind:
        case "init":
            hosts = list(dict.fromkeys([*_own_names(), host_of(arguments.server)]))
            made = authority.init_set(directory, hosts, names, days=days, bundle_server=arguments.server)
        case "server":
            made = authority.write_server(directory, names, days=days)
        case "node":
            made = authority.write_node(directory, arguments.node, names, days=days)
        case _:
            made = []
            for name in names:
                made += authority.write_client(directory, name, days=days, bundle_server=arguments.server)
            _warn_of_another_name(directory, arguments.server)
    for path in made:
        print(path)
    _tell_clients([path for path in made if path.endswith(BUNDLE_SUFFIX)])
    return 0


def _certs_renew(arguments: argparse.Namespace) -> int:
    from pjw.certs import upkeep

    made = upkeep.renew(arguments.directory, arguments.names, days=arguments.days)
    for path in made:
        print(path)
    _tell_clients([path for path in made if path.endswith(BUNDLE_SUFFIX)], "--replace ")
    if upkeep.SERVER in arguments.names:
        crt = os.path.join(arguments.directory, f"{upkeep.SERVER}.crt")
        print(
            f"pjwd: copy {crt} to the path that `server_crt` in pjwd's configuration names;"
            " then run: systemctl reload pjwd",
            file=sys.stderr,
        )
    return 0


def _certs_revoke(arguments: argparse.Namespace) -> int:
    from pjw.certs import upkeep

    path, count = upkeep.revoke(arguments.directory, arguments.names, arguments.list)
    print(path)
    what = "1 certificate" if count == 1 else f"{count} certificates"
    print(
        f"pjwd: added {what}; it counts on the server once `revoked` in its configuration names this list,"
        " after: systemctl reload pjwd",
        file=sys.stderr,
    )
    return 0


def _certs_list(arguments: argparse.Namespace) -> int:
    from pjw.certs import upkeep

    for line in upkeep.listed(arguments.directory, arguments.list):
        print(line)
    return 0


def _warn_of_another_name(directory: str, server: str) -> None:
    """Warn when the server's certificate in *directory* lacks the host that the bundles name."""
    from pjw.certs.checks import is_for, names_of, parse_certificates
    from pjw.certs.files import read_certificates
    from pjw.given import host_of

    crt = os.path.join(directory, "server.crt")
    try:
        certificate, *_ = parse_certificates(read_certificates(crt))
    except (PjwError, ValueError):
        return
    if not is_for(certificate, host_of(server)):
        names = ", ".join(names_of(certificate)) or "no host"
        print(
            f"pjwd: warning: {crt} is for {names}, not for {host_of(server)}, where the bundles lead to:"
            " see --server, or make another with `pjwd certs server`",
            file=sys.stderr,
        )


def _tell_clients(bundles: Sequence[str], option: str = "") -> None:
    """Tell each client's next step with its bundle, on stderr: stdout has the paths and nothing else."""
    for path in bundles:
        file = os.path.basename(path)
        client = file.removesuffix(BUNDLE_SUFFIX)
        print(
            f"\nfor {client}: copy {shlex.quote(path)} to where {client} works, unread by others",
            file=sys.stderr,
        )
        print(f"  then there: pjw context add {option}default {shlex.quote(file)}", file=sys.stderr)


def _own_names() -> list[str]:
    names = ["localhost", "127.0.0.1", "::1"]
    own = socket.gethostname()
    # a container's name may be digits alone, which no certificate takes for a host name
    return [*names, own] if own not in names and not own.rpartition(".")[2].isdecimal() else names


if __name__ == "__main__":
    sys.exit(main())
