"""Rows of the tables, from made-up records whose figures are worked out by hand."""

import pytest

from diffalign.eval.evidence import Config, Measured, tag_of
from diffalign.tasks.geneval.verdict import TAGS, prompts


def record(prompt_id, sample, correct, **others):
    facts = {"prompt_id": prompt_id, "sample": sample, "seed": sample, "correct": correct}
    return facts | {"nfe": 40.0, "seconds": 0.5} | others


@pytest.fixture
def two_a_tag():
    """The first two prompts of every tag, once each."""
    return [n for tag in TAGS for n in [i for i, p in enumerate(prompts()) if p["tag"] == tag][:2]]


def test_geneval(benchmark_module, two_a_tag):
    """One of two is right in every tag; the second judge says yes to all."""
    records = tuple(record(n, 0, i % 2 == 0, audit=1.0) for i, n in enumerate(two_a_tag))
    rows = benchmark_module("geneval").table(Measured(Config("CFG 2"), records))
    assert [row["tag"] for row in rows] == [*TAGS, "overall"]
    assert [row["images"] for row in rows] == [2] * 6 + [12]
    assert {row["score"].value for row in rows} == {0.5}
    assert [row["score"].n for row in rows] == [2] * 6 + [12]
    assert {row["second judge agrees"] for row in rows} == {0.5}


def test_negation(benchmark_module):
    """Two prompts, two images each: gone in 3 of 4, kept in 2, both in 1; CFG has both in 2."""
    negation = benchmark_module("negation")

    def records(outcomes):
        return [
            {
                "prompt_id": i // 2,
                "sample": i % 2,
                "gone": gone,
                "kept": kept,
                "both": gone and kept,
                "nfe": 20,
                "seconds": 0.25,
                "strength": 1.5,
                "off": 0.1,
            }
            for i, (gone, kept) in enumerate(outcomes)
        ]

    ours = records([(True, True), (True, False), (True, False), (False, True)])
    other = records([(True, True), (True, True), (False, False), (False, True)])
    matched = negation.Way(cfg=1.5, negative=True)
    row = negation.row("object", negation.Way(nag=5.0), ours, (matched, other))
    assert (row["negated"], row["method"], row["NFE"]) == ("object", "NAG 5", 20.0)
    assert [row[key].value for key in ("gone", "other kept", "gone and kept")] == [0.75, 0.5, 0.25]
    assert row["CFG's negative prompt at equal strength"] == "CFG 1.5 negative"
    difference = row["gone and kept, difference"]
    assert (difference.value, difference.low, difference.high, difference.n) == (
        -0.25,
        -0.5,
        0.0,
        2,
    )
    alone = negation.row("object", negation.Way(), ours, None)
    assert alone["gone and kept, difference"] is None


def test_guidance(benchmark_module, two_a_tag):
    """A rule that is right everywhere beside plain CFG that is right in every other prompt."""
    guidance = benchmark_module("guidance")
    scores = {"clip": 0.5, "spread": 0.1, "scale": 1.5}

    def run(name, correct):
        audit = float(name == "rule")
        records = (record(n, 0, correct(i), audit=audit, **scores) for i, n in enumerate(two_a_tag))
        return Measured(Config(name), tuple(records))

    plain, rule = run("CFG 2", lambda i: i % 2 == 0), run("rule", lambda i: True)
    selection = [
        guidance.Entry(plain.config, 2.0),
        guidance.Entry(rule.config, 2.0, "interval-cfg"),
    ]
    rows = guidance.compared(selection, {"CFG 2": plain, "rule": rule}, plain)
    assert [row["method"] for row in rows] == ["CFG 2", "rule"]
    gain = rows[1]["vs best"]
    assert gain.value == 0.5
    assert rows[1]["vs CFG at its scale"] == rows[1]["vs equal NFE"] == gain
    assert rows[1]["equal NFE"] == "CFG 2"
    assert rows[1]["second judge vs best"].value == 1.0
    assert rows[0]["Holm p"] is None
    # no gain in any tag has probability 4**-6, and the test has two sides
    assert rows[1]["Holm p"] == pytest.approx(2 * 4**-6, abs=5 * (2 * 4**-6 / 10_000) ** 0.5)
    assert {tag_of(n) for n in two_a_tag} <= set(rows[1])
    assert guidance.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )


def test_cost(benchmark_module):
    """Twice the time beside plain; a rule with half the rows is compared per row; medians."""
    cost = benchmark_module("cost")
    plain = [(1.0, 40.0), (2.0, 40.0), (4.0, 40.0)]
    seen = {name: [(2 * s, 40.0) for s, _ in plain] for name, *_ in cost.CASES}
    seen["IntervalCFG"] = [(s, 20.0) for s, _ in plain]
    seen["interception, no guidance"] = [(1.25 * s, 20.0) for s, _ in plain]
    rows = {
        row["technique"]: row for row in cost.table(seen | dict.fromkeys(cost.SCALES, plain), 4)
    }
    assert rows["APG"]["ratio"] == 2.0
    assert rows["APG"]["seconds per image"] == 1.0
    assert (rows["IntervalCFG"]["ratio"], rows["IntervalCFG"]["NFE"]) == (2.0, 20.0)
    assert rows["IntervalCFG"]["counted"] == "per evaluated row"
    assert rows["PLADIS, no guidance"]["of it interception"] == 0.25
    assert rows["APG"]["of it interception"] is None


def test_a_command_line_has_the_types_of_its_defaults(benchmark_module):
    results = benchmark_module("results")
    parser = results.command_line("What it asks.", runs_folder="runs/here", scale=1.5, steps=20)
    options = parser.parse_args(["--scale", "2", "--runs-folder", "there"])
    assert (options.scale, options.steps, options.runs_folder) == (2.0, 20, "there")
    assert options.output == "benchmarks/results"
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", "two"])


def test_schedules(benchmark_module, two_a_tag):
    """Every shape has the mean weight that its row states; right in one of two beside all."""
    schedules = benchmark_module("schedules")
    half = tuple(record(n, 0, i % 2 == 0) for i, n in enumerate(two_a_tag))
    whole = tuple(record(n, 0, True) for n in two_a_tag)
    for shape in schedules.SHAPES:
        config = Config(shape, (schedules.rule(shape, 3.0),), steps=20)
        runs = [Measured(config, records) for records in (half, whole)]
        row = schedules.row("tuning", shape, 3.0, runs[0], runs[0], runs[1])
        assert row["vs constant"].value == 0.0
        assert row["vs best constant"].value == -0.5
        if shape == "linear, clamped":  # 2 for 7 steps, then 1 + 4 i / 19: 2 + (1/20) sum of excess
            excess = sum(max(0.0, 1 + 4 * i / 19 - 2) for i in range(20))
            assert row["mean weight"] == pytest.approx(2 + excess / 20)
        else:
            assert row["mean weight"] == pytest.approx(3.0)
