"""The output of a job as text that cannot steer a terminal."""

from pjw.cli.plain import LINE_MAX, PlainText


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
