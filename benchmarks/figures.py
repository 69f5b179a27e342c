"""Print figures of the source: the amount that a newcomer has to read. It needs root.

    .venv/bin/python -m benchmarks.figures [--list] [COMMIT...]

For each commit (default: HEAD) it prints

- the source: files of Python and C, their lines, lines without blanks, comments and docstrings, lengths of
  functions;
- a Start: the files whose functions run between `pjw start sleep 60` and its answer, in pjw, pjwd, the
  launcher and pjw-init. Generated files do not count. `--list` names the functions.

Python is traced by sys.setprofile in a copy of the installed commit, C by -finstrument-functions. The
first start does not count, so that imports and first-time work are left out.
"""

import ast
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks import pjwd
from tests.support.service import Service, end_all

ROOT: Final = Path(__file__).parents[1]
GENERATED: Final = ("src/pjw/v1/", "src/pjw/cluster/v1/")

# Each process marks the functions that it calls while the first byte of the table is set. It maps the table
# into memory, because it may close descriptors, and a sandbox keeps it from opening files.
TRACER: Final = """
import json, mmap, os, sys, threading
here = os.path.dirname(__file__)
with open(os.path.join(here, "functions")) as file:
    slots = {(os.path.join(here, name), line): slot for slot, (name, line) in enumerate(json.load(file), 1)}
file = os.open(os.path.join(here, "traced"), os.O_RDWR)
table = mmap.mmap(file, 1 + len(slots))
os.close(file)
def note(frame, event, argument):
    if table[0] and event == "call":
        if slot := slots.get((frame.f_code.co_filename, frame.f_code.co_firstlineno)):
            table[slot] = 1
sys.setprofile(note)
threading.setprofile(note)
"""

# The table is a file that all clones share, with a byte for each 16 bytes of code. pjw-init is static, so its
# code lies where it was linked to.
C_TRACER: Final = r"""
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>
#define UNTRACED __attribute__((no_instrument_function))
enum { SLOTS = 1 << 20 };
static volatile unsigned char *table;
static volatile unsigned char *flag;
UNTRACED __attribute__((constructor)) static void open_table(void) {
    int file = open(FUNCTIONS, O_RDWR | O_CLOEXEC), on = open(FLAG, O_RDWR | O_CLOEXEC);
    table = mmap(0, SLOTS, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    flag = mmap(0, 1, PROT_READ | PROT_WRITE, MAP_SHARED, on, 0);
    close(file);
    close(on);
}
UNTRACED void __cyg_profile_func_enter(void *function, void *from) {
    (void)from;
    if (table && table != MAP_FAILED && *flag)
        table[((uintptr_t)function - 0x400000) / 16 % SLOTS] = 1;
}
UNTRACED void __cyg_profile_func_exit(void *function, void *from) {
    (void)function;
    (void)from;
}
"""


def main(arguments: list[str]) -> int:
    """Print the figures of each commit; the exit code."""
    for name in [each for each in arguments if each != "--list"] or ["HEAD"]:
        parsed = ["git", "rev-parse", "--short", f"{name}^{{commit}}"]
        commit = subprocess.run(
            parsed, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        with tempfile.TemporaryDirectory(prefix="pjw-figures-", dir="/var/tmp") as directory:
            source = Path(directory) / "source"
            _unpack(commit, source)
            print(f"{commit}:")
            _print_source(source)
            print()
            touched = _touched(commit, source, Path(directory))
            python = sum(name.endswith(".py") for name in touched)
            print(f"  a Start touches {len(touched)} files: {python} of Python, {len(touched) - python} of C")
            if "--list" in arguments:
                print(*(f"    {name}: {', '.join(touched[name])}" for name in sorted(touched)), sep="\n")
    return 0


def _unpack(commit: str, directory: Path) -> None:
    packed = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(directory, filter="data")


def _print_source(source: Path) -> None:
    for title, pattern in (("Python", "*.py"), ("C", "*.[ch]")):
        files = [
            path
            for path in (source / "src").rglob(pattern)
            if not str(path.relative_to(source)).startswith(GENERATED) and path.stat().st_size
        ]
        lengths = sorted(len(path.read_text().splitlines()) for path in files)
        small, large = sum(each < 40 for each in lengths), sum(each > 400 for each in lengths)
        print(
            f"  {title}: {len(files)} files, {sum(lengths)} lines; {small} files below 40 lines,"
            f" {large} above 400, the longest {lengths[-1]}"
        )
        if title == "Python":
            code = sum(_code_lines(path) for path in files)
            functions = sorted(length for path in files for length in _functions(path))
            print(f"    without blanks, comments and docstrings: {code} lines")
            print(
                f"    functions: {len(functions)}, lines: median {functions[len(functions) // 2]},"
                f" p90 {functions[len(functions) * 9 // 10]}, longest {functions[-1]}"
            )


def _functions(path: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def _places(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the first line of each function, with its decorators, and its name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield min(node.lineno, *(each.lineno for each in node.decorator_list), node.lineno), node.name


def _code_lines(path: Path) -> int:
    text = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    blank = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def _touched(commit: str, source: Path, directory: Path) -> dict[str, list[str]]:
    """Start one job of a commit, traced; return the functions that ran, by file."""
    subprocess.run([str(ROOT / "scripts/install-revision"), commit], check=True)
    venv = directory / "venv"
    shutil.copytree(ROOT / "build/revisions" / commit, venv, symlinks=True)
    [site] = venv.glob("lib/python*/site-packages")
    (site / "pjw_trace.py").write_text(TRACER)
    (site / "trace.pth").write_text("import pjw_trace\n")
    listed = [
        (str(path.relative_to(site)), line, name)
        for path in sorted((site / "pjw").rglob("*.py"))
        for line, name in _places(path)
    ]
    (site / "functions").write_text(json.dumps([(path, line) for path, line, _ in listed]))
    traced, functions = site / "traced", directory / "functions"
    traced.write_bytes(bytes(1 + len(listed)))
    functions.write_bytes(bytes(1 << 20))
    init = source / ("src/init" if (source / "src/init").exists() else "src/pjw/launcher/init")
    program = site / "pjw/launcher/pjw-init"
    _build_traced(init, program, functions, traced)
    for name in ("pjw", "pjwd"):
        script = venv / "bin" / name
        text = script.read_text()
        script.write_text(f"#!{venv}/bin/python\n" + text[text.index("\n") + 1 :])
    with pjwd.directory() as state:
        service = Service(state, ("alice",))
        service.pjwd = venv / "bin/pjwd"
        service.start()
        try:
            _start(venv, service)
            _switch(traced, b"\1")
            _start(venv, service)
            _switch(traced, b"\0")
        finally:
            service.stop()
            end_all(service.state)
    touched: dict[str, list[str]] = {}
    for (path, _, name), mark in zip(listed, traced.read_bytes()[1:], strict=True):
        if mark and not f"src/{path}".startswith(GENERATED):
            touched.setdefault(f"src/{path}", []).append(name)
    for name, function in _c_functions(program, functions.read_bytes()):
        touched.setdefault(f"{init.relative_to(source)}/{name}", []).append(function)
    return touched


def _start(venv: Path, service: Service) -> None:
    command = [str(venv / "bin/pjw"), "start", "sleep", "60"]
    subprocess.run(command, env=service.environment("alice"), check=True, stdout=subprocess.DEVNULL)


def _switch(traced: Path, byte: bytes) -> None:
    # in place: the processes have this very file in memory
    with traced.open("r+b") as file:
        file.write(byte)


def _build_traced(init: Path, program: Path, functions: Path, flag: Path) -> None:
    hook = init / "trace_hook.c"
    hook.write_text(C_TRACER)
    options: list[str | Path] = ["-std=gnu17", "-O0", "-g", "-static", "-finstrument-functions", "-w"]
    places = [f'-DFUNCTIONS="{functions}"', f'-DFLAG="{flag}"']
    subprocess.run(["gcc", *options, *places, "-o", program, *sorted(init.glob("*.c"))], check=True)
    hook.unlink()


def _c_functions(program: Path, table: bytes) -> Iterator[tuple[str, str]]:
    """Yield the file and the name of each function of C whose slot is marked."""
    listed = subprocess.run(["nm", "-l", str(program)], check=True, stdout=subprocess.PIPE, text=True).stdout
    for line in listed.splitlines():
        words = line.split()
        if len(words) == 4 and words[1] in "tT":
            slot = (int(words[0], 16) - 0x400000) // 16
            name = words[3].rsplit("/", 1)[-1].split(":")[0]
            if 0 <= slot < len(table) and table[slot] and name.endswith(".c") and name != "trace_hook.c":
                yield name, words[2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
