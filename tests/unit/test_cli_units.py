"""Sizes, durations and the like: what is typed, what is wrong with it, and what is read."""

import signal
from argparse import ArgumentTypeError
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjw.cli import units
from pjw.cli.options import size_or_pattern


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.size, "0", 0),
        (units.size, "4096", 4096),
        (units.size, "10B", 10),
        (units.size, "1k", 1024),
        (units.size, "256M", 256 * 1024**2),
        (units.size, "256MiB", 256 * 1024**2),
        (units.size, "256MB", 256 * 1024**2),
        (units.size, "1.5G", 3 * 1024**3 // 2),
        (units.size, "2T", 2 * 1024**4),
        (units.size, ".5M", 512 * 1024),
        (units.seconds, "90", 90),
        (units.seconds, "90s", 90),
        (units.seconds, "0.5s", 0.5),
        (units.seconds, ".5", 0.5),
        (units.seconds, "1m.5s", 60.5),
        (units.seconds, "5m", 300),
        (units.seconds, "1h30m", 5400),
        (units.seconds, "2d1h", 176_400),
        (units.whole_seconds, "1m30.0s", 90),
        (units.millicores, "0.5", 500),
        (units.millicores, "0.1", 100),
        (units.millicores, ".25", 250),
        (units.millicores, "2", 2000),
        (units.millicores, "0", 0),
        (units.count, "0", 0),
        (units.count, "10", 10),
        (units.signal_number, "INT", 2),
        (units.signal_number, "sigint", 2),
        (units.signal_number, "9", 9),
        (units.signal_number, "SIGUSR1", 10),
        (units.key_and_value, "a=b=c", ("a", "b=c")),
        (units.key_and_value, "a", ("a", "")),
        (size_or_pattern, "10B", 10),
        (size_or_pattern, ".5M", 512 * 1024),
        (size_or_pattern, "./.5M", ".5M"),
        (size_or_pattern, "./5M/", "5M"),
        (size_or_pattern, "dist/**", "dist/**"),
    ],
)
def test_what_is_typed_has_its_value(parse: Callable[[str], object], text: str, value: object) -> None:
    """In powers of 1024, in seconds, in thousandths of a processor: exactly."""
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "words"),
    [
        *(
            (units.size, text, "256M")
            for text in ("", "M", "1X", "-1", "1 M", "1e3", "٣", "1.M", ".", "1" * 19)
        ),
        (units.size, "0.3", "is not a whole number of bytes"),
        *((units.seconds, text, "1h30m") for text in ("", "h", "1x", "-1s", "1m1h", "1 h", "٣s", ".")),
        (units.whole_seconds, "0.5s", "is not a whole number of seconds"),
        *((units.millicores, text, "0.5 or 2") for text in ("", "half", "-1", "1.", ".", "1e3", "٣")),
        (units.millicores, "0.0001", "is not a whole number of thousandths"),
        *((units.count, text, "100") for text in ("", "-1", "1.5", "²", "many", "9" * 19)),
        (size_or_pattern, "10Q", "256M or 1.5G; a pattern of files would be ./10Q"),
        (size_or_pattern, "../x", "not in the job's workspace or own directory"),
        *((units.signal_number, text, "INT") for text in ("", "0", "32", "TERMINATE", "RTMIN", "-9", "²")),
    ],
)
def test_what_is_wrong_is_said(parse: Callable[[str], object], text: str, words: str) -> None:
    """With what would be right beside it."""
    with pytest.raises(ArgumentTypeError, match=words):
        parse(text)


def test_signals_are_those_of_linux() -> None:
    """A job gets them: pjw knows them without the system that it runs on."""
    names = {each.name.removeprefix("SIG"): int(each) for each in signal.Signals if each < signal.SIGRTMIN}
    assert names == units.SIGNALS
    assert [units.signal_number(name) for name in ("sigiot", "CLD", "SIGPOLL")] == [
        signal.SIGIOT,
        signal.SIGCLD,
        signal.SIGPOLL,
    ]


@given(st.text())
def test_any_text_is_a_value_or_an_error_of_ours(text: str) -> None:
    """Nothing else is raised, whatever is typed."""
    for parse in (units.size, units.seconds, units.millicores, units.count, units.signal_number):
        try:
            assert parse(text) >= 0
        except ArgumentTypeError as error:
            assert len(str(error)) < 400  # noqa: PT017  the others are values


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1K"),
        (1536, "1.5K"),
        (512 * 1024**2, "512M"),
        (10 * 1024**3, "10G"),
    ],
)
def test_a_size_is_read_as_it_is_typed(number: int, words: str) -> None:
    """One unit, at most one digit behind the point, and back again."""
    assert units.size_in_words(number) == words
    assert units.size(words) == number


@pytest.mark.parametrize(
    ("number", "words"),
    [(-3, "0s"), (59.9, "59s"), (60, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (273_600, "3d04h")],
)
def test_a_duration_has_its_two_largest_units(number: float, words: str) -> None:
    """Short, and as wide as others of its kind."""
    assert units.duration_in_words(number) == words
