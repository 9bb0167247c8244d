"""The table of what is bound to what, as text and as HTML; nothing computed for it."""

import re

import dask.array as da
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz


def warming(year, degree, tas=None):
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    with xr_aimz.plate("lat"):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
    mean = numpyro.deterministic("mean", slope * year**degree)
    numpyro.sample("obs", dist.StudentT(4, mean, sigma), obs=tas)


@pytest.fixture
def ds():
    def spring(block):
        raise AssertionError("computed")

    def unread(shape, chunks):
        return da.zeros(shape, chunks=chunks).map_blocks(spring, dtype=float)

    return xr.Dataset(
        {
            "years": ("time", unread(6, 4), {"units": "a"}),
            "temp": (("time", "lat"), unread((6, 3), (4, 3)), {"units": "<K>"}),
        },
        {"time": np.arange(6), "lat": [1.0, 2.0, 3.0]},
    )


VARIABLES = {"year": "years", "degree": 2, "tas": "temp"}


@pytest.fixture
def table(ds):
    return ds.aimz.describe(warming, VARIABLES)


def rows(text, title):
    """The cells of a table of the text, by their row's first."""
    lines = text.split(f"\n{title}\n")[1].split("\n\n")[0].splitlines()
    header, *rest = [re.split(r" {2,}", line.strip()) for line in lines]
    return {row[0]: row for row in rest}, header


def test_it_computes_nothing(ds, table):
    assert repr(table)
    assert table._repr_html_()
    with pytest.raises(AssertionError, match="computed"):
        ds.compute()


def test_arguments(table):
    found, header = rows(repr(table), "arguments")
    assert header == ["argument", "is", "bound to", "dims", "dtype", "units"]
    assert found["year"] == ["year", "input", "years", "time", "float64", "a"]
    assert found["tas"] == ["tas", "outcome", "temp", "time, lat", "float64", "<K>"]
    assert found["degree"] == ["degree", "constant", "2", "int"]


def test_dimensions(table):
    found, _ = rows(repr(table), "dimensions")
    assert found["time"][:3] == ["time", "6", "observation"]
    assert "(4, 2)" in found["time"][3]
    assert found["lat"][:3] == ["lat", "3", "observation"]


def test_core_dimensions(ds):
    whole = ds.chunk(time=-1)
    found, _ = rows(repr(whole.aimz.describe(warming, VARIABLES, core_dim="time")), "dimensions")
    assert found["time"][2] == "core"
    assert found["lat"][2] == "observation"


def test_sites(table):
    found, _ = rows(repr(table), "sites")
    width = jnp.zeros(()).dtype.itemsize
    assert found["sigma"] == ["sigma", "latent", "HalfNormal", f"{width} B"]
    assert found["slope"] == ["slope", "latent, local", "Normal", "lat", "lat", f"{3 * width} B"]
    assert found["mean"] == ["mean", "deterministic", "time, lat", f"{18 * width} B"]
    assert found["obs"][:3] == ["obs", "outcome temp", "StudentT"]
    assert found["obs"][-2:] == ["time, lat", f"{18 * width} B"]


def test_bytes_are_for_people():
    n = 300_000

    def model(x, y=None):
        numpyro.sample("y", dist.Normal(x, 1), obs=y)

    ds = xr.Dataset({"x": ("time", np.zeros(n)), "y": ("time", np.zeros(n))})
    width = jnp.zeros(()).dtype.itemsize
    found, _ = rows(repr(ds.aimz.describe(model)), "sites")
    assert found["y"][-1] == f"{n * width / 2**20:.4g} MiB"


def test_the_title(table):
    first = repr(table).splitlines()[0]
    for fact in ("warming", "'time': 6", "'lat': 3", "'grid'"):
        assert fact in first


def test_html_has_the_facts_of_the_text_and_is_escaped(table):
    html = table._repr_html_()
    for cells, _ in (rows(repr(table), title) for title in table.tables):
        for row in cells.values():
            for cell in row:
                assert cell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in html
    assert "<K>" not in html


def test_html_is_well_formed(table):
    opened = re.findall(r"<(\w+)", table._repr_html_())
    closed = re.findall(r"</(\w+)>", table._repr_html_())
    assert sorted(opened) == sorted(closed)


def test_a_fit_is_described_like_its_model(ds):
    draws = {"sigma": np.ones((1, 2)), "slope": np.ones((1, 2, 3))}
    fit = ds.aimz.from_posterior(warming, draws, VARIABLES)
    future = ds.drop_vars("temp").isel(time=slice(2))
    text = repr(future.aimz.describe(fit))
    found, _ = rows(text, "dimensions")
    assert found["time"][1] == "2"
    arguments, _ = rows(text, "arguments")
    assert arguments["year"][2] == "years"
    assert arguments["tas"][1:3] == ["outcome", "temp"]
    sites, _ = rows(text, "sites")
    width = jnp.zeros(()).dtype.itemsize
    # What a draw weighs on this Dataset, not on the one of the fit.
    assert sites["obs"][-1] == f"{6 * width} B"


def test_a_fit_of_other_units_is_refused(ds):
    draws = {"sigma": np.ones((1, 2)), "slope": np.ones((1, 2, 3))}
    fit = ds.aimz.from_posterior(warming, draws, VARIABLES)
    other = ds.assign(years=ds.years.assign_attrs(units="d"))
    with pytest.raises(xr_aimz.errors.UnitsError, match="'years'"):
        other.aimz.describe(fit)


def test_the_function_is_the_method(ds, table):
    assert repr(xr_aimz.describe(ds, warming, VARIABLES)) == repr(table)


def test_layout_table(ds):
    def model(year, tas=None):
        numpyro.sample("obs", dist.Normal(year, 1), obs=tas)

    variables = {"year": "years", "tas": "temp"}
    text = repr(ds.aimz.describe(model, variables, layout="table"))
    assert "'table'" in text
    found, _ = rows(text, "sites")
    assert "time, lat" in found["obs"]


def test_a_description_holds_no_tracers(table):
    leaves = jax.tree.leaves(dict(table.tables))
    assert all(isinstance(leaf, str) for leaf in leaves)
