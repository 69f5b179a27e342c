"""What is typed: every key goes through, and only at the beginning of a line some are pjw's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjw.cli.local_terminal import Keys


def typed(keys: Keys, *pieces: bytes) -> bytes:
    """What goes through of all pieces."""
    return b"".join(keys.take(piece) for piece in pieces)


@pytest.mark.parametrize(
    ("pieces", "passed"),
    [
        ([b"echo ~. a~.b\r"], b"echo ~. a~.b\r"),
        ([b"~~x"], b"~x"),
        ([b"~x"], b"~x"),
        ([b"~", b"x~", b"."], b"~x~."),
        ([b"ls\r~~.\r"], b"ls\r~.\r"),
        ([b"\x10\x03\x1a\x00\xff~"], b"\x10\x03\x1a\x00\xff~"),
    ],
)
def test_what_goes_through(pieces: list[bytes], passed: bytes) -> None:
    """All but what is asked of pjw; nobody leaves."""
    keys = Keys()
    assert typed(keys, *pieces) == passed
    assert not keys.left
    assert not keys.wants_help


@pytest.mark.parametrize("pieces", [[b"~."], [b"ls\r~."], [b"ls\n", b"~", b"."], [b"\r~.rest"]])
def test_who_leaves(pieces: list[bytes]) -> None:
    """At the beginning of a line, in one piece or in several; what comes behind goes nowhere."""
    keys = Keys()
    assert b"." not in typed(keys, *pieces)
    assert keys.left


def test_help_and_another_escape() -> None:
    """Help goes on at the beginning of the line; another character takes the place, or none does."""
    keys = Keys()
    assert typed(keys, b"~?") == b""
    assert keys.wants_help
    assert typed(keys, b"~.") == b""
    assert keys.left
    keys = Keys("%")
    assert typed(keys, b"~.\r%.") == b"~.\r"
    assert keys.left
    keys = Keys(None)
    assert typed(keys, b"~.\r~.") == b"~.\r~."
    assert not keys.left


@given(st.lists(st.binary()))
def test_without_an_escape_every_byte_goes_through(pieces: list[bytes]) -> None:
    """As it is."""
    assert typed(Keys(None), *pieces) == b"".join(pieces)


@given(st.lists(st.binary().map(lambda data: data.replace(b"~", b""))))
def test_other_keys_are_never_held_back(pieces: list[bytes]) -> None:
    """Each piece at once."""
    keys = Keys()
    assert [keys.take(piece) for piece in pieces] == pieces
