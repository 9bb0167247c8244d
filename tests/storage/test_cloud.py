"""Stores that are not a folder: an S3 server, one that fails, and an Icechunk repository."""

import logging
import random
import threading

import icechunk
import numpy as np
import pytest
import xarray as xr
from moto.server import DomainDispatcherApplication, create_backend_app
from obstore.exceptions import GenericError
from obstore.store import S3Store
from werkzeug.serving import make_server
from zarr.storage import ObjectStore

from xr_aimz import open_zarr
from xr_aimz.errors import DamagedStoreError, IncompleteStoreError, StoreError, WriteError
from xr_aimz.storage import completeness

NOISE = np.random.default_rng(0).normal(size=(40, 300)).astype("f4")


@pytest.fixture
def ds():
    lat = np.linspace(-60, 60, 40)
    return xr.Dataset({"a": (("lat", "y"), NOISE, {"units": "K"})}, {"lat": lat}).chunk(lat=2)


class Failing:
    """A WSGI application, out of order for one request in so many."""

    def __init__(self, application):
        self.application, self.every, self.failed = application, None, 0
        self.requests = []
        self.chance = random.Random(0)

    def __call__(self, environ, start_response):
        what = "LIST" if "list-type" in environ["QUERY_STRING"] else environ["REQUEST_METHOD"]
        self.requests.append((what, environ["PATH_INFO"]))
        if self.every and self.chance.random() < 1 / self.every:
            self.failed += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        return self.application(environ, start_response)


@pytest.fixture(scope="module")
def server():
    """A real S3 server on loopback."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = Failing(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    application.url = f"http://127.0.0.1:{http.server_port}"
    yield application
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def bucket(server, request, monkeypatch):
    import boto3

    options = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    for name, value in options.items():
        monkeypatch.setenv(name.upper().replace("REGION_NAME", "AWS_REGION"), value)
    name = request.node.name.replace("_", "-")[:60].lower()
    boto3.client("s3", endpoint_url=server.url, **options).create_bucket(Bucket=name)
    server.every = None
    yield name
    server.every = None


def s3(server, bucket, **retry):
    store = S3Store(
        bucket,
        prefix="out.zarr",
        endpoint=server.url,
        region="us-east-1",
        access_key_id="a",
        secret_access_key="b",
        client_options={"allow_http": True},
        **retry,
    )
    return ObjectStore(store)


def test_a_store_on_s3(ds, server, bucket):
    back = ds.aimz.to_zarr(s3(server, bucket))
    xr.testing.assert_identical(back.load(), ds.load())
    xr.testing.assert_identical(xr.open_zarr(s3(server, bucket)).load(), ds)


def test_an_address_on_s3(ds, server, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT", server.url)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    back = ds.aimz.to_zarr(f"s3://{bucket}/by/url.zarr")
    xr.testing.assert_identical(back.load(), ds.load())
    with pytest.raises(StoreError, match="other results"):
        (ds + 1).chunk(lat=2).aimz.to_zarr(f"s3://{bucket}/by/url.zarr")


def test_requests_that_fail_are_tried_again(ds, server, bucket):
    server.every, before = 10, server.failed
    back = ds.chunk(lat=1).aimz.to_zarr(s3(server, bucket))
    assert server.failed - before > 5
    server.every = None
    xr.testing.assert_identical(back.load(), ds.load())


def test_what_is_lost_is_found_by_one_listing_and_written_again(ds, server, bucket):
    store = s3(server, bucket)
    ds.aimz.to_zarr(store)
    server.requests.clear()
    open_zarr(store)
    listings = [path for what, path in server.requests if what == "LIST"]
    assert len(listings) == 1
    # Of the chunks of results none is asked for.
    assert not [path for _, path in server.requests if "/a/c/" in path]
    store.store.delete("a/c/3/0")
    with pytest.raises(IncompleteStoreError, match=r"'a' has 1 missing \(block \[3, 0\]\)"):
        open_zarr(store)
    server.requests.clear()
    back = ds.aimz.to_zarr(store)
    written = [path for what, path in server.requests if what == "PUT" and "/a/c/" in path]
    assert [path.rpartition("/a/")[2] for path in written] == ["c/3/0"]
    xr.testing.assert_identical(back.load(), ds.load())


def test_a_chunk_that_was_cut_is_found_by_its_size(ds, server, bucket):
    store = s3(server, bucket)
    ds.aimz.to_zarr(store)
    held = bytes(store.store.get("a/c/3/0").bytes())
    store.store.put("a/c/3/0", held[: len(held) // 2])
    with pytest.raises(DamagedStoreError, match=r"'a' has 1 not as long as written"):
        open_zarr(store)
    xr.testing.assert_identical(ds.aimz.to_zarr(store).load(), ds.load())


def never_opens(store):
    with pytest.raises((IncompleteStoreError, FileNotFoundError)):
        open_zarr(store)
    with pytest.raises(FileNotFoundError):
        xr.open_zarr(store)


def test_a_server_that_gives_up_loses_nothing(ds, server, bucket):
    store = s3(server, bucket, retry_config={"max_retries": 0})
    for tries in range(100):  # noqa: B007
        server.every = 30
        try:
            back = ds.aimz.to_zarr(store)
            break
        except (WriteError, GenericError):
            # Reading what is there can fail too, with the store's own error.
            server.every = None
            if not completeness.is_complete(store):
                never_opens(store)
    server.every = None
    assert tries > 1
    xr.testing.assert_identical(back.load(), ds.load())


@pytest.fixture
def repository(tmp_path):
    return icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")))


def snapshots(repository):
    return [s.message for s in repository.ancestry(branch="main")]


def test_a_repository_gets_one_commit(ds, repository):
    back = ds.aimz.to_zarr(repository)
    xr.testing.assert_identical(back.load(), ds.load())
    assert len(snapshots(repository)) == 2
    again = ds.chunk(lat=2).aimz.to_zarr(repository)
    xr.testing.assert_identical(again.load(), ds)
    assert len(snapshots(repository)) == 2


def test_strings_of_a_repository_come_back_as_they_were(ds, repository):
    named = ds.assign_coords(lat=[f"{n:03d}" for n in range(40)], run=np.array("r1", object))
    for back in (named.aimz.to_zarr(repository), open_zarr(repository)):
        assert (back.lat.dtype, back.run.dtype) == (np.dtype("<U3"), np.dtype(object))
        xr.testing.assert_identical(back.load(), named.load())


def test_a_run_that_fails_leaves_a_repository_as_it_was(ds, repository):
    ds.aimz.to_zarr(repository)

    def breaks(block):
        raise RuntimeError("cut")

    data = ds.a.data.map_blocks(breaks, dtype="f4", meta=np.empty((0, 0), "f4"))
    with pytest.raises(RuntimeError, match="cut"):
        ds.assign(a=ds.a.copy(data=data)).aimz.to_zarr(repository, mode="w")
    assert len(snapshots(repository)) == 2
    stored = xr.open_zarr(repository.readonly_session("main").store, consolidated=False)
    xr.testing.assert_identical(stored.load(), ds.load())


def test_a_repository_with_other_results_is_not_overwritten(ds, repository):
    ds.aimz.to_zarr(repository)
    other = (ds + 1).chunk(lat=2)
    with pytest.raises(StoreError, match="other results"):
        other.aimz.to_zarr(repository)
    xr.testing.assert_identical(other.aimz.to_zarr(repository, mode="w").load(), other.load())
    assert len(snapshots(repository)) == 3
