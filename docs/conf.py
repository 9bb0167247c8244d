"""Sphinx builds this: ``python -m sphinx -W -b html docs docs/_build/html``."""

import os
import shutil
from pathlib import Path

import xr_aimz

HERE = Path(__file__).parent

project = "xr_aimz"
author = "The xr_aimz developers"
copyright = author
version = release = xr_aimz.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {
    "description": "NumPyro models on labelled xarray Datasets",
    "fixed_sidebar": True,
    "page_width": "1100px",
}
html_title = "xr_aimz"

# Sphinx reads only what lies below docs/; the notebooks have one home, beside it.
NOTEBOOKS = HERE / "notebooks"
shutil.rmtree(NOTEBOOKS, ignore_errors=True)
shutil.copytree(
    HERE.parent / "notebooks", NOTEBOOKS, ignore=shutil.ignore_patterns(".ipynb_checkpoints")
)

# Not "cache": it looks at a notebook's source, and would show the outputs of an older package.
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_in_temp = True
# tqdm says in a kernel without ipywidgets that it draws its bars as text.
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # docstrings say what a parameter is, in words
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
