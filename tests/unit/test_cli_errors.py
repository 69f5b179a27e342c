"""Errors to exit codes, as `pjw --help` documents them, and words on stderr."""

import argparse
import errno

import pytest

from pjw import errors
from pjw.cli import connection, exits
from pjw.cli.exits import exit_code_of
from pjw.cli.main import main

CODES = {
    errors.LaunchError("x", errno.ENOENT): 127,
    errors.LaunchError("x", errno.EACCES): 126,
    errors.LaunchError("x", errno.ENOEXEC): 126,
    errors.LaunchError("x", errno.EISDIR): 126,
    errors.InvalidJobError("x"): 1,
    errors.JobNotFoundError(1): 1,
    errors.JobStateError("x"): 1,
    errors.OffsetError("x"): 1,
    errors.OutputLostError("x"): 1,
    errors.LimitReachedError("x"): 1,
    errors.NotAuthenticatedError("x"): 1,
    errors.NotAllowedError("x"): 1,
    errors.ServerUnreachableError("x"): 125,
    errors.ServerFailedError("x"): 125,
    errors.ConfigError("x"): 125,
    errors.ProtocolError("x"): 125,
}


@pytest.mark.parametrize("error", CODES, ids=lambda error: f"{type(error).__name__} {error}")
def test_each_error_has_its_exit_code(error: errors.PjwError) -> None:
    """Refused is 1; no server or no certificate 125; a command that cannot be executed 126 or 127."""
    assert exit_code_of(error) == CODES[error]


def test_every_exit_code_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """Each EXIT_ constant of the command line appears in its help."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    codes = {value for name, value in vars(exits).items() if name.startswith("EXIT_")}
    assert codes == {1, 2, 125, 126, 127, 130}
    for code in codes:
        assert f" {code} " in text.replace("\n", " ")


@pytest.mark.parametrize("hint", [None, "look there"])
def test_an_error_is_a_line_and_a_hint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, hint: str | None
) -> None:
    """`pjw: error:` with the words, `hint:` where there is a next step, nothing on stdout."""

    def fail(arguments: object) -> None:
        raise errors.ConfigError("cannot do it: broken", hint=hint)

    monkeypatch.setattr(connection, "find_settings", fail)
    assert main(["list"]) == 125
    assert capsys.readouterr() == (
        "",
        "pjw: error: cannot do it: broken\n" + (f"hint: {hint}\n" if hint else ""),
    )


@pytest.mark.parametrize("text", ["0", "7", "-1", "007", str(2**63), "9" * 100, "-" + "9" * 99])
def test_whole_numbers_are_ids(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether such a job exists is the server's to say."""
    seen: list[object] = []

    def stop(arguments: argparse.Namespace) -> None:
        seen.extend(arguments.jobs)
        raise errors.ConfigError("far enough")

    monkeypatch.setattr(connection, "find_settings", stop)
    assert main(["get", text]) == 125
    assert seen == [int(text)]
