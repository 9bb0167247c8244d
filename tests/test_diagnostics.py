"""Diagnostics agree with ArviZ's, and speak up where a fit should not be trusted."""

import warnings

import numpy as np
import pytest
import xarray as xr

from xr_aimz import diagnostics
from xr_aimz.diagnostics import concerns, ess_bulk, rhat, summarize

# R-hat is the same formula. Beneath the effective sample sizes lie two estimates of the
# autocorrelation, which cut its sum at neighbouring lags now and then, and two
# definitions of a sample quantile: up to 7.5 % apart over the chains below (antithetic
# ones of 100 draws; under 3 % otherwise).
RHAT_RTOL = 1e-9
ESS_RTOL = 0.1


def of_arviz(measure, x):
    """ArviZ's own diagnostic of draws ``(chain, draw, n)``, from either generation of it."""
    name, options = {
        "rhat": ("rhat", {"method": "rank"}),
        "ess_bulk": ("ess", {"method": "bulk"}),
        "ess_tail": ("ess", {"method": "tail", "prob": (0.05, 0.95)}),
    }[measure]
    draws = xr.Dataset({"x": (("chain", "draw", "n"), x)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ's own, of its refactoring
        try:
            import arviz_stats as arviz
        except ImportError:
            arviz = pytest.importorskip("arviz")
        return getattr(arviz, name)(draws, **options)["x"].values


def autoregressive(rho, chains, draws, n=3, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(chains, draws, n))
    x = np.empty_like(noise)
    x[:, 0] = noise[:, 0] / np.sqrt(1 - rho**2)
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    return x


def awkward(rho, chains, draws):
    """One well-behaved variable, one with a chain elsewhere, one with heavy tails."""
    x = autoregressive(rho, chains, draws)
    x[0, :, 1] += 0.5
    x[..., 2] = x[..., 2] ** 3
    return x


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, -0.5])
@pytest.mark.parametrize(("chains", "draws"), [(4, 100), (4, 501), (2, 1000)])
@pytest.mark.parametrize("measure", ["rhat", "ess_bulk", "ess_tail"])
def test_measures_agree_with_arviz(rho, chains, draws, measure):
    x = awkward(rho, chains, draws)
    got = getattr(diagnostics, measure)(x)
    rtol = RHAT_RTOL if measure == "rhat" else ESS_RTOL
    np.testing.assert_allclose(got, of_arviz(measure, x), rtol=rtol)


def test_integers_and_ties_agree_with_arviz():
    x = np.random.default_rng(0).poisson(3.0, size=(4, 400, 2))
    np.testing.assert_allclose(rhat(x.astype(float)), of_arviz("rhat", x), rtol=RHAT_RTOL)
    np.testing.assert_allclose(ess_bulk(x.astype(float)), of_arviz("ess_bulk", x), rtol=ESS_RTOL)


def test_independent_draws_are_worth_their_number():
    x = autoregressive(0.0, 4, 2000)
    assert (rhat(x) < 1.005).all()
    np.testing.assert_allclose(ess_bulk(x), 8000, rtol=0.15)


def test_correlated_draws_are_worth_what_theory_says():
    # An autoregression has (1 - rho) / (1 + rho) as many independent draws.
    x = autoregressive(0.8, 4, 5000)
    np.testing.assert_allclose(ess_bulk(x), 20_000 / 9, rtol=0.2)


def test_rhat_sees_a_shift_a_scale_and_a_drift():
    x = autoregressive(0.0, 4, 1000)
    x[0, :, 0] += 1
    x[0, :, 1] *= 3
    x[:, :, 2] += np.linspace(0, 2, 1000)
    assert (rhat(x) > 1.05).all()


@pytest.fixture
def posterior():
    x = autoregressive(0.0, 4, 500, n=2)
    return xr.Dataset(
        {
            "a": (("chain", "draw"), x[..., 0]),
            "b": (("draw", "lat", "chain"), x.transpose(1, 2, 0)),
            "n": (("chain", "draw"), np.random.default_rng(1).poisson(4, (4, 500))),
        },
        {"lat": [10.0, 20.0], "name": ("lat", ["p", "q"])},
    )


def test_a_summary_has_the_dims_and_labels_of_the_posterior(posterior):
    found = summarize(posterior)
    assert set(found.data_vars) == {"a", "b", "n"}
    assert found.diagnostic.values.tolist() == ["rhat", "ess_bulk", "ess_tail"]
    assert set(found.b.dims) == {"diagnostic", "lat"}
    assert found.lat.values.tolist() == [10.0, 20.0]
    expected = rhat(posterior.b.transpose("chain", "draw", "lat").values)
    np.testing.assert_allclose(found.b.sel(diagnostic="rhat"), expected)


def test_a_single_chain_has_no_rhat_but_an_effective_size(posterior):
    found = summarize(posterior.isel(chain=[0]))
    assert np.isnan(found.a.sel(diagnostic="rhat"))
    assert found.a.sel(diagnostic="ess_bulk") > 300


def test_few_draws_and_constants_give_nan(posterior):
    assert np.isnan(summarize(posterior.isel(draw=slice(3))).a).all()
    still = posterior.assign(a=xr.full_like(posterior.a, 2.0))
    assert np.isnan(summarize(still).a.sel(diagnostic="rhat"))


NO_STATS = xr.Dataset()


def test_a_good_fit_gives_no_concern(posterior):
    assert concerns(posterior, NO_STATS, None) == []
    quiet = xr.Dataset({"diverging": (("chain", "draw"), np.zeros((4, 500), bool))})
    assert concerns(posterior, quiet, None) == []


def test_divergences_are_a_concern_with_their_number(posterior):
    diverging = np.zeros((4, 500), bool)
    diverging[1, :7] = True
    stats = xr.Dataset({"diverging": (("chain", "draw"), diverging)})
    (found,) = concerns(posterior, stats, None)
    assert "7 of 2000" in found
    assert "target_accept_prob" in found


def test_chains_apart_are_a_concern_that_names_the_variable(posterior):
    shift = xr.DataArray([0.0, 0, 0, 2], dims="chain")
    found = concerns(posterior.assign(b=posterior.b + shift), NO_STATS, None)
    assert any("R-hat" in c and "'b'" in c and "'a'" not in c for c in found)


def test_few_effective_draws_are_a_concern_that_names_the_variable(posterior):
    slow = autoregressive(0.95, 4, 500)[..., 0]
    found = concerns(posterior.assign(a=(("chain", "draw"), slow)), NO_STATS, None)
    assert any("ess_bulk" in c and "'a'" in c and "'b'" not in c for c in found)
    assert any("4 chains" in c for c in found)


def losses(values):
    return xr.DataArray(np.asarray(values, float), dims="step")


STEPS = np.arange(2000)
NOISE = np.random.default_rng(0).normal(size=2000)


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_has_settled_is_no_concern(posterior, seed):
    noise = np.random.default_rng(seed).normal(size=2000)
    settled = losses(100 * np.exp(-STEPS / 100) + noise)
    assert concerns(posterior, NO_STATS, settled) == []


def test_a_loss_still_falling_is_a_concern_with_figures(posterior):
    (found,) = concerns(posterior, NO_STATS, losses(1000 - STEPS * 0.1 + NOISE))
    assert "still falling" in found
    assert "2000 steps" in found


def test_a_loss_without_noise_still_falling_is_a_concern(posterior):
    (found,) = concerns(posterior, NO_STATS, losses(1000 - STEPS * 0.1))
    assert "still falling" in found


def test_a_loss_that_rises_does_not_fall(posterior):
    assert not any("falling" in c for c in concerns(posterior, NO_STATS, losses(STEPS + NOISE)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_a_concern(posterior, bad):
    values = 100 * np.exp(-STEPS / 100) + NOISE
    values[500:503] = bad
    (found,) = concerns(posterior, NO_STATS, losses(values))
    assert "3 of 2000" in found
    assert "learning rate" in found


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_handful_of_losses_says_nothing(posterior, steps):
    assert concerns(posterior, NO_STATS, losses(np.ones(steps))) == []
