"""Tests look at what pjw shows: the places that reach into private members are listed, with reasons."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]
# of Python's own libraries, and of others
PUBLIC: Final = {"_exit", "_getframe", "_replace", "_actions", "_cython", "_ASN1Type"}
LAUNCHER: Final = "a launcher without processes: what stands for them is put into its own tables"
SHORTER: Final = "a time that no operator may set, made shorter"
TAKES_CALLS: Final = "a bug in the task that takes calls, which nothing else brings out"
TABLE: Final = "a fault of SQLite at one point"
ALLOWED: Final = {
    ("fuzz/dispatch.py", "_on_request"): LAUNCHER,
    ("root/test_sessions.py", "_JOB_ENDS_SECONDS"): SHORTER,
    ("root/test_usage.py", "_RETRY_SECONDS"): SHORTER,
    ("root/test_workspaces.py", "_REST"): "a time that no operator may set, made longer",
    ("support/pjwd_with.py", "_CoreServer"): TAKES_CALLS,
    ("support/pjwd_with.py", "_JOB_ENDS_SECONDS"): SHORTER,
    ("support/pjwd_with.py", "_pass_gate"): TAKES_CALLS,
    ("support/pjwd_with.py", "_take"): TAKES_CALLS,
    ("support/surface.py", "_json"): "the members of `pjw stats --json`, without a pjwd",
    ("unit/test_cdi.py", "_require_roots"): "who owns a file is for the tests of root",
    ("unit/test_cli_pjwd.py", "_UNIT_CONFIG"): "a file of the host's, elsewhere",
    ("unit/test_cli_settings.py", "_link"): "what a client was made with, without a server to call",
    ("unit/test_egress_reports.py", "_LINES_AT_ONCE"): "fewer lines fill it",
    ("unit/test_egress_reports.py", "_LINES_PER_SECOND"): "no line comes back while the test runs",
    ("unit/test_queue.py", "_held_up"): "nothing shows whether a client was passed over for now",
    ("unit/test_store.py", "_RECENT_MAX"): "the bound of the rows in memory",
    ("unit/test_store.py", "_db"): TABLE,
    ("unit/test_store.py", "_filtering_of"): "a lock for each client is kept no longer than it is held",
    ("unit/test_store.py", "_recent"): "the bound of the rows in memory",
}


def is_private(name: str) -> bool:
    """Whether a name is somebody's own."""
    return (
        name.startswith("_")
        and not name.startswith("__")
        and name not in PUBLIC
        and not name.endswith("Action")
    )


def private_names(path: Path) -> Iterator[str]:
    """The private names of others that a file uses: as a member, imported, or as a text for setattr."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name):
                yield name
            case ast.ImportFrom(names=names):
                yield from (alias.name for alias in names)
            case ast.Call(func=ast.Attribute(attr="setattr") | ast.Name(id="setattr" | "getattr")):
                for argument in node.args[:2]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        yield argument.value.rpartition(".")[2]
            case _:
                pass


def test_tests_look_at_what_is_shown() -> None:
    """Whoever needs one more place gives pjw a way to see it, or a reason here; what is not needed goes."""
    found = {
        (str(path.relative_to(TESTS)), name)
        for path in TESTS.rglob("*.py")
        if "node_modules" not in path.parts
        for name in private_names(path)
        if is_private(name)
    }
    assert sorted(found - ALLOWED.keys()) == []
    assert sorted(ALLOWED.keys() - found) == []
