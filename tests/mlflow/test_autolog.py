"""Against a real server with a SQLite backend on loopback, asked by plain HTTP."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from mlflow.data.schema import TensorDatasetSchema
from mlflow.utils.autologging_utils import disable_autologging
from tracking_server import TrackingServer, free_port

import xr_aimz
from xr_aimz.errors import MissingExtraError, OptionError, TrackingWarning

# A server takes some ten seconds to start.
pytestmark = pytest.mark.slow

FAST = {"method": "laplace", "draws": 200}


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


def data():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 50)
    y = 2 * x + rng.normal(size=50)
    return xr.Dataset({"x": ("time", x), "y": ("time", y)}, {"time": np.arange(1970, 2020)})


@pytest.fixture
def ds():
    return data()


@pytest.fixture(scope="module")
def mortal(tmp_path_factory):
    """A server of which tests may do away with what they like; it starts anew on its data."""
    server = TrackingServer(tmp_path_factory.mktemp("mortal"))
    yield server
    server.kill()


def experiment_on(server, request, monkeypatch):
    made = server.ask("experiments/create", name=f"{request.node.name} {time.monotonic_ns()}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", made["experiment_id"])
    return made["experiment_id"]


@pytest.fixture
def experiment(mlflow_server, request, monkeypatch):
    """An experiment of the test's own, into which runs go."""
    yield experiment_on(mlflow_server, request, monkeypatch)
    assert mlflow.active_run() is None


@pytest.fixture
def mortal_experiment(mortal, request, monkeypatch):
    mortal.start()
    yield experiment_on(mortal, request, monkeypatch)
    assert mlflow.active_run() is None


@pytest.fixture
def autolog():
    yield xr_aimz.mlflow.autolog
    xr_aimz.mlflow.autolog(disable=True)


def named(pairs):
    return {pair["key"]: pair["value"] for pair in pairs}


def only(runs):
    assert len(runs) == 1
    return runs[0]


@pytest.fixture(scope="module")
def tracked(mlflow_server):
    """Two fits by NUTS in an experiment of their own, and its id."""
    experiment = mlflow_server.ask("experiments/create", name="two fits")["experiment_id"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
        patch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
        xr_aimz.mlflow.autolog()
        options = {"chains": 2, "warmup": 300, "progress": False}
        fits = [data().aimz.fit(line, draws=n, **options) for n in (600, 601)]
        xr_aimz.mlflow.autolog(disable=True)
    return fits, experiment


def test_the_ui_finds_a_run_by_its_parameters(tracked, mlflow_server):
    (fit, other), experiment = tracked
    where = "params.method = 'nuts' and params.draws = '600' and params.`size.time` = '50'"
    found = only(mlflow_server.search(experiment, where))
    assert found["info"]["run_id"] == fit.lineage["mlflow_run_id"]
    assert found["info"]["run_id"] != other.lineage["mlflow_run_id"]
    assert found["info"]["status"] == "FINISHED"
    # The way that the pages of `mlflow ui` take themselves.
    by_page = mlflow_server.ask_page("runs/search", experiment_ids=[experiment], filter=where)
    assert only(by_page["runs"])["info"]["run_id"] == found["info"]["run_id"]
    assert mlflow_server.search(experiment, "params.draws = '599'") == []


def test_a_run_has_what_the_fit_has(tracked, mlflow_server):
    (fit, _), experiment = tracked
    run = only(mlflow_server.search(experiment, "params.draws = '600'"))
    metrics, tags = named(run["data"]["metrics"]), named(run["data"]["tags"])
    table = fit.diagnostics()
    assert metrics["rhat_max"] == pytest.approx(float(table.slope.sel(diagnostic="rhat")))
    assert metrics["ess_tail_min"] == pytest.approx(float(table.slope.sel(diagnostic="ess_tail")))
    assert metrics["divergences"] == int(table.divergences.sum())
    assert tags["mlflow.autologging"] == "xr_aimz"
    assert tags["xr_aimz.fit"] == fit.token
    assert tags["xr_aimz.version.numpyro"] == numpyro.__version__
    assert tags["xr_aimz.state"] == "logged"

    (given,) = run["inputs"]["dataset_inputs"]
    assert named(given["tags"]) == {"mlflow.data.context": "training"}
    assert given["dataset"]["name"] == "y"
    assert json.loads(given["dataset"]["profile"])["digest_of"] == "content"

    rows = mlflow_server.artifact(run, "posterior.csv").decode().splitlines()
    assert rows[0] == "entry,mean,sd,q0.05,q0.5,q0.95,rhat,ess_bulk,ess_tail"
    mean = float(fit.posterior.slope.mean())
    assert float(rows[1].split(",")[1]) == pytest.approx(mean, rel=1e-4)
    assert mlflow_server.artifact(run, "model.py").decode().startswith("def line(x, y=None):")
    assert mlflow_server.artifact(run, "trace.png").startswith(b"\x89PNG")
    assert b"numpyro==" in mlflow_server.artifact(run, "requirements.txt")
    whole = json.loads(mlflow_server.artifact(run, "fit.json"))
    assert whole["argument"] == {"x": ["x"], "y": ["y"]}


def test_mlflow_reads_the_input_back(ds, mlflow_server, experiment, autolog):
    autolog()
    fit = ds.aimz.fit(line, **FAST)
    run = mlflow.get_run(fit.lineage["mlflow_run_id"])
    dataset = run.inputs.dataset_inputs[0].dataset
    schema = TensorDatasetSchema.from_dict(json.loads(dataset.schema))
    assert schema.targets.input_names() == ["y"]
    assert set(schema.features.input_names()) == {"x", "time"}
    assert mlflow.data.get_source(run.inputs.dataset_inputs[0])._get_source_type() == "code"


def test_the_loss_is_a_metric_by_step(ds, mlflow_server, experiment, autolog):
    autolog()
    fit = ds.aimz.fit(line, method="svi", steps=2500, draws=200, progress=False)
    run = only(mlflow_server.search(experiment))
    points = mlflow_server.history(run, "loss")
    losses = fit.losses.values.astype(float)
    steps = [int(p["step"]) for p in points]
    assert steps == [*range(2, 2500, 3), 2499]
    values = [p["value"] for p in points]
    np.testing.assert_allclose(values[0], losses[:3].mean(), rtol=1e-6)
    np.testing.assert_allclose(values[-1], losses[-1], rtol=1e-6)
    assert "mean of 3 losses" in named(run["data"]["tags"])["xr_aimz.loss"]
    assert mlflow_server.artifact(run, "loss.png").startswith(b"\x89PNG")


def test_losses_that_are_not_finite_are_logged(ds, mlflow_server, experiment):
    fit = ds.aimz.fit(line, method="svi", steps=1000, draws=200, progress=False)
    broken = fit.losses.copy()
    broken[:3] = [np.nan, np.inf, -np.inf]
    xr_aimz.mlflow.log_fit(replace(fit, losses=broken))
    points = mlflow_server.history(only(mlflow_server.search(experiment)), "loss")
    assert len(points) == 1000


def test_results_name_the_run(ds, mlflow_server, experiment, autolog):
    autolog()
    fit = ds.aimz.fit(line, **FAST)
    pred = ds.aimz.predict(fit)
    run = only(mlflow_server.search(experiment))
    assert pred.attrs["mlflow_run_id"] == run["info"]["run_id"]


def test_the_active_run_is_taken_once(ds, mlflow_server, experiment, autolog):
    autolog(extra_tags={"team": "snow"})
    with mlflow.start_run() as active:
        first = ds.aimz.fit(line, **FAST)
        second = ds.aimz.fit(line, **FAST, seed=1)
        assert mlflow.active_run().info.run_id == active.info.run_id
    assert first.lineage["mlflow_run_id"] == active.info.run_id
    assert second.lineage["mlflow_run_id"] != active.info.run_id
    runs = {run["info"]["run_id"]: run for run in mlflow_server.search(experiment)}
    outer, inner = runs.pop(active.info.run_id), only(list(runs.values()))
    assert named(outer["data"]["params"])["seed"] == "0"
    assert "team" not in named(outer["data"]["tags"])
    assert named(inner["data"]["params"])["seed"] == "1"
    tags = named(inner["data"]["tags"])
    assert tags["mlflow.parentRunId"] == active.info.run_id
    assert tags["team"] == "snow"
    assert {outer["info"]["status"], inner["info"]["status"]} == {"FINISHED"}


def test_a_fit_that_fails_leaves_a_failed_run(ds, mlflow_server, experiment, autolog):
    autolog()
    raised = ValueError("of the model's own")

    def breaks(x, y=None):
        raise raised

    with pytest.raises(ValueError, match="own") as caught:
        ds.aimz.fit(breaks)
    assert caught.value is raised
    assert raised.__cause__ is None
    run = only(mlflow_server.search(experiment))
    assert run["info"]["status"] == "FAILED"
    assert named(run["data"]["tags"])["xr_aimz.error"] == "ValueError: of the model's own"


def test_a_fit_that_fails_does_not_end_a_run_of_the_callers(
    ds, mlflow_server, experiment, autolog
):
    autolog()
    with mlflow.start_run() as active:
        with pytest.raises(OptionError):
            ds.aimz.fit(line, method="laplace", chains=3)
        assert mlflow.active_run().info.run_id == active.info.run_id
    run = only(mlflow_server.search(experiment))
    assert run["info"]["status"] == "FINISHED"
    assert named(run["data"]["tags"])["xr_aimz.state"] == "failed"


def test_fits_in_two_threads_have_a_run_each(ds, mlflow_server, experiment, autolog):
    autolog()
    found, together = {}, threading.Barrier(3)

    def work(seed, **options):
        together.wait()
        try:
            found[seed] = ds.aimz.fit(line, seed=seed, **{**FAST, **options})
        except OptionError as error:
            found[seed] = error

    jobs = [(1, {}), (2, {}), (3, {"chains": 2})]
    threads = [threading.Thread(target=work, args=(s,), kwargs=o) for s, o in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = mlflow_server.search(experiment)
    by_seed = {
        named(run["data"].get("params", [])).get("seed", "failed"): run["info"] for run in runs
    }
    assert len(runs) == 3
    assert by_seed["1"]["run_id"] == found[1].lineage["mlflow_run_id"]
    assert by_seed["2"]["run_id"] == found[2].lineage["mlflow_run_id"]
    # One that fails has no part in the others.
    assert isinstance(found[3], OptionError)
    assert [by_seed[s]["status"] for s in ("1", "2", "failed")] == [*["FINISHED"] * 2, "FAILED"]


def test_it_is_turned_off_as_others_are(ds, mlflow_server, experiment, autolog):
    autolog()
    autolog(disable=True)
    assert ds.aimz.fit(line, **FAST).lineage == {}
    autolog(exclusive=True)
    with mlflow.start_run():
        assert ds.aimz.fit(line, **FAST).lineage == {}
    with disable_autologging():
        assert ds.aimz.fit(line, **FAST).lineage == {}
    assert len(mlflow_server.search(experiment)) == 1


# MLflow 3.17 with pandas 3: pandas.errors.Pandas4Warning, of MLflow's own comparison.
@pytest.mark.filterwarnings("ignore:Operation with range is deprecated")
def test_the_fit_itself_is_logged_where_that_is_asked_for(ds, mlflow_server, experiment, autolog):
    name = f"line {experiment}"
    autolog(log_models=True, registered_model_name=name)
    fit = ds.aimz.fit(line, **FAST)
    loaded = xr_aimz.mlflow.load_model(f"models:/{name}/1", model=line)
    assert loaded.token == fit.token
    assert loaded.lineage == fit.lineage
    xr.testing.assert_identical(loaded.posterior, fit.posterior)


def test_less_is_logged_where_less_is_asked_for(ds, mlflow_server, experiment, autolog):
    autolog(log_datasets=False, log_diagnostics=False, log_pictures=False)
    ds.aimz.fit(line, **FAST)
    run = only(mlflow_server.search(experiment))
    assert "metrics" not in run["data"]
    assert "dataset_inputs" not in run.get("inputs", {})
    files = {f["path"] for f in mlflow_server.files(run)}
    assert files == {"fit.json", "model.py", "requirements.txt"}


def test_what_is_logged_of_many_cells_is_bounded(mlflow_server, experiment, autolog):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(12, 2000))
    y[:, :7] = np.nan
    x = np.linspace(-1, 1, 12)
    ds = xr.Dataset({"x": ("time", x), "y": (("time", "cell"), y)})
    autolog()
    ds.aimz.fit(line, per="cell", method="laplace", draws=20)
    run = only(mlflow_server.search(experiment))
    metrics = named(run["data"]["metrics"])
    assert metrics["cells"] == 2000
    assert metrics["cells_no_data"] == 7
    assert metrics["cells_ok"] == 1993
    assert len(metrics) < 15
    assert len(run["data"]["params"]) < 30
    (row,) = mlflow_server.artifact(run, "posterior_variables.csv").decode().splitlines()[1:]
    assert row.startswith("slope,cell,2000,False,")
    assert sum(int(f["file_size"]) for f in mlflow_server.files(run)) < 300_000


def test_a_fit_is_logged_by_hand(ds, mlflow_server, experiment):
    draws = {"slope": np.random.default_rng(0).normal(size=(2, 100))}
    fit = ds.aimz.from_posterior(line, draws)
    logged = xr_aimz.mlflow.log_fit(fit)
    assert fit.lineage == {}
    assert logged.posterior is fit.posterior
    run = only(mlflow_server.search(experiment))
    assert logged.lineage == {"mlflow_run_id": run["info"]["run_id"]}
    assert "mlflow.autologging" not in named(run["data"]["tags"])
    assert named(run["data"]["tags"])["xr_aimz.concerns"] == "not looked for"


def test_a_model_with_long_names_and_values_is_logged(mlflow_server, experiment):
    long = "ä/" * 200 + "site"

    def model(y=None):
        mu = numpyro.sample(long, dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)

    ds = xr.Dataset({"y": ("t" * 300, np.arange(4.0))})
    fit = ds.aimz.fit(model, **FAST)
    xr_aimz.mlflow.log_fit(replace(fit, concerns=("x" * 20_000,), options={"a": "b" * 20_000}))
    run = only(mlflow_server.search(experiment))
    assert named(run["data"]["tags"])["xr_aimz.state"] == "logged"
    assert named(run["data"]["params"])["a"].endswith("b...")


# --- servers that fail ---------------------------------------------------------------------


def test_parameters_that_are_there_stay_and_ours_go_beside_them(
    ds, mlflow_server, experiment, autolog
):
    autolog()
    with mlflow.start_run():
        mlflow.log_params({"seed": "mine", "method": "laplace"})
        fit = ds.aimz.fit(line, **FAST)
    params = named(only(mlflow_server.search(experiment))["data"]["params"])
    assert params["seed"] == "mine"
    assert params["xr_aimz.seed"] == "0"
    assert params["draws"] == "200"
    assert "xr_aimz.method" not in params
    assert "mlflow_run_id" in fit.lineage


def test_tags_that_are_none_cost_a_warning_and_not_the_fit(ds, mlflow_server, experiment, autolog):
    autolog(extra_tags=["team"])
    with pytest.warns(TrackingWarning, match="the start of a run"):
        fit = ds.aimz.fit(line, **FAST)
    assert fit.posterior.sizes["draw"] == 200


def test_a_matplotlib_that_is_broken_costs_a_warning_and_not_the_fit(
    mlflow_server, experiment, tmp_path
):
    broken = "raise ImportError('numpy.core.multiarray failed to import')"
    (tmp_path / "matplotlib.py").write_text(broken)
    script = (
        "import warnings, test_autolog, xr_aimz\n"
        "xr_aimz.mlflow.autolog()\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    fit = test_autolog.data().aimz.fit(test_autolog.line, **test_autolog.FAST)\n"
        "told = [str(w.message) for w in said if w.category.__name__ == 'TrackingWarning']\n"
        "print(fit.posterior.sizes['draw'], 'multiarray failed' in told[0])\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path, str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "200 True"


def test_a_server_that_is_not_there(ds, autolog, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    plain = ds.aimz.fit(line, **FAST)
    autolog()
    before, began = dict(os.environ), time.monotonic()
    with pytest.warns(TrackingWarning, match="refused") as caught:
        fit = ds.aimz.fit(line, **FAST)
    # Twice some two seconds of waiting between requests, and a fit.
    assert time.monotonic() - began < 30
    assert only(caught).filename == __file__
    assert dict(os.environ) == before
    assert fit.token == plain.token
    assert fit.lineage == {}
    assert mlflow.active_run() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autolog(silent=True)
        ds.aimz.fit(line, **FAST)


def test_a_fit_that_fails_without_a_server_has_its_own_error(ds, autolog, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    autolog()
    # Warnings are errors here, and that of the tracking is not the one that comes out.
    with pytest.raises(OptionError, match="chains"):
        ds.aimz.fit(line, method="laplace", chains=3)


def test_a_server_that_dies_under_a_fit(ds, mortal, mortal_experiment, autolog):
    autolog()
    alive = [True]

    def deadly(x, y=None):
        if alive:
            alive.clear()
            mortal.kill()
        line(x, y)

    began = time.monotonic()
    with pytest.warns(TrackingWarning, match="parameters and tags"):
        fit = ds.aimz.fit(deadly, **FAST)
    assert time.monotonic() - began < 60
    assert fit.lineage == {}
    assert float(fit.posterior.slope.mean()) == pytest.approx(2, abs=1)
    assert mlflow.active_run() is None
    mortal.start()
    assert only(mortal.search(mortal_experiment))["info"]["status"] == "RUNNING"
    # And the fit is logged once the server is back.
    again = xr_aimz.mlflow.log_fit(fit)
    where = "params.model = 'deadly'"
    found = only(mortal.search(mortal_experiment, where))
    assert found["info"]["run_id"] == again.lineage["mlflow_run_id"]


def test_a_server_that_comes_while_a_fit_runs(ds, mortal, mortal_experiment, autolog):
    autolog()
    mortal.kill()

    def awaited(x, y=None):
        mortal.start()
        line(x, y)

    # No warning, or it would be an error.
    fit = ds.aimz.fit(awaited, **FAST)
    run = only(mortal.search(mortal_experiment))
    assert run["info"]["run_id"] == fit.lineage["mlflow_run_id"]
    assert run["info"]["status"] == "FINISHED"


def test_a_server_that_dies_half_way_through_the_record(ds, mortal, mortal_experiment):
    draws = np.random.default_rng(0).normal(size=(2, 100))
    posterior = xr.Dataset({"slope": (("chain", "draw"), draws)}).chunk()

    def deadly(block):
        mortal.kill()
        return block

    # Lazy draws: the server dies when the diagnostics look at them, after the parameters.
    lazy = posterior.slope.data.map_blocks(deadly, dtype=float, meta=np.empty((0, 0)))
    fit = ds.aimz.from_posterior(line, posterior.assign(slope=posterior.slope.copy(data=lazy)))
    began = time.monotonic()
    with pytest.warns(TrackingWarning, match="metrics: .*refused.*; not tried after that: .*"):
        logged = xr_aimz.mlflow.log_fit(fit)
    assert time.monotonic() - began < 60
    assert mlflow.active_run() is None
    mortal.start()
    found = only(mortal.search(mortal_experiment, "params.model = 'line'"))
    assert found["info"]["run_id"] == logged.lineage["mlflow_run_id"]
    assert "metrics" not in found["data"]


def test_a_server_that_hangs(ds, mortal, mortal_experiment, autolog, monkeypatch):
    # Whoever sets these has them: three tries of a second, twice.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    autolog()
    mortal.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.warns(TrackingWarning, match="timed out"):
            fit = ds.aimz.fit(line, **FAST)
        assert time.monotonic() - began < 40
    finally:
        mortal.signal(signal.SIGCONT)
    assert fit.lineage == {}


def test_a_disk_that_is_full(ds, mortal, mortal_experiment, autolog):
    autolog()
    with mortal.without_space(), pytest.warns(TrackingWarning, match="50. error responses"):
        fit = ds.aimz.fit(line, **FAST)
    assert float(fit.posterior.slope.mean()) == pytest.approx(2, abs=1)
    assert fit.lineage == {}
    again = ds.aimz.fit(line, **FAST)
    assert (
        only(mortal.search(mortal_experiment))["info"]["run_id"]
        == (again.lineage["mlflow_run_id"])
    )


# --- without MLflow ------------------------------------------------------------------------


def test_without_mlflow_the_extra_is_named(tmp_path):
    """An interpreter that has everything that is installed here, less MLflow."""
    for place in {Path(np.__file__).parents[1], Path(mlflow.__file__).parents[1]}:
        for item in place.iterdir():
            if not item.name.startswith("mlflow") and not (tmp_path / item.name).exists():
                (tmp_path / item.name).symlink_to(item)
    script = (
        "import xr_aimz\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('mlflow') is None\n"
        "try:\n"
        "    xr_aimz.mlflow\n"
        "except ModuleNotFoundError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    path = os.pathsep.join([str(Path(xr_aimz.__file__).parents[1]), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(MissingExtraError.__name__)
    assert 'pip install "xr_aimz[mlflow]"' in done.stdout


def test_the_package_imports_no_mlflow():
    script = "import sys, xr_aimz; assert not [m for m in sys.modules if 'mlflow' in m]"
    subprocess.run([sys.executable, "-c", script], check=True)
