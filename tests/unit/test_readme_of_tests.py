"""tests/README.md: what it says is proven is proven by tests that exist."""

import ast
import re
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]
# the heads of the tables, and how many rows each has at least: none may be dropped
HEADS: Final = {
    "mistake": 65,
    "in scope": 15,
    "bad input": 27,
    "a hostile job tries": 28,
    "a broken server tries": 12,
    "promise": 12,
}
NEXT: Final = "next issue"


def tables() -> dict[str, list[tuple[str, str]]]:
    """The rows of each table, by the word at its head; a row that only divides a table is not one."""
    found: dict[str, list[tuple[str, str]]] = {}
    head = ""
    for line in (TESTS / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            head = ""
        elif not head:
            head = cells[0]
            found[head] = []
        elif len(cells) == 2 and not cells[0].startswith(("**", "-")):
            found[head].append((cells[0], cells[1].removesuffix("|").strip()))
    return {name: rows for name, rows in found.items() if name in HEADS}


def names_in(path: Path) -> set[str]:
    """The names of a file's tests, which is read and not run."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, functions) and node.name.startswith("test_")
    }


def test_every_row_names_tests() -> None:
    """A row without one is a thing that nobody has shown, unless it says that it is not done yet."""
    found = tables()
    assert list(found) == list(HEADS)
    assert [head for head, least in HEADS.items() if len(found[head]) < least] == []
    one = r"`[a-z]+/test_\w+\.py::test_\w+`"
    for rows in found.values():
        assert len({name for name, _ in rows}) == len(rows)
        for name, named in rows:
            assert named == NEXT or re.fullmatch(rf"{one}(, {one})*", named), name


def test_every_named_test_exists() -> None:
    """Whoever renames or removes a test is told which proof is gone."""
    named = re.findall(r"`([a-z]+/test_\w+\.py)::(test_\w+)`", (TESTS / "README.md").read_text())
    assert named
    there = {file: names_in(TESTS / file) for file in {file for file, _ in named} if (TESTS / file).exists()}
    assert [f"{file}::{name}" for file, name in named if name not in there.get(file, ())] == []
