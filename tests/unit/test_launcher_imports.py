"""What the launcher loads: the standard library's quiet part, three pages of `pjw`, and itself."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

# A root process has no use for a network, threads, TLS, other programs' data formats, or for the
# rooms above it; each of these would be code that runs as root.
FORBIDDEN = {
    *("asyncio", "concurrent", "concurrent.futures", "cryptography", "ctypes", "google", "grpc", "http"),
    *("logging", "msgspec", "multiprocessing", "pickle", "queue", "shutil", "socketserver", "sqlite3", "ssl"),
    *(
        "subprocess",
        "tempfile",
        "threading",
        "urllib.request",
        "pjw.certs",
        "pjw.cli",
        "pjw.output",
        "pjw.rpc",
    ),
    *("pjw.server", "pjw.v1", "pjw.worker"),
}
SOURCE = Path(__file__).resolve().parents[2] / "src"


def loaded(statement: str) -> set[str]:
    """The modules that are loaded after a statement, in an interpreter started as the launcher is."""
    program = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", program], env={}, capture_output=True, check=True
    )
    return set(json.loads(done.stdout))


def test_the_launcher_loads_nothing_that_it_must_not() -> None:
    """None of the forbidden names, nor anything below them."""
    modules = loaded("import pjw.launcher.__main__")
    assert "pjw.launcher.dispatch" in modules
    assert {name for name in modules if name in FORBIDDEN or name.partition(".")[0] in FORBIDDEN} == set()


def test_the_launcher_starts_no_program_but_init_and_rm() -> None:
    """No lsblk, no mount, no kill: what the launcher wants of the kernel it asks the kernel."""
    starters = re.compile(
        r"^(posix_spawnp?|spawn[lv]p?e?|exec[lv]p?e?|v?fork|forkpty|system|popen|startfile)$"
    )
    found = {
        (path.name, node.func.attr, ast.unparse(node.args[0]) if node.args else "")
        for path in (SOURCE / "pjw/launcher").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and starters.match(node.func.attr)
    }
    assert found == {
        ("spawn.py", "posix_spawn", "INIT_PROGRAM"),
        ("scratch.py", "posix_spawn", "RM_PROGRAM"),
        # pjwd-egress, which gives up root before it hears of a job
        ("egress.py", "posix_spawn", "sys.executable"),
        # what counts scratch directories and workspaces: modules of the launcher's own
        ("scratch_use.py", "posix_spawn", "sys.executable"),
        # a process that makes a user namespace, and executes nothing
        ("mount_tree.py", "fork", ""),
    }


def test_of_pjw_it_loads_its_own_room_and_four_pages() -> None:
    """`pjw` itself, `pjw.errors`, `pjw.process`, `pjw.model`, `pjw.network`; all else is `pjw.launcher`."""
    modules = {name for name in loaded("import pjw.launcher.__main__") if name.partition(".")[0] == "pjw"}
    assert {name for name in modules if not name.startswith("pjw.launcher")} == {
        "pjw",
        "pjw.errors",
        "pjw.process",
        "pjw.model",
        "pjw.model.job",
        "pjw.model.limits",
        "pjw.model.offers",
        "pjw.model.spec",
        "pjw.network",
    }


def test_everything_else_is_the_standard_library() -> None:
    """No package from outside, whatever is installed beside pjw (.pth files load what they like)."""
    fresh = loaded("import pjw.launcher.__main__") - loaded("pass")
    assert {name.partition(".")[0] for name in fresh} - sys.stdlib_module_names == {"pjw"}


def test_the_package_itself_loads_nothing() -> None:
    """`import pjw` costs nothing, and its names are loaded when they are first used."""
    assert {name for name in loaded("import pjw") - loaded("pass") if name.startswith("pjw")} == {"pjw"}
    assert "pjw.model" in loaded("from pjw import JobSpec")
    assert "pjw.worker" in loaded("from pjw import Worker")


def test_an_unknown_name_of_the_package() -> None:
    """It is an AttributeError, as from any module."""
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", "import pjw; pjw.Wrker"], capture_output=True, check=False
    )
    assert b"AttributeError: module 'pjw' has no attribute 'Wrker'" in done.stderr
