"""Operations are counted on shapes, and the page says what was measured."""

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def nag_cost(benchmark_module):
    return benchmark_module("nag_cost")


def test_a_denoiser_without_values_is_counted(nag_cost):
    """A product of [3, 4] and [4, 8]: two operations for each of 3 x 4 x 8."""

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 8, bias=False, device="meta", dtype=torch.bfloat16)

        def forward(self, x, options=None):
            return (self.linear(x),)

    denoiser = Denoiser()
    nag_cost.on_meta(denoiser)
    x, results = torch.zeros(3, 4), []
    count = nag_cost.operations(lambda: results.append(denoiser(x, options={"x": x})))
    assert count == 2 * 3 * 4 * 8
    assert results[0][0].shape == (3, 8)
    assert results[0][0].device.type == "cpu"


def test_a_quarter_of_a_model(nag_cost):
    """A quarter of the tokens of image and text, and of the channels."""
    whole, part = nag_cost.Size(), nag_cost.Size(part=4)
    assert whole.pixels**2 == 4 * part.pixels**2
    model = nag_cost.MODELS["Flux.1"]
    texts = [model.inputs(size)["prompt_embeds"].shape for size in (whole, part)]
    assert texts == [(1, 512, 4096), (1, 128, 1024)]


def test_nothing_is_shared_in_the_authors_layout(nag_cost):
    shared = nag_cost.Dense.part
    with nag_cost.two_attentions():
        assert nag_cost.Dense.part(None, 1, 2, 3, None) is None
    assert nag_cost.Dense.part is shared


def test_the_page(nag_cost, benchmark_module):
    pages, results = benchmark_module("pages"), __import__("results")
    row = {"model": "SDXL", "operations": 1.002, "authors": 1.021, "authors' seconds": None}
    where = {"device": "CPU", "versions": {"torch": "2", "diffusers": "0"}, "commit": "a"}
    options = {"quick": True, "rounds": 2}
    result = results.Result([row], nag_cost.COLUMNS, {}, options, {**where, "command": "c"})
    text = pages.PAGES["nag_cost"](result)
    assert "| SDXL | 1.002 | 1.021 | – |" in text
    assert "a few of the blocks, 2 rounds" in text
