"""What is lost where time is saved: the figures against other computations, and what is compared
with what."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import diffalign as da
from diffalign.core.registry import TECHNIQUES, written
from diffalign.embedded.load import load
from diffalign.eval.evidence import Config, Measured


@pytest.fixture(scope="module")
def quality(benchmark_module):
    benchmark_module("pruning")
    import pruning_quality

    return pruning_quality


@pytest.fixture
def images():
    rng = torch.Generator().manual_seed(0)
    smooth = torch.rand(2, 3, 6, 6, generator=rng)
    smooth = torch.nn.functional.interpolate(smooth, size=(24, 24), mode="bilinear")
    noise = 0.1 * torch.randn(smooth.shape, generator=rng)
    return [(x.clamp(0, 1) * 255).round().to(torch.uint8) for x in (smooth, smooth + noise)]


def test_psnr(quality, images):
    a, b = images
    step = torch.where(a < 255, a + 1, a - 1)
    assert quality.psnr(a, step).tolist() == pytest.approx([20 * np.log10(255)] * 2)
    assert quality.psnr(a, a).tolist() == [60.0, 60.0]
    error = ((a[0].numpy() / 255.0 - b[0].numpy() / 255.0) ** 2).mean()
    assert float(quality.psnr(a, b)[0]) == pytest.approx(-10 * np.log10(error))


def test_ssim_is_that_of_filtered_images(quality, images):
    """Written with another library's Gaussian filter; its border is cut off."""

    def smooth(x):
        return gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    def one(x, y):
        a, b = smooth(x), smooth(y)
        xx, yy, xy = smooth(x * x) - a * a, smooth(y * y) - b * b, smooth(x * y) - a * b
        top = (2 * a * b + 0.01**2) * (2 * xy + 0.03**2)
        return (top / ((a * a + b * b + 0.01**2) * (xx + yy + 0.03**2))).mean()

    a, b = images
    pairs = zip(a.double() / 255, b.double() / 255)
    expected = [np.mean([one(x.numpy(), y.numpy()) for x, y in zip(*pair)]) for pair in pairs]
    assert quality.ssim(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    assert quality.ssim(a, a).tolist() == pytest.approx([1.0, 1.0])


def run_of(name, seconds, values):
    """One sample per prompt; ``values``: prompt id -> PSNR. The judge says that even is right."""
    records = [
        {
            "prompt_id": n,
            "sample": 0,
            "seed": n,
            "correct": n % 2 == 0,
            "seconds": seconds,
            "PSNR": value,
            "SSIM": value / 100,
            "distance": 0.1,
        }
        for n, value in values.items()
    ]
    return Measured(Config(name), tuple(records))


def test_fewer_steps_in_equal_seconds(quality):
    runs = [run_of("b", 4.0, {0: 30.0, 1: 20.0}), run_of("a", 2.0, {0: 10.0, 1: 10.0})]
    assert quality.in_equal_seconds(runs, 2.5, "PSNR") == {0: 15.0, 1: 12.5}
    assert quality.in_equal_seconds(runs, 4.0, "PSNR") == {0: 30.0, 1: 20.0}
    assert quality.in_equal_seconds(runs, 1.0, "PSNR") == {0: 10.0, 1: 10.0}
    assert quality.in_equal_seconds(runs, 9.0, "PSNR") == {0: 30.0, 1: 20.0}
    assert quality.in_equal_seconds(runs[:1], 9.0, "PSNR") == {0: 30.0, 1: 20.0}


def test_rows_stand_beside_fewer_steps(quality):
    ids = range(6)
    full, fewer, cat = (
        quality.Way("full", "28 steps", 28),
        quality.Way("fewer steps", "14 steps", 14),
        quality.Way("CAT", "CAT 0.3", 28),
    )
    runs = {
        full: run_of("full", 2.0, dict.fromkeys(ids, 60.0)),
        fewer: run_of("fewer", 1.0, dict.fromkeys(ids, 20.0)),
        cat: run_of("cat", 1.25, {n: 31.0 + n % 2 for n in ids}),
    }
    rows = quality.rows_of(28, runs, dict.fromkeys(runs, 3e12))
    assert [row["method"] for row in rows] == ["28 steps", "14 steps", "CAT 0.3"]
    assert [row["TFLOP"] for row in rows] == [3.0] * 3
    assert ["PSNR vs fewer steps" in row for row in rows] == [False, False, True]
    assert rows[2]["PSNR vs fewer steps"].value == pytest.approx(31.5 - 20.0)
    assert rows[2]["judge vs full"].value == 0.0
    assert rows[2]["PSNR"].n == 6


def test_ways(quality):
    ways = list(quality.ways(50))
    assert ways[0] == quality.Way("full", "50 steps", 50)
    names = [way.name for way in ways]
    assert len(set(names)) == len(names)
    groups = ["full", "fewer steps", "CAT", "round-robin", "other choices", "cache-dit"]
    assert list(dict.fromkeys(way.group for way in ways)) == [*groups, "AdaptiveGuidance"]
    assert all(way.steps < 50 for way in ways if way.group == "fewer steps")
    texts = [[written(TECHNIQUES, t) for t in way.techniques] for way in ways]
    assert ["adaptive-guidance", "cat"] in [sorted(t.split(":")[0] for t in text) for text in texts]


def test_images_beside_those_of_the_same_prompt_and_sample(quality):
    truth = {name: torch.full((2, 3, 12, 12), 0, dtype=torch.uint8) for name in "ab"}
    truth["a"][1], truth["b"][0] = 100, 200
    beside = quality.Beside(
        truth, lambda x: torch.nn.functional.normalize(x.flatten(1) + 1, dim=-1)
    )
    order = ["b", "b", "a", "a"]
    assert [int(x[0, 0, 0]) for x in beside.of(order)] == [200, 0, 0, 100]
    same = beside.of(order).float() / 255
    scores = {name: scorer(same, order) for name, scorer in beside.scorers().items()}
    assert scores["PSNR"].tolist() == [60.0] * 4
    assert scores["distance"].tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert float(beside.psnr(same.roll(1, 0), order)[0]) < 60


@pytest.fixture(scope="module")
def pipe():
    return load("emoji-dit")


def test_the_full_run_is_made_once(quality, pipe, tmp_path):
    options = Namespace(work=str(tmp_path), samples=2, batch=4, scale=3.0)
    counts = []
    truth = quality.full_run(pipe, [0, 5], 2, options, counts.append)
    assert (sum(counts), len(truth)) == (4, 2)
    assert all(images.shape[0] == 2 for images in truth.values())
    again = quality.full_run(pipe, [0, 5], 2, options, counts.append)
    assert sum(counts) == 4
    assert all(torch.equal(again[name], truth[name]) for name in truth)
    assert len(quality.full_run(pipe, [0, 5, 7], 2, options, counts.append)) == 3
    assert sum(counts) == 6
    assert [path.name for path in Path(tmp_path).iterdir()] == ["full-2.pt"]


@pytest.mark.slow
def test_operations_are_counted(quality, pipe):
    full = quality.operations(pipe, quality.Way("full", "4 steps", 4), 0, 3.0)
    pruned = quality.Way("CAT", "", 4, (da.CAT(0.3, start=2),))
    fewer = quality.operations(pipe, quality.Way("fewer steps", "2 steps", 2), 0, 3.0)
    assert fewer < quality.operations(pipe, pruned, 0, 3.0) < full


@pytest.mark.slow
def test_beside_the_caches_of_diffusers(benchmark_module, tmp_path, monkeypatch):
    """Every cache runs, and computes less than the full run; nothing is left on."""
    benchmark_module("pruning")
    import pruning_caches
    import results

    monkeypatch.setattr(pruning_caches, "STEPS", 6)
    monkeypatch.setattr(pruning_caches, "WARM", 3)
    monkeypatch.setattr(pruning_caches, "WIDTH", 64)
    options = Namespace(sides=[4], rounds=1, output=str(tmp_path))
    pruning_caches.study(options)
    rows = {row["method"]: row for row in results.read("pruning_caches", tmp_path).rows}
    assert list(rows) == list(pruning_caches.ways())
    assert rows["full"]["operations"] == rows["full"]["beside"] == 1.0
    for name, row in rows.items():
        assert row["seconds"] > 0
        assert name == "full" or row["operations"] < 1.0, name
    assert (tmp_path / "pruning_caches.md").is_file()


@pytest.mark.parametrize(
    "arguments", [["--samples", "0"], ["--prompts", "5"], ["--rounds", "0"], ["--model", "emoji"]]
)
def test_bad_input(benchmark_module, capsys, monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["pruning.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark_module("pruning").main()
    assert arguments[0] in capsys.readouterr().err
