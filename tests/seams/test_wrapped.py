"""Denoisers inside a PeftModel, or inside a wrapper such as data parallel's: techniques act on the
model within."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import diffalign as da
from diffalign.core import BlockTechnique
from diffalign.families import FAMILIES
from diffalign.seams.blocks.sites import sites
from diffalign.seams.denoiser.cache import is_cached, is_compiled, is_compiled_whole
from diffalign.testing.deep import PIPELINES, deep_pipeline
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

pytestmark = pytest.mark.slow

NAMES = ["StableDiffusionPipeline", "FluxPipeline", "ZImagePipeline", "WanPipeline"]


class Parallel(nn.Module):
    """What DistributedDataParallel is to a pipeline that reads facts of its model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def adapted(model):
    """A PeftModel whose adapter adds exact zeros."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))


@dataclass(frozen=True, slots=True)
class Halved(BlockTechnique[None]):
    """Lets every block do half of what it does."""

    def around(self, block, streams, site, step, state):
        return tuple((a + b) / 2 for a, b in zip(streams, block())), state


TECHNIQUES = {
    "NAG": lambda: [da.NAG(4.0, tau=1.6, alpha=0.7, sigma=(0.0, float("inf")))],
    "PLADIS": lambda: [da.PLADIS()],
    "blocks": lambda: [Halved()],
    "skipped blocks": lambda: [da.S2Guidance(3.0, blocks=(1,), start=0.0, stop=1.0)],
}


@pytest.mark.parametrize("techniques", TECHNIQUES)
@pytest.mark.parametrize("wrap", [adapted, Parallel, lambda model: Parallel(adapted(model))])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.few(5)
def test_techniques_reach_the_model_within(name, wrap, techniques):
    def run(pipe):
        with da.apply(pipe, *TECHNIQUES[techniques]()) as session:
            return final(pipe, tiny_inputs(name, batch=2, steps=2)), session.report()

    def make():
        return deep_pipeline(name, PIPELINES.get(name, ""))

    expected, plain = run(make())
    pipe = make()
    attribute = FAMILIES[name].denoisers[0]
    wrapped = wrap(getattr(pipe, attribute))
    setattr(pipe, attribute, wrapped.eval())
    native = final(pipe, tiny_inputs(name, batch=2, steps=2))
    classes = {path: type(module) for path, module in wrapped.named_modules()}
    got, report = run(pipe)
    assert torch.equal(got, expected)
    assert not torch.equal(got, native)
    assert report.layers == plain.layers
    assert {path: type(module) for path, module in wrapped.named_modules()} == classes
    assert sites(wrapped) == sites(getattr(make(), attribute))


@pytest.mark.slow
def test_what_is_compiled_and_cached_is_asked_of_the_model_within():
    from diffusers import FirstBlockCacheConfig

    def model():
        return tiny_pipeline("FluxPipeline").transformer

    for wrap in (lambda module: module, Parallel, adapted):
        plain = wrap(model())
        assert not any(ask(plain) for ask in (is_compiled, is_compiled_whole, is_cached))
        whole = model()
        whole.compile(backend="eager")
        assert is_compiled(wrap(whole))
        assert is_compiled_whole(wrap(whole))
        parts = model()
        parts.compile_repeated_blocks(backend="eager")
        assert is_compiled(wrap(parts))
        assert not is_compiled_whole(wrap(parts))
        cached = model()
        cached.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        assert is_cached(wrap(cached))
    outside = torch.compile(Parallel(model()), backend="eager")
    assert is_compiled_whole(outside)
    assert is_compiled_whole(Parallel(torch.compile(model(), backend="eager")))
