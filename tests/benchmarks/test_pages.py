"""Results are numbers, pages are made of them, and every sentence follows from its figures."""

import json
import re
from importlib import import_module

import pytest


@pytest.fixture(scope="module")
def pages(benchmark_module):
    return benchmark_module("pages")


@pytest.fixture(scope="module")
def results(pages):
    """The module that the others import, so that its classes are theirs."""
    return import_module("results")


@pytest.fixture(scope="module")
def advice(pages):
    return import_module("advice")


@pytest.fixture(scope="module")
def stored(pages):
    return pages.stored()


def texts(value):
    """Every text inside a JSON value."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value or ():
        if isinstance(item, dict | list | str):
            yield from texts(item) if not isinstance(item, str) else [item]


def test_results_are_numbers(stored):
    """No text of a row holds an interval or a difference, and every interval holds its value."""
    assert len(stored) >= 9
    for folder, name in stored:
        data = json.loads((folder / f"{name}.json").read_text())
        assert data["rows"], name
        assert data["units"], name
        assert {"commit", "command", "device", "versions"} <= set(data["environment"])
        for row in [*data["rows"], data["facts"]]:
            for text in texts(row):
                assert not re.search(r"\[[-+\d. ]+,|[-+]0\.\d", text), (name, text)
            for value in row.values():
                if isinstance(value, dict) and "low" in value:
                    assert set(value) == {"value", "low", "high", "n"}
                    assert value["low"] <= value["value"] <= value["high"], (name, row)
                    assert value["n"] > 0


def test_pages_are_what_their_numbers_say(results, pages, stored):
    for folder, name in stored:
        text = (folder / f"{name}.md").read_text(encoding="utf-8")
        assert pages.PAGES[name](results.read(name, folder)) == text, (
            f"run python benchmarks/pages.py {name}"
        )
    pairs = {(path.parent, path.stem) for path in results.FOLDER.rglob("*.md")}
    assert pairs == set(stored)


def test_a_file_is_read_as_it_was_written(results, tmp_path):
    rows = [
        {"method": "a", "score": results.Estimate(0.5, 0.25, 1 / 3, 9), "none": None},
        {"method": "b", "score": results.Estimate(1.0, 1.0, 1.0, 9), "none": 2.5},
    ]
    facts = {"best": "b", "gap": results.Estimate(0.1, -0.1, 0.2, 9), "weights": {"mean": [1.0]}}
    result = results.Result(rows, {"score": "share"}, facts, {"steps": 3}, {"commit": "x"})
    results.write(tmp_path / "a.json", result)
    assert results.read("a", tmp_path) == result
    assert result.row("b")["none"] == 2.5


def test_cells(results, pages):
    value = results.Estimate(-0.0104, -0.0281, 0.0079, 200)
    assert pages.cell(value, "difference of score") == "-0.010 [-0.028, +0.008]"
    assert pages.cell(value, "score") == "-0.010 [-0.028, 0.008]"
    assert pages.cell(0.123456) == "0.1235"
    assert pages.cell(None) == "–"
    assert pages.cell(7) == "7"


def test_plots_are_drawn_from_the_numbers(results, pages, tmp_path):
    for name in ("adaptive", "dynamic"):
        plots = pages.PLOTS[name](results.read(name))
        assert [picture.size for picture in plots.values()] == [(900, 480)]
        for plot in plots:
            assert (results.FOLDER / f"{plot}.png").is_file()
    (tmp_path / "adaptive.json").write_text((results.FOLDER / "adaptive.json").read_text())
    pages.publish("adaptive", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adaptive.json",
        "adaptive.md",
        "adaptive.png",
    }


@pytest.mark.parametrize(
    ("best", "same", "nfe", "sentence"),
    [
        ((0.03, 0.01, 0.05), (0.0, 0.0, 0.0), 40, "Use it: +0.030 over the best plain scale."),
        (
            (0.0, -0.03, 0.01),
            (0.03, 0.01, 0.05),
            40,
            "Use it where the scale may be too strong: +0.030",
        ),
        (
            (0.0, -0.01, 0.01),
            (0.0, -0.01, 0.01),
            30,
            "Use it to save 25% of the evaluations; a loss",
        ),
        ((-0.03, -0.05, -0.01), (0.0, -0.1, 0.1), 30, "Leave it off: -0.030 against"),
        ((0.0, -0.03, 0.01), (0.0, -0.1, 0.1), 30, "It saves 25%, and may cost up to 0.030"),
        (
            (0.0, -0.03, 0.01),
            (0.0, -0.1, 0.1),
            50,
            "No difference from the best plain scale was shown; it costs 25% more.",
        ),
        (
            (0.0, -0.03, 0.01),
            (0.0, -0.1, 0.1),
            40,
            "No difference from the best plain scale was shown.",
        ),
        (
            (0.0, 0.0, 0.0),
            (0.0, 0.0, 0.0),
            40,
            "No difference from the best plain scale was shown.",
        ),
    ],
)
def test_sentences_about_guidance(results, advice, best, same, nfe, sentence):
    row = {
        "method": "rule",
        "NFE": nfe,
        "vs best": results.Estimate(*best, 200),
        "vs CFG at its scale": results.Estimate(*same, 200),
        "second judge vs best": results.Estimate(*best, 200),
    }
    plain = {"method": "CFG 2", "NFE": 40}
    result = results.Result([plain, row], {}, {"best": "CFG 2"})
    assert advice.guidance(row, result).startswith(sentence)


def test_a_gain_that_the_second_judge_does_not_see(results, advice):
    row = {
        "method": "rule",
        "NFE": 40,
        "vs best": results.Estimate(0.05, 0.01, 0.09, 200),
        "vs CFG at its scale": results.Estimate(0.05, 0.01, 0.09, 200),
        "second judge vs best": results.Estimate(0.013, -0.022, 0.05, 200),
    }
    plain = {"method": "CFG 2", "NFE": 40}
    result = results.Result([plain, row], {}, {"best": "CFG 2"})
    assert advice.guidance(row, result) == (
        "Try it: +0.050 over the best plain scale, of which the second judge does not see all "
        "(+0.013 [-0.022, +0.050])."
    )


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        ((0.02, 0.01, 0.03), "Use it against"),
        ((-0.02, -0.03, -0.01), "Leave it off against"),
        ((0.0, -0.01, 0.01), "No difference shown against"),
    ],
)
def test_sentences_about_pladis(results, advice, gain, verdict):
    row = {"method": "p", "vs the same CFG": results.Estimate(*gain, 200)}
    result = results.Result([row], {}, {"default": "p", "strength": 2.0})
    assert advice.pladis(result).startswith(verdict)


def test_sentences_about_adaptive_guidance(results, advice):
    def row(method, nfe, low):
        return {
            "set": "evidence",
            "method": method,
            "NFE": nfe,
            "vs CFG": results.Estimate(0.0, low, 0.01, 200),
        }

    facts = {"plain": "CFG 2", "ours": "AG", "first": "first 45%", "threshold": 0.9, "space": "x0"}
    facts["ours vs first"] = results.Estimate(0.003, 0.0, 0.008, 200)
    for nfe, low, bar in ((30, -0.01, "held"), (31, -0.01, "missed"), (30, -0.03, "missed")):
        rows = [row("CFG 2", 40, 0.0), row("AG", nfe, low), row("first 45%", 29, -0.02)]
        text = advice.adaptive(results.Result(rows, {}, facts, {"steps": 20}))
        assert text.endswith(f"the first 45% of the steps +0.003 [+0.000, +0.008]; bar {bar}")


def test_a_bar_for_time(advice):
    assert advice.bar_held({"bar": 1.03, "ratio": 1.03}) == "yes"
    assert advice.bar_held({"bar": 1.03, "ratio": 1.031}) == "no"
    assert advice.bar_held({"bar": None, "ratio": 9.0}) == "–"


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        ((0.02, 0.01, 0.03), "is above the best constant weight, 3,"),
        ((-0.02, -0.03, -0.01), "is below the best constant weight, 3,"),
        ((0.0, -0.01, 0.01), "is not to be told from the best constant weight, 3,"),
    ],
)
def test_sentences_about_schedules(results, advice, gain, verdict):
    row = {"set": "evidence", "shape": "linear"}
    row |= {"vs constant": results.Estimate(0.1, 0.0, 0.2, 200)}
    row |= {"vs best constant": results.Estimate(*gain, 200)}
    facts = {"shape": "linear", "scale": 5.0, "constant": 3.0}
    for tuned, whence in ((None, "best shape on the tuning prompts"), ("a.json", "a.json chose")):
        text = advice.schedules(results.Result([row], {}, facts, {"tuned": tuned}))
        assert verdict in text
        assert whence in text
        assert text.endswith("+0.100 [+0.000, +0.200] to the constant weight of its own scale, 5.")


def test_sentences_about_dynamic_guidance(results, advice):
    row = {"set": "evidence", "method": "D", "processor time / CFG": 1.25, "mean weight": 2.5}
    row |= {"vs CFG": results.Estimate(0.02, 0.01, 0.03, 200)}
    row |= {"vs its mean": results.Estimate(-0.01, -0.02, 0.0, 200)}
    facts = {
        "plain": "CFG 3",
        "candidates": [1.0, 3.0],
        "start": 0.3,
        "evaluators": {"latents": "D"},
    }
    assert advice.dynamic(results.Result([row], {}, facts)).endswith(
        "by evaluator: latents +0.020 [+0.010, +0.030] at 1.25 times the processor time, "
        "-0.010 [-0.020, +0.000] to CFG 2.50, the mean of its choices"
    )


def test_sentences_about_negation(results, advice):
    """NAG beside equal strength and the strongest negative prompt, and what AdaptiveGuidance
    keeps of it."""

    def row(kind, method, share, nfe, equal=None):
        share = results.Estimate(share, share, share, 99)
        fact = {"negated": kind, "method": method, "NFE": nfe, "gone and kept": share}
        return fact | {"CFG's negative prompt at equal strength": equal}

    rows = []
    for kind in ("object", "colour"):
        rows += [row(kind, "nothing", 0.1, 20), row(kind, "CFG 3 negative", 0.5, 40)]
        rows += [row(kind, "AG 3 negative", 0.6, 30), row(kind, "CFG 2 negative", 0.4, 40)]
        rows += [row(kind, "NAG 5", 0.3, 20, "CFG 2 negative")]
    text = advice.negation(results.Result(rows, {}))
    assert "in 30% at 20 NFE without guidance (NAG 5; nothing: 10%)" in text
    assert "40% at equal strength, 50% at most (CFG 3), both at 40 NFE." in text
    assert text.endswith("AdaptiveGuidance keeps 60% at 30 NFE of 50% at 40 (CFG 3).")
