"""Rows of the benchmark of found prompts, worked by hand."""

import pytest

from diffalign.eval.evidence import tag_of


@pytest.fixture(scope="module")
def bench(benchmark_module):
    return benchmark_module("found_prompts")


def test_a_row_of_pez_by_hand(bench):
    """Two prompts of one category and one of another: shares found .5, 0 and 1, planted 1, 1, 1."""
    single, other = tag_of(0), tag_of(552)
    assert tag_of(1) == single != other
    common = {"nfe": 60, "cosine": 0.9, "planted": 1.0}
    records = [
        common | {"prompt_id": prompt_id, "found": found}
        for prompt_id, found in ((0, 0.5), (1, 0.0), (552, 1.0))
    ]
    row = bench.row_of("pez, text", records)
    assert (row["n"], row["NFE"], row["cosine"]) == (3, 60, pytest.approx(0.9))
    assert row["found"].value == pytest.approx(0.5)
    assert row["difference"].value == pytest.approx(-0.5)
    assert (row[single], row[other]) == (0.25, 1.0)
    assert set(row) <= {"method", *bench.COLUMNS}


def test_a_row_of_sage_by_hand(bench):
    records = [
        {"prompt_id": 0, "nfe": 852, "failures": 0.5, "chance": 0.25},
        {"prompt_id": 1, "nfe": 852, "failures": 0.25, "chance": 0.25},
    ]
    row = bench.row_of("sage", records)
    assert row["difference"].value == pytest.approx(0.125)
    assert row[tag_of(0)] == pytest.approx(0.375)
    assert row["found"] is None
