"""The benchmark of token pruning on a model of a few kilobytes: its figures are a report's."""

from argparse import Namespace

import pytest

from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD3 = "StableDiffusion3Pipeline"


def tiny(side, blocks):
    assert blocks == 2
    inputs = tiny_inputs(SD3, guided=False)
    drop = ("num_inference_steps", "generator", "output_type", "height", "width")
    return tiny_pipeline(SD3), {k: v for k, v in inputs.items() if k not in drop}


def test_a_row(benchmark_module, monkeypatch):
    """Width 16, 7 tokens of text, 16 of the image, of which 8 are computed; both blocks have two
    streams but the last, whose text ends with its projections."""
    module = benchmark_module("pruning")
    monkeypatch.setitem(module.MODELS, "SD3 medium", module.Model(tiny, 24, 16, 7))
    row = module.row("SD3 medium", 4, 0.5, Namespace(rounds=2, blocks=2))
    c, n, s, t = 16, 16, 8, 7
    image, text = 2 * 12 * c * c + 4 * 16 * c, 12 * c * c + 3 * c * c
    operations = [2 * (image * x + text * t) + 2 * 4 * c * (x + t) * (n + t) for x in (n, s)]
    assert row["bound"] == pytest.approx(operations[0] / operations[1])
    assert row["speedup"] == pytest.approx(row["full_s"] / row["pruned_s"])
    assert row["of bound"] == pytest.approx(row["speedup"] / row["bound"])
    assert row["run of 28"] == pytest.approx(8 + 20 / row["speedup"])
    assert (row["tokens"], row["computed"]) == (n, s)
    assert row["cache MiB"] == pytest.approx(2 * 2 * 24 * (n + t) * c / 2**20)
    assert row["choice_ms"] > 0


@pytest.mark.slow
def test_the_published_sizes(benchmark_module):
    """Heads times their size is the width that the table is about."""
    for model in benchmark_module("pruning").MODELS.values():
        pipe, _ = model.make(4, 1)
        assert pipe.transformer.inner_dim == model.width
