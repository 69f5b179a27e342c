"""The output of a job as text that cannot steer a terminal."""

import pytest

from pjw.cli.plain import LINE_MAX, PlainText, harmless

HARMLESS = (
    (b"a\tb\r\nc\rd\n", b"a\tb\r\nc\rd\n"),
    ("grüße €\u00a0\U0001f469\u200d\U0001f680".encode(), "grüße €\u00a0\U0001f469\u200d\U0001f680".encode()),
    (b"\x1b[1;31mred\x1b[m \x1b[38:2::1:2:3m", b"\x1b[1;31mred\x1b[m \x1b[38:2::1:2:3m"),
    (b"\x1b[2J\x1b[H\x1b]0;title\x07\x1bc", rb"\x1b[2J\x1b[H\x1b]0;title\x07\x1bc"),
    (b"\x1b[31", rb"\x1b[31"),
    (b"\x1b\x1b[0m", b"\\x1b\x1b[0m"),
    (b"\x1b[" + b"1" * 60 + b"m", rb"\x1b[" + b"1" * 60 + b"m"),
    (b"\x9b2J \xc2\x9b2J \xff", rb"\x9b2J \x9b2J \xff"),
    (b"\x00\x08\x7f", rb"\x00\x08\x7f"),
    ("\u202e\u2066".encode(), rb"\u202e\u2066"),
    (b"cut \xe2\x82", rb"cut \xe2\x82"),
)


def test_control_characters_are_shown() -> None:
    """Escape sequences, bells and carriage returns are text; lines and tabs are what they are."""
    assert PlainText().feed(b"a\x1b[31m\x07\tb\rc\r\nd\n") == "a\\x1b[31m\\x07    b\\rc\nd\n"


def test_a_character_may_be_cut_anywhere() -> None:
    """What ends in the middle of one waits for its rest; what is no UTF-8 is marked."""
    plain = PlainText()
    assert "".join(plain.feed(bytes([byte])) for byte in "grüße €\n".encode()) == "grüße €\n"
    assert PlainText().feed(b"a\xffb") == "a\N{REPLACEMENT CHARACTER}b"


def test_a_line_that_never_ends_is_broken() -> None:
    """In pieces of a bounded length, however it comes; a new line begins a new count."""
    plain = PlainText()
    text = "".join(plain.feed(b"x" * 1000) for _ in range(10))
    assert [len(line) for line in text.split("\n")] == [LINE_MAX, LINE_MAX, 10_000 - 2 * LINE_MAX]
    assert plain.feed(b"\n" + b"y" * LINE_MAX) == "\n" + "y" * LINE_MAX


@pytest.mark.parametrize(("output", "shown"), HARMLESS)
def test_a_terminal_is_not_steered(output: bytes, shown: bytes) -> None:
    """Text and colours pass, all else is shown; and it is the same wherever the output is cut in two."""
    assert b"".join(harmless([output])) == shown
    for cut in range(len(output)):
        assert b"".join(harmless([output[:cut], output[cut:]])) == shown
    assert b"".join(harmless(bytes([byte]) for byte in output)) == shown


def test_a_piece_is_not_held_back() -> None:
    """A follower sees each piece when it comes, all of it but what may be the beginning of a colour."""
    pieces = harmless([b"one ", b"two\x1b", b"[0m"])
    assert [next(pieces), next(pieces), next(pieces)] == [b"one ", b"two", b"\x1b[0m"]
