"""The width of a terminal, as everybody else finds it."""

import shutil

import pytest

from pjw.cli.terminal import columns


@pytest.mark.parametrize("given", [None, "", "0", "-3", "x", "²", "1", "100"])
def test_the_width_is_that_of_the_standard_library(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By COLUMNS where that is a width; else, without a terminal, 80."""
    if given is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", given)
    assert columns() == shutil.get_terminal_size().columns
