"""A Fit and a Dataset to a lazy Dataset.

Results have dims ``(chain, draw, *observation dims, *event dims)``, scenarios after draw, or
statistics in place of chains and draws; one dask task for each block, nothing computed.
"""

from xr_aimz.prediction.checks import check_split_along
from xr_aimz.prediction.chunk_plan import ChunkPlan
from xr_aimz.prediction.conditioning import Condition
from xr_aimz.prediction.effects import intervene
from xr_aimz.prediction.new_labels import check_posterior
from xr_aimz.prediction.predictive import log_likelihood, predict, prior_predictive
from xr_aimz.prediction.recursion import Dependence
from xr_aimz.prediction.request import PredictionRequest, build_result, prepare, result_attrs
from xr_aimz.prediction.spec import Prediction, Tracer
from xr_aimz.prediction.statistics import summary

__all__ = [
    "ChunkPlan", "Condition", "Dependence", "Prediction", "PredictionRequest", "Tracer",
    "build_result", "check_posterior", "check_split_along", "intervene", "log_likelihood",
    "predict", "prepare", "prior_predictive", "result_attrs", "summary",
]  # fmt: skip
