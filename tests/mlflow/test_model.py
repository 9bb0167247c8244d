"""A fit as an MLflow model in a folder: what is in it, and whose code runs."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
import yaml

import xr_aimz
from xr_aimz.errors import DamagedStoreError, MissingExtraError, ModelError, OptionError

os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
mlflow = pytest.importorskip("mlflow")
pytest.importorskip("mlflow.pyfunc")

# MLflow 3.17 with pandas 3: pandas.errors.Pandas4Warning, of MLflow's own comparison.
pytestmark = pytest.mark.filterwarnings("ignore:Operation with range is deprecated")

# Says so in a file when it is imported.
MODEL = """
from pathlib import Path

import numpyro
import numpyro.distributions as dist

Path(__file__).with_name("imported").touch()


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)
"""
SAVED = {"pip_requirements": ["xr_aimz"], "input_example": False}


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 30)
    return xr.Dataset(
        {"x": ("time", x), "y": ("time", 2 * x + rng.normal(size=30))}, {"time": np.arange(30)}
    )


@pytest.fixture(scope="module")
def fit(data):
    return data.aimz.fit(line, method="laplace", draws=400)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, data):
    """A model saved by someone else: its module is nowhere that this process looks."""
    place = tmp_path_factory.mktemp("foreign")
    (place / "foreign_line.py").write_text(MODEL)
    script = f"""
import sys; sys.path.insert(0, {str(place)!r})
import numpy as np, xarray as xr, xr_aimz, foreign_line
from xr_aimz.mlflow import save_model
x = np.linspace(-1, 1, 30)
ds = xr.Dataset({{"x": ("time", x), "y": ("time", 2 * x)}}, {{"time": np.arange(30)}})
fit = ds.aimz.fit(foreign_line.line, method="laplace", draws=400)
save_model(fit, {str(place / "model")!r}, code_paths=[{str(place / "foreign_line.py")!r}],
           trust_import=True, pip_requirements=["xr_aimz"])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    return place / "model"


def ran(foreign):
    return list(foreign.rglob("imported"))


@pytest.mark.slow
def test_nobodys_code_runs_unasked(foreign):
    assert not ran(foreign)
    path = list(sys.path)
    # What the saved model says of itself, that it may be imported, is not looked at here.
    with pytest.raises(ModelError, match="foreign_line:line"):
        xr_aimz.mlflow.load_model(foreign)
    assert sys.path == path
    for told in (False, "false", "true", 1):
        with pytest.raises(ModelError, match="MLFLOW_PYFUNC_INFERENCE_CONFIG"):
            mlflow.pyfunc.load_model(str(foreign), model_config={"trust_import": told})
    assert not ran(foreign)
    assert "foreign_line" not in sys.modules


@pytest.mark.slow
def test_code_runs_where_someone_says_so(foreign):
    # In a process of its own, which then knows the model's module.
    script = (
        "import sys, xr_aimz\n"
        f"fit = xr_aimz.mlflow.load_model({str(foreign)!r}, trust_import=True)\n"
        "assert fit.model.__module__ == 'foreign_line'\n"
        "import mlflow, pandas as pd\n"
        f"served = mlflow.pyfunc.load_model({str(foreign)!r})\n"
        "print(served.predict(pd.DataFrame({'time': [3], 'x': [0.5]})).y_mean[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True, text=True
    )
    assert abs(float(done.stdout.split()[-1]) - 1.0) < 0.3


def test_a_model_given_by_hand_needs_no_trust(fit, data, tmp_path):
    xr_aimz.mlflow.save_model(fit, tmp_path / "model", **SAVED)
    found = xr_aimz.mlflow.load_model(tmp_path / "model", line)
    xr.testing.assert_identical(
        data.aimz.predict(found).drop_attrs().compute(),
        data.aimz.predict(fit).drop_attrs().compute(),
    )


def test_nothing_in_the_folder_is_a_pickle(fit, tmp_path):
    folder = tmp_path / "model"
    xr_aimz.mlflow.save_model(fit, folder, pip_requirements=["xr_aimz"])
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert not [f for f in files if f.suffix in (".pkl", ".pickle", ".joblib")]
    with zipfile.ZipFile(folder / "fit.zarr.zip") as archive:
        # A tree of Zarr: metadata, and chunks by their place in an array.
        assert all(re.fullmatch(r"(.+/)?(zarr.json|c(/\d+)*)", n) for n in archive.namelist())
    described = yaml.safe_load((folder / "MLmodel").read_text())
    python = described["flavors"]["python_function"]
    assert python["loader_module"] == "xr_aimz.mlflow"
    assert python["config"] == {"trust_import": False}
    assert described["flavors"]["xr_aimz"]["data"] == "fit.zarr.zip"
    assert (folder / "requirements.txt").read_text().split()[-1] == "xr_aimz"


def test_a_damaged_store_is_refused(fit, tmp_path):
    xr_aimz.mlflow.save_model(fit, tmp_path / "model", **SAVED)
    store = tmp_path / "model/fit.zarr.zip"
    with zipfile.ZipFile(store) as archive:
        files = {n: archive.read(n) for n in archive.namelist()}
    lacking = {n: b for n, b in files.items() if n != "posterior/slope/c/0/0"}
    assert lacking != files
    for changed, named in [
        (lacking, "'posterior/slope' lacks 1"),
        ({**files, "../../outside": b"x"}, r"\.\./outside"),
        ({"other": b"{}"}, "Zarr group"),
    ]:
        with zipfile.ZipFile(store, "w") as archive:
            for name, content in changed.items():
                archive.writestr(name, content)
        with pytest.raises(DamagedStoreError, match=named):
            xr_aimz.mlflow.load_model(tmp_path / "model", line)
    store.write_bytes(b"no zip")
    with pytest.raises(DamagedStoreError, match="no zip file"):
        xr_aimz.mlflow.load_model(tmp_path / "model", line)
    assert not list(tmp_path.parent.glob("outside"))


def test_signature_and_example_are_those_of_the_binding(fit, tmp_path):
    folder = tmp_path / "model"
    xr_aimz.mlflow.save_model(
        fit, folder, pip_requirements=["xr_aimz"], defaults={"quantiles": [0.1], "draws": 50}
    )
    saved = mlflow.models.Model.load(str(folder))
    signature = saved.signature
    assert [(c.name, c.type.name) for c in signature.inputs] == [("time", "long"), ("x", "double")]
    assert signature.outputs.input_names() == ["y_mean", "y_std", "y_quantile[0.1]"]
    params = {p.name: p.default for p in signature.params}
    assert params["quantiles"] == [0.1]
    assert params["draws"] == 50
    assert params["seed"] == 0
    example = saved.load_input_example(str(folder))
    pd.testing.assert_frame_equal(example, xr_aimz.mlflow.input_example(fit))


def test_what_cannot_be_is_refused_before_anything_is_written(fit, data, tmp_path):
    folder = tmp_path / "model"

    def inner(x, y=None):
        line(x, y)

    local = data.aimz.fit(inner, method="laplace", draws=400)
    with pytest.raises(ModelError, match="code_paths"):
        xr_aimz.mlflow.save_model(local, folder, trust_import=True)
    with pytest.raises(OptionError, match="quantile'"):
        xr_aimz.mlflow.save_model(fit, folder, defaults={"quantile": [0.5]})
    with pytest.raises(OptionError, match="infer_signature"):
        xr_aimz.mlflow.save_model(fit, folder, defaults={"draws": 5}, signature=False)
    with pytest.raises(OptionError, match="registered_model_name"):
        xr_aimz.mlflow.log_model(fit, alias="best")
    with pytest.raises(ValueError, match="Only one of"):
        xr_aimz.mlflow.save_model(fit, folder, conda_env={}, pip_requirements=["xr_aimz"])
    assert not folder.exists()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        {"conda_env": "none.yml", "pip_requirements": None},
        {"pip_requirements": "-r none.txt"},
        {"code_paths": ["none.py"]},
        {"extra_files": ["/none"]},
        {"metadata": {"a": object()}},
        {"input_example": object()},
    ],
)
def test_a_model_that_cannot_be_saved_whole_leaves_nothing(fit, tmp_path, there, wrong):
    folder = tmp_path / "models" / "model"
    if there:
        folder.mkdir(parents=True)
    with pytest.raises(Exception):  # noqa: B017, PT011 # MLflow's own, of many classes.
        xr_aimz.mlflow.save_model(fit, folder, signature=False, **{**SAVED, **wrong})
    assert folder.exists() == there
    assert list((tmp_path / "models").rglob("*")) == ([folder] if there else [])
    xr_aimz.mlflow.save_model(fit, folder, signature=False, **SAVED)
    assert xr_aimz.mlflow.load_model(folder, line).token == fit.token
    assert sorted(f.name for f in folder.iterdir()) == [
        "MLmodel",
        "conda.yaml",
        "fit.zarr.zip",
        "python_env.yaml",
        "requirements.txt",
    ]


# MLflow does not close what it looks into the folder with.
@pytest.mark.filterwarnings("ignore:unclosed scandir iterator:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_that_holds_something_is_left_alone(fit, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(mlflow.MlflowException, match="not empty"):
        xr_aimz.mlflow.save_model(fit, tmp_path, signature=False, **SAVED)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def mean_of_all(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(slope * (x - x.mean()), 1), obs=y)


@pytest.mark.slow
def test_a_model_that_couples_rows_is_kept_but_not_served(data, tmp_path):
    fit = data.aimz.fit(mean_of_all, method="laplace", draws=400)
    with pytest.raises(ModelError, match="couples cells"):
        xr_aimz.mlflow.save_model(fit, tmp_path / "model", **SAVED)
    xr_aimz.mlflow.save_model(fit, tmp_path / "model", signature=False, **SAVED)
    assert xr_aimz.mlflow.load_model(tmp_path / "model", mean_of_all).token == fit.token


@pytest.mark.slow
def test_requirements_are_what_the_model_imports(foreign, tmp_path):
    # In a process that can import the model, whose own requirements are looked for in another.
    script = f"""
import sys; sys.path.insert(0, {str(foreign.parent)!r})
import xr_aimz, foreign_line
fit = xr_aimz.mlflow.load_model({str(foreign)!r}, foreign_line.line)
xr_aimz.mlflow.save_model(fit, {str(tmp_path / "model")!r}, extra_pip_requirements=["einops"],
    code_paths=[{str(foreign.parent / "foreign_line.py")!r}])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    found = (tmp_path / "model/requirements.txt").read_text().split()
    names = {line.partition("=")[0] for line in found}
    assert {"xr_aimz", "jax", "numpyro", "zarr", "mlflow", "einops"} <= names
    conda = yaml.safe_load((tmp_path / "model/conda.yaml").read_text())
    assert "einops" in json.dumps(conda)


def test_without_mlflow_the_extra_is_named():
    script = (
        "import sys; sys.modules['mlflow'] = None\n"
        "import xr_aimz\n"
        "try: xr_aimz.mlflow\n"
        "except ModuleNotFoundError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert MissingExtraError.__name__ in done.stdout
    assert 'pip install "xr_aimz[mlflow]"' in done.stdout
    assert Path(xr_aimz.__file__).parent.name == "xr_aimz"
