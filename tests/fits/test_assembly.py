"""Draws made elsewhere become a fit, in whatever container they come."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz
from xr_aimz.errors import ModelError


def model(x, tas=None):
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    w = numpyro.sample(
        "w", dist.Normal(jnp.zeros(2), 1).to_event(1), infer={"event_dims": ["basis"]}
    )
    with xr_aimz.plate("lat"):
        level = numpyro.sample("level", dist.Normal(0, 1))
    mean = numpyro.deterministic("mean", level + w.sum() * x)
    numpyro.sample("tas", dist.Normal(mean, sigma), obs=tas)


@pytest.fixture
def ds():
    x = np.linspace(-1, 1, 4)
    return xr.Dataset(
        {"x": ("time", x), "tas": (("time", "lat"), np.zeros((4, 3)), {"units": "K"})},
        {"time": np.arange(4), "lat": [10.0, 20.0, 30.0]},
    )


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "sigma": rng.random((2, 5)).astype(np.float32) * 1e-3,
        "w": rng.normal(size=(2, 5, 2)).astype(np.float32),
        "level": rng.normal(size=(2, 5, 3)).astype(np.float32),
    }


@pytest.fixture
def labelled(arrays):
    return xr.Dataset(
        {
            "sigma": (("chain", "draw"), arrays["sigma"]),
            "w": (("chain", "draw", "basis"), arrays["w"]),
            "level": (("chain", "draw", "lat"), arrays["level"]),
        },
        {"chain": [0, 1], "draw": np.arange(5), "lat": [10.0, 20.0, 30.0]},
    )


@pytest.fixture
def fit(ds, arrays):
    return ds.aimz.from_posterior(model, arrays)


def mean_of(ds, fit):
    return ds.aimz.predict(fit, sites="mean")["mean"].compute()


def test_a_mapping_of_arrays(ds, arrays, fit, labelled):
    assert set(fit.posterior.data_vars) == set(arrays)
    assert fit.posterior.level.dims == ("chain", "draw", "lat")
    assert fit.posterior.w.dims == ("chain", "draw", "basis")
    xr.testing.assert_identical(fit.posterior.drop_attrs(), labelled)
    got = mean_of(ds, fit)
    expected = labelled.level + labelled.w.sum("basis") * ds.x
    np.testing.assert_allclose(got.transpose(*expected.dims), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["jax", "lists"])
def test_anything_like_an_array(ds, arrays, fit, kind):
    convert = jnp.asarray if kind == "jax" else np.ndarray.tolist
    other = ds.aimz.from_posterior(model, {n: convert(a) for n, a in arrays.items()})
    xr.testing.assert_allclose(other.posterior, fit.posterior)


def test_a_dataset(ds, fit, labelled):
    other = ds.aimz.from_posterior(model, labelled)
    xr.testing.assert_identical(other.posterior, fit.posterior)
    xr.testing.assert_identical(mean_of(ds, other), mean_of(ds, fit))


def test_a_dataset_with_dims_in_another_order(ds, fit, labelled):
    turned = labelled.transpose("lat", "draw", "basis", "chain")
    other = ds.aimz.from_posterior(model, turned)
    assert other.posterior.level.dims == ("chain", "draw", "lat")
    xr.testing.assert_identical(mean_of(ds, other), mean_of(ds, fit))


def test_a_datatree(ds, fit, labelled):
    tree = xr.DataTree.from_dict({"posterior": labelled, "prior": labelled * 0})
    other = ds.aimz.from_posterior(model, tree)
    xr.testing.assert_identical(other.posterior, fit.posterior)


def test_a_tree_of_its_own_making(ds, fit):
    other = ds.aimz.from_posterior(model, fit.to_datatree())
    xr.testing.assert_identical(other.posterior, fit.posterior)


def test_what_arviz_makes_of_numpyro(ds, arrays, fit):
    # ArviZ names the axes by number where nobody has told it better.
    named = xr.Dataset(
        {
            n: (("chain", "draw", *(f"{n}_dim_{i}" for i in range(a.ndim - 2))), a)
            for n, a in arrays.items()
        },
        {"chain": [0, 1], "draw": np.arange(5), "level_dim_0": [0, 1, 2], "w_dim_0": [0, 1]},
    )
    other = ds.aimz.from_posterior(model, xr.DataTree.from_dict({"posterior": named}))
    xr.testing.assert_identical(other.posterior.drop_attrs(), fit.posterior.drop_attrs())


def test_labels_of_chains_and_draws_are_kept(ds, fit, labelled):
    own = labelled.assign_coords(chain=[3, 7], draw=[10, 20, 30, 40, 50])
    other = ds.aimz.from_posterior(model, own)
    pred = ds.aimz.predict(other)
    assert pred.chain.values.tolist() == [3, 7]
    assert pred.draw.values.tolist() == [10, 20, 30, 40, 50]


def test_labels_of_a_local_latent_are_kept_and_found(ds, labelled, fit):
    # The posterior's own order, which is not the Dataset's.
    turned = labelled.isel(lat=[2, 0, 1])
    other = ds.aimz.from_posterior(model, turned)
    assert other.posterior.lat.values.tolist() == [30.0, 10.0, 20.0]
    xr.testing.assert_allclose(mean_of(ds, other), mean_of(ds, fit))


def test_the_outcome_need_not_be_there(ds, arrays, fit):
    future = ds.drop_vars("tas").expand_dims(member=1).isel(member=0)

    def plain(x, tas=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        numpyro.sample("tas", dist.Normal(slope * x, 1), obs=tas)

    other = future.aimz.from_posterior(plain, {"slope": arrays["sigma"]})
    assert other.observed == ("tas",)
    assert future.aimz.predict(other).tas.dims == ("chain", "draw", "time")


@pytest.mark.parametrize("outcome", [True, False])
@pytest.mark.parametrize("missing", ["sigma", "w", "level"])
def test_a_latent_without_draws_is_refused(ds, arrays, missing, outcome):
    # Drawn from its prior it would be a wrong number, and a silent one.
    data = ds if outcome else ds.drop_vars("tas")
    given = {n: a for n, a in arrays.items() if n != missing}
    with pytest.raises(ModelError, match=f"'{missing}'") as caught:
        data.aimz.from_posterior(model, given, dim=("time", "lat"))
    assert all(repr(n) in str(caught.value) for n in given)


def test_draws_of_another_shape_are_refused(ds, arrays):
    with pytest.raises(ModelError, match=r"'level'.*\(2, 5, 4\).*\(3,\)"):
        ds.aimz.from_posterior(model, {**arrays, "level": np.zeros((2, 5, 4))})


def test_draws_without_chains_are_refused(ds, arrays):
    with pytest.raises(ModelError, match=r"'sigma'.*\(chain, draw, \.\.\.\)"):
        ds.aimz.from_posterior(model, {**arrays, "sigma": np.zeros(10)})


def test_other_numbers_of_draws_are_refused(ds, arrays):
    with pytest.raises(ValueError, match="draw"):
        ds.aimz.from_posterior(model, {**arrays, "sigma": np.ones((2, 4))})


@pytest.mark.parametrize("posterior", [None, 3, [1, 2]])
def test_what_is_no_posterior_is_refused(ds, posterior):
    with pytest.raises(ModelError, match=r"mapping.*Dataset.*DataTree"):
        ds.aimz.from_posterior(model, posterior)


def test_further_variables_of_a_posterior_are_left_out(ds, labelled, fit):
    more = labelled.assign(mean=(("chain", "draw"), np.zeros((2, 5))))
    other = ds.aimz.from_posterior(model, more)
    assert set(other.posterior.data_vars) == {"sigma", "w", "level"}
    xr.testing.assert_identical(mean_of(ds, other), mean_of(ds, fit))


def test_a_slash_in_a_name_is_a_dot_in_a_dataset(ds):
    def nested(x, tas=None):
        slope = numpyro.sample("net/slope", dist.Normal(0, 1))
        numpyro.sample("tas", dist.Normal(slope * x[..., None], 1), obs=tas)

    draws = np.ones((1, 3), np.float32)
    for name in ("net/slope", "net.slope"):
        fit = ds.aimz.from_posterior(nested, {name: draws}, dim=("time", "lat"))
        assert list(fit.posterior.data_vars) == ["net.slope"]


def test_params_are_passed_on(ds):
    def scaled(x, tas=None):
        scale = numpyro.param("scale", 1.0)
        numpyro.deterministic("scaled", scale * x)
        numpyro.sample("tas", dist.Normal(x, 1), obs=tas)

    fit = ds.aimz.from_posterior(scaled, {}, params={"scale": np.float32(3.0)})
    got = ds.aimz.predict(fit, sites="scaled").scaled.isel(chain=0, draw=0).compute()
    np.testing.assert_allclose(got, 3 * ds.x, rtol=1e-6)


def test_a_fit_keeps_what_it_was_given(ds, fit):
    assert fit.model is model
    assert fit.observed == ("tas",)
    xr.testing.assert_equal(fit.observed_data.tas, ds.tas)
    xr.testing.assert_equal(fit.constant_data.x, ds.x)
    assert fit.posterior.attrs["inference_library"] == "numpyro"
    assert {"posterior", "observed_data", "constant_data"} <= set(fit.to_datatree().children)


def test_a_fit_is_described_in_text_and_html(fit):
    for text in (repr(fit), fit._repr_html_()):
        for fact in ("model", "2 x 5 (chain x draw)", "x ← x", "tas", "time", "level"):
            assert fact in text
