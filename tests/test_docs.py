"""The docs build without a warning, name every public name, and their examples are true."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xr_aimz

DOCS = Path(__file__).parents[1] / "docs"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


# One test, since two builds at once would both copy the notebooks.
@pytest.mark.slow
def test_the_pages_build_and_have_every_public_name(tmp_path):
    pytest.importorskip("myst_nb")
    # No notebook is executed: test_notebooks does that.
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    command += ["-D", "nb_execution_mode=off", "-b", "html", "-d", f"{tmp_path}/doctrees"]
    done = subprocess.run(
        [*command, str(DOCS), f"{tmp_path}/html"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    reference = (tmp_path / "html/api.html").read_text("utf8")
    entries = set(re.findall(r'id="(?:module-)?xr_aimz\.([\w.]+)"', reference))
    assert set(xr_aimz.__all__) <= entries
    assert {f"errors.{name}" for name in xr_aimz.errors.__all__} <= entries

    notebooks = {path.stem for path in (DOCS.parent / "notebooks").glob("*.ipynb")}
    assert notebooks == {path.stem for path in (tmp_path / "html/notebooks").glob("*.html")}


def modules():
    found = pkgutil.walk_packages(xr_aimz.__path__, "xr_aimz.")
    return sorted(m.name for m in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name):
    # By name from sys.modules: an attribute of the package may be a function of that name.
    importlib.import_module(name)
    failed, _ = doctest.testmod(sys.modules[name], optionflags=FLAGS)
    assert not failed


def test_some_docstrings_have_examples():
    importlib.import_module("xr_aimz.fits.fitting")
    finder = doctest.DocTestFinder()
    assert any(test.examples for test in finder.find(sys.modules["xr_aimz.fits.fitting"]))


@pytest.mark.slow
@pytest.mark.parametrize("page", ["concepts", "effects"])
def test_examples_in_pages(page):
    failed, attempted = doctest.testfile(
        str(DOCS / f"{page}.md"), module_relative=False, optionflags=FLAGS, encoding="utf8"
    )
    assert attempted > 10
    assert not failed


@pytest.mark.parametrize("name", xr_aimz.__all__)
def test_every_public_name_says_what_it_is(name):
    assert inspect.getdoc(getattr(xr_aimz, name))
