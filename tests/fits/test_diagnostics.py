"""Diagnostics agree with ArviZ's, and speak up where a fit should not be trusted."""

import ast
import warnings

import numpy as np
import pytest
import xarray as xr

from xr_aimz.fits import diagnostics
from xr_aimz.fits.diagnostics import cell_concerns, concerns, ess_bulk, rhat, summarize

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
    # What fit takes.
    assert "method=NUTS(model, target_accept_prob=0.95)" in found


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


@pytest.mark.parametrize("steps", [1, 2, 5, 99])
def test_a_handful_of_losses_cannot_be_judged_and_says_so(posterior, steps):
    for values in (np.ones(steps), -np.arange(steps), NOISE[:steps]):
        (found,) = concerns(posterior, NO_STATS, losses(values))
        assert found.startswith(f"{steps} steps are too few to see")
        assert "take 100 or more" in found


def test_the_steps_that_are_judged_are_those_at_the_full_rate(posterior):
    early = losses(NOISE).assign_attrs(full_rate_steps=15)
    (found,) = concerns(posterior, NO_STATS, early)
    assert found.startswith("15 steps are too few to see")


def test_noise_that_hides_a_trend_is_a_concern(posterior):
    (found,) = concerns(posterior, NO_STATS, losses(100 * NOISE))
    assert "its noise hides a fall of" in found
    assert concerns(posterior, NO_STATS, losses(100 * NOISE).assign_attrs(epoch_steps=10.0)) == []


def trees(deep, depth=10, **more):
    """Stats of 4 x 500 draws, of which so many have a tree of the greatest depth."""
    steps = np.full(2000, 2 ** (depth - 1))
    steps[:deep] = 2**depth - 1
    dims = ("chain", "draw")
    return xr.Dataset(
        {"n_steps": (dims, steps.reshape(4, 500), {"max_tree_depth": depth})}, **more
    )


def test_trees_at_the_greatest_depth_are_a_concern_where_they_are_many(posterior):
    assert concerns(posterior, trees(20), None) == []
    (found,) = concerns(posterior, trees(140, depth=8), None)
    assert found.startswith("7% of 2000 draws ended at the greatest tree depth, 8")
    assert "NUTS(model, max_tree_depth=10)" in found
    # A sampler of a fixed number of steps has no such depth.
    bare = trees(140)
    bare.n_steps.attrs = {}
    assert concerns(posterior, bare, None) == []


def test_figures_are_beyond_the_limits_that_they_are_named_for(posterior):
    """Each variable that is named is at fault by the figure beside it, and no other is named."""
    shift = xr.DataArray([0.0, 0, 0, 0.15], dims="chain")
    slow = autoregressive(0.6, 4, 500)[..., 0]
    bad = posterior.assign(b=posterior.b + shift, a=(("chain", "draw"), slow))
    table = summarize(bad)
    for concern in concerns(bad, NO_STATS, None):
        kind = "rhat" if "R-hat" in concern else concern.split()[0]
        beyond = table.sel(diagnostic=kind)
        for name, figure in figures(concern).items():
            worst = float(beyond[name].max() if kind == "rhat" else beyond[name].min())
            assert figure == pytest.approx(worst, abs=1)
            assert figure > 1.01 if kind == "rhat" else figure < 400


def figures(concern):
    return ast.literal_eval("{" + concern.split("{")[1].split("}")[0] + "}")


CELLS = ("lat", "lon")


@pytest.fixture
def cells():
    """Draws of two variables in 2 x 3 cells, and stats of fits that went well."""
    x = autoregressive(0.0, 4, 500, n=24).reshape(4, 500, 4, 2, 3)
    dims = ("chain", "draw", "k", *CELLS)
    posterior = xr.Dataset({"a": (dims, x), "b": (("chain", "draw", *CELLS), x[:, :, 0] + 1)})
    status = xr.DataArray(
        np.zeros((2, 3), int),
        dims=CELLS,
        attrs={"flag_meanings": "ok no_data", "flag_values": [0]},
    )
    diverging = xr.zeros_like(posterior.b, dtype=bool)
    return posterior, xr.Dataset({"status": status, "diverging": diverging})


@pytest.mark.parametrize("measure", ["R-hat", "ess_bulk"])
def test_cells_name_only_the_variables_that_are_at_fault(cells, measure):
    posterior, stats = cells
    assert cell_concerns(posterior, stats, None, CELLS) == []
    if measure == "R-hat":
        shift = xr.DataArray([0.0, 0, 0, 2], dims="chain")
        slow = posterior.b + shift.where(posterior.b.lat == 1, 0)
    else:
        slow = posterior.b.copy(data=autoregressive(0.9, 4, 500, n=6).reshape(4, 500, 2, 3))
        slow = slow.where(posterior.b.lon == 2, posterior.b)
    found = cell_concerns(posterior.assign(b=slow), stats, None, CELLS)
    (concern,) = [c for c in found if measure in c]
    assert list(figures(concern)) == ["b"]
    assert f"in {3 if measure == 'R-hat' else 2} of 6 cells" in concern


def test_a_cell_that_failed_is_no_figure_of_the_others(cells):
    posterior, stats = cells
    status = stats.status.copy()
    status[:, 1] = 1
    bad = posterior.assign(b=posterior.b + xr.DataArray([0, 0, 0, 2], dims="chain"))
    (found,) = cell_concerns(bad.isel(lon=[1]), stats.isel(lon=[1]), None, CELLS)[:1]
    assert "R-hat" in found
    assert (
        cell_concerns(bad.isel(lon=[1]), stats.assign(status=status).isel(lon=[1]), None, CELLS)
        == []
    )


def test_trees_at_the_greatest_depth_are_counted_by_cell(cells):
    posterior, stats = cells
    steps = np.full((4, 500, 2, 3), 31)
    dims = ("chain", "draw", *CELLS)
    steps[:, :35, 1, 2] = 2**10 - 1
    steps[:, :5, 0, 0] = 2**10 - 1
    stats["n_steps"] = (dims, steps, {"max_tree_depth": 10})
    (found,) = cell_concerns(posterior, stats, None, CELLS)
    assert found.startswith("in 1 of 6 cells more than 1% of the draws ended at the greatest tree")
    assert "at worst 7%" in found
    assert "NUTS(model, max_tree_depth=12)" in found


def test_a_handful_of_steps_in_cells_cannot_be_judged(cells):
    posterior, stats = cells
    one = posterior.isel(chain=[0])
    few = xr.DataArray(
        np.ones((5, 2, 3)),
        {"step": np.arange(1, 6)},
        ("step", *CELLS),
        attrs={"full_rate_steps": 3},
    )
    (found,) = cell_concerns(one, stats, few, CELLS)
    assert found.startswith("5 steps are too few to see")
