"""What is lost where time is saved: the figures against other computations, and what is compared
with what."""

from argparse import Namespace
from types import SimpleNamespace

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


def test_what_a_reader_can_do_with_it(quality):
    import advice
    import results

    def row(name, *psnr):
        right = results.Estimate(0.0, -0.1, 0.1, 6)
        return {
            "method": name,
            "steps": 28,
            "PSNR vs fewer steps": results.Estimate(*psnr, 6),
            "judge vs fewer steps": right,
        }

    rows = [row("CAT 0.3", 2.0, 1.0, 3.0), row("round-robin 0.3", -2.0, -3.0, -1.0)]
    assert advice.pruning(results.Result(rows, {})) == (
        "Beside fewer of 28 steps in equal seconds: CAT 0.3 is nearer to the full run (+2.0 [+1.0, "
        "+3.0] dB), right images +0.00 [-0.10, +0.10]; round-robin 0.3 is farther from the full "
        "run (-2.0 [-3.0, -1.0] dB), right images +0.00 [-0.10, +0.10]."
    )
    rows[0] = row("CAT 0.3", 0.5, -1.0, 2.0)
    assert "CAT 0.3 is not nearer to the full run" in advice.pruning(results.Result(rows, {}))


class Judge:
    """Finds one object in bright images and nothing in dark ones."""

    thresholds = None

    def detect(self, images):
        return [float(x.mean()) > 0.5 for x in images]


def test_a_record_for_each_image(quality, monkeypatch):
    """Two prompts with two images each, of which the second prompt's second differs."""
    monkeypatch.setattr(
        quality, "verdict", lambda item, bright, limits: SimpleNamespace(correct=bright)
    )
    images = torch.full((4, 3, 12, 12), 200, dtype=torch.uint8)
    ours = images.clone()
    ours[3] = 0
    judges = quality.Judges(
        Judge(), lambda x: torch.nn.functional.normalize(x.flatten(1) + 1, dim=-1)
    )
    batches = [quality.Batch(x, 2.5) for x in (ours, images)]
    records = list(judges.records(*batches, [7, 5], 2))
    assert [(r["prompt_id"], r["sample"]) for r in records] == [(7, 0), (7, 1), (5, 0), (5, 1)]
    assert [r["seed"] for r in records] == [quality.seed_of(n, k) for n in (7, 5) for k in (0, 1)]
    assert [r["correct"] for r in records] == [True, True, True, False]
    assert [r["PSNR"] for r in records[:3]] == [60.0] * 3
    assert records[3]["PSNR"] == pytest.approx(20 * np.log10(255 / 200))
    assert records[3]["SSIM"] < records[2]["SSIM"] == pytest.approx(1.0)
    assert {r["seconds"] for r in records} == {2.5}


@pytest.mark.parametrize("count", [6, 12, 20])
def test_groups_have_a_prompt_of_each_tag(quality, count):
    parts = list(quality.groups(count))
    assert sorted(n for part in parts for n in part) == quality.stratified(count)
    assert all(len({quality.tag_of(n) for n in part}) == len(part) for part in parts)
    assert [len(part) for part in parts[:-1]] == [6] * (len(parts) - 1)


@pytest.fixture(scope="module")
def pipe():
    return load("emoji-dit")


def settings(folder, **more):
    return Namespace(**{"work": str(folder), "samples": 2, "scale": 3.0, **more})


def test_images_are_made_once(quality, pipe, tmp_path):
    way, options = quality.Way("full", "2 steps", 2), settings(tmp_path)
    first = quality.generated(pipe, way, 28, [0, 5], options)
    assert first.images.shape == (4, 3, 128, 128)
    assert first.images.dtype == torch.uint8
    assert first.seconds > 0
    again = quality.generated(None, way, 28, [0, 5], options)
    assert torch.equal(again.images, first.images)
    assert again.seconds == first.seconds
    assert [path.name for path in tmp_path.rglob("*.*")] == ["0-5.pt"]
    with pytest.raises(SystemExit, match="Give another --work"):
        quality.generated(None, way, 28, [0, 5], settings(tmp_path, scale=2.0))


@pytest.mark.slow
def test_operations_are_counted_once(quality, pipe, tmp_path):
    options = settings(tmp_path)
    ways = [
        quality.Way("full", "4 steps", 4),
        quality.Way("CAT", "CAT", 4, (da.CAT(0.3, start=2),)),
        quality.Way("fewer steps", "2 steps", 2),
    ]
    full, pruned, fewer = (quality.operations(pipe, way, 0, options) for way in ways)
    assert fewer < pruned < full
    assert quality.operations(None, ways[1], 0, options) == pruned


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
    "arguments",
    [
        ["--samples", "0"],
        ["--prompts", "11"],
        ["--rounds", "0"],
        ["--blocks", "1"],
        ["--steps", "28", "9"],
        ["--model", "emoji"],
    ],
)
def test_bad_input(benchmark_module, capsys, monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["pruning.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark_module("pruning").main()
    assert arguments[0] in capsys.readouterr().err
