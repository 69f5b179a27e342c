"""The reference of the API, from the .proto file and its comments."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pjw.v1 import job_worker_pb2

PROTO: Final = Path(__file__).parents[2] / "src" / "pjw" / "v1" / "job_worker.proto"
BLOCK: Final = re.compile(r"(?P<kind>service|message|enum) (?P<name>\w+) \{\}?")
RPC: Final = re.compile(
    r"rpc (?P<name>\w+)\((?P<request>(stream )?\w+)\) returns \((?P<answer>(stream )?\w+)\);"
)
ONEOF: Final = re.compile(r"oneof (?P<name>\w+) \{")
VALUE: Final = re.compile(r"(?P<name>[A-Z][A-Z0-9_]*) = (?P<number>\d+);")
FIELD: Final = re.compile(r"(?P<type>(optional |repeated )?[\w.]+(<.+>)?) (?P<name>\w+) = (?P<number>\d+);")


@dataclass(frozen=True, slots=True)
class Row:
    """A method with its messages, a field with its type, or a value of an enum."""

    name: str
    comment: str
    type: str = ""
    answer: str = ""
    number: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """A service, a message or an enum, with what is in it."""

    kind: str
    name: str
    comment: str
    rows: list[Row] = field(default_factory=list)


def api() -> str:
    """Return the page of the API."""
    introduction, blocks = _read(PROTO.read_text())
    _check(blocks)
    return "\n".join(["# API", "", introduction, "", *(line for block in blocks for line in _section(block))])


def _read(text: str) -> tuple[str, list[Block]]:
    """Return the comment above the package, and each block of the file."""
    introduction, comment, oneof = "", "", ""
    blocks: list[Block] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("//"):
            comment = f"{comment} {line.removeprefix('//').strip()}".strip()
            continue
        if line.startswith("package "):
            introduction = comment
        elif found := BLOCK.fullmatch(line):
            blocks.append(Block(found["kind"], found["name"], comment))
        elif found := ONEOF.fullmatch(line):
            oneof = found["name"]
        elif line == "}":
            oneof = ""
        elif found := RPC.fullmatch(line):
            blocks[-1].rows.append(Row(found["name"], comment, found["request"], found["answer"]))
        elif found := VALUE.fullmatch(line):
            blocks[-1].rows.append(Row(found["name"], comment, number=found["number"]))
        elif found := FIELD.fullmatch(line):
            kind = f"{found['type']}, one of `{oneof}`" if oneof else found["type"]
            blocks[-1].rows.append(Row(found["name"], comment, kind, number=found["number"]))
        comment = ""
    return introduction, blocks


def _check(blocks: list[Block]) -> None:
    """Raise ValueError unless all that the compiler sees in the file was read."""
    contract = job_worker_pb2.DESCRIPTOR
    compiled: dict[str, list[str]] = {}
    for name, service in contract.services_by_name.items():
        compiled[name] = [method.name for method in service.methods]
    for name, message in contract.message_types_by_name.items():
        compiled[name] = [one.name for one in message.fields]
    for name, enum in contract.enum_types_by_name.items():
        compiled[name] = [value.name for value in enum.values]
    read = {block.name: [row.name for row in block.rows] for block in blocks}
    if read != compiled:
        odd = sorted(name for name in read.keys() | compiled.keys() if read.get(name) != compiled.get(name))
        raise ValueError(f"cannot read {PROTO}: not understood are {', '.join(odd)}")


def _section(block: Block) -> Iterator[str]:
    yield f"## {block.name}\n\n{block.comment}\n"
    if block.kind == "service":
        for row in block.rows:
            yield f"### {row.name}\n\n{row.comment}\n\n`{row.name}({row.type}) returns ({row.answer})`\n"
    elif block.kind == "enum":
        yield "| value | number | meaning |\n| --- | --- | --- |"
        yield from (f"| `{row.name}` | {row.number} | {_cell(row.comment)} |" for row in block.rows)
    elif block.rows:
        yield "| field | number | type | meaning |\n| --- | --- | --- | --- |"
        for row in block.rows:
            yield f"| `{row.name}` | {row.number} | {_cell(row.type)} | {_cell(row.comment)} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
