"""A loaded fit goes on as the one in memory does: its chains, its guide, its optimizer."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpyro
import pytest
import saved_models
import xarray as xr
from numpyro.infer import MCMC, NUTS, SA, SVI, Trace_ELBO
from numpyro.infer.autoguide import (
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

import xr_aimz
from xr_aimz.errors import ModelError, OptionError

pytestmark = [
    # The fits that all of them share take half a minute to compile.
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning"),
]

LINE, LOCAL = saved_models.line, saved_models.local
FEW = {"draws": 40, "warmup": 40, "progress": False}
STEPS = {"steps": 150, "progress": False}
SAMPLED = """
import sys, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
import xr_aimz
for number in range({count}):
    fit = xr_aimz.load_fit(f"{folder}/{{number}}.zarr", trust_import=True)
    print(fit.sample(20, seed=7).token)
"""


def own(guide=saved_models.guide):
    return SVI(LINE, guide, numpyro.optim.Adam(0.05), Trace_ELBO())


CASES = {
    "nuts": (LINE, {}, FEW),
    "one chain": (LINE, {}, FEW | {"chains": 1}),
    "gaps": (LINE, {"gap": True}, FEW),
    "kernel": (LINE, {}, FEW | {"method": NUTS(LINE, target_accept_prob=0.9, dense_mass=True)}),
    "mcmc": (
        LINE,
        {},
        {
            "method": MCMC(
                NUTS(LINE), num_warmup=30, num_samples=40, thinning=2, progress_bar=False
            )
        },
    ),
    "svi": (LINE, {}, STEPS | {"method": "svi"}),
    "svi with gaps": (LINE, {"gap": True}, STEPS | {"method": "svi"}),
    "autoguide": (LINE, {}, STEPS | {"method": AutoMultivariateNormal}),
    "laplace guide": (LINE, {}, STEPS | {"method": AutoLaplaceApproximation(LINE)}),
    "low rank": (LINE, {}, STEPS | {"method": AutoLowRankMultivariateNormal(LINE, rank=1)}),
    "by hand": (LINE, {}, STEPS | {"method": own()}),
    "network": (saved_models.network, {}, STEPS | {"method": "svi"}),
    "batches": (LINE, {}, STEPS | {"method": "svi", "batch": {"time": 10}}),
    "batches of locals": (LOCAL, {}, STEPS | {"method": "svi", "batch": {"time": 10}}),
}


def data(gap=False):
    x = np.linspace(-1, 1, 40)
    y = 2 * x + np.random.default_rng(0).normal(size=40)
    y[3] = np.nan if gap else y[3]
    return xr.Dataset({"x": ("time", x), "y": ("time", y)}, {"time": np.arange(40)})


@pytest.fixture(scope="module")
def fits():
    return {
        name: data(**about).aimz.fit(model, **options)
        for name, (model, about, options) in CASES.items()
    }


def test_a_fresh_process_samples_the_same(fits, tmp_path):
    for number, fit in enumerate(fits.values()):
        fit.save(tmp_path / f"{number}.zarr")
    code = SAMPLED.format(tests=str(Path(__file__).parent), count=len(fits), folder=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = {name: fit.sample(20, seed=7).token for name, fit in fits.items()}
    assert dict(zip(fits, done.stdout.split(), strict=True)) == here


@pytest.mark.parametrize("name", ["nuts", "svi", "batches"])
def test_further_draws_are_saved_in_turn(name, fits, tmp_path):
    further = fits[name].sample(20, seed=7)
    further.save(tmp_path / "further.zarr")
    back = xr_aimz.load_fit(tmp_path / "further.zarr", fits[name].model)
    # And what was loaded and not yet drawn from.
    back.save(tmp_path / "again.zarr")
    again = xr_aimz.load_fit(tmp_path / "again.zarr", fits[name].model)
    one, two = further.sample(10, seed=1), again.sample(10, seed=1)
    assert one.token == two.token
    assert one.concerns == two.concerns
    np.testing.assert_array_equal(one.posterior.draw, two.posterior.draw)


def test_a_minibatch_fit_is_continued_exactly(fits, tmp_path):
    options = {"method": "svi", "batch": {"time": 10}, "progress": False}
    options["optimizer"] = numpyro.optim.Adam(0.01)
    half = data().aimz.fit(LINE, steps=100, **options)
    half.save(tmp_path / "half.zarr")
    back = xr_aimz.load_fit(tmp_path / "half.zarr", LINE)
    one = data().aimz.fit(LINE, steps=200, init=half, **options)
    two = data().aimz.fit(LINE, steps=200, init=back, **options)
    assert one.token == two.token
    xr.testing.assert_identical(one.losses, two.losses)


def test_a_guide_by_hand_is_given_or_imported(fits, tmp_path):
    fits["by hand"].save(tmp_path / "fit.zarr")
    bare = xr_aimz.load_fit(tmp_path / "fit.zarr", LINE)
    with pytest.raises(ModelError, match=r"'saved_models:guide'.*method=.*trust_import=True"):
        bare.sample(5)
    given = xr_aimz.load_fit(tmp_path / "fit.zarr", LINE, method=own())
    assert given.sample(5).token == fits["by hand"].sample(5).token

    def other(x, y=None):
        return saved_models.guide(x, y)

    wrong = xr_aimz.load_fit(tmp_path / "fit.zarr", LINE, method=own(other))
    with pytest.raises(ModelError, match="source of method"):
        wrong.sample(5)


def test_a_guide_without_words_is_given(tmp_path):
    guide = AutoNormal(LINE, prefix="own", create_plates=lambda x, y=None: [])
    fit = data().aimz.fit(LINE, method=guide, **STEPS)
    fit.save(tmp_path / "fit.zarr")
    with pytest.raises(OptionError, match=r"made with .AutoNormal.*method="):
        xr_aimz.load_fit(tmp_path / "fit.zarr", LINE).sample(5)
    back = xr_aimz.load_fit(tmp_path / "fit.zarr", LINE, method=guide)
    assert back.sample(5).token == fit.sample(5).token


def test_what_cannot_go_on_says_so(tmp_path):
    fit = data().aimz.fit(LINE, method=SA(LINE), draws=100, warmup=10, chains=1, progress=False)
    fit.save(tmp_path / "fit.zarr")
    back = xr_aimz.load_fit(tmp_path / "fit.zarr", LINE)
    assert back.token == fit.token
    with pytest.raises(OptionError, match="a store keeps the chains of HMC and NUTS"):
        back.sample(5)
    made = data().aimz.from_posterior(LINE, {"slope": np.zeros((1, 3))})
    made.save(tmp_path / "made.zarr")
    with pytest.raises(OptionError, match="there is nothing to draw from"):
        xr_aimz.load_fit(tmp_path / "made.zarr", LINE).sample(5)
