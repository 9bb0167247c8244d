"""Settings: global or for a block, checked when they are set."""

import os
import subprocess
import sys

import pytest

import xr_aimz
from xr_aimz import errors
from xr_aimz.options import shows_progress


@pytest.fixture(autouse=True)
def restored():
    before = xr_aimz.get_options()
    yield
    xr_aimz.set_options(**before)


class Terminal:
    """A stream that says where it leads."""

    def __init__(self, answer):
        self.answer = answer

    def isatty(self):
        return self.answer


def test_options_hold_for_good():
    xr_aimz.set_options(block_bytes=1024)
    assert xr_aimz.get_options()["block_bytes"] == 1024


def test_options_hold_for_a_block_and_nest():
    before = xr_aimz.get_options()
    with xr_aimz.set_options(block_bytes=10):
        with xr_aimz.set_options(block_bytes=20, progress=True):
            assert xr_aimz.get_options() == {**before, "block_bytes": 20, "progress": True}
        assert xr_aimz.get_options() == {**before, "block_bytes": 10}
    assert xr_aimz.get_options() == before


def test_options_come_back_after_an_error():
    before = xr_aimz.get_options()
    with pytest.raises(ZeroDivisionError), xr_aimz.set_options(block_bytes=10):
        raise ZeroDivisionError
    assert xr_aimz.get_options() == before


def test_what_is_handed_out_is_a_copy():
    xr_aimz.get_options()["block_bytes"] = 1
    assert xr_aimz.get_options()["block_bytes"] != 1


def test_an_unknown_option_is_refused_with_those_there_are():
    with pytest.raises(
        errors.OptionError, match=r"'block_byte'.*'block_bytes', 'compile_cache', 'progress'"
    ):
        xr_aimz.set_options(block_byte=1)


@pytest.mark.parametrize("value", [0, -1, 1.5, "1 GiB", None, True])
def test_a_block_has_a_number_of_bytes(value):
    with pytest.raises(errors.OptionError, match="block_bytes") as caught:
        xr_aimz.set_options(block_bytes=value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", ["yes", 2, "bar"])
def test_progress_is_yes_no_or_as_it_comes(value):
    with pytest.raises(errors.OptionError, match="progress") as caught:
        xr_aimz.set_options(progress=value)
    assert repr(value) in str(caught.value)


def test_one_bad_option_sets_none():
    before = xr_aimz.get_options()
    with pytest.raises(errors.OptionError):
        xr_aimz.set_options(block_bytes=99, progress="maybe")
    assert xr_aimz.get_options() == before


def test_progress_is_shown_as_asked_then_as_set_then_where_a_person_looks(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal(True))
    assert shows_progress(None)
    assert not shows_progress(False)
    with xr_aimz.set_options(progress=False):
        assert not shows_progress(None)
        assert shows_progress(True)
    monkeypatch.setattr(sys, "stderr", Terminal(False))
    assert not shows_progress(None)
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert shows_progress(None)


IN_ANOTHER_PROCESS = """
import sys, numpy as np, xarray as xr, xr_aimz
if sys.argv[2] == "late":
    import jax.numpy as jnp
    jnp.arange(3.0).sum()  # JAX has looked for a folder, and found none
import numpyro, numpyro.distributions as dist

def model(x, y=None):
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

ds = xr.Dataset({"x": ("time", np.arange(5.0))})
with xr_aimz.set_options(compile_cache=sys.argv[1]):
    print(float(ds.aimz.prior_predictive(model, draws=2, dim="time").y.sum()))
import jax
print(jax.config.jax_compilation_cache_dir)
print(jax.config.jax_persistent_cache_min_compile_time_secs)
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_compiled_programs_are_kept_for_the_next_process(when, tmp_path):
    folder = tmp_path / "new" / "folder"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}

    def run():
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(folder), when]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return done.stdout.splitlines(), {f.name for f in folder.iterdir() if "-cache" in f.name}

    printed, kept = run()
    assert any("mapped" in name for name in kept), kept
    assert printed[1:] == ["None", "1.0"]  # as it was before
    assert run() == (printed, kept)  # the next process compiles nothing new
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    environment |= own | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3"}
    assert run()[0] == [printed[0], str(tmp_path / "own"), "3.0"]


def test_a_compile_cache_is_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", 3, "", "gs://bucket/folder"):
        with pytest.raises(errors.OptionError, match=r"compile_cache=.*no folder"):
            xr_aimz.set_options(compile_cache=wrong)
    assert xr_aimz.get_options()["compile_cache"] is None
