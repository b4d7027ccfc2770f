"""Triton kernels under the interpreter (``interpreted.py``, in a process of its own) against
float64, and their memory traffic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted.py")
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module", params=["float16", pytest.param("float32", marks=pytest.mark.slow)])
def cases(request) -> dict[str, dict]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {case["name"]: case for case in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    ("kernel", "count"), [("nag", 12), ("pladis", 51), ("tokens", 8), ("selection", 16)]
)
def test_error_stays_within_the_derived_bound(cases, kernel, count):
    """``worst`` is the largest ratio of error to bound over a case's elements; the bounds are
    derived in ``interpreted.py``."""
    mine = {name: case["worst"] for name, case in cases.items() if name.startswith(f"{kernel} ")}
    assert len(mine) == count
    assert {
        name: worst for name, worst in mine.items() if not worst <= 1.0
    } == {}  # NaN is not <= 1


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_nag_loads_each_input_once_and_stores_the_output_once(cases, norm):
    case = cases[f"traffic nag {norm}"]
    assert case["loads"] == case["load_addresses"] == 2 * case["elements"]
    assert case["stores"] == case["store_addresses"] == case["elements"]


def test_pladis_moves_operands_and_result_only(cases):
    case = cases["traffic pladis one row tile"]
    assert case["loads"] == case["load_addresses"] == case["elements"]
    assert case["stores"] == case["store_addresses"] == case["results"]


def test_tokens_are_read_and_written_once(cases):
    case = cases["traffic tokens"]
    assert case["loads"] == case["load_addresses"] == case["elements"] + case["index"]
    assert case["stores"] == case["store_addresses"] == case["elements"]
