"""Draw from the posterior of a model, given arrays for its arguments.

A model and its arrays come in; draws of each latent site over ``(chain, draw, ...)`` come out, by
MCMC, SVI, Stein, Laplace, in batches, or for every cell of ``per``.
"""

from xr_aimz.inference.local_params import check_batch_model
from xr_aimz.inference.mcmc import continuation, init_strategy, sampler_for
from xr_aimz.inference.methods import make_cell_inference, make_inference, retarget
from xr_aimz.inference.minibatch import restore_minibatch
from xr_aimz.inference.minibatch_data import batch_sizes
from xr_aimz.inference.missing import (
    cells_with_missing,
    mask_model,
    prepare_masked,
    sample_missing,
)
from xr_aimz.inference.per_cell import CellStore, InMemoryCells, fit_cells, plan_cell_fits
from xr_aimz.inference.per_cell_program import FLAGS, CellMethod
from xr_aimz.inference.per_cell_store import ZarrCells
from xr_aimz.inference.problem import (
    CHAINS,
    DRAWN,
    LEARNING_RATE,
    STEPPED,
    InferenceProblem,
    PosteriorDraws,
    PreviousFit,
    SamplerState,
    SavedSampler,
)
from xr_aimz.inference.variational import (
    LEAST_STEPS,
    VISIBLE_NATS,
    few_steps_concern,
    restore_guide,
)

__all__ = [
    "CHAINS", "DRAWN", "FLAGS", "LEARNING_RATE", "LEAST_STEPS", "STEPPED", "VISIBLE_NATS",
    "CellMethod", "CellStore", "InMemoryCells", "InferenceProblem", "PosteriorDraws",
    "PreviousFit", "SamplerState", "SavedSampler", "ZarrCells", "batch_sizes",
    "cells_with_missing", "check_batch_model", "continuation", "few_steps_concern",
    "fit_cells", "init_strategy", "make_cell_inference", "make_inference", "mask_model",
    "plan_cell_fits", "prepare_masked", "restore_guide", "restore_minibatch", "retarget",
    "sample_missing", "sampler_for",
]  # fmt: skip
