"""A label's words depend on its value and its dimension, and on nothing else."""

import datetime
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from xr_aimz.errors import LabelError
from xr_aimz.random.labels import hash_labels, hash_name

cftime = pytest.importorskip("cftime")


def same(left, right, dim="x"):
    return np.array_equal(hash_labels(dim, left), hash_labels(dim, right))


def distinct(words):
    return len(np.unique(words, axis=0)) == len(words)


KINDS = {
    "float": np.linspace(-90, 90, 7),
    "float32": np.linspace(0, 1, 7, dtype=np.float32),
    "int": np.arange(-3, 4),
    "uint": np.arange(7, dtype=np.uint64) + np.uint64(2**63),
    "bool": np.array([True, False]),
    "datetime": pd.date_range("1969-12-28", periods=7),
    "timedelta": pd.timedelta_range("-2 days", periods=7),
    "timezone": pd.date_range("2000-01-01", periods=7, tz="Europe/London"),
    "numpy strings": np.array(list("abcdefg")),
    "numpy bytes": np.array(list("abcdefg"), dtype="S"),
    "objects": pd.Index(list("abcdefg"), dtype=object),
    "StringDtype": pd.Index(list("abcdefg"), dtype="string"),
    "categories": pd.CategoricalIndex(list("abcdefg")),
    "masked integers": pd.Index(pd.array(range(7), dtype="Int64")),
    "cftime": [cftime.Datetime360Day(2000, 1, day + 1) for day in range(7)],
    "dates": [datetime.date(2000, 1, day + 1) for day in range(7)],
    "levels": pd.MultiIndex.from_product([[1, 2, 3], ["a", "b"]], names=["n", "s"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_every_kind_are_distinct_and_commute_with_selection(kind):
    labels = KINDS[kind]
    words = hash_labels("x", labels)
    assert words.shape == (len(labels), 2)
    assert words.dtype == np.uint32
    assert distinct(words)
    order = np.random.default_rng(0).permutation(len(labels))
    picked = [labels[i] for i in order] if isinstance(labels, list) else labels[order]
    np.testing.assert_array_equal(hash_labels("x", picked), words[order])
    np.testing.assert_array_equal(hash_labels("x", labels[2:3]), words[2:3])
    assert hash_labels("x", labels[:0]).shape == (0, 2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "levels"])
def test_dimensions_with_equal_labels_differ(kind):
    labels = KINDS[kind]
    assert not np.any(hash_labels("lat", labels) == hash_labels("lon", labels))


def test_an_integer_index_equals_positions():
    assert np.array_equal(hash_labels("x", None, size=5), hash_labels("x", np.arange(5)))
    assert same(np.arange(5, dtype=np.int16), np.arange(5, dtype=np.uint8))


def test_equal_floats_hash_equally():
    assert same([-0.0], [0.0])
    assert same(np.array([0.5], np.float32), np.array([0.5]))
    assert same(np.array([0.5], ">f8"), np.array([0.5]))
    assert not same([0.5], [np.nextafter(0.5, 1)])


@pytest.mark.parametrize("unit", ["W", "D", "h", "m", "s", "ms", "us", "ns", "25s"])
@pytest.mark.parametrize("kind", ["datetime64", "timedelta64"])
def test_an_instant_hashes_equally_in_every_unit(kind, unit):
    days = np.array([-350, 0, 7, 14 * 365], "int64") * 7
    plain = days.astype(f"{kind}[D]")
    assert same(plain, plain.astype(f"{kind}[{unit}]"))
    assert same(plain, plain.astype(f"{kind}[{unit}]").astype(plain.dtype.newbyteorder(">")))


def test_calendar_units_and_far_instants():
    assert same(np.array(["1850", "2100"], "M8[Y]"), np.array(["1850-01", "2100-01"], "M8[s]"))
    far = np.array(["-9999-01-01", "0001-01-01", "9999-12-31"], "M8[s]")
    assert same(far, far.astype("M8[us]"))
    assert distinct(hash_labels("t", np.arange("0001-01", "9999-01", dtype="M8[M]")))


def test_instants_finer_than_nanoseconds():
    whole = np.array([-5, 0, 12], "M8[ns]")
    assert same(whole, whole.astype("M8[as]"))
    parts = np.arange(-2500, 2500, 250).astype("M8[ps]")
    assert distinct(hash_labels("t", parts))
    assert same(parts, parts.astype("M8[fs]"))


def test_a_time_zone_is_not_part_of_the_instant():
    london = pd.date_range("2000-06-01", periods=3, tz="Europe/London")
    assert same(london, london.tz_convert("UTC").tz_localize(None))


def test_strings_hash_equally_however_they_are_held():
    words = ["Åre", "", "b", "a longer name"]
    held = [
        np.array(words),
        np.array(words, dtype=object),
        pd.Index(words, dtype="string"),
        pd.Index(words, dtype="str"),
        pd.CategoricalIndex(words, categories=sorted(words)),
        pd.CategoricalIndex(words, categories=[*words, "unused"]),
        pd.Series(words),
    ]
    for other in held:
        assert same(words, other)


def test_python_objects_hash_as_their_tight_dtype():
    assert same(np.array([1, 2], dtype=object), [1, 2])
    assert same(np.array([1.5, 2.0], dtype=object), [1.5, 2.0])
    dates = [datetime.datetime(2000, 1, 1), datetime.datetime(2000, 1, 2)]
    assert same(np.array(dates, dtype=object), np.array(["2000-01-01", "2000-01-02"], "M8[D]"))
    assert same([d.date() for d in dates], np.array(["2000-01-01", "2000-01-02"], "M8[D]"))


def test_cftime_calendars_differ_and_microseconds_are_exact():
    assert not same([cftime.DatetimeNoLeap(2000, 1, 1)], [cftime.Datetime360Day(2000, 1, 1)])
    assert same(
        [cftime.DatetimeNoLeap(2000, 1, 1)], [cftime.datetime(2000, 1, 1, calendar="noleap")]
    )
    ticks = [cftime.DatetimeNoLeap(9999, 12, 31, 23, 59, 59, us) for us in range(5)]
    assert distinct(hash_labels("time", ticks))


def test_a_multiindex_is_the_sum_of_its_levels():
    lat, lon = np.array([10.0, 20.0]), np.array([1, 2, 3])
    stacked = pd.MultiIndex.from_product([lat, lon], names=["lat", "lon"])
    grid = hash_labels("lat", lat)[:, None] + hash_labels("lon", lon)
    np.testing.assert_array_equal(hash_labels("z", stacked), grid.reshape(-1, 2))
    unnamed = pd.MultiIndex.from_product([lat, lat])
    assert distinct(hash_labels("z", unnamed))


@pytest.mark.parametrize(
    "labels",
    [
        [1.0, np.nan],
        np.array(["2000", "NaT"], "M8[ns]"),
        np.array(["a", None], dtype=object),
        pd.CategoricalIndex(["a", None]),
        pd.MultiIndex.from_tuples([(1.0, "a"), (np.nan, "b")]),
        pd.Index(pd.array([1, None], dtype="Int64")),
    ],
    ids=lambda labels: type(labels).__name__,
)
def test_missing_labels_are_refused(labels):
    with pytest.raises(LabelError, match=r"station.*missing label"):
        hash_labels("station", labels)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([1 + 2j]),
        np.array([object()]),
        np.array([1, "a"], dtype=object),
        np.array([{"a": 1}, {"b": 1}], dtype=object),
        pd.interval_range(0, 3),
        pd.period_range("2000", periods=3, freq="M"),
        np.array([1, 2], "m8[M]"),
        np.zeros((2, 2)),
        [[1, 2], [3, 4]],
        3.5,
    ],
    # Workers of pytest-xdist must agree on the names, and an object's repr has its address.
    ids=[
        "complex",
        "object",
        "mixed",
        "dict",
        "interval",
        "period",
        "months",
        "2-D",
        "nested",
        "scalar",
    ],
)
def test_labels_without_stable_bits_are_refused(labels):
    with pytest.raises(LabelError, match="'station'"):
        hash_labels("station", labels)


def test_a_wrong_size_is_refused():
    with pytest.raises(LabelError, match="size 3 but 2 labels"):
        hash_labels("x", [1, 2], size=3)
    with pytest.raises(LabelError, match="neither labels nor a size"):
        hash_labels("x", None)


@pytest.mark.slow
def test_words_are_the_same_in_another_process():
    code = (
        "from xr_aimz.random.labels import *; print(hash_labels('x', ['a', 'b']).tolist(),"
        "hash_name('tas').tolist(), hash_labels('x', [0.1, 1.0]).tolist())"
    )
    run = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert run[0] == run[1]
    here = hash_labels("x", ["a", "b"]), hash_name("tas"), hash_labels("x", [0.1, 1.0])
    assert run[0].decode().strip() == " ".join(str(words.tolist()) for words in here)


def test_words_are_pinned():
    """Stored predictions are resumed by later versions: a change here breaks them."""
    assert hash_name("tas").tolist() == [1693969917, 4281364426]
    floats = [[1254254799, 3512839623], [2587804028, 2283377961]]
    assert hash_labels("lat", [0.0, 45.5]).tolist() == floats
    strings = [[3180327787, 1400383833], [931242333, 1871688688]]
    assert hash_labels("site", ["a", "b"]).tolist() == strings


def test_many_labels_do_not_collide_and_neighbours_are_unrelated():
    words = hash_labels("x", np.arange(400_000))
    assert distinct(words)
    for column in words.T:
        bits = np.unpackbits(column.copy().view(np.uint8)).reshape(-1, 32)
        # 32 counts of 400 000 fair bits, of neighbours' disagreements too: |z| < 5.
        for share in (bits.mean(0), (bits[1:] != bits[:-1]).mean(0)):
            assert np.max(np.abs(share - 0.5)) < 5 * 0.5 / np.sqrt(400_000)
