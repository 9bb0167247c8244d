"""Rows become grids that are not much larger, whatever rows they are."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xr_aimz.errors import LabelError
from xr_aimz.mlflow.columns import LabelColumn
from xr_aimz.mlflow.tables import group_rows


def cut(labels, core=(), like=None):
    columns = [LabelColumn(d, (like or {}).get(d), True) for d in labels]
    return list(group_rows({d: pd.Index(v) for d, v in labels.items()}, columns, core))


def cells(found):
    return sum(int(np.prod([len(v) for v in p.labels.values()])) for p in found)


@given(st.sets(st.tuples(*[st.integers(0, 60)] * 3), min_size=1, max_size=60))
def test_every_row_is_in_one_piece_at_its_own_labels(rows):
    rows = sorted(rows, key=hash)
    labels = {d: [r[i] for r in rows] for i, d in enumerate("tyx")}
    found = cut(labels)
    assert sorted(np.concatenate([p.rows for p in found])) == list(range(len(rows)))
    for piece in found:
        for d, own in labels.items():
            there = piece.labels[d][piece.places[d]]
            np.testing.assert_array_equal(there, np.asarray(own)[piece.rows])


def test_a_grid_is_one_piece_in_any_order():
    rng = np.random.default_rng(0)
    t, x = np.mgrid[:20, :30].reshape(2, -1)[:, rng.permutation(600)]
    (piece,) = cut({"t": t, "x": x})
    assert cells([piece]) == 600


def test_rows_far_apart_make_no_huge_grid():
    # Each label once: one grid of all would have a million cells.
    rows = np.arange(1000)
    found = cut({"t": rows, "x": rows[::-1]})
    assert cells(found) <= 1000 * 32
    assert len(found) < 100


def test_a_series_stays_whole_and_in_the_order_of_the_fit():
    t = np.array([3, 1, 2, 2, 1, 3, 2, 1])
    site = np.array(list("aaabbbcc"))
    found = cut({"t": t, "site": site}, core=("t",), like={"t": pd.Index([5, 4, 3, 2, 1])})
    # The third site has a shorter series, which is another program.
    assert [list(p.labels["t"]) for p in found] == [[3, 2, 1], [2, 1]]
    assert [list(p.labels["site"]) for p in found] == [["a", "b"], ["c"]]


def test_labels_that_the_fit_never_saw_follow_its_direction():
    years = {"t": [7, 6, 8]}
    assert list(cut(years, ("t",), {"t": pd.Index([3, 2, 1])})[0].labels["t"]) == [8, 7, 6]
    assert list(cut(years, ("t",), {"t": pd.Index([1, 2, 3])})[0].labels["t"]) == [6, 7, 8]
    assert list(cut(years, ("t",))[0].labels["t"]) == [6, 7, 8]


def test_new_labels_of_a_core_dim_without_an_order_are_refused():
    with pytest.raises(LabelError, match=r"'t'.*\[7\].*no order"):
        cut({"t": [1, 7]}, ("t",), {"t": pd.Index([3, 1, 2])})


def test_a_series_with_a_gap_in_two_core_dims_is_refused():
    with pytest.raises(LabelError, match="no whole grid"):
        cut({"t": [1, 1, 2], "x": [1, 2, 1]}, core=("t", "x"))


def test_two_rows_of_one_cell_are_refused():
    with pytest.raises(LabelError, match=r"rows \[0, 2\].*'t': 1.*'x': 'a'"):
        cut({"t": [1, 1, 1], "x": ["a", "b", "a"]})
