"""What is damaged, edited or malicious is refused, says what is wrong, and runs nothing."""

import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import saved_models
import xarray as xr
import zarr

import xr_aimz
from xr_aimz.errors import (
    AimzError,
    DamagedStoreError,
    IncompleteStoreError,
    MemoryLimitError,
    ModelError,
    StoreKindError,
)

TOUCHED = Path("/tmp") / f"xr_aimz-touched-{os.getpid()}"


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return os.system, (f"touch {TOUCHED}",)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    x = np.linspace(-1, 1, 12)
    ds = xr.Dataset({"x": ("time", x), "y": ("time", 2 * x)}, {"time": list("abcdefghijkl")})
    draws = {"slope": np.linspace(1, 2, 10).reshape(2, 5)}
    path = tmp_path_factory.mktemp("original") / "fit.zarr"
    ds.aimz.from_posterior(saved_models.line, draws).save(path)
    return path


@pytest.fixture
def store(original, tmp_path):
    shutil.copytree(original, tmp_path / "fit.zarr")
    yield tmp_path / "fit.zarr"
    assert not TOUCHED.exists(), "loading ran code of the store"


def refused(store, match, error=DamagedStoreError, **options):
    """Loading raises, with and without trust, and imports nothing that was not there."""
    before = set(sys.modules)
    for trust in (False, True):
        for model in (None, saved_models.line):
            with pytest.raises(error, match=match):
                xr_aimz.load_fit(store, model, trust_import=trust, **options)
    assert not {n for n in set(sys.modules) - before if n in ("antigravity", "this", "os.system")}


def root_of(store):
    return json.loads((store / "zarr.json").read_text())


def forged(store, change):
    """Change the spec, and its digest with it, as someone would who means it."""
    root = root_of(store)
    spec = root["attributes"]["xr_aimz_fit"]
    change(spec)
    text = json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()
    root["attributes"]["xr_aimz_sha256"] = hashlib.sha256(text).hexdigest()
    (store / "zarr.json").write_text(json.dumps(root))


def forged_metadata(store, path, change):
    """Change an array's metadata, and the digest that the spec has of it."""
    place = store / path / "zarr.json"
    document = json.loads(place.read_text())
    change(document)
    place.write_text(json.dumps(document))
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(text).hexdigest()

    def told(spec):
        spec["arrays"][path]["metadata"] = digest
        lengths = document["chunk_grid"]["configuration"]["chunk_shape"]
        grid = [-(-n // c) for n, c in zip(document["shape"], lengths, strict=True)]
        spec["arrays"][path]["chunks"] = int(np.prod(grid))

    forged(store, told)


def test_the_original_loads(original):
    assert xr_aimz.load_fit(original, saved_models.line).posterior.slope.shape == (2, 5)


# Damage.


def test_a_truncated_chunk(store):
    chunk = store / "posterior/slope/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    refused(store, "'posterior/slope' cannot be read, a chunk of it is damaged")


def test_a_changed_byte(store):
    chunk = store / "observed_data/y/c/0"
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw)
    refused(store, "'observed_data/y' cannot be read, a chunk of it is damaged")


def test_an_empty_chunk(store):
    (store / "posterior/slope/c/0/0").write_bytes(b"")
    refused(store, "'posterior/slope'")


def test_a_missing_chunk(store):
    (store / "posterior/slope/c/0/0").unlink()
    refused(store, "'posterior/slope' lacks 1 of its 1 chunks")


def test_a_missing_group(store):
    shutil.rmtree(store / "posterior")
    refused(store, "'posterior/zarr.json' is missing")


def test_a_chunk_of_another_array(store):
    shutil.copy(store / "constant_data/x/c/0", store / "observed_data/y/c/0")
    refused(store, "the values of array 'observed_data/y' were changed")


@pytest.mark.parametrize("key", ["token", "method", "options", "binding", "sites"])
def test_an_edited_spec(store, key):
    root = root_of(store)
    root["attributes"]["xr_aimz_fit"][key] = "edited"
    (store / "zarr.json").write_text(json.dumps(root))
    refused(store, "the spec was changed after it was written")


def test_edited_metadata(store):
    place = store / "posterior/slope/zarr.json"
    place.write_text(place.read_text().replace("float64", "float32"))
    refused(store, "the metadata of array 'posterior/slope' was changed")


def test_json_that_is_cut_short(store):
    text = (store / "zarr.json").read_text()
    (store / "zarr.json").write_text(text[: len(text) // 2])
    refused(store, "'zarr.json' is no JSON")


def test_what_was_not_written_to_its_end(store, tmp_path):
    (store / "zarr.json").unlink()
    refused(store, "no whole store of a fit", IncompleteStoreError)
    refused(tmp_path / "nothing", "no whole store of a fit: there is none", IncompleteStoreError)


def test_another_zarr_store(tmp_path):
    xr.Dataset({"a": 1}).to_zarr(tmp_path / "a.zarr", consolidated=False)
    refused(tmp_path / "a.zarr", "is no saved fit", StoreKindError)


def test_results_are_no_fit(tmp_path):
    xr.Dataset({"a": ("x", np.ones(2))}).aimz.to_zarr(tmp_path / "a.zarr")
    refused(tmp_path / "a.zarr", "holds results of to_zarr.*open_zarr", StoreKindError)


def test_a_format_of_the_future(store):
    forged(store, lambda spec: spec.update(format=2))
    refused(store, "has format 2; this version reads 1")


# Malice: the digests are right.


def test_pickled_objects_as_an_array(store):
    # Zarr 3 has no such dtype of its own: numcodecs' pickle filter is how version 2 had it.
    def change(document):
        document["data_type"] = "object"
        document["codecs"] = [{"name": "numcodecs.pickle", "configuration": {}}]

    (store / "posterior/slope/c/0/0").write_bytes(pickle.dumps(Bomb()))
    forged_metadata(store, "posterior/slope", change)
    refused(store, "has a dtype, codec or layout that no saved fit has")


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle", "numcodecs.json2", "gzip"])
def test_codecs_beyond_the_list(store, codec):
    def change(document):
        document["codecs"].insert(1, {"name": codec, "configuration": {}})

    forged_metadata(store, "posterior/slope", change)
    refused(store, f"codecs .*{codec}")


def test_version_2_with_a_pickle_filter(store):
    shutil.rmtree(store / "posterior/slope")
    old = zarr.create_array(store, name="posterior/slope", shape=2, dtype="f8", zarr_format=2)
    place = store / "posterior/slope/.zarray"
    told = json.loads(place.read_text())
    told |= {"dtype": "|O", "filters": [{"id": "pickle"}]}
    place.write_text(json.dumps(told))
    (store / "posterior/slope/0").write_bytes(pickle.dumps(Bomb()))
    assert old.shape == (2,)
    refused(store, "'posterior/slope/zarr.json' is missing")


@pytest.mark.parametrize(
    "path", ["../outside", "posterior/../../outside", "/etc/passwd", "a/b/c", "posterior/..", ".."]
)
def test_paths_that_lead_out(store, path):
    forged(store, lambda spec: spec["arrays"].update({path: {"metadata": "0", "chunks": 1}}))
    refused(store, "is no path of an array within the store")


def test_a_variable_at_a_path_that_is_not_listed(store):
    def change(spec):
        spec["datasets"]["posterior"]["variables"]["slope"]["path"] = "../outside"

    forged(store, change)
    refused(store, "the spec lists no array '../outside'|none that a fit has")


@pytest.mark.parametrize("link", ["posterior/slope/c/0/0", "posterior/slope", "posterior"])
def test_links_that_lead_out(store, tmp_path, link):
    outside = tmp_path / "outside"
    shutil.move(store / link, outside)
    (store / link).symlink_to(outside)
    refused(store, "is a link")


@pytest.mark.parametrize(
    "path",
    [
        "os:system",
        "subprocess:run",
        "builtins:exec",
        "antigravity:fly",
        "this:s",
        "saved_models:line()",
        "os:system;x",
        "saved_models:line.__globals__",
        "../evil:model",
        "__main__:x",
        "",
        ":",
    ],
)
def test_import_paths_that_would_run_code(store, path):
    forged(store, lambda spec: spec["model"].update(path=path))
    before = set(sys.modules)
    with pytest.raises(ModelError):
        xr_aimz.load_fit(store)
    with pytest.raises(AimzError):
        xr_aimz.load_fit(store, trust_import=True)
    assert "antigravity" not in set(sys.modules) - before


def test_a_function_of_a_module_without_a_model(store):
    # Importable, and not of the standard library; the digest of its source is right.
    import inspect

    source = inspect.getsource(json_dump := pytest.importorskip("yaml").dump)
    digest = hashlib.sha256(source.encode()).hexdigest()
    path = f"{json_dump.__module__}:{json_dump.__qualname__}"
    forged(store, lambda spec: spec["model"].update(path=path, sha256=digest))
    with pytest.raises(DamagedStoreError, match="is no model of a module that uses NumPyro"):
        xr_aimz.load_fit(store, trust_import=True)


def test_nothing_is_imported_before_all_is_verified(store, tmp_path, monkeypatch):
    (tmp_path / "evil_model.py").write_text(f"open({str(TOUCHED)!r}, 'w')\nimport numpyro\n")
    monkeypatch.syspath_prepend(tmp_path)
    forged(store, lambda spec: spec["model"].update(path="evil_model:model"))
    chunk = store / "posterior/slope/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(DamagedStoreError, match="damaged"):
        xr_aimz.load_fit(store, trust_import=True)
    with pytest.raises(DamagedStoreError, match="damaged"):
        xr_aimz.load_fit(store)
    assert "evil_model" not in sys.modules


def test_nothing_is_imported_for_draws_of_another_fit(store, tmp_path, monkeypatch):
    (tmp_path / "evil_model.py").write_text(f"open({str(TOUCHED)!r}, 'w')\nimport numpyro\n")
    monkeypatch.syspath_prepend(tmp_path)
    forged(store, lambda spec: spec.update(token="0" * 64))
    forged(store, lambda spec: spec["model"].update(path="evil_model:model"))
    with pytest.raises(DamagedStoreError, match="the draws are not those of the fit"):
        xr_aimz.load_fit(store, trust_import=True)
    assert "evil_model" not in sys.modules


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codecs", []),
        ("codecs", [{"name": ["crc32c"]}]),
        ("codecs", [["crc32c"]]),
        ("chunk_grid", {"name": "regular", "configuration": None}),
    ],
)
def test_metadata_of_no_kind(store, field, value):
    place = store / "posterior/slope/zarr.json"
    document = json.loads(place.read_text()) | {field: value}
    place.write_text(json.dumps(document))
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(text).hexdigest()
    forged(store, lambda s: s["arrays"]["posterior/slope"].update(metadata=digest))
    with pytest.raises(DamagedStoreError):
        xr_aimz.load_fit(store, saved_models.line)


def test_a_huge_claimed_shape(store):
    def change(document):
        document["shape"] = [10**7, 10**8]
        document["chunk_grid"]["configuration"]["chunk_shape"] = [10**7, 10**8]

    forged_metadata(store, "posterior/slope", change)
    refused(store, "says that it has 8e.15 bytes", MemoryLimitError)


def test_a_huge_claimed_number_of_chunks(store):
    def change(document):
        document["shape"] = [10**9, 10**9]

    forged_metadata(store, "posterior/slope", change)
    refused(store, "lacks .* chunks")


@pytest.mark.parametrize(
    "packed",
    [
        {"class": ["Popen", [["touch", "x"]]]},
        {"class": ["HMCState", []]},
        {"pickle": "gASV"},
        {"key": ["os.system", "params/0"]},
        {"array": {"path": "zarr.json", "dtype": "<f8"}},
        {"array": {"path": "posterior/slope", "dtype": "|O"}},
        {"float": "1e999"},
        [1, 2],
    ],
)
def test_values_of_no_kind(store, packed):
    forged(store, lambda spec: spec.update(params={"dict": [["a", packed]]}))
    refused(store, "packed value|kind of value|is no |cannot have been|lists no array|none that")


def test_a_spec_without_its_parts(store):
    for key in ("binding", "sites", "datasets", "params", "model", "token"):
        pristine = root_of(store)
        forged(store, lambda spec, key=key: spec.pop(key))
        with pytest.raises(DamagedStoreError):
            xr_aimz.load_fit(store, saved_models.line)
        (store / "zarr.json").write_text(json.dumps(pristine))


def test_a_site_of_an_argument_that_the_binding_lacks(store):
    forged(store, lambda spec: spec["sites"]["y"].update(obs_argument="other"))
    refused(store, "other")
