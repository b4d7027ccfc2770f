"""GenEval's rules against 700 cases answered by the official scoring functions, a hand table of
relations and hand-worked rewards."""

import ast
import hashlib
import json
import random
import struct
import sys
from pathlib import Path

import pytest

from diffalign.tasks.geneval import prompts as geneval_prompts
from diffalign.tasks.geneval import summary as geneval_summary
from diffalign.tasks.geneval import verdict as geneval
from diffalign.tasks.geneval.verdict import (
    Detection,
    Thresholds,
    keep,
    parse_prompt,
    relations,
    verdict,
)

ORACLE = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "geneval_oracle.jsonl")
    .read_text()
    .splitlines()
]
BOX = (0.0, 0.0, 10.0, 10.0)


def seen(name, score=0.95, box=BOX, colour=None):
    return Detection(name, score, box, colour)


def case_detections(case):
    return [
        Detection(d["class"], d["score"], tuple(d["bbox"]), d["color"]) for d in case["detections"]
    ]


def test_all_700_official_answers():
    assert len(ORACLE) == 700
    wrong = []
    for case in ORACLE:
        result = verdict(case["metadata"], case_detections(case), Thresholds(**case["options"]))
        if (result.correct, result.reason, result.kept) != (
            case["correct"],
            case["reason"],
            case["kept"],
        ):
            wrong.append(case["id"])
    assert wrong == []


def test_order_of_detections_does_not_matter():
    rng = random.Random(0)
    for case in ORACLE:
        detections = case_detections(case)
        order = rng.sample(range(len(detections)), len(detections))
        result = verdict(
            case["metadata"], [detections[i] for i in order], Thresholds(**case["options"])
        )
        assert {name: [order[i] for i in indices] for name, indices in result.kept.items()} == case[
            "kept"
        ]
        assert (result.correct, result.reason) == (case["correct"], case["reason"])


def test_official_summary_figures():
    lines = [
        {"tag": c["suite"], "correct": c["correct"], "metadata": c["metadata"]}
        for c in ORACLE
        if c["suite"] in geneval.TAGS
    ]
    total = geneval.summary(lines)
    percent = {tag: round(100 * score.correct_images, 2) for tag, score in total.tags.items()}
    expected = {
        "color_attr": 35.71,
        "position": 39.0,
        "single_object": 44.0,
        "two_object": 44.0,
        "colors": 61.67,
        "counting": 48.24,
    }
    assert percent == expected
    assert list(total.tags) == list(geneval.TAGS)
    assert (total.images, total.prompts) == (515, 320)
    assert round(total.mean_of_tags, 5) == 0.45436
    assert round(100 * total.correct_images, 2) == 43.69
    assert round(100 * total.correct_prompts, 2) == 57.81
    assert total.overall is None


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((100, 100, 200, 200), (300, 100, 400, 200), ("left of",)),
        ((300, 300, 400, 400), (100, 100, 200, 200), ("below", "right of")),
        ((100, 100, 300, 300), (110, 110, 310, 310), ()),
        ((10, 0, 20, 10), (0, 0, 10, 10), ("right of",)),
        (
            (235, 190, 260, 200),
            (205, 150, 230, 160),
            ("below",),
        ),  # dx is exactly 0.5, and > is strict
        ((0, 0, 40, 40), (100, 10, 400, 390), ("left of",)),
        ((0, 0, 10, 10), (0, 100, 10, 110), ("above",)),
        (BOX, BOX, ()),
    ],
)
def test_relations_by_hand(a, b, expected):
    assert relations(a, b) == expected


def test_relations_without_shrinking_and_mirrored():
    assert relations((0, 0, 2, 2), (0, 0, 2, 2), 0.0) == ()  # no offset, and no division by zero
    assert relations((1, 0, 11, 10), BOX, 0.0) == ("right of",)
    assert relations((1, 0, 11, 10), BOX, 0.1) == ()
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    rng = random.Random(1)
    for _ in range(500):
        a, b = (
            (x, y, x + rng.uniform(1, 9), y + rng.uniform(1, 9))
            for x, y in [(rng.uniform(0, 30), rng.uniform(0, 30)) for _ in range(2)]
        )
        assert sorted(opposite[name] for name in relations(a, b)) == list(relations(b, a))


def test_threshold_is_strict_and_float32():
    float32 = struct.unpack("f", struct.pack("f", 0.3))[0]
    above = struct.unpack("f", struct.pack("I", struct.unpack("I", struct.pack("f", 0.3))[0] + 1))[
        0
    ]
    assert float32 > 0.3  # the case a float64 comparison gets wrong
    assert keep([seen("dog", 0.3), seen("dog", float32)], "two_object") == {}
    assert keep([seen("dog", above)], "two_object") == {"dog": [0]}


def test_counting_threshold_needs_the_exact_tag():
    dogs = [seen("dog", 0.5), seen("dog", 0.91)]
    assert keep(dogs, "counting") == {"dog": [1]}
    assert keep(dogs, "Counting") == keep(dogs, "anything") == {"dog": [1, 0]}


def test_overlap_uses_inclusive_pixels():
    # 10 x 10 and 10 x 11 pixels by the inclusive rule: IoU = 100 / 110; exclusive it would be 81 /
    # 90 = 0.9 < 0.905.
    pair = [seen("dog", 0.9, (0, 0, 9, 9)), seen("dog", 0.8, (0, 0, 9, 10))]
    assert keep(pair, "x", Thresholds(max_overlap=0.905)) == {"dog": [0]}
    assert keep(pair, "x", Thresholds(max_overlap=0.91)) == {"dog": [0, 1]}
    assert keep([seen("dog"), seen("dog")], "x") == {
        "dog": [1, 0]
    }  # 1 is off even for identical boxes; ties: later first


def test_global_random_state_is_untouched():
    before = random.getstate()
    verdict(geneval.prompts()[0], [seen("bench")])
    assert random.getstate() == before


def test_only_counting_cares_about_extra_objects():
    three = [seen("bench", 0.95 + 0.01 * i) for i in range(3)]
    assert verdict(parse_prompt("a photo of a bench"), three).correct
    assert verdict(parse_prompt("a photo of three benchs"), three).correct
    two = verdict(parse_prompt("a photo of two benchs"), three)
    assert (two.correct, two.reason) == (False, "expected bench<3, found 3")


def test_colour_looks_at_the_most_confident_only():
    red = parse_prompt("a photo of a red bench")
    assert verdict(
        red, [seen("bench", 0.9, colour="red"), seen("bench", 0.8, colour="blue")]
    ).correct
    wrong = verdict(red, [seen("bench", 0.8, colour="red"), seen("bench", 0.9, colour="blue")])
    assert (wrong.correct, wrong.reason) == (
        False,
        "expected red bench>=1, found 0 red; and 1 blue",
    )


def test_position_looks_at_the_most_confident_only():
    left = parse_prompt("a photo of a dog left of a cat")
    cat, good, bad = seen("cat", box=(50, 0, 60, 10)), (0, 0, 10, 10), (100, 0, 110, 10)
    assert verdict(left, [cat, seen("dog", 0.9, good), seen("dog", 0.8, bad)]).correct
    result = verdict(left, [cat, seen("dog", 0.8, good), seen("dog", 0.9, bad)])
    assert result.reason == "expected dog left of target, found right of target"
    same = verdict(left, [seen("cat", box=good), seen("dog", box=good)])
    assert same.reason == "expected dog left of target, found  target"


def test_wrong_colour_of_the_target_means_no_target():
    include = [
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "position": ["left of", 0]},
    ]
    result = verdict(
        {"tag": "custom", "include": include},
        [seen("cat", box=(50, 0, 60, 10), colour="blue"), seen("dog")],
    )
    assert (
        result.reason
        == "expected red cat>=1, found 0 red; and 1 blue\nno target for dog to be left of"
    )


def test_empty_metadata_is_correct():
    assert verdict({"tag": "x", "include": []}, [seen("dog")]) == geneval.Verdict(
        True, "", {"dog": [0]}
    )
    assert verdict({"tag": "x"}, []).correct


def test_identical_clauses_are_not_added_up():
    clause = {"class": "dog", "count": 1}
    assert verdict({"tag": "x", "include": [clause, clause]}, [seen("dog")]).correct


def test_sixteen_objects_are_the_most():
    include = [{"class": "dog", "count": 17}]
    result = verdict({"tag": "x", "include": include}, [seen("dog")] * 20)
    assert result.reason == "expected dog>=17, found 16"


def test_strict_counts_all_and_ignores_exclude():
    one, two = (
        [seen("dog", colour="red")],
        [seen("dog", colour="red"), seen("dog", 0.5, colour="blue")],
    )
    red = parse_prompt("a photo of a red dog")
    assert geneval.strict_verdict(red, one).correct
    assert verdict(red, two).correct
    assert geneval.strict_verdict(red, two).reason == "expected dog==1, found 2"
    both = {"tag": "x", "include": [{"class": "dog", "count": 2, "color": "red"}]}
    assert (
        geneval.strict_verdict(both, two).reason
        == "expected red dog==2, found 1 red; and 1 red, 1 blue"
    )
    assert geneval.strict_verdict(
        {"tag": "x", "include": [], "exclude": [{"class": "dog", "count": 1}]}, one
    ).correct


def test_dense_reward_by_hand():
    def dense(include, *detections):
        return geneval.dense_reward({"tag": "x", "include": include}, detections)

    dog3, red2 = [{"class": "dog", "count": 3}], [{"class": "dog", "count": 2, "color": "red"}]
    assert dense(dog3, seen("dog"), seen("dog")) == pytest.approx(2 / 3)
    assert dense([{"class": "dog", "count": 1}], *[seen("dog")] * 4) == -2.0  # 1 - 3 / 1
    assert (
        dense(red2, seen("dog", colour="red")) == 0.25
    )  # (1 - 1/2, and a 0 for the colour that was not looked at) / 2
    assert (
        dense(red2, seen("dog", colour="red"), seen("dog", colour="blue")) == 0.75
    )  # (1 + 1/2) / 2
    left = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    cat, west, east = (
        seen("cat", box=(50, 0, 60, 10)),
        seen("dog", box=(0, 0, 10, 10)),
        seen("dog", box=(90, 0, 100, 10)),
    )
    assert dense(left, cat, west) == 1.0
    assert dense(left, cat, east) == 0.75  # 1, 1, and for the wrong relation 0 and 1
    assert dense(left, west) == pytest.approx(1 / 3)  # cat 0, dog 1, no target 0
    assert dense(left, cat) == pytest.approx(1 / 3)  # cat 1, dog 0, and a 0 for its position
    painted = [left[0], {**left[1], "color": "red"}]
    assert dense(painted, cat, Detection("dog", 0.9, BOX, "blue")) == pytest.approx(
        2 / 3
    )  # 1, 1, 0: position is not looked at
    assert dense([]) == 0.0


def test_strict_implies_official_without_exclude():
    strict = 0
    for case in ORACLE:
        if not case["metadata"].get("exclude"):
            arguments = case["metadata"], case_detections(case), Thresholds(**case["options"])
            if geneval.strict_verdict(*arguments).correct:
                strict += 1
                assert case["correct"]
                assert geneval.dense_reward(*arguments) == (
                    1.0 if case["metadata"]["include"] else 0.0
                )
    assert strict > 100


def full_run(correct, images=4):
    return [
        geneval.result_line(f"{i:05}/{k}.png", m, [], geneval.Verdict(correct(i, m, k), "", {}))
        for i, m in enumerate(geneval.prompts())
        for k in range(images)
    ]


def test_overall_of_a_complete_run_is_the_mean_of_tags():
    total = geneval.summary(full_run(lambda i, m, k: m["tag"] in ("counting", "colors") or k == 0))
    # two tags at 1, four at 1/4, whatever their sizes (80, 99, 80, 94, 100, 100)
    assert total.overall == pytest.approx((2 + 4 / 4) / 6)
    assert total.correct_images == pytest.approx((80 + 94 + (80 + 99 + 100 + 100) / 4) / 553)
    assert (total.correct_prompts, total.incomplete, total.images, total.prompts) == (
        1.0,
        "",
        2212,
        553,
    )
    assert {tag: score.prompts for tag, score in total.tags.items()} == dict(
        zip(geneval.TAGS, (80, 99, 80, 94, 100, 100), strict=True)
    )


def test_one_missing_image_removes_the_overall_and_is_named():
    lines = full_run(lambda i, m, k: True)
    prompt = geneval.prompts()[200]["prompt"]
    total = geneval.summary(lines[:800] + lines[801:])
    assert total.overall is None
    assert "1 of 553 prompts" in total.incomplete
    assert repr(prompt) in total.incomplete
    assert "counting" in total.incomplete
    assert geneval.summary([*lines, lines[0]]).overall is None
    strange = geneval.result_line(
        "x.png", {"tag": "colors", "prompt": "mine"}, [], geneval.Verdict(True, "", {})
    )
    assert "not GenEval's, first 'mine'" in geneval.summary([*lines, strange]).incomplete
    assert (
        geneval.summary(full_run(lambda i, m, k: True, images=2), images_per_prompt=2).overall
        == 1.0
    )


def test_result_line_is_the_official_form():
    metadata, detections = (
        geneval.prompts()[0],
        [seen("dog", 0.5), seen("bench", 0.75, (1.0, 2.0, 3.0, 4.0)), seen("bench", 0.1)],
    )
    line = geneval.result_line("0.png", metadata, detections, verdict(metadata, detections))
    assert list(line) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert json.loads(line["details"]) == {
        "bench": [[1.0, 2.0, 3.0, 4.0, 0.75]],
        "dog": [[0.0, 0.0, 10.0, 10.0, 0.5]],
    }
    assert json.loads(line["metadata"]) == metadata
    assert (line["tag"], line["prompt"], line["correct"]) == (
        "single_object",
        "a photo of a bench",
        True,
    )


def test_packaged_files_are_the_official_ones():
    folder = geneval_prompts.data_folder()
    notice = (folder / "NOTICE").read_bytes()
    assert (
        hashlib.sha256(notice).hexdigest()
        == "f146fc2e0b2cfd88257852e8c226164cd61a27a7f1891a0d63658b904a5accac"
    )
    assert b"MIT License" in (folder / "LICENSE").read_bytes()
    sums = [line.split() for line in notice.decode().split("sha256:\n")[1].splitlines()]
    assert len(sums) == 3
    for digest, name in sums:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_prompts():
    metadata = geneval.prompts()
    assert [m["prompt"] for m in metadata] == (
        geneval_prompts.data_folder() / "generation_prompts.txt"
    ).read_text().splitlines()
    metadata[0]["include"].clear()
    assert geneval.prompts()[0]["include"]
    names = geneval.class_names()
    assert (len(names), names[0], names[64:67], names[79]) == (
        80,
        "person",
        ("computer mouse", "tv remote", "computer keyboard"),
        "toothbrush",
    )
    assert {c["class"] for m in metadata for c in m["include"]} == set(names)


def test_parse_prompt_reproduces_all_official_metadata():
    official = geneval.prompts()
    assert len(official) == 553
    assert [parse_prompt(m["prompt"]) for m in official] == official


@pytest.mark.parametrize(
    ("text", "tag", "include"),
    [
        ("a photo of an orange", "single_object", [("orange", 1, None)]),
        ("a photo of an orange orange", "colors", [("orange", 1, "orange")]),
        (
            "a photo of an orange and a clock",
            "two_object",
            [("orange", 1, None), ("clock", 1, None)],
        ),
        ("an orange orange and a black orange juice", None, None),
        (
            "a photo of an orange orange and a black clock",
            "color_attr",
            [("orange", 1, "orange"), ("clock", 1, "black")],
        ),
        ("a photo of three oranges", "counting", [("orange", 3, None)]),
        (
            "  A red   apple and a Green clock. ",
            "color_attr",
            [("apple", 1, "red"), ("clock", 1, "green")],
        ),
        ("a red apple and a red clock", "color_attr", [("apple", 1, "red"), ("clock", 1, "red")]),
        ("seven wine glasses", "counting", [("wine glass", 7, None)]),
        ("a photo of two skises", "counting", [("skis", 2, None)]),
        ("two computer mice", "counting", [("computer mouse", 2, None)]),
        ("two people", "counting", [("person", 2, None)]),
        ("three couches", "counting", [("couch", 3, None)]),
        ("a teddy bear", "single_object", [("teddy bear", 1, None)]),
    ],
)
def test_parse_prompt_of_free_text(text, tag, include):
    parsed = parse_prompt(text)
    if tag is None:
        assert parsed is None
        return
    assert (parsed["tag"], parsed["prompt"]) == (tag, text)
    assert [(c["class"], c["count"], c.get("color")) for c in parsed["include"]] == include
    assert ("exclude" in parsed) == (tag == "counting")


def test_parse_prompt_of_positions():
    for relation in geneval.RELATIONS:
        include = [
            {"class": "cat", "count": 1},
            {"class": "tv remote", "count": 1, "position": [relation, 0]},
        ]
        assert parse_prompt(f"a tv remote {relation} a cat")["include"] == include


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a photo of",
        "a photo of a",
        "a photo of a unicorn",
        "a photo of dog",
        "a photo of the dog",
        "a photo of a dogs",
        "a photo of one dog",
        "a photo of two dog",
        "a photo of eleven dogs",
        "a photo of two red dogs",
        "a photo of a red person",
        "a photo of a gray dog",
        "a photo of a red blue dog",
        "a photo of a red dog and a cat",
        "a photo of a dog and a red cat",
        "a photo of a dog and a dog",
        "a photo of a dog left of a dog",
        "a photo of a red dog left of a cat",
        "a photo of a dog left of a red cat",
        "a photo of a dog to the left of a cat",
        "a photo of a dog on a bench",
        "a photo of a dog and a cat and a bird",
        "a photo of a dog above a cat below a bird",
        "a photo of a dog above a cat and a bird",
        "a photo of two dogs and a cat",
        "a photo of a photo of a dog",
        "a painting of a dog",
        "a red apple and a green clock on a table",
    ],
)
def test_parse_prompt_refuses_other_text(text):
    assert parse_prompt(text) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 0.5, BOX), "class name"),
        (("dog", 1.5, BOX), "score"),
        (("dog", float("nan"), BOX), "score"),
        (("dog", 0.5, (0, 0, 1)), "box"),
        (("dog", 0.5, (0, 0, 1, float("inf"))), "box"),
        (("dog", 0.5, BOX, "grey"), "grey"),
    ],
)
def test_bad_detections(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Detection(*arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": -0.1},
        {"counting_threshold": 2},
        {"max_overlap": float("nan")},
        {"max_objects": 0},
        {"max_objects": 1.5},
        {"position_threshold": -1},
    ],
)
def test_bad_thresholds(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Thresholds(**options)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"include": []}, "tag"),
        ({"tag": "x", "include": "dog"}, "list of clauses"),
        ({"tag": "x", "include": [{"class": "dog"}]}, "count"),
        ({"tag": "x", "include": [{"class": "dog", "count": 0}]}, "count"),
        ({"tag": "x", "include": [{"class": "dog", "count": 1, "size": "big"}]}, "at most"),
        ({"tag": "x", "include": [{"class": "dog", "count": 1, "color": "grey"}]}, "grey"),
        (
            {"tag": "x", "include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]},
            "earlier",
        ),
        ({"tag": "x", "exclude": [{"class": "dog", "count": 1, "color": "red"}]}, "exclude"),
    ],
)
def test_bad_metadata(metadata, message):
    with pytest.raises((ValueError, TypeError), match=message):
        verdict(metadata, [])


def test_missing_colour_is_an_error_only_where_it_is_needed():
    red = parse_prompt("a red dog")
    with pytest.raises(ValueError, match="colour classifier"):
        verdict(red, [seen("dog")])
    assert verdict(red, [seen("cat")]).reason == "expected dog>=1, found 0"
    assert verdict(red, [seen("dog", 0.9, colour="red"), seen("dog", 0.5)]).correct


def test_bad_results():
    with pytest.raises(ValueError, match="at least one"):
        geneval.summary([])
    with pytest.raises(TypeError, match="result 0"):
        geneval.summary([{"tag": "colors", "correct": 1, "metadata": {}}])
    with pytest.raises(ValueError, match="result 0 is not JSON"):
        geneval.summary([{"tag": "colors", "correct": True, "metadata": "{"}])
    with pytest.raises(ValueError, match="images_per_prompt"):
        geneval.summary([], images_per_prompt=0)


@pytest.mark.parametrize("module", [geneval, geneval_prompts, geneval_summary])
def test_only_the_standard_library_is_imported(module):
    names = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    ours = {name for name in names if name.startswith("diffalign.tasks.geneval.")}
    assert {name.split(".")[0] for name in names - ours} <= sys.stdlib_module_names
