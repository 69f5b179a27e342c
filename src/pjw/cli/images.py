"""`pjw image`: the roots that jobs can have instead of the machine's own files."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from pjw.cli.commands import each, show_name
from pjw.cli.connection import connect
from pjw.cli.copy import Count, tell_left_out
from pjw.cli.render import json_text, printable, time_text
from pjw.cli.terminal import Progress
from pjw.cli.units import duration_in_words, size_in_words
from pjw.model import Image, check_image


def load_image(arguments: argparse.Namespace) -> None:
    """Send an image, have a job of ours unpack it, and print its name."""
    check_image(arguments.name)
    seen = Count("the image")
    with connect(arguments) as client, Progress(seen.words):
        loaded = client.load_image(arguments.name, arguments.source, seen)
    tell_left_out(loaded.left_out)
    print(loaded.image.name)


def list_images(arguments: argparse.Namespace) -> None:
    """Print the names of images; at a terminal also their figures and owners."""
    with connect(arguments) as client:
        found = client.images()
    form = arguments.format or ("table" if sys.stdout.isatty() else "names")
    if form == "json":
        print(json_text(list(map(members, found)), indent=2))
        return
    names = [_name(image, with_client=arguments.all) for image in found]
    if form == "names":
        # the client's own image takes precedence over the operator's of the same name
        names = list(dict.fromkeys(names))
    for line in table(found, names) if form == "table" else names:
        print(line)


def _name(image: Image, *, with_client: bool) -> str:
    return f"{printable(image.client_name)}/{image.name}" if with_client and image.client_name else image.name


def remove_images(arguments: argparse.Namespace) -> int:
    """Remove images one by one, and print each name; go on when one cannot be removed."""
    with connect(arguments) as client:
        return each(arguments.names, client.remove_image, show_name)


def table(found: Sequence[Image], names: Sequence[str]) -> Iterator[str]:
    """Yield a line for each image, with these names, under a heading."""
    now = datetime.now(UTC)
    width = max(map(len, ("NAME", *names)))
    yield f"{'NAME':<{width}} {'SIZE':>8} {'FILES':>9} {'JOBS':>6}  {'OF':<8}  USED"
    for image, name in zip(found, names, strict=True):
        ago = duration_in_words(max(0.0, (now - image.used).total_seconds()))
        whose = "you" if image.client_name else "operator"
        size = size_in_words(image.bytes)
        used = f"{ago} ago" if image.client_name else "-"
        yield f"{name:<{width}} {size:>8} {image.inodes:>9} {image.jobs:>6}  {whose:<8}  {used}"


def members(image: Image) -> dict[str, Any]:
    """Return the keys and values of an image's JSON."""
    return {
        "name": image.name,
        "digest": image.digest,
        "made": time_text(image.made),
        "used": time_text(image.used),
        "bytes": image.bytes,
        "inodes": image.inodes,
        "jobs": image.jobs,
        "clientName": image.client_name,
        "config": {
            "env": dict(image.config.env),
            "workdir": image.config.workdir,
            "entrypoint": list(image.config.entrypoint),
            "command": list(image.config.command),
        },
    }
