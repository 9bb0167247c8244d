"""Draws and names of graphs that no change of the code may change."""

import json
from pathlib import Path

import jax
import numpy as np
import ordinary_models
import pytest
import xarray as xr

PINS = json.loads((Path(__file__).parents[1] / "data/pins.json").read_text("utf8"))


@pytest.mark.parametrize("name", PINS["models"])
def test_draws_and_names_are_pinned(name):
    model, split, options = ordinary_models.MODELS[name]
    ds = ordinary_models.DS.chunk(dict.fromkeys(split, 3))
    pred = ds.aimz.prior_predictive(model, draws=2, seed=11, **options)
    assert isinstance(pred, xr.Dataset)
    if jax.__version__ == PINS["jax"]:
        # Of another version a program may have other operations, and so another name.
        assert {n: a.data.name for n, a in pred.items()} == PINS["models"][name]["names"]
    corners = pred.isel({d: [0, -1] for d in pred.dims if d in ("time", "lat")}).compute()
    for variable, values in PINS["models"][name]["draws"].items():
        np.testing.assert_allclose(
            np.asarray(corners[variable], float).ravel(), values, rtol=2e-4, atol=2e-4
        )


@pytest.mark.skipif(jax.__version__ != PINS["jax"], reason="another version has other programs")
def test_names_of_predictions_that_check_lazy_inputs_are_pinned():
    assert ordinary_models.names_of_checked() == PINS["checked"]
