"""A fit as MLflow's generic model: a table goes in, a table comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from xr_aimz.errors import DtypeError, MissingValueError
from xr_aimz.flavour.answers import draws_table, summary_table
from xr_aimz.flavour.asking import asked_for
from xr_aimz.flavour.columns import columns_of
from xr_aimz.flavour.served import Memory, answer
from xr_aimz.flavour.tables import datasets
from xr_aimz.posterior import Fit

__all__ = ["Predictor"]

_SHOWN = 3


class Predictor:
    """Answers tables with a fit; the model behind ``mlflow.pyfunc.load_model``.

    Threads may share one. The first request of a size compiles; those of up to twice as many
    rows often run the same program.

    Parameters
    ----------
    fit : Fit
    """

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        self.columns = columns_of(fit)
        self._memory = Memory()

    def get_raw_model(self) -> Fit:
        """The fit."""
        return self.fit

    def predict(
        self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Predictions for the rows of a table.

        Parameters
        ----------
        model_input : pandas.DataFrame
            A row for each cell, in any order: a column for each observation dimension, with
            its labels, and one for each variable that the model takes; other columns are left
            alone. Where the fit had one dimension without labels, its column may be left out,
            and the rows' positions are their labels.
        params : mapping, optional
            ``summary``, a list of statistics as in :func:`xr_aimz.summary`, by default
            ``["mean", "std"]``; ``quantiles``, by default ``[0.05, 0.5, 0.95]``; ``returns``,
            ``"summary"`` or ``"draws"``; and ``draws``, ``seed``, ``sites``, ``new_labels``, as
            in :func:`xr_aimz.predict`; ``do``, JSON of numbers by name, or of scenarios of
            these.

        Returns
        -------
        pandas.DataFrame
            The rows asked for, in their order, with their index: ``tas_mean``, ``tas_std``,
            ``tas_quantile[0.05]``, named as ``predict(..., summary=...)`` names them, with the
            labels of further dimensions in brackets. With ``returns="draws"`` a row for each
            draw of each row, with columns ``row`` (counted from 0), ``chain`` and ``draw``.
            Floats are float32 unless JAX is told otherwise.

        Raises
        ------
        MissingVariableError, LabelError, DtypeError, DimensionError
            A column that is missing, or holds what it cannot.
        MissingValueError
            A row lacks a value, and an outcome of ints or bools has none for that.
        OptionError, InterventionError
            A parameter that cannot be.
        ModelError
            The model couples rows.
        """
        if not isinstance(model_input, pd.DataFrame):
            raise DtypeError(
                f"a {type(model_input).__name__} was given; give a pandas DataFrame with columns "
                f"{list(self.columns.required)!r}"
            )
        wanted = asked_for(params)
        results = (
            (piece, answer(ds, self.fit, wanted, self._memory))
            for piece, ds in datasets(model_input, self.columns, self.fit.constant_data)
        )
        try:
            if wanted.draws:
                return draws_table(results, len(model_input))
            return summary_table(results, model_input.index)
        except MissingValueError as error:
            raise self._told_of_rows(model_input, error) from error

    def _told_of_rows(self, table: pd.DataFrame, error: MissingValueError) -> MissingValueError:
        """The same for someone who has a table, and no Dataset to fill."""
        own = [c for v in self.columns.variables for c in v.columns if c in table]
        gaps = table[own].isna()
        rows = np.flatnonzero(gaps.any(axis=1)).tolist()
        if not rows:
            return error
        there = [c for c in own if gaps[c].any()]
        return MissingValueError(
            f"rows {rows[:_SHOWN]!r} of the table ({len(rows)} in all) have no value in columns "
            f"{there!r}, and an outcome of ints or bools has no missing value to answer with: "
            "leave those rows out; or give them any number and drop their answers; or ask for "
            "other outcomes, sites=[...]"
        )
