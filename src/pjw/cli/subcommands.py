"""The commands whose code is imported only when they run: quota, context, help, completion, top, stats."""

import argparse
from functools import partial
from importlib import import_module
from typing import Any, Final

from pjw.cli.connection import job_name, server
from pjw.errors import ConfigError

INSTALL_TOP: Final = "pip install 'pjw-client[top]'"
# textual brings rich
_OF_TOP: Final = ("rich", "textual")
# argparse's own type for what a parser's commands are added to, with any parser class
Commands = Any


def _runs(parser: argparse.ArgumentParser, function: str) -> None:
    """Have a command run `module.function`."""
    parser.set_defaults(run=partial(_run, function))


def _run(function: str, arguments: argparse.Namespace) -> int:
    module, _, name = function.rpartition(".")
    try:
        found = import_module(f"pjw.cli.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_TOP:
            raise
        raise ConfigError(
            f"cannot show {module}: the package textual is not installed", hint=INSTALL_TOP
        ) from None
    getattr(found, name)(arguments)
    return 0


def _add_context(commands: Commands) -> None:
    context = commands.add_parser("context", help="services by name, so that no certificate is typed twice")
    kinds = context.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, function: str, text: str) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = kinds.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}."
        )
        _runs(action, f"contexts.{function}")
        return action

    action = add("add", "add_context", "make a context of a bundle, which your operator made: NAME.pjw")
    action.add_argument("name", metavar="NAME")
    action.add_argument("bundle", metavar="FILE", help="- for stdin")
    action.add_argument(
        "--replace", action="store_true", help="replace a context of this name, for a new certificate"
    )
    action.add_argument(
        "--server",
        type=server,
        metavar="HOST[:PORT]",
        # the option of the same name before the command counts as well
        default=argparse.SUPPRESS,
        help="instead of the bundle's",
    )
    add("list", "list_contexts", "list the contexts: their names, or a table at a terminal")
    action = add("use", "use_context", "make a context the current one")
    action.add_argument("name", metavar="CONTEXT")
    action = add("show", "show_context", "show a context: its server, its files, who you are there")
    action.add_argument("name", metavar="CONTEXT", nargs="?", help="default: the current one")
    action = add("rm", "remove_contexts", "forget contexts, with their certificates and keys")
    action.add_argument("names", metavar="CONTEXT", nargs="+")


def _add_top(commands: Commands) -> None:
    command = commands.add_parser(
        "top",
        help="watch the jobs that run, and what they use, on the whole terminal",
        description="Watch the jobs that run, and what they use. Keys: up and down choose a job, s stops it"
        " and k kills it (both ask), l or enter shows its output, o changes the order, q quits.",
    )
    _runs(command, "top.show_top")
    add_all(command)


def _add_stats(commands: Commands) -> None:
    command = commands.add_parser("stats", help="show what a job used over its life, with plots")
    _runs(command, "stats.show_stats")
    command.add_argument("job", type=job_name, metavar="JOB", help="a job's id, or its name")
    add_all(command)
    command.add_argument(
        "--format", choices=("plot", "json"), default="plot", help="default plot; json has every sample"
    )


def _add_quota(commands: Commands) -> None:
    command = commands.add_parser(
        "quota",
        help="show your limits, what your jobs use now, and your share",
        description="Show what your jobs may use one by one and together, what they use now, and your share"
        " of the machine. With pjw --all show another client's, if your operator allows it.",
    )
    _runs(command, "quota.show_quota")
    command.add_argument("client", nargs="?", default="", metavar="CLIENT", help="default: yourself")
    add_all(command)
    command.add_argument("--format", choices=("table", "json"), default="table", help="default table")


def add_all(command: argparse.ArgumentParser) -> None:
    """Add --all to the options of a command."""
    command.add_argument(
        "--all",
        action="store_true",
        # the option of the same name before the command counts as well
        default=argparse.SUPPRESS,
        help="the jobs of every client, not only yours; your operator must allow it",
    )


def _add_help(commands: Commands) -> None:
    command = commands.add_parser("help", help="explain a command, or a topic such as certificates or limits")
    _runs(command, "help.show_help")
    command.add_argument("words", nargs="*", metavar="COMMAND|TOPIC")


def _add_completion(commands: Commands) -> None:
    command = commands.add_parser(
        "completion",
        help="print the script for completion in bash, zsh or fish",
        description='Print the script for completion, for example for: eval "$(pjw completion bash)" in'
        " ~/.bashrc, the same with zsh in ~/.zshrc (after compinit), and pjw completion fish | source.",
    )
    _runs(command, "completion.print_script")
    command.add_argument("shell", choices=("bash", "zsh", "fish"))


# what adds each of them to the command tree
ADDERS: Final = {
    "top": _add_top,
    "stats": _add_stats,
    "quota": _add_quota,
    "context": _add_context,
    "help": _add_help,
    "completion": _add_completion,
}
