"""docs/reliability.md: the matrix has every fault and promise, and each cell a test that looks at it."""

import ast
import re
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]
DOCUMENT: Final = TESTS.parent / "docs" / "reliability.md"
# The columns, and what a test calls to look at each (tests/support/scene.py).
PROMISES: Final = {
    "job goes on": "goes_on",
    "output whole": "output_whole",
    "end known": "end_known",
    "others unaffected": "others_unharmed",
    "nothing left": "nothing_left",
}
FAULTS: Final = (
    *(
        f"kill -9 of {process} at each step of a {what}"
        for process in ("the server", "the launcher", "init")
        for what in ("start", "stop")
    ),
    *(f"kill -9 of {process} at each step of an end" for process in ("the server", "the launcher")),
    *(
        "SIGSTOP of the server",
        "SIGSTOP of the launcher",
        "ENOSPC",
        "a full scratch file system",
        "a hostile neighbour",
        "a port under attack",
        "EMFILE",
        "ENOMEM",
        "read-only state",
    ),
    *("the clock jumps forward", "the clock jumps back", "lost inotify events (queue overflow)"),
    *("network cut in mid-stream", "slow reader", "client vanishing", "VM power cut"),
    "OOM of the server itself",
)


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose first line begins so, without that line."""
    lines = DOCUMENT.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(head))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def legend() -> dict[str, tuple[str, str]]:
    """The file and the name of each test, by its letter."""
    found = {}
    for letter, test, _ in rows("| | test |"):
        named = re.fullmatch(r"`((?:root|vm)/test_\w+\.py)::(test_\w+)`", test)
        assert named, test
        found[letter] = (named[1], named[2])
    return found


def called(file: str, name: str) -> set[str]:
    """The names of all that a test calls, itself or in a function beside it."""
    functions = {
        node.name: node
        for node in ast.parse((TESTS / file).read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert name in functions, f"{file}::{name}"
    names: set[str] = set()
    todo = [name]
    while todo:
        for node in ast.walk(functions[todo.pop()]):
            if isinstance(node, ast.Call):
                function = node.func
                what = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                if what in functions and what not in names:
                    todo.append(what)
                names.add(what)
    return names


def test_every_fault_and_promise_is_there() -> None:
    """No row and no column of what was promised may be dropped."""
    assert f"| fault | {' | '.join(PROMISES)} |" in DOCUMENT.read_text()
    named = " / ".join(row[0] for row in rows("| fault |"))
    assert [fault for fault in FAULTS if fault not in named] == []
    assert all(len(row) == 1 + len(PROMISES) for row in rows("| fault |"))


def test_every_cell_is_a_test_that_looks_at_its_promise() -> None:
    """A cell names tests that exist and look; or it is a dash with a reason."""
    known, used = legend(), set[str]()
    for fault, *cells in rows("| fault |"):
        for method, cell in zip(PROMISES.values(), cells, strict=True):
            if cell.startswith("- "):
                assert len(cell) > 10, f"{fault}: no reason"
                continue
            for letter in cell.split(", "):
                file, name = known[letter.removesuffix("*")]
                used.add(letter.removesuffix("*"))
                # a test in its own words is beside those that look for all
                looks = letter.endswith("*") or method in called(file, name)
                assert looks or len(cell.split(", ")) > 1, f"{fault}: {name} does not call {method}"
    assert used == known.keys()
