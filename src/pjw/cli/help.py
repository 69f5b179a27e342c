"""`pjw help [COMMAND|TOPIC]`, and the guess at a command or option that the user may have meant."""

import argparse
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Final

from pjw.cli.parser import build_parser
from pjw.cli.topics import TOPICS


def show_help(arguments: argparse.Namespace) -> None:
    """Print the text of a topic, the help of a command, or without words an overview of pjw."""
    words = arguments.words
    if len(words) == 1 and words[0] in TOPICS:
        topic = TOPICS[words[0]]
        print(f"{words[0]}: {topic.title}\n\n{topic.text}", end="")
        return
    parser: argparse.ArgumentParser = build_parser()
    for depth, word in enumerate(words):
        commands = commands_of(parser)
        if word not in commands:
            known = [*commands, *(TOPICS if depth == 0 else ())]
            parser.error(f"no help for {word[:80]!r}; there is for: {', '.join(known)}")
        parser = commands[word]
    parser.print_help()
    if not words:
        width = max(map(len, TOPICS))
        print("\ntopics (pjw help TOPIC):")
        for name, topic in TOPICS.items():
            print(f"  {name:<{width}}  {topic.title}")


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return the commands of a parser, by name."""
    # argparse has no other way to ask
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            return dict(action.choices)
    return {}


# The command or option that the user may have meant, from argparse's words about an unknown one.

# The names that other programs have for our commands: docker, systemctl, kubectl, the shell.
_ELSEWHERE: Final = {
    "ps": "list",
    "ls": "list",
    "jobs": "list",
    "status": "get",
    "show": "get",
    "inspect": "get",
    "describe": "get",
    "exec": "run",
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


def guess(parser: argparse.ArgumentParser, message: str) -> str | None:
    """Return a hint, if a wrong word resembles one of this parser's."""
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
    from pjw.cli.parser import build_parser

    top = build_parser()
    if parser.prog != top.prog and word in _options(top):
        return f"{word} belongs before the command: {top.prog} {word} …{parser.prog.removeprefix(top.prog)}"
    likely = _nearest(word, _options(parser))
    see = f"{parser.prog} --help has all options"
    return f"perhaps {' or '.join(likely)}; {see}" if likely else see


def _nearest(word: str, known: list[str]) -> list[str]:
    """Return the only name that begins so, or the two that are most alike."""
    begins = [name for name in known if len(word) > len("--") and name.startswith(word)]
    return begins if len(begins) == 1 else get_close_matches(word, known, 2, 0.7)


def _options(parser: argparse.ArgumentParser) -> list[str]:
    # argparse has no other way to ask
    return [name for name in parser._option_string_actions if name.startswith("--")]  # noqa: SLF001
