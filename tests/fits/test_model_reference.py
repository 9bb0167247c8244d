"""A model is told by its path and source, and found again by the same."""

import functools
import sys

import pytest
import saved_models

from xr_aimz.errors import ModelError
from xr_aimz.fits.configuration import model_reference, resolve_model


def test_a_function_of_a_module_has_a_path():
    found = model_reference(saved_models.line)
    assert found["path"] == "saved_models:line"
    assert found["source"].startswith("def line(x, y=None):")
    assert len(found["sha256"]) == 64


def test_what_cannot_be_imported_has_none():
    def inner(x, y=None):
        return x

    class Model:
        def __call__(self, x, y=None):
            return x

    for model in (inner, lambda x: x, Model(), functools.partial(saved_models.line, y=1)):
        assert model_reference(model)["path"] is None
        assert model_reference(model)["sha256"] is not None
    wrapped = functools.wraps(saved_models.line)(inner)
    assert model_reference(wrapped)["path"] is None, "the path leads to another function"


def test_partials_differ_by_what_is_given():
    one, two = (functools.partial(saved_models.line, y=y) for y in (1, 2))
    assert model_reference(one)["sha256"] != model_reference(two)["sha256"]


def test_indentation_is_no_difference():
    def make():
        def model(x, y=None):
            return x

        return model

    assert model_reference(make())["source"].startswith("def model")


def test_a_model_without_source_is_not_compared():
    space = {}
    exec("def model(x, y=None): pass", space)
    spec = model_reference(space["model"])
    assert spec["sha256"] is None
    assert resolve_model(spec, saved_models.line, trust_import=False) is saved_models.line


def test_a_model_that_changed_is_found_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    home = tmp_path / "changing_model.py"
    home.write_text("import numpyro\ndef model(x):\n    return x\n")
    import changing_model

    spec = model_reference(changing_model.model)
    assert resolve_model(spec, None, trust_import=True) is changing_model.model
    del sys.modules["changing_model"]
    home.write_text("import numpyro\ndef model(x):\n    return x + 1  # another\n")
    with pytest.raises(ModelError, match=r"sha256 is '\w+', and 'model' of the fit had '\w+'"):
        resolve_model(spec, None, trust_import=True)
    home.unlink()
    del sys.modules["changing_model"]
    with pytest.raises(ModelError, match="importing 'changing_model' failed"):
        resolve_model(spec, None, trust_import=True)
