"""What is typed of a document, where, and what is to be seen there (tests/support/documents.py)."""

from pathlib import Path

from tests.support.documents import commands_of, matches

DOCUMENT = """\
```console
server# make install
…
ann$ cat >some.py <<'END'
# no command of root
END
```

<!-- terminal: pjwd -->
```console
server# pjwd serve \\
    --listen here
ready
```

```sh
$ this is not typed
```

<!-- terminal: pjwd -->
```console
new
$ true
```
"""


def test_commands_of_machines_and_terminals(tmp_path: Path) -> None:
    """Each is typed at the terminal of its prompt, and what comes later is seen below what came before."""
    document = tmp_path / "trial.md"
    document.write_text(DOCUMENT)
    assert [(one.machine, one.terminal, one.line, one.typed, one.shown) for one in commands_of(document)] == [
        ("server#", "", 2, "make install", ["…"]),
        ("ann$", "", 4, "cat >some.py <<'END'\n# no command of root\nEND", []),
        ("server#", "pjwd", 11, "pjwd serve \\\n    --listen here", ["ready"]),
        ("server#", "pjwd", 22, "", ["ready", "new"]),
        ("", "pjwd", 23, "true", []),
    ]


def test_what_is_left_out_of_a_document() -> None:
    """`…` is anything in a line, and any lines where it is alone."""
    assert matches(["a … c", "…", "z"], ["a b c", "x", "y", "z"])
    assert matches(["…"], [])
    assert not matches(["a …"], ["b"])
    assert not matches(["a"], ["a", "b"])
