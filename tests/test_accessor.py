"""``Dataset.aimz``: methods with the signatures of the functions, into which each is one call."""

import inspect

import pytest
import xarray as xr

import xr_aimz
from xr_aimz.accessor import AimzAccessor

METHODS = sorted(name for name in vars(AimzAccessor) if not name.startswith("_"))


def test_every_function_of_a_dataset_is_a_method():
    functions = {name: getattr(xr_aimz, name) for name in xr_aimz.__all__}
    of_a_dataset = {
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and "ds" in inspect.signature(function).parameters
    }
    assert set(METHODS) == of_a_dataset


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_signature_of_its_function(name):
    method, function = getattr(AimzAccessor, name), getattr(xr_aimz, name)
    first, *rest = inspect.signature(function).parameters.values()
    itself, *own = inspect.signature(method).parameters.values()
    assert (first.name, itself.name) == ("ds", "self")
    assert own == rest
    assert inspect.signature(method).return_annotation == (
        inspect.signature(function).return_annotation
    )
    assert inspect.getdoc(method).endswith(f"See :func:`xr_aimz.{name}`.")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_passes_every_argument_on(name, monkeypatch):
    method, function = getattr(AimzAccessor, name), getattr(xr_aimz, name)
    folder = inspect.getmodule(function).__name__.rpartition(".")[0]
    calls = []
    monkeypatch.setattr(f"{folder}.{name}", lambda *args, **kwargs: calls.append((args, kwargs)))
    ds = xr.Dataset()
    _, *own = inspect.signature(method).parameters.values()
    args = [f"the {p.name}" for p in own if p.kind is not p.KEYWORD_ONLY]
    kwargs = {p.name: f"the {p.name}" for p in own if p.kind is p.KEYWORD_ONLY}
    getattr(ds.aimz, name)(*args, **kwargs)
    [(passed, options)] = calls
    assert passed[0] is ds
    assert [*passed[1:]] == args
    assert options == kwargs
