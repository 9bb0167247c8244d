"""Losses of many steps in bounded space, the same however they come in."""

import numpy as np
import pytest

from xr_aimz.inference import minibatch
from xr_aimz.inference.minibatch import LossHistory


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(minibatch, "MOST_LOSSES", 20)


def added(values, *sizes):
    history = LossHistory()
    for piece in np.split(values, np.cumsum(sizes)):
        history = history.add(piece)
    return history


def test_few_losses_are_kept_as_they_are():
    values = np.arange(1000, dtype=np.float32)
    history = added(values, 3, 400)
    assert history.every == 1
    np.testing.assert_array_equal(history.means, values)


@pytest.mark.parametrize("count", [20, 21, 40, 41, 163, 640])
def test_many_are_means_of_runs_however_they_came(few, count):
    # Whole numbers, so that means are exact.
    values = 64.0 * np.random.default_rng(0).integers(0, 100, count).astype(np.float32)
    whole, parts = added(values), added(values, 1, 7, 13)
    assert whole.every == parts.every
    assert len(whole.means) <= 20
    runs = len(values) // whole.every
    expected = values[: runs * whole.every].reshape(runs, -1).mean(axis=1)
    np.testing.assert_array_equal(whole.means, expected)
    np.testing.assert_array_equal(parts.means, expected)


def test_a_loss_settles_where_it_falls_no_more_than_its_noise():
    noise = np.random.default_rng(0).normal(size=2000)
    falling = np.linspace(4, 0, 2000)
    assert not added(noise + falling).settled(1000)
    assert added(noise - falling).settled(1000)
    assert not added(noise).settled(1500)
