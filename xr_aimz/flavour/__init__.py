"""The MLflow flavour: a fit kept as a model, and asked with tables. See :mod:`xr_aimz.mlflow`."""
