"""The indices of an array as text, and the names of its elements."""

import re
from contextlib import suppress
from itertools import chain

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pjw.arrays import ELEMENTS_MAX, INDEX_MAX, TEXT_MAX_CHARACTERS, Array, Element
from pjw.errors import InvalidJobError
from pjw.model import JobSpec, QueueSpec

INDICES = st.integers(0, 60)


@st.composite
def parts(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A part as text, and its indices as someone who reads it counts them."""
    first = draw(INDICES)
    if draw(st.booleans()):
        return f"{first}", [first]
    last, step = draw(st.integers(first, 70)), draw(st.integers(1, 9))
    text = f"{first}-{last}" + (f":{step}" if step > 1 or draw(st.booleans()) else "")
    return text, [index for index in range(first, last + 1) if (index - first) % step == 0]


@given(st.lists(parts(), min_size=1, max_size=5), st.integers(0, 99))
def test_what_a_text_says(found: list[tuple[str, list[int]]], at_once: int) -> None:
    """All indices in their order, each with its place; one that is in it twice is refused."""
    text = ",".join(text for text, _ in found) + (f"%{at_once}" if at_once else "")
    indices = list(chain.from_iterable(indices for _, indices in found))
    if len(set(indices)) < len(indices):
        with pytest.raises(InvalidJobError) as refused:
            Array.of(text)
        named = re.search(r": ([0-9]+) is in it twice", str(refused.value))
        assert named is not None
        assert indices.count(int(named[1])) > 1
        return
    array = Array.of(text)
    assert [array.index(place) for place in range(len(array))] == indices
    assert [array.place(index) for index in indices] == list(range(len(indices)))
    assert (array.lowest, array.highest, array.at_once) == (min(indices), max(indices), at_once)
    assert {array.place(index) for index in set(range(80)) - set(indices)} <= {None}
    with pytest.raises(IndexError):
        array.index(len(indices))
    assert Array.of(str(array)) == array


@given(st.text("0123456789-,:% _", max_size=12))
def test_no_text_but_what_the_manual_has(text: str) -> None:
    """Any text is an array as the manual has it, or is refused."""
    part = r"[0-9]{1,10}(-[0-9]{1,10}(:[0-9]{1,10})?)?"
    with suppress(InvalidJobError):
        array = Array.of(text)
        assert re.fullmatch(rf"{part}(,{part})*(%[0-9]{{1,7}})?", text)
        assert 1 <= len(array) <= ELEMENTS_MAX


@given(
    st.tuples(st.integers(0, 10**9), st.integers(1, 10**4), st.integers(1, 50)),
    st.tuples(st.integers(0, 10**9), st.integers(1, 10**4), st.integers(1, 50)),
)
def test_two_ranges(one: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    """They are refused exactly when an index is in both, however far apart they begin."""
    ranges = [range(first, first + (count - 1) * step + 1, step) for first, step, count in (one, other)]
    assume(all(len(each) <= ELEMENTS_MAX for each in ranges))
    text = ",".join(f"{each[0]}-{each[-1]}:{each.step}" for each in ranges)
    common = set(ranges[0]) & set(ranges[1])
    if not common:
        assert len(Array.of(text)) == sum(map(len, ranges))
        return
    with pytest.raises(InvalidJobError, match=f": {min(common)} is in it twice"):
        Array.of(text)


def test_refusals() -> None:
    """Each says what is wrong."""
    for text, words in {
        "": "'' is neither an index nor a range of them",
        "1-": "'1-' is neither",
        "5-1": "'5-1' has no element",
        "1-5:0": "'1-5:0' has no element",
        "1-5%0": "'0' is no number of elements that run at once",
        "1-5%": "'' is no number",
        "1%2%3": "'2%3' is no number",
        "0x5": "neither",
        "٣": "neither",
        "1,1": "1 is in it twice",
        str(INDEX_MAX + 1): f"an index is at most {INDEX_MAX}",
        "0-1000000": "an array has at most 1000000 elements, not 1000001",
        "1," * TEXT_MAX_CHARACTERS + "1": "text of at most 1000 characters",
    }.items():
        with pytest.raises(InvalidJobError, match=re.escape(words)):
            Array.of(text)
    assert len(Array.of("0-999999")) == ELEMENTS_MAX
    assert Array.of(f"{INDEX_MAX}").highest == INDEX_MAX


def test_specs() -> None:
    """They have the text as it is shown; what reads its input cannot be an array."""
    assert QueueSpec(array="01-07:3,9-9%5").array == "1-7:3,9%5"
    with pytest.raises(InvalidJobError, match="the indices of an array are text, not 5"):
        QueueSpec(array=5)  # type: ignore[arg-type]
    with pytest.raises(InvalidJobError, match="an array has no input"):
        JobSpec("cat", input=True, queue=QueueSpec(array="1-2"))


@given(st.integers(0, 10**18 - 1), st.integers(0, INDEX_MAX))
def test_names(array_id: int, index: int) -> None:
    """An element is named by two numbers, and by nothing like them."""
    element = Element(array_id, index)
    assert str(element) == f"{array_id}_{index}"
    assert Element.of(str(element)) == element
    for wrong in (f"{array_id}", f"{array_id}_", f"_{index}", f" {element}", f"{element}_1", f"-{element}"):
        assert Element.of(wrong) is None
