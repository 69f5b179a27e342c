"""Write pjw.1, pjwd.8 and pjwd.toml.5: from the parsers, the help topics and docs/configuration.md.

The date is that of SOURCE_DATE_EPOCH where it is set, so that a package is the same whenever it is built.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from argparse_manpage.compat import get_reproducible_date
from argparse_manpage.manpage import Manpage
from markdown_it import MarkdownIt
from markdown_it.token import Token

from pjw.cli.parser import build_parser as pjw_parser
from pjw.cli.topics import TOPICS
from pjw.server.main import build_parser as pjwd_parser

ROOT: Final = Path(__file__).parents[2]
SOURCE: Final = f"pjw {version('pjw')}"
DATE: Final = get_reproducible_date()
FONTS: Final = {
    "code_inline": (r"\fB", r"\fR"),
    "strong": (r"\fB", r"\fR"),
    "em": (r"\fI", r"\fR"),
}


def main(directory: str) -> None:
    """Write all pages."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    see_also = {
        "pjw": r"\fBpjwd\fR(8), \fBpjwd.toml\fR(5)",
        "pjwd": r"\fBpjw\fR(1), \fBpjwd.toml\fR(5)",
        "pjwd.toml": r"\fBpjw\fR(1), \fBpjwd\fR(8)",
    }
    pjw = page(pjw_parser(), "1", "run commands isolated and limited, and stream their output")
    for name, topic in TOPICS.items():
        pjw.add_section(f"{name}: {topic.title}", "=", roff(topic.text))
    pjw.add_section("see also", "=", see_also["pjw"])
    # the topics say it in full
    pjw.parser.epilog = None
    (target / "pjw.1").write_text(written(pjw))
    pjwd = page(pjwd_parser(), "8", "the service that runs the jobs of pjw")
    pjwd.add_section("see also", "=", see_also["pjwd"])
    (target / "pjwd.8").write_text(written(pjwd))
    head = (
        f'.TH PJWD.TOML "5" "{DATE}" "{SOURCE}" "pjw"',
        ".SH NAME",
        r"pjwd.toml \- configuration of pjwd",
        ".SH DESCRIPTION",
    )
    text = (ROOT / "docs" / "configuration.md").read_text().partition("\n")[2]
    tail = (".SH SEE ALSO", see_also["pjwd.toml"], "")
    (target / "pjwd.toml.5").write_text("\n".join((*head, roff(text), *tail)))


def page(parser: Any, section: str, description: str) -> Manpage:  # noqa: ANN401  whose own type is private
    """Return a page of a program and all its commands."""
    page = Manpage(parser, format="single-commands-section")
    page.section, page.description, page.date = section, description, DATE
    page.source, page.manual = SOURCE, "pjw"
    return page


def written(page: Manpage) -> str:
    """Return a page as text, with a date that mandoc(1) can read, and its commands under their name."""
    text = str(page).replace(DATE.replace("-", r"\-"), DATE, 1)
    # argparse breaks lines for a terminal, roff for the page; what begins with a space it would not fill
    text = re.sub(
        r"^usage: .*(?:\n +\S.*)+", lambda usage: " ".join(usage[0].split()), text, flags=re.MULTILINE
    )
    # a group's title, and what is said of the group
    text = re.sub(r"^(\w[^\n]*)\n(\w[^\n]*\n\n\.RS 7)$", r"\1\n.br\n\2", text, flags=re.MULTILINE)
    return text.replace(".SH\nPOSITIONAL ARGUMENTS", ".SH\nCOMMANDS")


def roff(markdown: str) -> str:
    """Markdown as lines of man(7): headings, paragraphs, lists, code, and tables as definitions."""
    tokens = iter(MarkdownIt().enable("table").parse(markdown))
    lines: list[str] = []
    item = False
    for token in tokens:
        match token.type:
            case "heading_open":
                lines += [".SH " + inline(next(tokens)).upper()]
            case "list_item_open":
                lines += [r".IP \(bu 2"]
                item = True
            case "list_item_close":
                item = False
            case "bullet_list_close":
                lines += [".PP"]
            case "paragraph_open" if not item:
                lines += [".PP"]
            case "inline":
                lines += [inline(token)]
            case "code_block" | "fence":
                code = token.content.rstrip("\n").split("\n")
                lines += [".PP", ".RS 4", ".nf", *map(escaped, code), ".fi", ".RE"]
            case "table_open":
                lines += table(takewhile(lambda token: token.type != "table_close", tokens))
    # after a heading, and before what begins a paragraph by itself, there is none to begin
    begins = (".PP", ".SH", ".TP", ".IP")
    around = zip([".SH", *lines], lines, [*lines[1:], ".SH"], strict=False)
    kept = [
        line
        for before, line, after in around
        if line != ".PP" or not (before.startswith(".SH") or after.startswith(begins))
    ]
    return "\n".join(kept)


def table(tokens: Iterable[Token]) -> list[str]:
    """Return a table's rows as definitions of their first cells; a default stands next to the name."""
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(inline(token))
    head, *body = rows
    lines: list[str] = []
    for first, *rest in body:
        default = rest.pop(0) if head[1] == "default" else ""
        lines += [".TP", f"{first} (default: {default})" if default else first]
        names = head[-len(rest) :]
        lines += [rest[0]] if len(rest) == 1 else joined(names, rest)
    return [*lines, ".PP"]


def joined(names: Sequence[str], cells: Sequence[str]) -> list[str]:
    """Cells with the heads of their columns."""
    return [
        f"{name}: {cell}" + (";" if name != names[-1] else "")
        for name, cell in zip(names, cells, strict=True)
    ]


def inline(token: Token) -> str:
    """Return the text of a paragraph, with its fonts."""
    parts: list[str] = []
    for child in token.children or ():
        kind = child.type.removesuffix("_open").removesuffix("_close")
        if kind == "code_inline":
            parts.append(FONTS[kind][0] + escaped(child.content) + FONTS[kind][1])
        elif kind in FONTS:
            parts.append(FONTS[kind][0 if child.nesting == 1 else 1])
        elif kind == "softbreak":
            parts.append("\n")
        else:
            parts.append(escaped(child.content))
    # a line that begins with a control character would be a request
    return "\n".join(r"\&" + line if line[:1] in (".", "'") else line for line in "".join(parts).split("\n"))


def escaped(text: str) -> str:
    r"""Return text that roff shows as it is: `\`, `-` and a first `.` mean something to it."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return r"\&" + text if text[:1] in (".", "'") else text


if __name__ == "__main__":
    main(sys.argv[1])
