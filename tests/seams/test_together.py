"""Sessions beside what else a pipeline may carry: feature caches, compiled blocks, LoRA, row
subsets."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

import diffalign as da
from diffalign.core import COND, UNCOND, Guidance
from diffalign.guidance import CFG
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline


@dataclass(frozen=True, slots=True)
class Subset(Guidance[None]):
    """CFG on the first image only; ``stop``: from this step on conditional for all."""

    stop: int = 99

    def passes(self, step, state):
        return (COND, replace(UNCOND, rows=(0,))) if step.index < self.stop else (COND,)

    def combine(self, preds, step, state):
        guided = preds[COND].clone()
        if UNCOND in preds:
            assert len(preds[UNCOND]) == 1
            guided[:1] = step.mix(preds[COND][:1], preds[UNCOND], 4.0)
        return guided, None


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "WanPipeline", "ZImagePipeline"])
def test_a_row_subset_is_really_a_subset(name):
    """Two images, one guided: three rows per step, and each image as it comes out alone (other GEMM
    shapes, so to rounding)."""
    pipe = tiny_pipeline(name)

    def given():
        return {
            **tiny_inputs(name, batch=2, steps=3),
            "guidance_scale": 4.0 if name != "ZImagePipeline" else 3.0,
        }

    with da.apply(pipe, CFG()):
        guided = final(pipe, given())
    with da.apply(pipe, CFG(1.0)):
        plain = final(pipe, given())
    with da.apply(pipe, Subset()) as session:
        got = final(pipe, given())
    assert session.report().rows == 9
    assert session.report().nfe == 4.5
    assert torch.allclose(got[0], guided[0], atol=1e-5 * float(guided.abs().max()))
    assert torch.allclose(got[1], plain[1], atol=1e-5 * float(plain.abs().max()))


@pytest.mark.slow
def test_compiled_models_see_two_row_counts():
    """A compiled model must not meet a third batch size: whole branches are evaluated and the
    subset picked afterwards."""
    pipe = tiny_pipeline("StableDiffusionPipeline")
    seen = set()

    def backend(module, inputs):
        def run(*args):
            seen.update(
                a.shape[0]
                for a in args
                if isinstance(a, torch.Tensor) and a.ndim == 4 and a.shape[1:] == (4, 8, 8)
            )
            return module.forward(*args)

        return run

    with da.apply(pipe, Subset(stop=2)):
        native = final(pipe, tiny_inputs("StableDiffusionPipeline", batch=2, steps=4))
    torch._dynamo.reset()
    pipe.unet.compile(backend=backend, dynamic=False)
    try:
        with da.apply(pipe, Subset(stop=2)) as session:
            got = final(pipe, tiny_inputs("StableDiffusionPipeline", batch=2, steps=4))
    finally:
        torch._dynamo.reset()
    assert session.report().rows == 4 + 4 + 2 + 2
    assert seen == {4, 2}
    assert torch.allclose(got, native, atol=1e-5 * float(native.abs().max()))


CACHES = {
    "first-block": lambda pipe: FirstBlockCacheConfig(threshold=0.1),
    "taylor-seer": lambda pipe: TaylorSeerCacheConfig(),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}


@pytest.mark.parametrize("cache", sorted(CACHES))
@pytest.mark.parametrize(
    "name", ["WanPipeline", "FluxPipeline", "LTXPipeline", "CogVideoXPipeline"]
)
@pytest.mark.few(4)
def test_feature_caches_run_as_without_a_session(name, cache):
    def cached():
        pipe = tiny_pipeline(name)
        pipe.transformer.enable_cache(CACHES[cache](pipe))
        return pipe

    try:
        native = final(cached(), tiny_inputs(name, steps=6))
    except ValueError as error:  # this cache does not know the family's blocks
        pytest.fail(f"{name} with {cache}: {error}")
    pipe = cached()
    with da.apply(pipe, CFG()):
        assert torch.equal(final(pipe, tiny_inputs(name, steps=6)), native)
        assert torch.equal(final(pipe, tiny_inputs(name, steps=6)), native)


@pytest.mark.parametrize("name", ["LTXPipeline", "CogVideoXPipeline"])
def test_a_cache_is_reset_when_the_branch_drops_out(name):
    """Pyramid attention broadcast keeps tensors of both branches; without a reset the smaller batch
    cannot use them."""
    pipe = tiny_pipeline(name)
    pipe.transformer.enable_cache(CACHES["pyramid"](pipe))
    with da.apply(pipe, Subset(stop=3)) as session:
        assert torch.isfinite(final(pipe, tiny_inputs(name, steps=6))).all()
    assert session.report().rows == 3 * 2 + 3


def test_lora_may_be_toggled_under_a_session():
    from peft import LoraConfig

    pipe = tiny_pipeline("StableDiffusionPipeline")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    def given():
        return tiny_inputs("StableDiffusionPipeline", steps=3)

    native = final(pipe, given())
    with da.apply(pipe, CFG()):
        assert torch.equal(final(pipe, given()), native)
        pipe.unet.disable_adapters()
        without = final(pipe, given())
        pipe.unet.enable_adapters()
        assert torch.equal(final(pipe, given()), native)
    assert not torch.equal(without, native)
