"""A result depends on its arguments, and not on what its process did before."""

import os
import subprocess
import sys
from pathlib import Path

import calls
import pytest

SCAN = "fit of a scan with a missing input"
QUICK = [SCAN, "predict"]


def digests(names, seed):
    """What each call gives, made in that order in a process of its own."""
    found = subprocess.run(
        [sys.executable, calls.__file__, *names],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": seed},
    )
    assert found.returncode == 0, found.stderr
    return dict(line.split("\t") for line in found.stdout.splitlines())


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="some"),
        pytest.param(list(calls.CALLS), id="all", marks=pytest.mark.slow),
    ],
)
def test_every_call_gives_the_same_after_all_others_and_before_them(names):
    forwards, backwards = digests(names, "1"), digests(names[::-1], "2")
    assert set(forwards) == set(names)
    assert forwards == backwards
