"""JobSpec, Limits, ExitStatus: values that check themselves."""

import dataclasses

import pytest

from pjw.errors import InvalidJobError
from pjw.model import (
    ARGUMENT_MAX_BYTES,
    ARGUMENTS_MAX_BYTES,
    LIMIT_MAXIMUM,
    LIMIT_MINIMUM,
    NO_SUMS,
    ExitStatus,
    JobSpec,
    JobState,
    Limits,
    Sums,
    check_workspace,
)

NAMES = [name for name, _ in Limits().items()]


@pytest.mark.parametrize(
    ("command", "argv", "display"),
    [
        ("echo hi | cat", ("/bin/sh", "-c", "echo hi | cat"), "echo hi | cat"),
        (["echo", "a b", "$x"], ("echo", "a b", "$x"), "echo 'a b' '$x'"),
        (("true",), ("true",), "true"),
        (["x", ""], ("x", ""), "x ''"),
        ("  spaced ", ("/bin/sh", "-c", "  spaced "), "  spaced "),
        ("äöü €", ("/bin/sh", "-c", "äöü €"), "äöü €"),
    ],
)
def test_what_is_executed_and_shown(command: str | list[str], argv: tuple[str, ...], display: str) -> None:
    """A string goes to the shell as one argument; a sequence stays as it is, shown as it could be typed."""
    spec = JobSpec(command)
    assert (spec.argv, spec.display) == (argv, display)


@pytest.mark.parametrize("command", ["", " ", "\t\n", [], (), [""], ["", "x"]])
def test_an_empty_command(command: str | list[str]) -> None:
    """Nothing, blanks, or no name to execute."""
    with pytest.raises(InvalidJobError, match=r"^the command is empty$"):
        JobSpec(command)


@pytest.mark.parametrize("command", ["a\0", ["a", "\0"]])
def test_a_nul(command: str | list[str]) -> None:
    """No argument of a program can hold one."""
    with pytest.raises(InvalidJobError, match="NUL"):
        JobSpec(command)


@pytest.mark.parametrize("command", ["\ud800", ["true", "a\udcffb"]])
def test_invalid_unicode(command: str | list[str]) -> None:
    """Lone surrogates, as Python makes them of invalid UTF-8."""
    with pytest.raises(InvalidJobError, match="not valid UTF-8"):
        JobSpec(command)


def test_the_longest_argument() -> None:
    """The kernel's bound for one argument, in bytes of UTF-8, and not one more."""
    JobSpec(["x", "y" * ARGUMENT_MAX_BYTES])
    JobSpec("ü" * (ARGUMENT_MAX_BYTES // 2))
    with pytest.raises(InvalidJobError, match="131072 bytes long") as caught:
        JobSpec("y" * (ARGUMENT_MAX_BYTES + 1))
    assert caught.value.hint == "put a long script into a file and run that"
    with pytest.raises(InvalidJobError):
        JobSpec("ü" * (ARGUMENT_MAX_BYTES // 2 + 1))


def test_the_longest_command() -> None:
    """Our bound for all arguments with their NULs, and not one more."""
    fits = ["x" * 131_071] * 4
    assert sum(len(word) + 1 for word in fits) == ARGUMENTS_MAX_BYTES
    JobSpec(fits)
    with pytest.raises(InvalidJobError, match="is 524289 bytes long with all its arguments; at most 524288"):
        JobSpec([*fits, ""])


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "/etc", "../1/work", "a b", "", "1", "ä", "a" * 64, "a\n", "-a"]
)
def test_names_of_workspaces_with_odd_characters(name: str) -> None:
    """A name is a word, and else refused before anything is done."""
    with pytest.raises(InvalidJobError, match="is no name for a workspace"):
        check_workspace(name)
    if name:
        with pytest.raises(InvalidJobError, match="is no name for a workspace"):
            JobSpec("true", workspace=name)


def test_exclusive_needs_a_workspace() -> None:
    """To be alone in nothing makes no sense."""
    with pytest.raises(InvalidJobError, match="alone in its workspace, and this one has none"):
        JobSpec("true", exclusive=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_range_of_a_limit(name: str) -> None:
    """0 is no limit; from the least that works to 2^62; everything else is refused by name."""
    least = LIMIT_MINIMUM.get(name, 1)
    for good in (0, least, LIMIT_MAXIMUM):
        assert getattr(Limits().with_overrides({name: good}), name) == good
    for bad in (-1, LIMIT_MAXIMUM + 1, 2**64, True, 1.0, b"1", None, *range(1, min(least, 3))):
        with pytest.raises(InvalidJobError, match=f"^limit {name} must be "):
            Limits().with_overrides({name: bad})
    if least > 1:
        with pytest.raises(InvalidJobError, match=f"at least {least}, not {least - 1}"):
            Limits().with_overrides({name: least - 1})


def test_an_unknown_limit() -> None:
    """It is named, never ignored."""
    with pytest.raises(InvalidJobError, match="no limit is called 'memory'"):
        Limits().with_overrides({"memory": 1})


@pytest.mark.parametrize("name", NAMES)
def test_a_ceiling(name: str) -> None:
    """As much is allowed, more is not, and no limit is more than any number; without a ceiling all is."""
    unlimited = Limits(**dict.fromkeys(NAMES, 0))
    ceiling = unlimited.with_overrides({name: 1000 * 1000 * 10})
    for value, above in (
        (10**7, None),
        (10**7 - 1, None),
        (10**7 + 1, name),
        (LIMIT_MAXIMUM, name),
        (0, name),
    ):
        assert unlimited.with_overrides({name: value}).first_above(ceiling) == above
        assert unlimited.with_overrides({name: value}).first_above(unlimited) is None


def test_an_exit_status_is_one_thing() -> None:
    """A code or a signal, never both and never neither; a signal has a code of its own."""
    assert ExitStatus(code=0).signal is None
    assert (ExitStatus(signal=15).code, ExitStatus(signal=9).code) == (143, 137)
    assert ExitStatus(code=143) != ExitStatus(signal=15)
    for arguments in ({}, {"code": 0, "signal": 9}):
        with pytest.raises(ValueError, match="a code or a signal"):
            ExitStatus(**arguments)


def test_final_states() -> None:
    """EXITED and LOST, no other."""
    assert {state for state in JobState if state.final} == {JobState.EXITED, JobState.LOST}


def test_values_do_not_change() -> None:
    """All of them are frozen."""
    for value, name in ((Limits(), "pids_max"), (ExitStatus(0), "code"), (JobSpec("x"), "command")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)


def test_the_lower_of_two_sums() -> None:
    """No limit is above any number, and stays where neither has one."""
    own, all_jobs = (
        Sums(memory_max_bytes=2**30, pids_max=100),
        Sums(memory_max_bytes=2**29, cpu_max_millicores=900),
    )
    assert own.within(all_jobs) == all_jobs.within(own) == Sums(2**29, 100, 900)
    assert own.within(NO_SUMS) == own
    assert NO_SUMS.within(NO_SUMS) == NO_SUMS


def test_patterns_of_files_to_keep() -> None:
    """Without what says nothing; in the job's own directory, and bounded."""
    given = ["dist/", "./*.log", "a//./b", "."]
    assert JobSpec("x", outputs=given).outputs == ("dist", "*.log", "a/b", "**")
    for wrong, words in (
        (["/etc"], "not in the job's workspace or own directory"),
        (["a/../.."], "not in the job's workspace or own directory"),
        ([""], "not in the job's workspace or own directory"),
        (["a\0b"], "a NUL"),
        (["x" * 1025], "longer than 1024 bytes"),
        (["x"] * 33, "at most 32 patterns"),
        ("dist", "a list of text"),
        ([1], "a list of text"),
    ):
        with pytest.raises(InvalidJobError, match=words):
            JobSpec("x", outputs=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidJobError, match="no output is required"):
        JobSpec("x", output_required=True)
