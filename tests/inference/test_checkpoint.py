"""A checkpoint is whole or not there."""

import numpy as np
import pytest

from xr_aimz.errors import StoreError
from xr_aimz.inference.checkpoint import Checkpoint, read_checkpoint, write_checkpoint


def test_what_is_written_is_read(tmp_path):
    state = {"leaf 0": np.arange(3.0), "step": np.array(7), "fit": np.array("digest")}
    write_checkpoint(tmp_path / "state", state)
    found = read_checkpoint(tmp_path / "state")
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    class Unwritable:
        def __array__(self, dtype=None, copy=None):
            raise MemoryError

    write_checkpoint(tmp_path / "state", {"step": np.array(1)})
    with pytest.raises(MemoryError):
        write_checkpoint(tmp_path / "state", {"step": np.array(2), "leaf 0": Unwritable()})
    assert int(read_checkpoint(tmp_path / "state")["step"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_no_file_is_no_state(tmp_path):
    assert read_checkpoint(tmp_path / "state") is None
    assert Checkpoint(None).read() is None
    assert not Checkpoint(None).due


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04cut short", b"text"])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(StoreError, match="is not a file that a fit has written"):
        read_checkpoint(tmp_path / "state")


def test_a_place_where_no_file_can_be(tmp_path):
    for path in (tmp_path, tmp_path / "absent" / "state"):
        with pytest.raises(StoreError, match="not the path of a file in a directory that exists"):
            Checkpoint(path)
