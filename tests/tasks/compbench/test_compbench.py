"""The rules against the answers of the published program, and numbers worked out by hand."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from diffalign.tasks.compbench import rules
from diffalign.tasks.compbench.prompts import (
    CATEGORIES,
    counted,
    data_folder,
    file_name,
    mixture,
    parse_of,
    prompts,
    read_name,
)

ORACLE = Path(__file__).parents[2] / "data" / "t2i_rules_oracle.jsonl"
CASES = [json.loads(line) for line in ORACLE.read_text(encoding="utf-8").splitlines()]


def depth_of(case):
    """The map that a case describes: rectangles painted over a background."""
    height, width = case["size"]
    rows = [[case["background"]] * width for _ in range(height)]
    for r in case["rects"]:
        for row in rows[r["y0"] : r["y1"]]:
            row[r["x0"] : r["x1"]] = [r["value"]] * (r["x1"] - r["x0"])
    return rows


def answer(case):
    boxes = [rules.Labelled(d["label"], d["score"], tuple(d["bbox"])) for d in case["detections"]]
    if case["rule"] == "numeracy":
        return rules.numeracy(boxes, case["objects"], case["counts"])
    if case["rule"] == "3d_spatial":
        depth = depth_of(case["depth"])
        return rules.spatial_3d(boxes, case["objects"], case["relation"], depth)
    return rules.spatial(boxes, case["objects"], case["relation"])


@pytest.mark.parametrize("rule", ["2d_spatial", "2d_spatial_complex", "3d_spatial", "numeracy"])
def test_every_case_of_the_published_program(rule):
    cases = [case for case in CASES if case["rule"] == rule]
    answers = {case["id"]: answer(case) for case in cases}
    expected = {case["id"]: pytest.approx(case["expected"], abs=1e-6) for case in cases}
    assert answers == expected


def test_the_oracle_is_whole():
    assert len(CASES) == 240
    assert len({json.dumps(case, sort_keys=True) for case in CASES}) == 240


@pytest.mark.parametrize(
    ("relation", "a", "b", "expected"),
    [
        ("on the left of", (0, 100, 100, 200), (200, 100, 300, 200), 1.0),
        ("on the left of", (0, 100, 100, 200), (60, 100, 160, 200), 0.4),
        ("on the left of", (0, 0, 100, 100), (90, 95, 190, 195), 0.0),
        ("next to", (0, 0, 100, 100), (200, 220, 300, 320), 0.681818),
        ("near", (0, 0, 100, 100), (140, 300, 240, 400), 1.0),
        ("on the top of", (100, 0, 200, 100), (100, 70, 200, 170), 0.566667),
        ("on top of", (100, 0, 200, 100), (100, 70, 200, 170), 0.0),
    ],
)
def test_places_worked_out_by_hand(relation, a, b, expected):
    assert rules.place_2d(a, b, relation) == pytest.approx(expected, abs=1e-6)


def test_fixed_mode_reads_rows_as_y():
    """The left half of the picture is near; the box on the left is wider than high."""
    depth = [[1.0] * 50 + [0.0] * 50 for _ in range(100)]
    one, other = (0.0, 60.0, 50.0, 100.0), (10.0, 60.0, 100.0, 100.0)
    assert rules.place_3d(one, other, "in front of", depth, "fixed") > 0
    assert rules.place_3d(one, other, "in front of", depth, "compat") == 0.0


def test_attribute_is_a_rounded_product_of_eight():
    assert rules.attribute([0.9136, 0.6021]) == 0.5501
    assert rules.attribute([]) == 1.0
    assert rules.attribute([1.0] * 8 + [0.0]) == 1.0
    assert rules.attribute([0.00004]) == 0.0


def test_complex_is_the_mean_of_its_parts():
    parts = {"attribute": 0.6, "clip": 0.3, "spatial": 0.0}
    sizes = {2: 0, 3: 0}
    for prompt in prompts("complex"):
        sizes[len(mixture(prompt))] += 1
    assert sizes == {2: 58 + 212, 3: 30}
    assert rules.complex_score(parts, ("clip", "attribute")) == pytest.approx(0.45)
    assert rules.complex_score(parts, ("spatial", "clip", "attribute")) == pytest.approx(0.3)


def test_prompts_are_the_official_files():
    notice = (data_folder() / "NOTICE").read_text(encoding="utf-8")
    sums = re.findall(r"^([0-9a-f]{64})  (\S+)$", notice, flags=re.M)
    assert len(sums) == 12
    for digest, name in sums:
        assert hashlib.sha256((data_folder() / name).read_bytes()).hexdigest() == digest
    assert all(len(prompts(category)) == 300 for category in CATEGORIES)
    with pytest.raises(ValueError, match="must be one of color"):
        prompts("colour")


def test_every_file_name_gives_prompt_and_number_back():
    for category in CATEGORIES:
        for index, prompt in enumerate(prompts(category)):
            assert read_name(file_name(prompt, 10 * index + 3)) == (prompt, 10 * index + 3)
    with pytest.raises(ValueError, match="not a file name"):
        read_name("cat.png")


def test_relations_and_counts_of_the_prompts():
    names = [rules.relation_of(prompt) for prompt in prompts("spatial")]
    numbers = {name: names.count(name) for name in rules.RELATIONS_2D}
    assert numbers == {
        "next to": 24,
        "near": 24,
        "on side of": 37,
        "on the left of": 51,
        "on the right of": 56,
        "on the top of": 56,
        "on the bottom of": 52,
        "on top of": 0,
    }
    for index, prompt in enumerate(prompts("numeracy")):
        parse = parse_of("numeracy", index)
        assert counted(prompt) == (parse["objects"], parse["counts"]), prompt
