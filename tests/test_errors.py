"""The nearest of the names that exist."""

import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from xr_aimz.errors import find_closest, list_names, suggest

NAMES = ["co2", "tas", "tas_min", "precipitation", "Q"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("co_2", "co2"),
        ("CO2", "co2"),
        ("q", "Q"),
        ("tas_mni", "tas_min"),
        ("precip", "precipitation"),
        ("slope", None),
    ],
)
def test_a_misspelled_name_means_the_nearest(name, meant):
    assert find_closest(name, NAMES) == meant


def test_a_list_says_which_is_meant():
    assert list_names(["a", "co2"], "co_2") == "['a', 'co2'] (did you mean 'co2' by 'co_2'?)"
    assert list_names(["tas", "co2"], ["tass", "c2", "zzz"]) == (
        "['tas', 'co2'] (did you mean 'tas' by 'tass', 'co2' by 'c2'?)"
    )
    assert list_names(("b", "a"), "zzz") == "['b', 'a']"
    assert list_names([], "a") == "[]"
    # What is no string is near to nothing.
    assert suggest(["nuts"], [3, None]) == ""


WORDS = st.text(string.ascii_lowercase, min_size=5, max_size=9)


@given(WORDS, st.lists(WORDS, max_size=4), st.data())
def test_a_slip_of_one_letter_is_found_among_names_that_are_far(name, others, data):
    place = data.draw(st.integers(0, len(name) - 1))
    slip = name[:place] + data.draw(st.sampled_from(string.ascii_lowercase)) + name[place + 1 :]
    far = [n for n in others if not set(n) & set(slip)]
    assume(slip != name)
    assert find_closest(slip, [*far, name]) == name
