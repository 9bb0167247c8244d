"""Labels and values of a table get the kind that the fit has, or are refused."""

import cftime
import numpy as np
import pandas as pd
import pytest

from xr_aimz.errors import DtypeError, LabelError
from xr_aimz.mlflow.columns import cast_labels, cast_values
from xr_aimz.random.labels import hash_labels

INTS = pd.Index([2000, 2005])
FLOATS = pd.Index([2000.0, 2005.0])
STRINGS = pd.Index(["a", "b"])
DATES = pd.DatetimeIndex(["2000-01-01", "2005-06-30T12:00"]).as_unit("s")
SPANS = pd.TimedeltaIndex(["1 days", "2 days 06:00:00"])
DAYS = pd.Index([cftime.Datetime360Day(2000, 2, 30), cftime.Datetime360Day(2005, 1, 1, 12)])


@pytest.mark.parametrize(
    ("index", "given"),
    [
        (INTS, [2000, 2005]),
        (INTS, [2000.0, 2005.0]),
        (INTS, np.array([2000, 2005], np.uint16)),
        (INTS.astype("int32"), [2000, 2005]),
        (INTS, pd.array([2000, 2005], dtype="Int64")),
        (FLOATS, [2000, 2005]),
        (FLOATS.astype("float32"), [2000.0, 2005.0]),
        (pd.Index(np.array([0.1, 0.2], np.float32)), [0.1, 0.2]),
        (pd.Index([True, False]), [True, False]),
        (STRINGS, ["a", "b"]),
        (STRINGS, np.array(["a", "b"], object)),
        (pd.CategoricalIndex(["a", "b"]), ["a", "b"]),
        (pd.Index(["a", "b"], dtype=object), pd.Series(["a", "b"], dtype="str")),
        (DATES, ["2000-01-01", "2005-06-30 12:00:00"]),
        (DATES, ["2000-01-01T00:00:00Z", "2005-06-30T12:00:00Z"]),
        (DATES, pd.Series(DATES).astype("datetime64[ns]")),
        (DATES, pd.Series(DATES).dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo")),
        (SPANS, ["1 days", "54h"]),
        (SPANS, ["24:00:00", "P2DT6H"]),
        (SPANS, pd.Series(SPANS)),
        (DAYS, ["2000-02-30", "2005-01-01T12:00:00"]),
        (DAYS, ["2000-02-30 00:00", "2005-01-01 12:00:00.000000"]),
        (DAYS, list(DAYS)),
    ],
)
def test_labels_get_the_kind_of_the_fits(index, given):
    found = cast_labels("at", pd.Series(given), index)
    assert list(found) == list(index)
    # What a draw is addressed by.
    np.testing.assert_array_equal(hash_labels("at", found), hash_labels("at", index))


@pytest.mark.parametrize(
    ("index", "given", "named"),
    [
        (INTS, [2000.5, 2005.0], "2000.5"),
        (INTS, ["2000", "2005"], "'2000'"),
        (INTS, [True, False], "True"),
        (INTS, [2000.0, None], r"rows \[1\]"),
        (STRINGS, [1, 2], "1"),
        (STRINGS, ["a", None], r"rows \[1\]"),
        (DATES, [2000, 2005], "2000"),
        (DATES, ["January", "2005-06-30"], "'January'"),
        (DATES, ["2000", "2005"], "'2000'.*with dashes"),
        (DATES, ["20000101", "2005-06-30"], "'20000101'.*with dashes"),
        (SPANS, ["5", "6"], "'5'.*with a unit"),
        (SPANS, ["-1.5", "1 days"], "'-1.5'.*with a unit"),
        (SPANS, ["long", "1 days"], "'long'"),
        (DAYS, ["2000-02-31", "2005-01-01"], "360_day"),
        (DAYS, ["2000", "2001"], "Datetime360Day"),
        (DAYS, [cftime.DatetimeNoLeap(2000, 1, 1)], "Datetime360Day"),
    ],
)
def test_labels_of_another_kind_are_refused_by_name(index, given, named):
    with pytest.raises(LabelError, match=f"'at'.*{named}"):
        cast_labels("at", pd.Series(given), index)


def test_dates_between_those_of_a_coarse_unit_stay_themselves():
    found = cast_labels("at", pd.Series(["2000-01-01T00:00:00.5"]), DATES)
    assert found[0] == pd.Timestamp("2000-01-01T00:00:00.5")


def test_without_labels_at_the_fit_a_column_stays_as_it_is():
    assert list(cast_labels("at", pd.Series([3, 1]), None)) == [3, 1]


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        ("f8", [1, 2], [1.0, 2.0]),
        ("f4", [1.5, None], [1.5, np.nan]),
        ("f8", pd.Series([1.5, None], dtype=object), [1.5, np.nan]),
        ("f8", pd.Series([10**30, 2], dtype=object), [1e30, 2.0]),
        ("i8", [1.0, 2.0], [1, 2]),
        ("i4", [1, 2], [1, 2]),
        ("u1", [1, 255], [1, 255]),
        ("?", [True, False], [True, False]),
        ("?", [1, 0], [True, False]),
        ("i8", [True, False], [1, 0]),
        (None, [1, 2], [1, 2]),
    ],
)
def test_values_get_the_kind_of_the_fits(dtype, given, expected):
    found = cast_values("x", pd.Series(given), None if dtype is None else np.dtype(dtype))
    np.testing.assert_array_equal(found, expected)
    assert dtype is None or found.dtype.kind == np.dtype(dtype).kind


@pytest.mark.parametrize(
    ("dtype", "given", "named"),
    [
        ("f8", ["1.5", "2"], "'1.5'"),
        ("f8", pd.Series([1.5, "high"], dtype=object), "'high'"),
        ("i8", [1.5, 2.0], "1.5 in row 0"),
        ("i8", [1.0, None], "nan in row 1"),
        ("u1", [1, 256], "256 in row 1"),
        ("u1", [1, -1], "-1 in row 1"),
        ("?", [1, 2], "2 in row 1"),
        ("f8", pd.Series(pd.to_datetime(["2000-01-01"])), "datetime64"),
    ],
)
def test_values_that_are_none_are_refused_by_name(dtype, given, named):
    with pytest.raises(DtypeError, match=f"'x'.*{named}"):
        cast_values("x", pd.Series(given), np.dtype(dtype))
