"""Any bytes as a revocation list: read to the letter, or refused by file and line; nothing is passed over."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjw.certs.revocation import RevocationList, parse_revocation_list
from pjw.errors import ConfigError

serials = st.integers(0, 16**40 - 1)
fingerprints = st.binary(min_size=32, max_size=32)
SEPARATORS = st.sampled_from(["\n", "\r\n", "\n\n", " # comment\n", "\t\n#\n"])


def colons(digits: str) -> str:
    """Hex digits in pairs."""
    return ":".join(digits[at : at + 2] for at in range(0, len(digits), 2))


@given(entries=st.lists(serials | fingerprints), data=st.data())
def test_every_entry_is_taken(entries: list[int | bytes], data: st.DataObject) -> None:
    """However they are written and ended, what is in the list is what was written."""
    text = ""
    for entry in entries:
        digits = entry.hex() if isinstance(entry, bytes) else f"{entry:x}"
        digits = digits.rjust(len(digits) + len(digits) % 2, "0")
        prefix = "sha256 Fingerprint=" if isinstance(entry, bytes) else "serial="
        text += data.draw(st.sampled_from(["", prefix])) + data.draw(
            st.sampled_from([digits, digits.upper(), colons(digits)])
        )
        text += data.draw(SEPARATORS)
    assert parse_revocation_list(text.encode(), "/revoked") == RevocationList(
        frozenset(entry for entry in entries if isinstance(entry, int)),
        frozenset(entry for entry in entries if isinstance(entry, bytes)),
    )


@given(
    st.binary(max_size=300) | st.text("0123456789abcdefABCDEF:=# \n\rserialx", max_size=200).map(str.encode)
)
def test_garbage_is_read_or_named(data: bytes) -> None:
    """A list has as many entries as lines that say something, or it is an error with one of their numbers."""
    said = [line.partition(b"#")[0].strip() for line in data.split(b"\n")]
    try:
        revoked = parse_revocation_list(data, "/revoked")
    except ConfigError as error:
        found = re.match(r"cannot read revocation list /revoked: line (\d+): ", str(error))
        assert found is not None
        assert said[int(found[1]) - 1]
        return
    values = {line.lower().rpartition(b"=")[2].replace(b":", b"").lstrip(b"0") for line in said if line}
    assert len(revoked) <= len(values)
    assert bool(revoked) == bool(values)


@given(st.lists(serials, min_size=1, max_size=20), st.data())
def test_one_bad_line_is_found_wherever_it_is(numbers: list[int], data: st.DataObject) -> None:
    """The number that is told is that of the line, counted from 1."""
    lines = [f"{number:X}" for number in numbers]
    at = data.draw(st.integers(0, len(lines)))
    lines.insert(at, "john")
    with pytest.raises(ConfigError, match=f": line {at + 1}: 'john' is neither"):
        parse_revocation_list("\n".join(lines).encode(), "/revoked")
