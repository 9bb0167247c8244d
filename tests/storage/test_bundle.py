"""A fit is written whole or not there, to any store that Zarr knows, and nothing is lost by it."""

from dataclasses import replace

import numpy as np
import obstore.store
import pytest
import saved_models
import xarray as xr
from hypothesis import HealthCheck, given, settings
from strategies import cases
from zarr.storage import LocalStore, MemoryStore, ObjectStore

import xr_aimz
from xr_aimz.errors import IncompleteStoreError, StoreError, WriteError


@pytest.fixture(scope="module")
def ds():
    x = np.linspace(-1, 1, 12)
    return xr.Dataset({"x": ("time", x), "y": ("time", 2 * x)}, {"time": np.arange(12)})


@pytest.fixture(scope="module")
def fit(ds):
    return ds.aimz.from_posterior(saved_models.line, {"slope": np.linspace(1, 2, 10)[None]})


@pytest.mark.parametrize("kind", ["memory", "obstore", "url"])
def test_any_store_will_do(kind, fit):
    store = {
        "memory": MemoryStore(),
        "obstore": ObjectStore(obstore.store.MemoryStore()),
        "url": "memory://test_vault/fit.zarr",
    }[kind]
    fit.save(store)
    assert xr_aimz.load_fit(store, saved_models.line).token == fit.token


def test_what_exists_is_kept_or_replaced(fit, tmp_path):
    fit.save(tmp_path / "fit.zarr")
    with pytest.raises(StoreError, match="exists; choose another path, or mode='w'"):
        fit.save(tmp_path / "fit.zarr")
    other = replace(fit, lineage={"mlflow_run_id": "abc"})
    other.save(tmp_path / "fit.zarr", mode="w")
    back = xr_aimz.load_fit(tmp_path / "fit.zarr", saved_models.line)
    assert back.lineage == {"mlflow_run_id": "abc"}
    with pytest.raises(StoreError, match="mode='a'"):
        fit.save(tmp_path / "other.zarr", mode="a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="exists"):
        fit.save(tmp_path / "notes")


class Failing(LocalStore):
    """A disk that fails after some writes."""

    left = 20

    async def set(self, key, value):
        type(self).left -= 1
        if self.left < 0:
            raise OSError("disk failed")
        await super().set(key, value)


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 1])
def test_a_save_that_was_cut_short_never_looks_whole(share, fit, tmp_path):
    Failing.left = most = 10**6
    fit.save(Failing(tmp_path / "whole.zarr"))
    # The last write is the root's, which makes it whole.
    Failing.left = int(share * (most - Failing.left - 1))
    with pytest.raises(WriteError, match="disk failed"):
        fit.save(Failing(tmp_path / "fit.zarr"))
    with pytest.raises(IncompleteStoreError, match="no whole store of a fit"):
        xr_aimz.load_fit(tmp_path / "fit.zarr", saved_models.line)
    fit.save(tmp_path / "fit.zarr")
    assert xr_aimz.load_fit(tmp_path / "fit.zarr", saved_models.line).token == fit.token


def test_what_lies_beside_a_save_that_was_cut_short_is_kept(fit, tmp_path):
    Failing.left = 5
    with pytest.raises(WriteError, match="disk failed"):
        fit.save(Failing(tmp_path / "fit.zarr"))
    thesis = tmp_path / "fit.zarr/thesis.txt"
    thesis.write_text("mine")
    with pytest.raises(StoreError, match=r"cut short, and \['thesis.txt'\]"):
        fit.save(tmp_path / "fit.zarr")
    assert thesis.read_text() == "mine"


def test_a_lazy_fit_is_not_saved_over_its_own_draws(fit, tmp_path):
    lazy = replace(fit, posterior=fit.posterior.chunk(draw=3))
    lazy.save(tmp_path / "fit.zarr")
    back = xr_aimz.load_fit(tmp_path / "fit.zarr", saved_models.line)
    assert back.token == lazy.token
    assert back.posterior.slope.chunks == ((1,), (3, 3, 3, 1))
    with pytest.raises(StoreError, match=r"is read from .* itself"):
        back.save(tmp_path / "fit.zarr", mode="w")
    with pytest.raises(StoreError, match=r"is read from .* itself"):
        back.save((tmp_path / "fit.zarr").as_uri(), mode="w")
    back.save((tmp_path / "copy.zarr").as_uri())
    copy = xr_aimz.load_fit(tmp_path / "copy.zarr", saved_models.line)
    xr.testing.assert_identical(copy.posterior.compute(), fit.posterior)


def test_uneven_chunks_come_back_as_they_were(fit, tmp_path):
    lazy = replace(fit, posterior=fit.posterior.chunk(draw=(1, 4, 2, 3)))
    lazy.save(tmp_path / "fit.zarr")
    back = xr_aimz.load_fit(tmp_path / "fit.zarr", saved_models.line)
    assert back.posterior.slope.chunks == lazy.posterior.slope.chunks
    assert back.token == lazy.token
    xr.testing.assert_identical(back.posterior.compute(), fit.posterior)


def test_what_cannot_be_kept_is_refused_before_anything_is_written(ds, fit, tmp_path):
    odd = replace(fit, binding=replace(fit.binding, constants={"n": object()}))
    with pytest.raises(StoreError, match="constant 'n' holds"):
        odd.save(tmp_path / "fit.zarr")
    slashed = replace(fit, constant_data=fit.constant_data.rename(x="a/b"))
    with pytest.raises(StoreError, match=r"'constant_data/a/b'.*rename"):
        slashed.save(tmp_path / "fit.zarr")
    stacked = fit.posterior.stack(both=("chain", "draw"))
    with pytest.raises(StoreError, match="MultiIndex"):
        replace(fit, posterior=stacked).save(tmp_path / "fit.zarr")
    assert not (tmp_path / "fit.zarr").exists()


@pytest.mark.slow
@given(cases())
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_bindings_and_labels_of_any_dataset_come_back(case):
    fit, store = case.fit(), MemoryStore()
    fit.save(store)
    back = xr_aimz.load_fit(store, fit.model)
    assert back.token == fit.token
    for group in ("posterior", "observed_data", "constant_data"):
        xr.testing.assert_identical(getattr(back, group), getattr(fit, group))
    assert back.sites == fit.sites
    assert replace(back.binding, labels={}) == replace(fit.binding, labels={})
    assert set(back.binding.labels) == set(fit.binding.labels)
    for d, index in fit.binding.labels.items():
        assert back.binding.labels[d].identical(index)
