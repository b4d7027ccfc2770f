"""The evidence harness: sets, intervals against closed forms, resuming, pairing."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

import diffalign as da
from diffalign.eval.evidence import (
    Config,
    compare,
    evidence_prompts,
    measure,
    seed_of,
    spread,
    stratified,
    tuning_prompts,
)
from diffalign.eval.files import RunError
from diffalign.eval.statistics import interval
from diffalign.tasks.geneval.verdict import Detection, Thresholds, prompts


def test_sets_are_stratified_and_disjoint():
    evidence, tuning = evidence_prompts(), tuning_prompts()
    assert (len(evidence), len(tuning)) == (200, 100)
    assert not set(evidence) & set(tuning)
    for ids, sizes in ((evidence, {33, 34}), (tuning, {16, 17})):
        assert set(Counter(prompts()[n]["tag"] for n in ids).values()) == sizes
    with pytest.raises(ValueError, match="there are 80"):
        stratified(600)


def test_bootstrap_has_the_binomial_error_and_is_repeatable():
    """One image per prompt: the standard error tends to sqrt(p (1 - p) / n)."""
    values = [1.0] * 120 + [0.0] * 280
    got = interval(values, ["one"] * 400, draws=20_000)
    assert got.mean == 0.3
    expected = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert (got.high - got.low) / 2 == pytest.approx(expected, rel=0.03)
    assert got == interval(values, ["one"] * 400, draws=20_000)


def test_strata_weigh_the_same_whatever_their_size():
    values, tags = [1.0] * 10 + [0.0] * 90, ["a"] * 10 + ["b"] * 90
    got = interval(values, tags)
    assert (got.mean, got.low, got.high) == (0.5, 0.5, 0.5)  # nothing varies inside a stratum


def test_p_value_of_a_clear_and_of_no_difference():
    assert interval([0.2] * 50, ["a"] * 50).p == 1 / 10_000
    assert interval([0.0] * 50, ["a"] * 50).p == 1.0
    with pytest.raises(ValueError, match="one tag per value"):
        interval([1.0], [])


def test_seeds_differ_between_images_and_not_between_runs():
    seeds = {seed_of(n, k) for n in range(50) for k in range(4)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(3, 1) == seed_of(3, 1) != seed_of(3, 1, base=1)


class Judge:
    """Finds an apple exactly when the picture's mean is above a half."""

    thresholds = Thresholds()

    def detect(self, images):
        return [
            [Detection("apple", 0.9, (0.0, 0.0, 9.0, 9.0), None)] if image.mean() > 0.5 else []
            for image in images
        ]


@pytest.fixture
def pipe(tiny):
    return tiny.pipe


@pytest.fixture(autouse=True)
def _no_canary(monkeypatch):
    """The stand-in for a judge has never seen the embedded world."""
    from diffalign.eval.scorers.emoji import EmojiScorer

    monkeypatch.setattr(EmojiScorer, "canary", lambda self: None)


def run(pipe, folder, config, ids=(0, 7, 80, 180), **more):
    return measure(pipe, Judge(), config, folder, prompt_ids=list(ids), **more)


def test_a_run_goes_on_without_doing_anything_twice(pipe, tmp_path):
    config = Config("cfg", (da.CFG(3.0),), steps=2)
    whole = run(pipe, tmp_path / "whole", config)
    run(pipe, tmp_path / "parts", config, ids=(0, 7))
    record = tmp_path / "parts" / "records" / "00007.json"
    record.write_text(record.read_text()[:40])  # torn by an interruption
    images = []
    parts = run(pipe, tmp_path / "parts", config, progress=images.append)
    assert images[0] == 2
    assert sum(images) == 8
    keys = ("prompt_id", "sample", "seed", "correct", "reason", "nfe", "scale", "spread")
    assert [[r[k] for k in keys] for r in parts.records] == [
        [r[k] for k in keys] for r in whole.records
    ]
    assert all(
        r["nfe"] == 4.0 and r["scale"] == pytest.approx(3.0, rel=1e-4) for r in whole.records
    )
    assert all(r["seconds"] > 0 for r in whole.records)


def test_other_settings_in_the_same_folder_are_refused(pipe, tmp_path):
    run(pipe, tmp_path, Config("cfg", (da.CFG(3.0),), steps=2), ids=(0,))
    with pytest.raises(RunError, match=r"another run: steps is 2 there and 3 here, techniques"):
        run(pipe, tmp_path, Config("cfg", (da.CFG(4.0),), steps=3), ids=(0,))


def test_spread_by_hand():
    """Three images of one grey each: every one to the two others."""
    images = torch.tensor([0.0, 0.3, 0.9])[:, None, None, None].expand(3, 3, 2, 2)
    assert spread(images, []).tolist() == pytest.approx([0.6, 0.45, 0.75])
    assert spread(images[:1], []).tolist() == [0.0]


def test_paired_comparison(pipe, tmp_path):
    one = run(
        pipe,
        tmp_path / "a",
        Config("a", scale=3.0, steps=2),
        scorers={"bright": lambda images, texts: images.mean((1, 2, 3))},
    )
    two = run(pipe, tmp_path / "b", Config("b", (da.CFG(1.0),), steps=2))
    assert (compare(one, one).mean, compare(one, one).low, compare(one, one).high) == (
        0.0,
        0.0,
        0.0,
    )
    assert compare(one, two).mean == pytest.approx(one.score().mean - two.score().mean)
    assert 0.0 < one.mean("bright") < 1.0
    assert one.mean("nfe") == 2 * two.mean("nfe") == 4.0
    short = run(pipe, tmp_path / "c", Config("c", scale=3.0, steps=2), ids=(0, 7))
    with pytest.raises(ValueError, match="same prompts and seeds"):
        compare(one, short)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["model"]["revision"]


def test_images_do_not_depend_on_the_technique_when_it_is_off(pipe, tmp_path):
    plain = run(pipe, tmp_path / "plain", Config("plain", scale=3.0, steps=2), ids=(0,))
    tapped = run(pipe, tmp_path / "cfg", Config("cfg", (da.CFG(3.0),), steps=2), ids=(0,))
    assert [r["spread"] for r in plain.records] == [r["spread"] for r in tapped.records]
