"""The evidence of noise optimisation: what was best when, chance by hand, prompts in turns."""

from argparse import Namespace

import pytest

from diffalign.eval.evidence import tag_of


@pytest.fixture(scope="module")
def bench(benchmark_module):
    return benchmark_module("noise_opt")


POINTS = [
    {"nfe": 20, "images": 1, "seconds": 1.0, "reward": 0.1, "judge": False, "audit": False},
    {"nfe": 60, "images": 3, "seconds": 2.5, "reward": 0.4, "judge": True, "audit": False},
    {"nfe": 100, "images": 5, "seconds": 4.0, "reward": 0.5, "judge": True, "audit": True},
]


def record(**others):
    numbers = {"nfe": 120, "backward": 0, "images": 6, "seconds": 5.0, "norm": 1.0}
    return {"points": POINTS, **numbers, "normal": True, "fresh": None} | others


def test_the_best_image_after_so_much_work(bench):
    assert bench.at(record(), "nfe", 99)["reward"] == 0.4
    assert bench.at(record(), "seconds", 4.0)["reward"] == 0.5
    assert bench.at(record(), "images", 0)["reward"] == 0.1


def test_a_row_compares_at_equal_work(bench):
    """A run of 60 NFE and 2 seconds that ends at .45, beside random search's .4 and .1."""
    ours = record(points=[POINTS[0], POINTS[1] | {"reward": 0.45}], nfe=60, seconds=2.0)
    row = bench.row_of("reno", [ours, ours], [record(), record()], [ours, record()], [0, 1])
    assert row["to random, NFE"].value == pytest.approx(0.05)
    assert row["to random, seconds"].value == pytest.approx(0.35)
    assert row["gain"].value == pytest.approx(0.35)
    assert (row["judge"].value, row["audit"].value, row["audit gain"].value) == (1.0, 0.0, 0.0)
    assert row["fresh"] is None
    assert row["audit to ReNO"].value == pytest.approx(-0.5)


def test_a_single_prompt_is_no_stratum(bench):
    assert bench.strata([0, 1]) == [tag_of(0)] * 2
    assert bench.strata([0, 1, 552]) == ["all"] * 3


def test_chance_by_hand(bench):
    """Of the four signs of two equal differences one has a mean as high, and all of three zeros."""
    assert bench.chance([1.0, 1.0]) == pytest.approx(1 / 4, abs=0.02)
    assert bench.chance([0.0, 0.0, 0.0]) == 1.0
    assert bench.chance([1.0] * 12) < 0.01


def test_prompts_come_in_turns_of_their_tags(bench):
    ids = bench.turns(bench.stratified(12))
    assert sorted(ids) == bench.stratified(12)
    assert len({tag_of(i) for i in ids[:6]}) == len({tag_of(i) for i in ids[6:]}) == 6


def test_only_prompts_that_every_method_has_count(bench, tmp_path):
    options = Namespace(
        work=tmp_path, model="emoji", images=4, steps=10, methods=["random-search", "find"]
    )
    assert bench.table([0, 1], options) == []
    for name, prompt_id, fresh in (("random-search", 0, 0.2), ("find", 0, 0.3), ("find", 1, 0.9)):
        file = bench.file_of(name, prompt_id, options)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(bench.json.dumps(record(fresh=fresh)))
    rows = bench.table([0, 1], options)
    assert [(row["method"], row["n"]) for row in rows] == [("random-search", 1), ("find", 1)]
    assert rows[1]["fresh"].value == pytest.approx(0.3)
    assert rows[1]["fresh to normal"].value == pytest.approx(0.1)
    assert rows[1]["chance"] == pytest.approx(0.5, abs=0.02)
    assert rows[0]["chance"] is None
    assert rows[0]["audit to ReNO"] is None


def test_carinox_needs_the_backward_passes_of_reno(bench):
    """30 images are 29 backward passes; four for each of seven starts."""
    assert bench.equal_starts(30) == 7
    assert bench.equal_starts(16) == 4
    assert bench.equal_starts(2) == 1
