"""Reports: numbers against those worked out by hand, pages in which nothing of a prompt runs."""

import dataclasses
import json
import re

import pytest

import diffalign as da
from diffalign.eval import page as pages
from diffalign.eval.files import RunError
from diffalign.eval.folder import Share
from diffalign.eval.report import markdown, report
from diffalign.eval.results import Column, Shot, columns, distinct
from diffalign.eval.statistics import holm, mcnemar
from diffalign.eval.summary import comparisons, incomplete_of, result_of, summarise
from diffalign.tasks.compbench.prompts import CATEGORIES
from diffalign.tasks.geneval.prompts import TAGS, prompts
from diffalign.tasks.published import COMPBENCH, GENEVAL, published

from .conftest import PROMPTS


def column(label, scores, tags, samples=2, **more):
    """A run of prompts with these scores, ``samples`` images each."""
    shots = tuple(
        Shot(n, k, f"prompt {n}", tag, {}, None, f"{n}.png", 10 * n + k, value, "", {"nfe": 4.0})
        for n, (values, tag) in enumerate(zip(scores, tags))
        for k, value in enumerate(values)
    )
    settings = {
        "benchmark": {"name": "file", "part": "", "prompts": len(scores), "sha256": ""},
        "model": {"name": label},
        "samples": samples,
    }
    return Column(label, label, settings | more, {"name": "judge"}, shots, ())


def test_numbers_by_hand():
    one = column("a", [(1, 1), (1, 0), (0, 0)], ["x", "x", "y"])
    result = result_of(one)
    assert result["tags"]["x"]["mean"] == 0.75
    assert result["tags"]["y"]["mean"] == 0.0
    assert result["mean_of_tags"]["mean"] == result["overall"] == 0.375
    assert result["best_of_images"] == pytest.approx(2 / 3)
    assert (result["images"], result["nfe"], result["incomplete"]) == (6, 4.0, "")


def test_paired_comparison_by_hand():
    tags = ["x"] * 4
    one = column("a", [(1, 1), (1, 0), (0, 0), (0, 0)], tags)
    two = column("b", [(1, 1), (1, 1), (1, 0), (0, 0)], tags)
    (entry,) = comparisons([one, two])
    assert entry["mean"] == pytest.approx(0.25)
    assert (entry["won"], entry["tied"], entry["lost"]) == (2, 2, 0)
    assert entry["images"] == {"both": 3, "only_a": 0, "only_b": 2, "neither": 3}
    assert entry["mcnemar"] == 0.5
    (same,) = comparisons([one, dataclasses.replace(one, label="c")])
    assert (same["mean"], same["low"], same["high"], same["p"]) == (0.0, 0.0, 0.0, 1.0)
    short = dataclasses.replace(two, shots=two.shots[:-2])
    with pytest.raises(RunError, match="differ in 2 images"):
        comparisons([one, short])


def test_holm_and_mcnemar_against_published_examples():
    """Holm 1979 by hand; McNemar's exact test is a binomial one."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert mcnemar(0, 0) == 1.0
    from scipy.stats import binomtest

    for a, b in ((1, 9), (4, 4), (12, 3)):
        assert mcnemar(a, b) == pytest.approx(binomtest(a, a + b, 0.5).pvalue)


@pytest.mark.slow
def test_overall_of_geneval_needs_every_prompt():
    official = [
        json.loads(json.dumps(facts, sort_keys=True)) for facts in prompts()
    ]  # as read back

    def geneval(count):
        shots = tuple(
            Shot(n, k, str(p["prompt"]), str(p["tag"]), p, None, "", n, float(k == 0), "", {})
            for n, p in enumerate(official[:count])
            for k in range(4)
        )
        benchmark = {"name": "geneval", "part": "", "prompts": 553, "sha256": ""}
        settings = {"benchmark": benchmark, "model": {"name": "Qwen/Qwen-Image"}, "samples": 4}
        return Column("a", "a", settings, {"name": "judge"}, shots, ())

    whole = result_of(geneval(553))
    assert (whole["overall"], whole["best_of_images"]) == (0.25, 1.0)
    rows = whole["published"]["scores"]
    assert rows["overall"] == {"published": 0.87, "difference": pytest.approx(0.25 - 0.87)}
    assert rows["position"] == {"published": 0.76, "difference": pytest.approx(0.25 - 0.76)}
    assert any("single_object is 0.25" in text for text in whole["warnings"])
    partial = result_of(geneval(550))
    assert partial["overall"] is None
    assert incomplete_of(geneval(400)) == "only 400 of 553 prompts have scores"


def test_what_is_optimised_is_no_judge():
    search = {"method": [{"name": "best-of-n"}], "reward": "judge", "budget": None}
    one = column("a", [(1, 1)], ["x"], search=search)
    assert "no test" in result_of(one)["warnings"][0]


@pytest.mark.slow
def test_shards_join_to_the_bytes_of_the_whole_run(evaluated, plan, tmp_path):
    evaluated("whole")
    for i in range(2):
        evaluated(f"part-{i}", items=Share(i, 2).of_items(plan.benchmark.items))
    names = ("results.json", "samples.jsonl", "results.md", "results.parquet")
    report(columns([tmp_path / "whole"]), tmp_path / "a")
    report(columns([tmp_path / "part-1", tmp_path / "part-0"]), tmp_path / "b")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert json.loads((tmp_path / "a" / "results.json").read_text())["n-samples"] == {
        "tiny: plain": {"original": 5, "effective": 5}
    }
    one = columns([tmp_path / "part-0"])
    assert incomplete_of(one[0]) == "only 3 of 5 prompts have scores"


@pytest.mark.slow
def test_runs_beside_each_other(evaluated, plan, tmp_path):
    evaluated("plain")
    technique = dataclasses.replace(plan, techniques=(da.CFG(5.0),))
    evaluated("cfg", plan=technique)
    table = columns([tmp_path / "plain", tmp_path / "cfg"])
    numbers, files = report(table, tmp_path / "report")
    assert list(numbers["results"]) == ["tiny: plain", "tiny: cfg:scale=5"]
    assert len(numbers["comparisons"]) == 1
    assert {path.name for path in files} == {path.name for path in (tmp_path / "report").iterdir()}
    text = (tmp_path / "report" / "results.md").read_text()
    assert "| tiny: cfg:scale=5 - tiny: plain |" in text
    timing = json.loads((tmp_path / "report" / "timing.json").read_text())
    assert timing["tiny: plain"]["seconds_median"] > 0
    rows = [json.loads(x) for x in (tmp_path / "report" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    import pyarrow.parquet as parquet

    assert parquet.read_table(tmp_path / "report" / "results.parquet").to_pylist() == rows


@pytest.mark.slow
def test_nothing_in_a_prompt_can_run(evaluated, tmp_path):
    evaluated("run")
    numbers, _ = report(columns([tmp_path / "run"]), tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    assert PROMPTS[1] not in text
    assert "a &lt;b&gt;red&lt;/b&gt; &amp; blue thing" in text
    assert "dark <i>" not in text
    assert "<td>16x16</td>" in text
    assert len(re.findall("<script>", text)) == 1
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert re.search(r"script-src &#x27;sha256-[\w+/=]+&#x27;", text)
    assert PROMPTS[1] not in markdown(numbers)


def test_pictures_shrink_until_the_page_fits(evaluated, tmp_path, monkeypatch):
    evaluated("run")
    table = columns([tmp_path / "run"])
    assert pages._size(table) == pages.SIZES[0]
    monkeypatch.setattr(pages, "LARGEST", 600)
    assert pages._size(table) == pages.SIZES[-1]


@pytest.mark.slow
def test_scorers_and_benchmarks_are_not_mixed(evaluated, tmp_path):
    from .conftest import Brightness

    evaluated("run")
    with pytest.raises(RunError, match="no scores of other"):
        columns([tmp_path / "run"], "other")
    other = Brightness(border=0.1)
    other.name = "other"
    evaluated("run", scorer=other)
    with pytest.raises(RunError, match="scores of brightness, other; name one"):
        columns([tmp_path / "run"])
    assert columns([tmp_path / "run"], "other")[0].scorer["border"] == 0.1


def test_published_scores_stand_beside_the_own_ones():
    """Numbers copied from the tables; a model of the same weights under another name too."""
    row = published("geneval", "runwayml/stable-diffusion-v1-5", {"overall": 0.5, "counting": 0.3})
    assert row["source"] == "Ghosh et al. 2023"
    assert row["scores"]["overall"] == {"published": 0.43, "difference": pytest.approx(0.07)}
    assert row["scores"]["counting"]["difference"] == pytest.approx(-0.05)
    sdxl = published("compbench", "stabilityai/stable-diffusion-xl-base-1.0", {"complex": 0.3237})
    assert sdxl["scores"] == {"complex": {"published": 0.3237, "difference": 0.0}}
    assert published("geneval", "me/mine", {"overall": 0.5}) is None
    assert published("prompts.jsonl", "Qwen/Qwen-Image", {"overall": 0.5}) is None


@pytest.mark.parametrize(("table", "names"), [(GENEVAL, TAGS), (COMPBENCH, CATEGORIES)])
def test_tables_of_published_scores_are_whole(table, names):
    for source, numbers in table.values():
        assert source
        values = [float(text) for text in numbers.split()]
        assert all(0 < value <= 1 for value in values)
        if table is COMPBENCH:
            assert len(values) == len(names)
        else:  # the overall is the mean of the categories, as far as both are rounded
            assert len(values) in (1, 1 + len(names))
            assert values[1:] == [] or abs(sum(values[1:]) / 6 - values[0]) <= 0.01 + 1e-9


def test_what_a_report_says_of_published_scores_sizes_and_answers():
    one = column("Qwen/Qwen-Image", [(1, 0)], ["position"])
    settings = {**one.settings, "benchmark": {**one.settings["benchmark"], "name": "compbench"}}
    settings["model"] = {"name": "black-forest-labs/FLUX.1-schnell"}
    shots = tuple(
        dataclasses.replace(shot, tag="color", size=(64, 48), geometric=0.25) for shot in one.shots
    )
    numbers = summarise([dataclasses.replace(one, settings=settings, shots=shots)])
    (result,) = numbers["results"].values()
    assert (result["sizes"], result["geometric"]) == (["64x48"], 0.25)
    text = markdown(numbers)
    assert "published by another evaluator (Huang et al. 2025, table XIII)" in text
    assert "color 0.7407, here -0.241." in text
    assert "Geometric mean of the answers" in text


def test_labels_are_distinct():
    assert distinct(["a", "b", "a"]) == ["a", "b", "a (2)"]
    assert summarise([column("a", [(1,)], ["x"], samples=1)])["comparisons"] == []
