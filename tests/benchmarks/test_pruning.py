"""The benchmark of token pruning on a model of a few kilobytes: its figures are a report's."""

from argparse import Namespace

import pytest

import diffalign as da
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD3 = "StableDiffusion3Pipeline"


def tiny(side, blocks):
    assert blocks == 2
    inputs = tiny_inputs(SD3, guided=False)
    drop = ("num_inference_steps", "generator", "output_type", "height", "width")
    return tiny_pipeline(SD3), {k: v for k, v in inputs.items() if k not in drop}


def test_a_row(benchmark_module, monkeypatch):
    """Width 16, 7 tokens of text, 16 of the image, of which 8 are computed."""
    module = benchmark_module("pruning")
    monkeypatch.setitem(module.MODELS, "SD3 medium", module.Model(tiny, 24, 16, 7, True))
    row = module.row("SD3 medium", 4, 0.5, Namespace(rounds=2, blocks=2))
    c, n, s, t = 16, 16, 8, 7
    operations = [24 * c * c * (x + t) + 4 * c * (x + t) * (n + t) for x in (n, s)]
    assert row["bound"] == pytest.approx(operations[0] / operations[1])
    assert row["of bound"] == pytest.approx(row["speedup"] / row["bound"])
    assert row["run of 28"] == pytest.approx(8 + 20 / row["speedup"])
    assert (row["tokens"], row["computed"]) == (n, s)
    assert row["cache MiB"] == pytest.approx(2 * 2 * 24 * (n + t) * c / 2**20)
    assert row["choice_ms"] > 0


def test_a_missing_block_is_as_long_as_the_first(benchmark_module, monkeypatch):
    """A clock that ticks at each look: a call of the model with two blocks, of which the first is
    timed, lasts three ticks, and its first block one."""
    module, ticks = benchmark_module("pruning"), iter(range(1000))
    monkeypatch.setattr(module.time, "process_time", lambda: next(ticks))
    pipe, call = tiny(4, 2)
    seconds, _ = module.step_seconds(
        pipe, call | {"height": 8, "width": 8}, da.CAT(0.5, start=3), 24
    )
    assert seconds == [3 + 22 * 1] * module.STEPS


def test_operations_of_cross_attention(benchmark_module):
    """Of PixArt: feed-forward and the image's projections 28 C^2, those of the text 4 C^2."""
    model = benchmark_module("pruning").MODELS["PixArt-Sigma"]
    c, n, s, t = 1152, 4096, 1228, 300
    linear = 2 * c * c * ((4 + 8 + 2) * s + 2 * t)
    assert model.operations(n, s) == linear + 4 * c * s * n + 4 * c * s * t


@pytest.mark.slow
def test_the_published_sizes(benchmark_module):
    """Heads times their size is the width that the table is about."""
    for model in benchmark_module("pruning").MODELS.values():
        pipe, _ = model.make(4, 1)
        assert pipe.transformer.inner_dim == model.width
