"""The laws of the contract, on generated Datasets: what a prediction must not depend on."""

import os
import runpy
import subprocess
import sys

import dask
import dask.array as da
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import strategies
import xarray as xr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lazy_checks import ComputedError, all_lazy, refuse, untouchable
from strategies import DIMS, assert_close, assert_same, cases, chunked, chunkings, selections

import xr_aimz
from xr_aimz.tracing.sites import Block, trace_lock

INEXACT = jnp.result_type(float)


@given(st.data())
def test_building_computes_nothing(data):
    case = data.draw(cases())
    ds = all_lazy(case.ds, data.draw(chunkings(case.ds)))
    with dask.config.set(scheduler=refuse):
        fit = case.fit(ds)
        pred = ds.aimz.predict(fit, draws=2)
        density = ds.aimz.log_likelihood(fit)
    for result in (pred, density):
        assert all(isinstance(a.data, da.Array) for a in result.data_vars.values())
        assert "refuse" not in repr(result)
    # The inputs are behind the results all the same.
    with pytest.raises(ComputedError):
        density.compute(scheduler="synchronous")


@given(cases(families=("grid", "local", "multivariate")))
def test_a_lazy_posterior_stays_lazy(case):
    known = case.fit().posterior
    with dask.config.set(scheduler=refuse):
        fit = case.fit(posterior=known.map(untouchable))
        pred = case.ds.aimz.predict(fit)
    with pytest.raises(ComputedError):
        pred.compute(scheduler="synchronous")


# 2. Labels, dtypes, dim order and attrs survive.


@given(st.data())
def test_what_comes_out_is_labelled_as_what_went_in(data):
    case = data.draw(cases())
    ds = chunked(case.ds, data.draw(chunkings(case.ds)))
    fit = case.fit(ds)
    pred, density = ds.aimz.predict(fit), ds.aimz.log_likelihood(fit)
    for name in case.outcomes:
        assert pred[name].dims == ("chain", "draw", *case.dims, *case.event)
        assert density[name].dims == ("chain", "draw", *case.dims)
        assert pred[name].attrs == ds[name].attrs
        assert density[name].dtype == INEXACT
        of_ints = ds[name].dtype.kind == "i"
        assert pred[name].dtype == (jnp.result_type(int) if of_ints else INEXACT)
        assert pred[name].notnull().all()
    for result in (pred, density):
        assert result.attrs["aimz_fit"] == fit.token
        own = ("history", "aimz_fit", "aimz_seed", "aimz_versions")
        assert {k: v for k, v in result.attrs.items() if k not in own} == {
            k: v for k, v in ds.attrs.items() if k != "history"
        }
        lines = result.attrs["history"].splitlines()
        assert lines[: len(lines) - 1] == ds.attrs.get("history", "").splitlines()
        fitting = [n for n, c in ds.coords.items() if set(c.dims) <= set(result.dims)]
        assert set(result.coords) == {*fitting, "chain", "draw"}
        for name in fitting:
            xr.testing.assert_identical(result[name].variable, ds[name].variable)
        for dim in set(fitting) & set(ds.indexes):
            assert type(result.indexes[dim]) is type(ds.indexes[dim])
            assert result.indexes[dim].equals(ds.indexes[dim])
        assert result.chain.values.tolist() == list(range(strategies.CHAINS))
        assert result.draw.values.tolist() == list(range(strategies.DRAWS))


@given(cases(families=("grid", "local")))
def test_deterministics_have_the_dims_of_their_plates(case):
    pred = case.ds.aimz.predict(case.fit())
    if "mu" in pred:
        assert pred.mu.dims == pred.y.dims
        assert pred.half.dims == ("chain", "draw")
        np.testing.assert_allclose(pred.half, case.posterior["b"] / 2, rtol=1e-6)
        z = case.variables["z"]
        terms = [xr.DataArray(case.posterior[n], dims=("chain", "draw")) for n in "ab"]
        mu = terms[0] + terms[1] * case.ds.x + (case.ds[z] if isinstance(z, str) else z)
        assert_close(pred.mu.values, mu.broadcast_like(pred.mu).transpose(*pred.mu.dims).values)
    else:
        which = [d for i, d in enumerate(DIMS) if case.variables["which"] >> i & 1]
        assert pred.twice.dims == ("chain", "draw", *(d for d in case.dims if d in which))
        assert_close(pred.twice.values, 2 * case.posterior["level"].astype(INEXACT))


# 3. A prediction commutes with whatever keeps each cell's labels.


@given(st.data())
def test_predict_commutes_with_selection(data):
    case = data.draw(cases(kinds=strategies.KINDS))
    fit, ds = case.fit(), case.ds
    pred = chunked(ds, data.draw(chunkings(ds))).aimz.predict(fit)
    some = data.draw(selections(ds))
    part = ds.isel(some)
    part = chunked(part, data.draw(chunkings(part)))
    assert_same(part.aimz.predict(fit), pred.isel(some))
    there = {d: ds.indexes[d][i] for d, i in some.items()}
    assert_same(ds.sel(there).aimz.predict(fit), pred.sel(there))


@given(st.data())
def test_log_likelihood_commutes_with_selection(data):
    case = data.draw(cases(kinds=strategies.KINDS))
    fit, some = case.fit(), data.draw(selections(case.ds))
    density = case.ds.aimz.log_likelihood(fit)
    assert_same(case.ds.isel(some).aimz.log_likelihood(fit), density.isel(some))


@given(st.data())
def test_one_label_drops_its_dim(data):
    case = data.draw(cases(kinds=strategies.KINDS))
    dim = data.draw(st.sampled_from(case.dims))
    label = case.ds.indexes[dim][data.draw(st.integers(0, case.ds.sizes[dim] - 1))]
    fit = case.fit()
    pred = case.ds.sel({dim: label}).aimz.predict(fit)
    assert all(dim not in a.dims for a in pred.variables.values())
    assert pred[dim].ndim == 0
    assert_same(pred, case.ds.aimz.predict(fit).sel({dim: label}))


@given(st.data())
def test_a_dimension_without_labels_is_addressed_from_its_start(data):
    families = ("grid", "broadcast", "features", "table", "counts", "multivariate")
    case = data.draw(cases(families=families, kinds=("none",)))
    dim = data.draw(st.sampled_from(case.dims))
    head = {dim: slice(0, data.draw(st.integers(1, case.ds.sizes[dim])))}
    fit = case.fit()
    assert_same(case.ds.isel(head).aimz.predict(fit), case.ds.aimz.predict(fit).isel(head))


@given(st.data())
def test_no_chunking_moves_a_draw(data):
    case = data.draw(cases())
    fit = case.fit()
    whole = case.ds.aimz.predict(fit)
    chunks = {d: data.draw(strategies.cuts(n)) for d, n in case.ds.sizes.items() if d in DIMS}
    pieces = case.ds.chunk(chunks).aimz.predict(fit)
    for name in case.outcomes:
        found = dict(zip(pieces[name].dims, pieces[name].chunks, strict=True))
        assert {d: found[d] for d in chunks} == chunks
    assert_same(pieces, whole)


@settings(max_examples=6)
@given(cases(families=("grid", "local", "counts")))
def test_cutting_the_draws_moves_none(case):
    fit = case.fit()
    # So few bytes that a block with all its draws is too heavy.
    with xr_aimz.set_options(block_bytes=64):
        runs = case.ds.chunk(dict.fromkeys(case.dims, 2)).aimz.predict(fit)
    assert any(len(a.chunks[1]) > 1 for a in runs.data_vars.values())
    assert_same(runs, case.ds.aimz.predict(fit))


@given(st.data())
def test_inputs_chunked_unlike_each_other_move_no_draw(data):
    case = data.draw(cases(ndims=(2, 3)))
    ds = case.ds
    for name in ("x", "z", "y", "n"):
        chunks = {d: data.draw(strategies.cuts(n)) for d, n in ds[name].sizes.items()}
        ds = ds.assign({name: ds[name].chunk(chunks)})
    fit = case.fit()
    assert_same(ds.aimz.predict(fit), case.ds.aimz.predict(fit))
    assert_same(ds.aimz.log_likelihood(fit), case.ds.aimz.log_likelihood(fit))


@given(st.data())
def test_predict_commutes_with_concatenation(data):
    case = data.draw(cases(kinds=strategies.KINDS))
    dim = data.draw(st.sampled_from(case.dims))
    assume(case.ds.sizes[dim] > 1)
    at = data.draw(st.integers(1, case.ds.sizes[dim] - 1))
    fit = case.fit()
    parts = [
        case.ds.isel({dim: piece}).aimz.predict(fit) for piece in (slice(at), slice(at, None))
    ]
    joined = xr.concat(
        parts, dim, data_vars="minimal", coords="minimal", compat="override", join="override"
    )
    assert_same(joined, case.ds.aimz.predict(fit))


@given(st.data())
def test_the_order_of_dims_and_variables_does_not_matter(data):
    case = data.draw(cases())
    fit = case.fit()
    dims = data.draw(st.permutations(list(case.ds.dims)))
    names = data.draw(st.permutations(list(case.ds.data_vars)))
    # The variables alone: a coordinate with two dims comes out as it went in.
    given_dims = {n: [d for d in dims if d in a.dims] for n, a in case.ds.data_vars.items()}
    turned = case.ds[names].assign(
        {n: case.ds[n].variable.transpose(*some) for n, some in given_dims.items()}
    )
    pred = case.ds.aimz.predict(fit)
    assert_same(turned.aimz.predict(fit), pred)
    assert_same(turned.drop_vars([*case.outcomes, "many"]).aimz.predict(fit), pred)
    assert_same(turned.aimz.log_likelihood(fit), case.ds.aimz.log_likelihood(fit))


@given(st.data())
def test_a_fit_to_a_transposed_dataset_is_the_fit_transposed(data):
    case = data.draw(cases(families=("grid", "broadcast", "features", "counts", "multivariate")))
    dims = [*data.draw(st.permutations(case.dims)), "species"]
    turned = case.ds.transpose(*dims)
    pred = turned.aimz.predict(case.fit(turned))
    expected = case.ds.aimz.predict(case.fit())
    for name in case.outcomes:
        assert pred[name].dims == ("chain", "draw", *(d for d in dims if d in expected[name].dims))
    assert_same(pred.transpose(*expected.dims), expected.transpose(*expected.dims))


@given(st.data())
def test_local_latents_follow_their_labels(data):
    """Draws of a local latent in another order of labels are the same draws."""
    case = data.draw(cases(families=("local",), kinds=strategies.KINDS))
    fit = case.fit()
    order = {
        d: np.array(data.draw(st.permutations(range(n))))
        for d, n in fit.posterior.sizes.items()
        if d in case.dims
    }
    assume(order)
    shuffled = case.fit(posterior=fit.posterior.isel(order))
    assert_same(case.ds.aimz.predict(shuffled), case.ds.aimz.predict(fit))


@given(cases())
def test_seeds_sites_and_labels_tell_draws_apart(case):
    """The laws above would hold for draws that are all the same."""
    ds, fit = case.ds, case.fit()
    name = case.outcomes[0]
    if name == "n":
        return
    draws = ds.aimz.predict(fit)[name].values
    if case.event:
        assert len(np.unique(draws)) == draws.size
    other = ds.aimz.predict(fit, seed=1)[name].values
    assert not np.isin(other, draws).any()
    # The noise alone: the same parameters and inputs everywhere.
    flat = ds.assign(x=xr.zeros_like(ds.x), z=xr.zeros_like(ds.z))
    same = {n: np.full_like(v, 0.5) for n, v in case.posterior.items()}
    noise = flat.aimz.predict(case.fit(flat, same))[name].values
    assert len(np.unique(noise)) > 0.9 * noise.size


# 4. A subset of chains and draws.


@given(st.data())
def test_some_draws_are_the_prediction_from_those_draws(data):
    case = data.draw(cases())
    fit = case.fit()
    n = {"chain": strategies.CHAINS, "draw": strategies.DRAWS}
    some = {
        d: data.draw(st.lists(st.integers(0, m - 1), min_size=1, unique=True))
        for d, m in n.items()
    }
    fewer = case.fit(posterior=fit.posterior.isel(some))
    assert_same(case.ds.aimz.predict(fewer), case.ds.aimz.predict(fit).isel(some))
    assert_same(case.ds.aimz.log_likelihood(fewer), case.ds.aimz.log_likelihood(fit).isel(some))


@given(cases(), st.integers(1, strategies.DRAWS))
def test_thinning_takes_evenly_spaced_draws(case, draws):
    fit = case.fit()
    some = np.arange(draws) * strategies.DRAWS // draws
    thinned = case.ds.aimz.predict(fit, draws=draws)
    assert thinned.sizes["draw"] == draws
    assert_same(thinned, case.ds.aimz.predict(fit).isel(draw=some))


@given(cases(families=("grid", "counts")), st.data())
def test_some_sites_are_those_of_all(case, data):
    fit = case.fit()
    pred = case.ds.aimz.predict(fit)
    names = data.draw(st.lists(st.sampled_from(sorted(pred.data_vars)), min_size=1, unique=True))
    some = case.ds.aimz.predict(fit, sites=names)
    # What no chosen site spans, the Dataset's coordinates do not bring along.
    wanted = pred[names]
    kept = [c for c in some.coords if c in wanted.coords]
    assert set(some.data_vars) == set(names)
    assert_same(some[names].drop_vars(set(some.coords) - set(kept)), wanted[names])


# 5. The log-likelihood is NumPyro's.


def in_numpyro(case):
    """NumPyro's own log-likelihood of the whole Dataset at once, arrays laid out by hand."""
    ds = case.ds
    passed = {n: v for n, v in case.variables.items() if not isinstance(v, (str, list))}
    names = {n: v for n, v in case.variables.items() if isinstance(v, (str, list))}
    for name in ("x", "z", "y", "hit"):
        names.setdefault(name, name)

    def laid(name):
        array = ds[name]
        full = array.expand_dims([d for d in case.dims if d not in array.dims])
        full = full.transpose(*case.dims, ...)
        if case.layout == "table":
            full = full.broadcast_like(ds[case.outcomes[0]]).transpose(*case.dims, ...)
            return full.values.reshape(-1)
        return full.values if array.ndim else array.values

    code = case.model.__code__
    for name in set(code.co_varnames[: code.co_argcount]) - set(passed):
        source = names[name]
        if isinstance(source, list):
            columns = np.broadcast_arrays(*(laid(n) for n in source))
            passed[name] = jnp.stack([jnp.asarray(c, INEXACT) for c in columns], -1)
        else:
            passed[name] = jnp.asarray(laid(source))
    sizes = {d: ds.sizes[d] for d in case.dims}
    posterior = {n: jnp.asarray(v) for n, v in case.posterior.items()}
    if "level" in posterior:
        which = case.variables["which"]
        shape = [n if which >> DIMS.index(d) & 1 else 1 for d, n in sizes.items()]
        posterior["level"] = posterior["level"].reshape(*posterior["level"].shape[:2], *shape)
    block = Block(sizes, {d: i - len(sizes) for i, d in enumerate(sizes)})
    # Only for the sizes that xr_aimz.plate asks for.
    with trace_lock(block):
        return numpyro.infer.util.log_likelihood(case.model, posterior, batch_ndims=2, **passed)


@given(st.data())
def test_log_likelihood_is_numpyros(data):
    case = data.draw(cases())
    ds = chunked(case.ds, data.draw(chunkings(case.ds)))
    density = ds.aimz.log_likelihood(case.fit()).compute(scheduler="synchronous")
    expected = in_numpyro(case)
    assert len(expected) == len(density.data_vars) == len(case.outcomes)
    sites = {"n": "n", "hit": "any"} if "n" in case.outcomes else {case.outcomes[0]: "y"}
    for name, site in sites.items():
        wanted = np.asarray(expected[site]).reshape(density[name].shape)
        np.testing.assert_allclose(density[name].values, wanted, rtol=2e-5, atol=2e-5)


# 3, again: devices, threads, processes.

SCRIPT = """
import sys

import dask
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr

import xr_aimz


def model(x, y=None, n=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    with xr_aimz.plate("lon"):
        level = numpyro.sample("level", dist.Normal(0, 1))
    with xr_aimz.plate("lat"), xr_aimz.plate("lon"):
        mu = numpyro.deterministic("mu", level + slope * x)
        numpyro.sample("y", dist.Gamma(2.0, jnp.exp(mu)), obs=y)
        numpyro.sample("n", dist.Poisson(jnp.exp(mu)), obs=n)


def prediction():
    rng = np.random.default_rng(0)
    shape = (10, 6)
    ds = xr.Dataset(
        {
            "x": (("lat", "lon"), rng.uniform(-1, 1, shape)),
            "y": (("lat", "lon"), rng.gamma(2, 1, shape)),
            "n": (("lat", "lon"), rng.poisson(1, shape)),
        },
        {"lat": np.linspace(-45, 45, 10), "lon": list("abcdef")},
    )
    # Thirteen draws: no number of devices divides them.
    posterior = {"slope": rng.normal(size=(1, 13)), "level": rng.normal(size=(1, 13, 6))}
    fit = ds.aimz.from_posterior(model, posterior)
    ds = ds.chunk(lat=4, lon=5)
    return xr.merge(
        [
            ds.aimz.predict(fit),
            ds.aimz.log_likelihood(fit).rename(y="density", n="mass"),
        ],
        combine_attrs="drop",
        compat="override",
        join="exact",
    )


def main(how, out):
    if how == "cluster":
        from distributed import Client

        with Client(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
            host="127.0.0.1",
        ):
            found = prediction().compute()
    else:
        with dask.config.set(scheduler=how):
            found = prediction().compute()
    import jax

    np.savez(out, devices=jax.device_count(), **{n: a.values for n, a in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("laws") / "law.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def reference(script):
    found = runpy.run_path(str(script))["prediction"]().compute(scheduler="synchronous")
    return {name: array.values for name, array in found.items()}


def outcome_of(script, how, out, **environment):
    subprocess.run(
        [sys.executable, str(script), how, str(out)],
        check=True,
        timeout=300,
        env={**os.environ, **environment},
        cwd=script.parent,
    )
    with np.load(out) as found:
        return dict(found)


def assert_all_same(found, reference):
    assert set(found) == set(reference)
    assert reference["n"].dtype.kind == "i"
    for name, wanted in reference.items():
        assert_close(found[name], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_no_number_of_devices_moves_a_draw(script, reference, tmp_path, devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    found = outcome_of(
        script, "synchronous", tmp_path / "found.npz", XLA_FLAGS=flags, JAX_PLATFORMS="cpu"
    )
    assert found.pop("devices") == devices
    assert_all_same(found, reference)


def test_threads_move_no_draw(script, reference):
    with dask.config.set(scheduler="threads", num_workers=4):
        found = runpy.run_path(str(script))["prediction"]().compute()
    assert_all_same({name: array.values for name, array in found.items()}, reference)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["processes", "cluster"])
def test_no_process_moves_a_draw(script, reference, tmp_path, how):
    found = outcome_of(script, how, tmp_path / "found.npz", JAX_PLATFORMS="cpu")
    found.pop("devices")
    assert_all_same(found, reference)
