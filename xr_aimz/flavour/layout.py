"""What is where in the folder of a saved model."""

__all__ = ["FLAVOUR", "LOADER", "STORE", "TRUST"]

FLAVOUR = "xr_aimz"
LOADER = "xr_aimz.mlflow"
STORE = "fit.zarr.zip"
TRUST = "trust_import"
