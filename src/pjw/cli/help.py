"""`pjw help [COMMAND|TOPIC]`."""

import argparse

from pjw.cli.parser import build_parser, commands_of
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
