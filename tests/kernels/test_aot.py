"""Every configuration compiles ahead of time for sm_80 and sm_90 without spills; the checked-in
table says with which resources."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from diffalign.kernels.pladis import tiles

SCRIPT = Path(__file__).with_name("aot.py")
ROOT = SCRIPT.parents[2]
SAMPLE = (
    "nag E640 l1 bf16 sm_90",
    "nag E5120 l2 fp16 sm_80",
    "pladis D40 K128 entmax bf16 sm_80",
    "pladis D64 K128 sparsemax bias fp16 sm_90",
    "pladis D72 K64 entmax bias bf16 sm_90",
    "pladis D128 K128 entmax bias joint fp16 sm_80",
    "pladis D160 K128 entmax bf16 sm_90",
    "tokens E576 D36 text-first i32 sm_80",
    "tokens E1536 D64 text-last i32 sm_90",
    "selection ranks i64 sm_90",
    "selection N4096 i64 sm_80",
)


def load():
    spec = importlib.util.spec_from_file_location("aot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table() -> dict:
    return json.loads(SCRIPT.with_name("resources.json").read_text())


def compile_again(table: dict, names: tuple[str, ...]) -> None:
    """Compile in a process without the interpreter and compare with the table: exactly for its
    Triton, else limits only."""
    arguments = [a for name in names for a in ("--only", name)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = {case["name"]: case["values"] for case in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(names)
    for name, values in found.items():
        hold(name, values)
        if triton.__version__ == table["triton"]:
            assert values == table["configurations"][name], name


def hold(name: str, values: list[int]) -> None:
    """No spill, wide loads, and shared memory within what the heuristic promises for the tile and
    the architecture has."""
    registers, spilled, shared, wide = values
    assert spilled == 0, name
    assert 0 < registers <= 255, name
    kernel, *sizes, arch = name.split()
    # a choice reads a few kilobytes, at any number of tokens
    assert wide >= 2 or kernel == "selection", name
    promised = {"sm_80": 163, "sm_90": 227}[arch]
    if kernel == "pladis":
        plan = tiles.plan(int(sizes[0][1:]), int(sizes[1][1:]))
        assert plan.shared_kb <= promised, name
        promised = plan.shared_kb
    assert shared <= promised << 10, name


def test_table_covers_what_the_heuristics_choose_and_holds(table):
    aot = load()
    assert [job.name for job in aot.jobs()] == list(table["configurations"])
    for name, values in table["configurations"].items():
        hold(name, values)
    reachable = {
        (size, plan.key_tile)
        for size in tiles.HEAD_DIMS
        for keys in range(1, 600)
        if (plan := tiles.plan(size, keys))
    }
    listed = {
        tuple(name.split()[1:3]) for name in table["configurations"] if name.startswith("pladis")
    }
    assert listed == {(f"D{size}", f"K{tile}") for size, tile in reachable}
    assert aot.page(table) == SCRIPT.with_name("resources.md").read_text()


@pytest.mark.slow
def test_sample_compiles_as_the_table_says(table):
    compile_again(table, SAMPLE)


@pytest.mark.slow
def test_a_real_call_launches_what_was_compiled_ahead_of_time():
    """Same machine code byte for byte, on the device of the operands, with addresses in 64 bits and
    no TF32 product."""
    script = SCRIPT.with_name("launched.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 18
    for case in cases:
        assert case["same"], case
        assert case["guarded"], case
        assert not case["tf32"], case
        # the number of a row tile's first query is one
        assert case["32-bit products"] == case["name"].startswith("pladis"), case


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_the_whole_table_is_what_the_compiler_gives(table, part):
    """Every binary again, in eight parts for the workers.

    ``aot.py --write`` renews the table after a change of kernel or Triton.
    """
    compile_again(table, tuple(table["configurations"])[part::8])
