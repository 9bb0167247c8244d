"""A registered model on a real server answers as ``predict`` does, over HTTP.

One tracking server (SQLite), one registered model and one scoring server serve all tests here;
all three are processes of their own on the loopback, ended with the module.
"""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import xr_aimz

os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
mlflow = pytest.importorskip("mlflow")
pytest.importorskip("mlflow.pyfunc")

pytestmark = [
    pytest.mark.slow,
    # MLflow 3.17 with pandas 3: pandas.errors.Pandas4Warning, of MLflow's own comparison.
    pytest.mark.filterwarnings("ignore:Operation with range is deprecated"),
]

MODEL = """
import numpyro
import numpyro.distributions as dist

import xr_aimz


def melting(warmth, forcing, melt=None):
    with xr_aimz.plate("site"):
        rate = numpyro.sample("rate", dist.HalfNormal(10))
    with xr_aimz.plate("time"), xr_aimz.plate("site"):
        numpyro.sample("melt", dist.Normal(rate * warmth + forcing, 1), obs=melt)
"""
STATISTICS = ("mean", "std", 0.05, 0.5, 0.95)
# The answer is float32 in decimal digits, from a program for another size of block.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PATIENCE = 180


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def running(command, url, log, **environment):
    """A server that has answered once; the caller ends it."""
    # MLflow starts its own tools by name, and a virtual environment need not be activated.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, **environment},
            # It has children of its own, which are ended with it.
            start_new_session=True,
        )
    for _ in range(PATIENCE * 5):
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return server
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    end(server)
    raise AssertionError(f"{command} did not answer:\n{log.read_text()[-4000:]}")


def end(server):
    if server.poll() is None:
        os.killpg(server.pid, 15)
    try:
        server.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, 9)
        server.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    warmth = rng.uniform(0, 8, (9, 6))
    return xr.Dataset(
        {
            "warmth": (("time", "site"), warmth, {"units": "degC"}),
            "forcing": ("time", np.linspace(0, 1, 9)),
            "melt": (("time", "site"), 3 * warmth + rng.normal(size=(9, 6))),
        },
        {"time": pd.date_range("2000-01-01", periods=9, freq="YS"), "site": list("abcdef")},
    )


@pytest.fixture(scope="module")
def fit(place, data):
    (place / "melt_model.py").write_text(MODEL)
    sys.path.insert(0, str(place))
    try:
        model = importlib.import_module("melt_model").melting
    finally:
        sys.path.remove(str(place))
    return data.aimz.fit(model, method="laplace", draws=600)


@pytest.fixture(scope="module")
def tracking(place):
    port = free_port()
    store = f"sqlite:///{place}/mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", store, "--workers", "1"]
    command += ["--artifacts-destination", str(place / "artifacts")]
    url = f"http://127.0.0.1:{port}"
    server = running(command, f"{url}/health", place / "tracking.log")
    yield url
    end(server)


@pytest.fixture(scope="module")
def registered(place, tracking, fit):
    """The URI of the registered model, by its alias."""
    # By the environment: what mlflow.set_tracking_uri sets would stay for other tests.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracking)
        with mlflow.start_run() as run:
            info = xr_aimz.mlflow.log_model(
                fit,
                registered_model_name="melt",
                alias="champion",
                code_paths=[str(place / "melt_model.py")],
                trust_import=True,
                pip_requirements=["xr_aimz"],
            )
        yield "models:/melt@champion", info, run.info.run_id


@pytest.fixture(scope="module")
def served(place, tracking, registered):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", registered[0], "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    # The model's code comes from the registry: it is in no folder that the server looks into.
    log = place / "scoring.log"
    server = running(command, f"{url}/ping", log, MLFLOW_TRACKING_URI=tracking)
    yield url
    end(server)


def post(url, body):
    request = urllib.request.Request(
        f"{url}/invocations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return pd.DataFrame(json.load(response)["predictions"])


def refusal(url, body):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, body)
    return caught.value.code, json.load(caught.value)["message"]


@pytest.fixture(scope="module")
def table(data):
    table = data.drop_vars("melt").to_dataframe().reset_index()
    return table.assign(time=table.time.dt.strftime("%Y-%m-%d"))


def split(table):
    return {"dataframe_split": table.to_dict(orient="split", index=False)}


def records(table):
    return {"dataframe_records": table.to_dict(orient="records")}


def at(pred, table):
    return pred.compute().sel(
        time=xr.DataArray(pd.to_datetime(table.time), dims="row"),
        site=xr.DataArray(table.site.to_numpy(), dims="row"),
    )


def assert_answers(answer, pred, quantiles=(0.05, 0.5, 0.95)):
    np.testing.assert_allclose(answer["melt_mean"], pred.melt_mean, **CLOSE)
    np.testing.assert_allclose(answer["melt_std"], pred.melt_std, **CLOSE)
    for q in quantiles:
        found = answer[f"melt_quantile[{q}]"]
        np.testing.assert_allclose(found, pred.melt_quantile.sel(quantile=q), **CLOSE)


def test_a_registered_model_answers_as_predict_does(served, data, fit, table):
    pred = at(data.aimz.predict(fit, summary=STATISTICS), table)
    assert_answers(post(served, split(table)), pred)
    some = table.sample(7, random_state=0)
    assert_answers(post(served, records(some)), pred.isel(row=some.index.to_numpy()))


def test_parameters_go_over_http(served, data, fit, table):
    params = {"draws": 200, "quantiles": [0.1, 0.9], "seed": 5, "do": '{"warmth": 4.0}'}
    pred = data.aimz.predict(
        fit, draws=200, seed=5, do={"warmth": 4.0}, summary=("mean", "std", 0.1, 0.9)
    )
    answer = post(served, {**split(table.head(8)), "params": params})
    assert_answers(answer, at(pred, table.head(8)), (0.1, 0.9))


def test_draws_come_over_http(served, data, fit, table):
    params = {"returns": "draws", "draws": 3}
    answer = post(served, {**records(table.head(2)), "params": params})
    pred = at(data.aimz.predict(fit, draws=3), table.head(2))
    assert list(answer.columns) == ["row", "chain", "draw", "melt"]
    for row in range(2):
        found = answer["melt"][answer["row"] == row]
        np.testing.assert_allclose(found, pred.melt.isel(chain=0, row=row), **CLOSE)


def test_requests_at_once_get_the_answers_of_each_alone(served, data, fit, table):
    pred = at(data.aimz.predict(fit, summary=STATISTICS), table)
    starts = [0, 11, 5, 23, 40, 31, 2, 17] * 3

    def ask(start):
        return post(served, split(table.iloc[start : start + 1 + start % 9]))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, starts))
    for start, answer in zip(starts, answers, strict=True):
        assert_answers(answer, pred.isel(row=slice(start, start + len(answer))))


def test_a_gap_is_a_gap_in_its_own_row(served, data, fit, table):
    pred = at(data.aimz.predict(fit, summary=STATISTICS), table.head(3))
    holed = json.loads(json.dumps(records(table.head(3))))
    holed["dataframe_records"][1]["warmth"] = None
    answer = post(served, holed)
    assert answer.isna().all(axis=1).tolist() == [False, True, False]
    assert_answers(answer.iloc[[0, 2]], pred.isel(row=[0, 2]))


def test_the_models_own_example_is_a_request(served, registered, data, fit):
    folder = mlflow.artifacts.download_artifacts(registered[0])
    example = mlflow.models.Model.load(folder).get_serving_input(folder)
    answer = post(served, json.loads(example))
    pred = data.isel(time=[0]).aimz.predict(fit, summary=STATISTICS).isel(time=0)
    assert_answers(answer, pred.isel(site=slice(0, 5)))


def test_what_cannot_be_is_refused_over_http_by_name(served, table):
    code, message = refusal(served, split(table.head(1).assign(site="z")))
    assert code == 400
    assert "'rate'" in message
    assert "'z'" in message
    code, message = refusal(served, split(table.drop(columns="warmth")))
    assert code == 400
    assert "warmth" in message
    code, message = refusal(served, {**split(table), "params": {"do": '{"melting": 1}'}})
    assert code == 400
    assert "melting" in message


def test_batches_of_a_table_are_answered_as_the_whole(registered, data, fit, table):
    # As mlflow.pyfunc.spark_udf does: a model loaded once, an iterator of pieces of rows.
    table = table.assign(time=pd.to_datetime(table.time))
    model = mlflow.pyfunc.load_model(registered[0])
    pieces = [table.iloc[i : i + 10] for i in range(0, len(table), 10)]
    found = pd.concat(model.predict(piece, params={"seed": 2}) for piece in pieces)
    pred = at(data.aimz.predict(fit, seed=2, summary=STATISTICS), table)
    assert_answers(found, pred)
    assert model.metadata.signature.inputs.input_names() == ["time", "site", "warmth", "forcing"]


@pytest.mark.filterwarnings("ignore")
def test_spark_answers_as_the_whole(registered, data, fit, table, monkeypatch):
    # Not among the extras: it needs a Java beside Python.
    pytest.importorskip("pyspark")
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import struct

    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    table = table.assign(time=pd.to_datetime(table.time))
    made = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    # Several batches in each of several partitions, in an order of Spark's own.
    spark = made.config("spark.sql.execution.arrow.maxRecordsPerBatch", "7").getOrCreate()
    try:
        kind = "melt_mean double, melt_std double"
        ask = mlflow.pyfunc.spark_udf(
            spark, registered[0], env_manager="local", result_type=kind, params={"seed": 2}
        )
        rows = spark.createDataFrame(table).repartition(3)
        columns = struct(*[rows[c] for c in table.columns])
        asked = rows.withColumn("answer", ask(columns))
        found = asked.select("time", "site", "answer.melt_mean", "answer.melt_std").toPandas()
    finally:
        spark.stop()
    pred = at(data.aimz.predict(fit, seed=2, summary=("mean", "std")), found)
    np.testing.assert_allclose(found.melt_mean, pred.melt_mean, **CLOSE)
    np.testing.assert_allclose(found.melt_std, pred.melt_std, **CLOSE)


def test_the_fit_behind_a_registered_model_predicts_as_before(registered, data, fit):
    uri, info, run_id = registered
    assert info.registered_model_version == "1"
    found = xr_aimz.mlflow.load_model(uri, fit.model)
    assert found.lineage["mlflow_run_id"] == run_id
    xr.testing.assert_identical(
        data.aimz.predict(found).drop_attrs().compute(),
        data.aimz.predict(fit).drop_attrs().compute(),
    )


def test_a_server_that_may_not_import_serves_nothing(place, registered, tracking):
    command = [sys.executable, "-c", f"import mlflow; mlflow.pyfunc.load_model({registered[0]!r})"]
    told = {"MLFLOW_PYFUNC_INFERENCE_CONFIG": '{"trust_import": false}'}
    done = subprocess.run(
        command,
        env={**os.environ, **told, "MLFLOW_TRACKING_URI": tracking},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "trust_import" in done.stderr
