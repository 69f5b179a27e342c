"""The commands whose code is imported only when they run: such as quota, context, help, top, stats, mcp."""

import argparse
from functools import partial
from importlib import import_module
from typing import Any, Final

from pjw.cli import units
from pjw.cli.connection import job_name, server
from pjw.errors import ConfigError, InvalidJobError

INSTALL_TOP: Final = "pip install 'pjw-client[top]'"
INSTALL_MCP: Final = "pip install 'pjw-client[mcp]'"
_TOP: Final = ("show top", "textual", INSTALL_TOP)
_MCP: Final = ("serve agents", "mcp", INSTALL_MCP)
# For each missing package: the command that cannot run, the extra to install, and how. textual brings rich,
# and mcp the others.
_EXTRAS: Final = {"rich": _TOP, "textual": _TOP, "anyio": _MCP, "mcp": _MCP, "pydantic": _MCP}
# the states of a job, as --state takes them
STATES: Final = ("queued", "starting", "running", "stopping", "exited", "lost")
# argparse's own type of the object to which a parser's commands are added, with any parser class
Commands = Any


def _runs(parser: argparse.ArgumentParser, function: str) -> None:
    """Have a command run `module.function`."""
    parser.set_defaults(run=partial(_run, function))


def _run(function: str, arguments: argparse.Namespace) -> int:
    module, _, name = function.rpartition(".")
    try:
        found = import_module(f"pjw.cli.{module}")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        doing, package, install = extra
        raise ConfigError(f"cannot {doing}: the package {package} is not installed", hint=install) from None
    code: int | None = getattr(found, name)(arguments)
    return code or 0


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
        " and k kills it (both ask), l or enter shows its output, e opens a shell in it, o changes the order,"
        " q quits.",
    )
    _runs(command, "top.show_top")
    add_all(command)


def _add_submit(commands: Commands) -> None:
    command = commands.add_parser(
        "submit",
        help="put the jobs of a file into the queue, all or none; prints their ids",
        description="Put the jobs of a file into the queue, all of them or none, and print their ids."
        " FILE.toml has a table [[job]] for each; any other file, and - for stdin, a line of JSON for each. A"
        " job has a command, and may have name, after (names of jobs above it, or ids, with :failed or :any),"
        " env, labels, workdir, workspace, exclusive, image, read_only, mounts, allow, link, gpus, node,"
        " partition, constraint, split_stderr, priority, not_before, hold, and the limits of pjw start.",
    )
    _runs(command, "batch.submit_file")
    add_secrets(command)
    add_upload(command)
    add_outputs(command, sizes=False)
    command.add_argument("file", metavar="FILE", help="at most 500 jobs; - for stdin")
    command.set_defaults(starts=True)


def _add_events(commands: Commands) -> None:
    command = commands.add_parser(
        "events",
        help="show changes of your jobs as they come: a line each, or JSON in a pipe",
        description="Show each change of the states of your jobs from now on: a line each at a terminal,"
        " lines of JSON elsewhere. Each has a number: --since goes on behind it, with no gap and no repeat,"
        " also when pjwd or pjw was restarted meanwhile. A lost connection is made again.",
    )
    _runs(command, "events.show_events")
    begin = command.add_mutually_exclusive_group()
    begin.add_argument(
        "--since",
        type=units.count,
        metavar="NUMBER",
        help="begin behind the change of this number; 0: the first",
    )
    begin.add_argument("--list", action="store_true", help="begin with the jobs as they are now")
    command.add_argument(
        "-f", "--follow", action=argparse.BooleanOptionalAction, default=True,
        help="go on for ever, which is the default; or end after the changes so far",
    )  # fmt: skip
    command.add_argument(
        "--job",
        type=job_name,
        action="append",
        default=[],
        metavar="JOB",
        help="only of this job, or of several",
    )
    command.add_argument(
        "--state", choices=STATES, action="append", default=[], help="only to this state, or to several"
    )
    command.add_argument(
        "--label", type=units.key_and_value, action="append", default=[], metavar="KEY=VALUE",
        help="only of jobs with this label, and all others that are given",
    )  # fmt: skip
    command.add_argument("--name", metavar="NAME", help="only of jobs of this name")
    add_all(command)
    command.add_argument(
        "--format", choices=("table", "jsonl"), help="default table at a terminal, else jsonl"
    )
    command.add_argument(
        "--json", dest="format", action="store_const", const="jsonl", help="the same as --format jsonl"
    )


def _add_stats(commands: Commands) -> None:
    command = commands.add_parser("stats", help="show what a job used over its life, with plots")
    _runs(command, "stats.show_stats")
    command.add_argument("job", type=job_name, metavar="JOB", help="a job's id, or its name")
    add_all(command)
    command.add_argument(
        "--format", choices=("plot", "json"), default="plot", help="default plot; json has every sample"
    )


def _add_mcp(commands: Commands) -> None:
    command = commands.add_parser(
        "mcp",
        help="let an AI agent run commands: an MCP server on stdin and stdout",
        description="Serve MCP (Model Context Protocol) on stdin and stdout, for the program of an AI agent,"
        " which starts this command itself. The agent can run commands, read their output, stop them, put and"
        " get files of running jobs, and list jobs: as you, within your limits. It serves until stdin ends.",
    )
    _runs(command, "agents.serve")
    command.set_defaults(starts=True)


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


def _add_workspace(commands: Commands) -> None:
    workspace = commands.add_parser(
        "workspace",
        help="list and remove your workspaces: directories that outlive jobs",
        description="Workspaces are directories of yours on the machine with pjwd. They outlive jobs:"
        " pjw run --workspace NAME makes one, or uses it again.",
    )
    kinds = workspace.add_subparsers(required=True, metavar="ACTION")
    action = kinds.add_parser(
        "ls",
        help="list your workspaces: their names, or a table at a terminal",
        description="List your workspaces: their names, or a table at a terminal.",
    )
    _runs(action, "workspaces.list_workspaces")
    action.add_argument("--format", choices=("table", "names", "json"), help="json has every member")
    action = kinds.add_parser(
        "rm",
        help="remove workspaces, with all that is in them",
        description="Remove workspaces, with all that is in them. One that a job uses is not removed.",
    )
    _runs(action, "workspaces.remove_workspaces")
    action.add_argument("names", metavar="WORKSPACE", nargs="+")


def _add_nodes(commands: Commands) -> None:
    nodes = commands.add_parser(
        "nodes",
        help="list, drain, resume and remove the nodes of a cluster",
        description="List the nodes of a cluster: their names, or a table at a terminal. Only a gateway has"
        " nodes, and your operator must let you see them.",
    )
    _runs(nodes, "nodes.list_nodes")
    nodes.add_argument("--format", choices=("table", "names", "json"), help="json has every member")
    kinds = nodes.add_subparsers(metavar="ACTION")
    for name, text in (
        ("drain", "give nodes no more jobs; the jobs that they have go on"),
        ("resume", "give drained nodes jobs again"),
        ("rm", "forget nodes that are gone for good, with the output that they have"),
    ):
        action = kinds.add_parser(name, help=text, description=f"{text.capitalize()}.")
        _runs(action, f"nodes.{'remove' if name == 'rm' else name}")
        action.add_argument("names", metavar="NODE", nargs="+")


def _add_image(commands: Commands) -> None:
    image = commands.add_parser(
        "image",
        help="load, list and remove images, which jobs can have instead of the machine's files",
        description="A job with an image (pjw run --image NAME) has the image's files as its root, and sees"
        " none of the machine's files. Your operator may offer images, and you can load your own.",
    )
    kinds = image.add_subparsers(required=True, metavar="ACTION")
    action = kinds.add_parser(
        "load",
        help="load an image of your own from a file, and print its name",
        description="Load an image of your own: an archive of docker save, podman save or skopeo, an OCI"
        " layout (a tar archive, or oci:DIR[:TAG]), or a tar archive or a directory (dir:DIR) of a root. A"
        " job of yours unpacks it. Running jobs keep an older image of this name.",
    )
    _runs(action, "images.load_image")
    action.set_defaults(starts=True)
    action.add_argument("name", metavar="NAME")
    action.add_argument("source", metavar="FILE", help="or oci:DIR[:TAG], docker-archive:FILE[:TAG], dir:DIR")
    action = kinds.add_parser(
        "ls",
        help="list the images that your jobs can have: their names, or a table at a terminal",
        description="List the images that your jobs can have: their names, or a table at a terminal.",
    )
    _runs(action, "images.list_images")
    action.add_argument("--format", choices=("table", "names", "json"), help="json has every member")
    action = kinds.add_parser(
        "rm",
        help="remove images of your own",
        description="Remove images of your own. pjw removes the files of one when no job uses it any more.",
    )
    _runs(action, "images.remove_images")
    action.add_argument("names", metavar="IMAGE", nargs="+")


def add_secrets(group: Any) -> None:  # noqa: ANN401  argparse has no public name for a group
    """Add --secret and --secret-file to the options of a command that makes jobs."""
    group.add_argument(
        "--secret", action="append", default=[], metavar="KEY[=VALUE]",
        help="a variable for the job alone, which pjw shows nowhere; KEY: the one that is set here",
    )  # fmt: skip
    group.add_argument(
        "--secret-file", action="append", default=[], metavar="FILE", help="the same, a line each; # comments"
    )


def add_upload(group: Any) -> None:  # noqa: ANN401  as above
    """Add --upload to the options of a command that makes jobs."""
    group.add_argument(
        "--upload", action="append", default=[], type=_source, metavar="DIR[:PATH]",
        help="put what is in DIR, or a file, into its directory before it starts, or into PATH there",
    )  # fmt: skip


class _Output(argparse.Action):
    """--output: a number of bytes, which is a limit, or else a pattern of files; of these several."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401  argparse's own word for it
        option_string: str | None = None,
    ) -> None:
        if isinstance(values, int):
            namespace.output = values
        else:
            namespace.outputs = [*namespace.outputs, values]


def size_or_pattern(text: str) -> int | str:
    """Parse the value of --output: a number of bytes, or a pattern of files, which begins with no digit."""
    try:
        return units.size(text)
    except argparse.ArgumentTypeError as error:
        if text[:1].isdigit():
            raise argparse.ArgumentTypeError(f"{error}; a pattern of files would be ./{text}") from None
    # only for this option
    from pjw.model import check_outputs

    try:
        return check_outputs([text])[0]
    except InvalidJobError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_outputs(group: Any, *, sizes: bool) -> None:  # noqa: ANN401  as above
    """Add --output and --output-required to the options of a command that makes jobs."""
    text = "keep what matches in its directory when it has ended, such as 'dist/**'; see pjw artifacts"
    if sizes:
        text += ". A SIZE bounds its output; then it is killed"
    group.add_argument(
        "--output", action=_Output, default=None, type=size_or_pattern if sizes else str,
        metavar="GLOB|SIZE" if sizes else "GLOB", help=text,
    )  # fmt: skip
    group.add_argument(
        "--output-required", action="store_true", help="it has not succeeded when nothing could be kept"
    )
    group.set_defaults(outputs=[])


def _source(text: str) -> Any:  # noqa: ANN401  imported only for this option
    from pjw.cli.copy import source

    return source(text)


def add_all(command: argparse.ArgumentParser) -> None:
    """Add --all to the options of a command."""
    command.add_argument(
        "--all",
        action="store_true",
        # the option of the same name before the command counts as well
        default=argparse.SUPPRESS,
        help="the jobs of every client, not only yours; your operator must allow it",
    )


def _add_cp(commands: Commands) -> None:
    command = commands.add_parser(
        "cp",
        help="copy files into a job, or out of it",
        usage="pjw cp PATH JOB:PATH | pjw cp JOB:PATH PATH",
        description="Copy a file or a directory into a job that runs, or out of it, as cp -r does: into the"
        " other path where that is a directory, else by that name. PATH/. is the contents of a directory. A"
        " path in a job begins in its workspace, or else its own directory, or with /. - is a tar archive on"
        " stdin or stdout. Of a job that has ended there are its artifacts: what --output has named.",
    )
    command.set_defaults(run=_copy, starts=True)
    command.add_argument("source", type=_place, metavar="SOURCE", help="PATH, JOB:PATH or -")
    command.add_argument("target", type=_place, metavar="TARGET", help="JOB:PATH, PATH or -")


def _add_artifacts(commands: Commands) -> None:
    command = commands.add_parser(
        "artifacts",
        help="list the files that were kept of a job that has ended",
        description="List the files that were kept of a job that has ended, as --output of its start named"
        " them: a line each at a terminal, lines of JSON elsewhere. pjw cp JOB:PATH PATH copies them.",
    )
    _runs(command, "copy.show_artifacts")
    add_all(command)
    command.add_argument("job", type=job_name, metavar="JOB", help="a job's id, or its name")


def _copy(arguments: argparse.Namespace) -> int:
    from pjw.cli.copy import copy

    return copy(arguments)


def _place(text: str) -> Any:  # noqa: ANN401  imported only for this command
    from pjw.cli.copy import place

    return place(text)


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


# the functions that add each of them to the command tree
ADDERS: Final = {
    "top": _add_top,
    "submit": _add_submit,
    "events": _add_events,
    "stats": _add_stats,
    "quota": _add_quota,
    "cp": _add_cp,
    "workspace": _add_workspace,
    "nodes": _add_nodes,
    "image": _add_image,
    "artifacts": _add_artifacts,
    "mcp": _add_mcp,
    "context": _add_context,
    "help": _add_help,
    "completion": _add_completion,
}
