"""Text for messages: one line of an error, some of many names, and no halves of characters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.text import (
    LONGEST_REASON,
    did_you_mean,
    first_line,
    has_surrogate,
    last_line,
    list_some,
    nearest_names,
    without_surrogates,
)
from tests.support.storms import tries

SURROGATES = st.text(st.characters(categories=["Cs", "L", "Zs"]), max_size=8)


@tries(50)
@given(st.text(max_size=400))
def test_an_error_in_a_message_is_one_short_line_that_says_something(text: str) -> None:
    for line in (first_line(ValueError(text)), last_line(ValueError(text))):
        assert line
        assert len(line) <= LONGEST_REASON
        assert len(line.splitlines()) == 1


def test_the_first_and_the_last_line_are_those_that_say_something() -> None:
    error = RuntimeError("\n \x1b[31mError(s) in loading\x1b[0m\n\tsize mismatch for score\n\n")
    assert (first_line(error), last_line(error)) == ("Error(s) in loading", "size mismatch for score")
    assert first_line(KeyError()) == last_line(KeyError()) == "KeyError"


@tries(50)
@given(st.lists(st.sampled_from("abc"), max_size=9), st.integers(1, 9))
def test_all_names_are_listed_or_counted(names: list[str], most: int) -> None:
    listed, _, more = list_some(names, most).partition(" and ")
    assert len(list(filter(None, listed.split(", ")))) + int(more.removesuffix(" more") or 0) == len(names)


@tries(100)
@given(SURROGATES)
def test_a_text_without_surrogates_can_be_written_and_another_is_told(text: str) -> None:
    mended = without_surrogates(text)
    assert mended.encode("utf-8").decode("utf-8") == mended
    assert has_surrogate(text) == (mended != text)


NAMES = ["cohort_size", "buffer_size", "HLoRA", "FLoRA", "ByClient", "IID", "learning_rate"]


@tries(50)
@given(st.sampled_from(NAMES), st.integers(0, 12), st.sampled_from("xq"), st.booleans())
def test_a_slip_of_one_letter_or_of_capitals_finds_the_name_that_was_meant(
    name: str, at: int, letter: str, capitals: bool
) -> None:
    if capitals:
        assert nearest_names(name.swapcase().replace("_", ""), NAMES) == [name]
    else:
        place = min(at, len(name))
        assert nearest_names(name[:place] + letter + name[place:], NAMES)[0] == name


def test_a_part_of_names_is_near_to_all_of_them_and_what_is_like_none_to_none() -> None:
    assert did_you_mean("size", NAMES) == "did you mean buffer_size or cohort_size?"
    assert did_you_mean("zzz", NAMES) == did_you_mean("x", []) == did_you_mean("i", NAMES) == ""
    assert len(nearest_names("abc", [f"abc_{k}" for k in range(9)], most=2)) == 2
