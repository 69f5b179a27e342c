"""The reference of the two command lines, from the parsers that read them."""

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Final

from pjw.cli.parser import build_parser as pjw_parser
from pjw.cli.topics import TOPICS
from pjw.server.main import build_parser as pjwd_parser

USAGE: Final = "usage: "


def pjw() -> str:
    """Return the page of pjw."""
    return _page(pjw_parser)


def pjwd() -> str:
    """Return the page of pjwd."""
    return _page(pjwd_parser)


def topics() -> str:
    """Return the page of the topics of `pjw help`."""
    sections = [
        f"## {name}\n\n{topic.title[0].upper()}{topic.title[1:]}.\n\n{topic.text}"
        for name, topic in TOPICS.items()
    ]
    return "\n".join(["# Help topics\n\n`pjw help TOPIC` says the same.\n", *sections])


def _page(build: Callable[[], argparse.ArgumentParser]) -> str:
    # what argparse takes for the width of the terminal
    os.environ["COLUMNS"] = "100"
    return "\n".join(_command(build(), 1))


def _command(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    """Yield a command's section, and then those of its subcommands."""
    yield f"{'#' * level} {parser.prog}\n"
    if parser.description:
        yield f"{parser.description}\n"
    usage = parser.format_usage().removeprefix(USAGE).rstrip().replace("\n" + " " * len(USAGE), "\n")
    yield f"```text\n{usage}\n```\n"
    for group in parser._action_groups:
        yield from _table(parser, group)
    if parser.epilog:
        yield f"```text\n{parser.epilog.strip()}\n```\n"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                yield from _command(command, min(level + 1, 6))


def _table(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> Iterator[str]:
    """Yield the options of one group: a row for each, as `--help` names it."""
    rows = []
    formatter = parser._get_formatter()
    for action in group._group_actions:
        if isinstance(action, argparse._SubParsersAction):
            rows += [
                (f"[`{choice.dest}`](#{parser.prog.replace(' ', '-')}-{choice.dest})", choice.help or "")
                for choice in action._choices_actions
            ]
            continue
        # the description of a command explains each argument that has no help text
        plain = not action.option_strings and not action.help
        if plain or action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        name = formatter._format_action_invocation(action)
        rows.append((f"`{_escaped(name)}`", formatter._expand_help(action) if action.help else ""))
    if rows:
        title = {"options": "option", "positional arguments": "argument"}.get(group.title or "", group.title)
        if group.description:
            yield f"{group.description}\n"
        yield f"| {title} | meaning |\n| --- | --- |"
        yield from (f"| {name} | {_cell(text)} |" for name, text in rows)
        yield ""


def _cell(text: str) -> str:
    return _escaped(" ".join(text.split())).replace("<", "&lt;")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
