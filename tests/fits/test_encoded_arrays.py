"""Arrays come back exactly, whatever a store makes of their dtypes."""

import cftime
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from xr_aimz.errors import DamagedStoreError, StoreError
from xr_aimz.fits.serialization import decode_array, encode_array

dtypes = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.unsigned_integer_dtypes(endianness="?")
    | hnp.floating_dtypes(sizes=(32, 64), endianness="?")
    | hnp.datetime64_dtypes(max_period="D", min_period="ns")
    | hnp.timedelta64_dtypes(max_period="D", min_period="ns")
)


@given(hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=2, max_side=3)))
def test_numbers_and_times_come_back_to_the_bit(values):
    held, how, _ = encode_array(values, "x")
    back = decode_array(held, how)
    assert (back.dtype, back.shape) == (values.dtype, values.shape)
    assert back.tobytes() == values.tobytes()


@given(st.lists(st.text(st.characters(exclude_characters="\x00"), max_size=5), max_size=4))
def test_strings_come_back(words):
    for dtype in (object, "U", np.dtypes.StringDType()):
        values = np.array(words, dtype) if words else np.empty(0, "U1")
        held, how, _ = encode_array(values, "x")
        back = decode_array(held, how)
        assert back.dtype == values.dtype
        assert back.tolist() == values.tolist()


@given(
    st.sampled_from(["360_day", "noleap", "all_leap", "julian", "standard"]),
    st.lists(st.integers(0, 10**16), min_size=1, max_size=4),
)
def test_dates_of_any_calendar_come_back(calendar, counts):
    values = np.asarray(cftime.num2date(counts, "microseconds since 1600-01-01", calendar), object)
    held, how, attrs = encode_array(values, "x")
    back = decode_array(held, how)
    assert back.tolist() == values.tolist()
    assert {x.calendar for x in back} == {x.calendar for x in values}
    assert attrs["calendar"] == values[0].calendar


@pytest.mark.parametrize(
    "values",
    [
        np.array([None]),
        np.array([b"a"]),
        np.zeros(1, np.longdouble),
        np.array([cftime.DatetimeNoLeap(1, 1, 1), cftime.Datetime360Day(1, 1, 1)]),
    ],
)
def test_what_has_no_place_is_refused(values):
    if values.dtype == np.float64:
        pytest.skip("a long double is a double here")
    with pytest.raises(StoreError, match="labels of 'lat'"):
        encode_array(values, "labels of 'lat'")


@pytest.mark.parametrize("how", [{}, {"dtype": "|O"}, {"dtype": "<f4"}, {"dtype": "V8"}])
def test_an_array_that_cannot_have_been_that_is_refused(how):
    with pytest.raises(DamagedStoreError):
        decode_array(np.zeros(2), how)
