"""Writes pins.json: prior draws of ordinary models, and the names of their graphs.

A test holds every later version to it. Written anew when draws change on purpose, which the
changelog says.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import ordinary_models

MODELS = (
    "baseball",
    "bnn",
    "horseshoe",
    "ar2",
    "local_level",
    "hsgp",
    "mixture",
    "zero_inflated",
    "ordered",
    "multinomial",
    "mvn_lkj",
    "effects_mvn",
    "truncated",
    "beta",
    "rw_local",
    "studentt",
)


def pin(name):
    """Draws at the first and last cells, and the names of the lazy variables."""
    model, split, options = ordinary_models.MODELS[name]
    ds = ordinary_models.DS.chunk(dict.fromkeys(split, 3))
    pred = ds.aimz.prior_predictive(model, draws=2, seed=11, **options)
    corners = pred.isel({d: [0, -1] for d in pred.dims if d in ("time", "lat")})
    return {
        "draws": {str(n): np.asarray(a, float).ravel().tolist() for n, a in corners.items()},
        "names": {str(n): a.data.name for n, a in pred.items()},
    }


if __name__ == "__main__":
    pins = {"jax": jax.__version__, "models": {name: pin(name) for name in MODELS}}
    pins["checked"] = ordinary_models.names_of_checked()
    Path(__file__).with_name("pins.json").write_text(json.dumps(pins, indent=1) + "\n")
