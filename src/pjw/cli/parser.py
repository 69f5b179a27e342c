"""The commands of pjw, in one table, and the parser made of it. Each command's code is imported to run it."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from pjw.cli import options
from pjw.cli.connection import server
from pjw.cli.exits import EXIT_USAGE
from pjw.cli.terminal import columns
from pjw.given import DEFAULT_ADDRESS

if TYPE_CHECKING:
    Parsers = argparse._SubParsersAction["Parser"]  # noqa: SLF001  it has no other name

_EPILOG: Final = """\
exit codes: 0 done, 1 refused, 2 wrong usage, 125 pjw failed (no server, no
certificate), 126 not executable, 127 no such program, 130 interrupted;
pjw run, and pjw wait for one job: the job's own, 128+n for signal n

Put these options before COMMAND; --all may also follow it. All but --all can
also be set as PJW_SERVER, PJW_CA_CRT, PJW_CLIENT_CRT, PJW_CLIENT_KEY and
PJW_CONTEXT, or in ~/.config/pjw/config.toml. PJW_BUNDLE is a bundle, by its
path or its text.
A JOB is given by its id or its name, an element of an array as 17_5.
"""


class Command(NamedTuple):
    """A command, or an action of a command: `add` of `pjw context add`."""

    name: str
    help: str
    # `module.function` in pjw.cli, imported only when the command runs; none when only its actions run
    runs: str | None = None
    add_options: Callable[[argparse.ArgumentParser], None] | None = None
    description: str | None = None
    usage: str | None = None
    # whether the command is only for the user's own, so that --all makes no sense
    starts: bool = False
    actions: "tuple[Command, ...]" = ()


COMMANDS: Final = (
    Command(
        "run",
        "start a job, show its output, and exit as it does",
        "run.run",
        options.for_run,
        usage="pjw run [OPTION]... CMD | pjw run [OPTION]... [--] PROGRAM ARG...",
        description="Start a job, show its output, and exit with its exit code (128+n for signal n). Ctrl-C"
        " stops the job, a second one kills it, a third one leaves it to itself. pjw makes a lost connection"
        " again. One argument is a shell command, run by /bin/sh -c; several are a program with arguments.",
        starts=True,
    ),
    Command(
        "start",
        "start a job and print its id",
        "commands.start",
        options.for_start,
        usage="pjw start [OPTION]... CMD | pjw start [OPTION]... [--] PROGRAM ARG...",
        description="Start a job and print its id. One argument is a shell command, run by /bin/sh -c;"
        " several are a program and its arguments, executed as they are.",
        starts=True,
    ),
    Command(
        "exec",
        "run another command in a running job, and exit as it does",
        "execute.execute",
        options.for_exec,
        usage="pjw exec [OPTION]... JOB CMD | pjw exec [OPTION]... JOB [--] PROGRAM ARG...",
        description="Run another command in a running job: as its user, with its files, its network and its"
        " limits. Show its output, and exit with its exit code (128+n for signal n). Ctrl-C hangs it up, a"
        " second one leaves it to itself. One argument is a shell command, several are a program with"
        " arguments.",
        starts=True,
    ),
    Command(
        "attach",
        "come back to the terminal of a job or of a session",
        "interactive.attach",
        options.for_attach,
        description="Connect this terminal to a job that was started with -it, or to a session (JOB/NUMBER):"
        " show its last lines, and type into it. A terminal that was connected before is detached.",
        starts=True,
    ),
    Command(
        "forward",
        "forward a port of this machine to one within a job",
        "forward.forward",
        options.for_forward,
        description="Listen on a port of this machine (127.0.0.1), and carry each connection to a TCP port"
        " within a running job, until the job ends, or pjw does.",
        starts=True,
    ),
    Command(
        "list",
        "list your jobs: their ids, or a table at a terminal",
        "commands.list_jobs",
        options.for_list,
        description="List your jobs, in the order of their ids. A template makes a line of each job, with"
        " keys of the JSON in braces: template:'{id} {state} {labels.team} {duration:>9}'.",
    ),
    Command(
        "get",
        "show a job as JSON; several as an array",
        "commands.get",
        options.for_jobs,
    ),
    Command(
        "logs",
        "stream a job's output from its first byte until the job ends",
        "commands.logs",
        options.for_logs,
        description="Stream a job's output: its bytes alone, from the first one until the job ends.",
    ),
    Command(
        "wait",
        "wait until jobs have ended, and print the exit code of each",
        "commands.wait",
        options.for_wait,
        description="Wait until jobs have ended, and print the exit code of each (128+n for signal n), a line"
        " each in the order in which they are given. For one job pjw also exits with that code.",
    ),
    Command(
        "stop",
        "stop a job, wait for its end, and show it as JSON",
        "commands.stop",
        options.for_stop,
        description="Stop jobs: with SIGTERM, and after the grace period with SIGKILL. Wait until they have"
        " ended, and print one as JSON, several as an array; at a terminal, print a line for each.",
    ),
    Command(
        "rm",
        "forget ended jobs, with their output, and print each",
        "commands.remove",
        options.for_rm,
    ),
    Command(
        "prune",
        "forget all jobs that have ended, with their output, and print each",
        "commands.prune",
        options.for_prune,
        description="Forget all of your jobs that have ended, with their output. At a terminal, ask first.",
    ),
    Command(
        "queue",
        "show your jobs that wait in the queue, in the order of their turns, and why",
        "commands.show_queue",
        options.for_queue,
        description="Show your jobs that wait in the queue, in the order of their turns, and why they wait:"
        " their ids, or a table at a terminal.",
    ),
    Command(
        "hold",
        "keep jobs of the queue from being started, and print each",
        "commands.hold",
        options.for_jobs,
    ),
    Command(
        "release",
        "let held jobs of the queue be started, and print each",
        "commands.release",
        options.for_jobs,
    ),
    Command(
        "top",
        "watch the jobs that run, and what they use, on the whole terminal",
        "top.show_top",
        options.for_all,
        description="Watch the jobs that run, and what they use. Keys: up and down choose a job, s stops it"
        " and k kills it (both ask), l or enter shows its output, e opens a shell in it, o changes the order,"
        " q quits.",
    ),
    Command(
        "submit",
        "put the jobs of a file into the queue, all or none, and print their ids",
        "batch.submit_file",
        options.for_submit,
        description="Put the jobs of a file into the queue, all of them or none, and print their ids."
        " FILE.toml has a table [[job]] for each; any other file, and - for stdin, a line of JSON for each. A"
        " job has a command, and may have name, after (names of jobs above it, or ids, with :failed or :any),"
        " env, labels, workdir, workspace, exclusive, image, read_only, mounts, allow, link, gpus, node,"
        " partition, constraint, split_stderr, priority, not_before, hold, and the limits of pjw start.",
        starts=True,
    ),
    Command(
        "events",
        "show changes of your jobs as they come: a line each, or JSON in a pipe",
        "events.show_events",
        options.for_events,
        description="Show each change of the states of your jobs from now on: a line each at a terminal,"
        " lines of JSON elsewhere. Each has a number: --since goes on after it, with no gap and no repeat,"
        " also when pjwd or pjw was restarted meanwhile. pjw makes a lost connection again.",
    ),
    Command(
        "stats",
        "show what a job used over its life, with plots",
        "stats.show_stats",
        options.for_stats,
    ),
    Command(
        "quota",
        "show your limits, what your jobs use now, and your share",
        "quota.show_quota",
        options.for_quota,
        description="Show what your jobs may use one by one and together, what they use now, and your share"
        " of the machine. With pjw --all show another client's, if your operator allows it.",
    ),
    Command(
        "cp",
        "copy files into a job, or out of it",
        "copy.copy",
        options.for_cp,
        usage="pjw cp PATH JOB:PATH | pjw cp JOB:PATH PATH",
        description="Copy a file or a directory into a running job, or out of it, as cp -r does: into the"
        " other path where that is a directory, else by that name. PATH/. is the contents of a directory. A"
        " path in a job begins in its workspace, or else its own directory, or with /. - is a tar archive on"
        " stdin or stdout. Of an ended job, pjw copies the artifacts: the files that --output named.",
        starts=True,
    ),
    Command(
        "workspace",
        "list and remove your workspaces: directories that outlive jobs",
        description="Workspaces are directories of yours on the machine with pjwd. They outlive jobs:"
        " pjw run --workspace NAME makes one, or uses it again.",
        actions=(
            Command(
                "ls",
                "list your workspaces: their names, or a table at a terminal",
                "workspaces.list_workspaces",
                options.for_list_of_names,
                description="List your workspaces: their names, or a table at a terminal.",
            ),
            Command(
                "rm",
                "remove workspaces, with all that is in them",
                "workspaces.remove_workspaces",
                options.for_names("WORKSPACE"),
                description="Remove workspaces, with all that is in them. One that a job uses is not"
                " removed.",
            ),
        ),
    ),
    Command(
        "nodes",
        "list, drain, resume and remove the nodes of a cluster",
        "nodes.list_nodes",
        options.for_list_of_names,
        description="List the nodes of a cluster: their names, or a table at a terminal. Only a gateway has"
        " nodes, and your operator must let you see them.",
        actions=(
            Command(
                "drain",
                "give nodes no more jobs; the jobs that they have go on",
                "nodes.drain",
                options.for_names("NODE"),
                description="Give nodes no more jobs; the jobs that they have go on.",
            ),
            Command(
                "resume",
                "give drained nodes jobs again",
                "nodes.resume",
                options.for_names("NODE"),
                description="Give drained nodes jobs again.",
            ),
            Command(
                "rm",
                "forget nodes that are gone for good, with the output that they have",
                "nodes.remove",
                options.for_names("NODE"),
                description="Forget nodes that are gone for good, with the output that they have.",
            ),
        ),
    ),
    Command(
        "image",
        "load, list and remove images, which jobs can have instead of the machine's files",
        description="A job with an image (pjw run --image NAME) has the image's files as its root, and sees"
        " none of the machine's files. Your operator may offer images, and you can load your own.",
        actions=(
            Command(
                "load",
                "load an image of your own from a file, and print its name",
                "images.load_image",
                options.for_image_load,
                starts=True,
                description="Load an image of your own: an archive of docker save, podman save or skopeo, an"
                " OCI layout (a tar archive, or oci:DIR[:TAG]), or a tar archive or a directory (dir:DIR) of"
                " a root. A job of yours unpacks it. Running jobs keep an older image of this name.",
            ),
            Command(
                "ls",
                "list the images that your jobs can have: their names, or a table at a terminal",
                "images.list_images",
                options.for_list_of_names,
                description="List the images that your jobs can have: their names, or a table at a terminal.",
            ),
            Command(
                "rm",
                "remove images of your own",
                "images.remove_images",
                options.for_names("IMAGE"),
                description="Remove images of your own. pjw removes the files of one when no job uses it any"
                " more.",
            ),
        ),
    ),
    Command(
        "artifacts",
        "list the files that were kept of an ended job",
        "copy.show_artifacts",
        options.for_artifacts,
        description="List the files that were kept of an ended job, as --output of its start named"
        " them: a line each at a terminal, lines of JSON elsewhere. pjw cp JOB:PATH PATH copies them.",
    ),
    Command(
        "mcp",
        "let an AI agent run commands: an MCP server on stdin and stdout",
        "agents.serve",
        description="Serve MCP (Model Context Protocol) on stdin and stdout, for the program of an AI agent,"
        " which starts this command itself. The agent can run commands, read their output, stop them, put and"
        " get files of running jobs, and list jobs: as you, within your limits. It serves until stdin ends.",
        starts=True,
    ),
    Command(
        "context",
        "manage services by name, each with its certificate",
        actions=(
            Command(
                "add",
                "make a context of a bundle, which your operator made: NAME.pjw",
                "contexts.add_context",
                options.for_context_add,
                description="Make a context of a bundle, which your operator made: NAME.pjw.",
            ),
            Command(
                "list",
                "list the contexts: their names, or a table at a terminal",
                "contexts.list_contexts",
                description="List the contexts: their names, or a table at a terminal.",
            ),
            Command(
                "use",
                "make a context the current one",
                "contexts.use_context",
                options.for_context_use,
                description="Make a context the current one.",
            ),
            Command(
                "show",
                "show a context: its server, its files, who you are there",
                "contexts.show_context",
                options.for_context_show,
                description="Show a context: its server, its files, who you are there.",
            ),
            Command(
                "rm",
                "forget contexts, with their certificates and keys",
                "contexts.remove_contexts",
                options.for_names("CONTEXT"),
                description="Forget contexts, with their certificates and keys.",
            ),
        ),
    ),
    Command(
        "help",
        "explain a command, or a topic such as certificates or limits",
        "help.show_help",
        options.for_help,
    ),
    Command(
        "completion",
        "print the script for completion in bash, zsh or fish",
        "completion.print_script",
        options.for_completion,
        description='Print the script for completion, for example for: eval "$(pjw completion bash)" in'
        " ~/.bashrc, the same with zsh in ~/.zshrc (after compinit), and pjw completion fish | source.",
    ),
)


class Parser(argparse.ArgumentParser):
    """A parser that gives its formatters their width: without it, argparse would import shutil to find it."""

    def __init__(
        self,
        *,
        formatter: type[argparse.HelpFormatter] = argparse.HelpFormatter,
        **others: Any,  # noqa: ANN401  argparse's own
    ) -> None:
        super().__init__(
            formatter_class=partial(formatter, width=columns() - 2), allow_abbrev=False, **others
        )
        # main and the commands report a fault through the parser of the command
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        """Report a fault, and guess which word the user meant."""
        self.print_usage(sys.stderr)
        hint = _guess(self, message)
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\n" + (f"hint: {hint}\n" if hint else ""))


def build_parser(words: Sequence[str] = ()) -> Parser:
    """Build the parser of all commands; `run` of its result names the function that carries one out.

    For *words* that begin with a command it has that command alone: building all takes 3 % of a `pjw get`.
    """
    parser = Parser(
        prog="pjw",
        description="Run commands on a machine with pjwd: isolated, limited, their output streamed.",
        epilog=_EPILOG,
        formatter=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version, and exit")
    parser.add_argument("--server", type=server, metavar="HOST[:PORT]", help=f"default {DEFAULT_ADDRESS}")
    parser.add_argument("--ca-crt", metavar="FILE", help="the authority of the server's certificate")
    parser.add_argument("--client-crt", metavar="FILE", help="your certificate")
    parser.add_argument("--client-key", metavar="FILE", help="your key")
    parser.add_argument("--context", metavar="CONTEXT", help="a service by its name, see pjw context")
    parser.add_argument(
        "--all",
        action="store_true",
        help="the jobs of every client, not only yours; your operator must allow it",
    )
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    only = [command for command in COMMANDS if command.name in words[:1]]
    for command in only or COMMANDS:
        _add(parsers, command)
    return parser


def _add(parsers: "Parsers", command: Command) -> None:
    parser = parsers.add_parser(
        command.name, help=command.help, description=command.description, usage=command.usage
    )
    if command.runs is not None:
        parser.set_defaults(run=command.runs, starts=command.starts)
    if command.add_options is not None:
        command.add_options(parser)
    if command.actions:
        actions = parser.add_subparsers(required=command.runs is None, metavar="ACTION")
        for action in command.actions:
            _add(actions, action)


class _Version(argparse.Action):
    """Prints the version of the package."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401  argparse's own
        super().__init__(nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        # only for --version
        from pjw.version import version

        print(f"pjw {version()}")
        parser.exit()


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return the commands of a parser, by name."""
    # argparse has no other way to ask
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            return dict(action.choices)
    return {}


# A guess at the command or option that the user meant, from argparse's message about an unknown one.

# The names that other programs have for our commands: docker, systemctl, kubectl, the shell.
_ELSEWHERE: Final = {
    "ps": "list",
    "ls": "list",
    "jobs": "list",
    "status": "get",
    "show": "get",
    "inspect": "get",
    "describe": "get",
    "add": "start",
    "tail": "logs",
    "log": "logs",
    "output": "logs",
    "kill": "stop",
    "cancel": "stop",
    "remove": "rm",
    "delete": "rm",
}
_WRONG: Final = re.compile(
    r"(?:argument (?:COMMAND|ACTION): invalid choice: '|unrecognized arguments: )([\w-]+)"
)


def _guess(parser: argparse.ArgumentParser, message: str) -> str | None:
    """Return a hint if the unknown word resembles one that this parser knows."""
    match = _WRONG.match(message)
    if not match:
        return None
    word = match[1][:80]
    if word.startswith("-"):
        return _guess_option(parser, word)

    known = commands_of(parser)
    likely = [_ELSEWHERE[word]] if _ELSEWHERE.get(word) in known else _nearest(word, list(known))
    return "perhaps " + " or ".join(f"{parser.prog} {name}" for name in likely) if likely else None


def _guess_option(parser: argparse.ArgumentParser, word: str) -> str:
    top = build_parser()
    if parser.prog != top.prog and word in _options(top):
        return f"{word} belongs before the command: {top.prog} {word} …{parser.prog.removeprefix(top.prog)}"
    likely = _nearest(word, _options(parser))
    see = f"{parser.prog} --help has all options"
    return f"perhaps {' or '.join(likely)}; {see}" if likely else see


def _nearest(word: str, known: list[str]) -> list[str]:
    """Return the only name that begins with *word*, or else the two most similar names."""
    # only after a wrong word
    from difflib import get_close_matches

    begins = [name for name in known if len(word) > len("--") and name.startswith(word)]
    return begins if len(begins) == 1 else get_close_matches(word, known, 2, 0.7)


def _options(parser: argparse.ArgumentParser) -> list[str]:
    # argparse has no other way to ask
    return [name for name in parser._option_string_actions if name.startswith("--")]  # noqa: SLF001
