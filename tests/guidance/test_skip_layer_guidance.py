"""Skip-layer guidance: SD3's own code, published layers, several layers in one pass."""

import pytest
import torch

import diffalign as da
from diffalign.families import FAMILIES
from diffalign.guidance import CFG
from diffalign.guidance.skip_layer_guidance import SkipLayerGuidance
from diffalign.testing.contracts import GuidanceContract
from diffalign.testing.deep import deep_pipeline, without_block
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs

EVERYWHERE = {"start": 0.0, "stop": 1.0}


class TestSkipLayerGuidance(GuidanceContract):
    def make(self):
        return SkipLayerGuidance(3.0, layers=(7, 8, 9), start=0.0, stop=0.5)

    def off(self):
        return SkipLayerGuidance(3.0, layers=(7,), slg_scale=0.0, stop=1.0), CFG(3.0)

    def rows(self, steps, batch):
        return batch * (2 * steps + steps // 2)


def call(pipe, technique, name, variant="", **options):
    scale = options.pop("scale", 4.0)
    inputs = tiny_inputs(
        name, variant=variant, steps=options.pop("steps", 2), batch=options.pop("batch", 1)
    )
    with da.apply(pipe, technique) as session:
        return final(pipe, {**inputs, FAMILIES[name].gates[0]: scale, **options}), session.report()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skip_layer_guidance_is_sd3s_own(dtype):
    """Bit for bit. The pipeline acts for 0.01 * 4 < index < 0.8 * 4, that is at steps 1 to 3."""
    name = "StableDiffusion3Pipeline"
    pipe = deep_pipeline(name).to(dtype)

    def inputs():
        return {**tiny_inputs(name, dtype=dtype, steps=4, batch=2), "guidance_scale": 4.0}

    plain = final(pipe, inputs())
    native = final(
        pipe,
        {
            **inputs(),
            "skip_guidance_layers": [1, 2],
            "skip_layer_guidance_scale": 1.7,
            "skip_layer_guidance_stop": 0.8,
        },
    )
    technique = SkipLayerGuidance(layers=(1, 2), slg_scale=1.7, start=0.25, stop=1.0)
    with da.apply(pipe, technique) as session:
        assert torch.equal(final(pipe, inputs()), native)
    assert session.report().rows == 2 * (2 + 3 * 3)
    assert not torch.equal(native, plain)
    assert torch.equal(final(pipe, inputs()), plain)


def test_published_layers_of_sd35_medium():
    pipe = deep_pipeline("StableDiffusion3Pipeline", "3.5", extra=22)
    pipe.transformer.register_to_config(num_layers=24)
    made, report = call(pipe, SkipLayerGuidance(), "StableDiffusion3Pipeline", steps=10)
    assert report.resolved["skip-layer-guidance"]["layers"] == (
        (7, 8, 9),
        "published for SD3.5 medium",
    )
    assert report.rows == 2 * 10 + 2
    assert made.isfinite().all()


def test_both_stacks_of_flux_can_be_named():
    pipe = deep_pipeline("FluxPipeline")
    seen = []
    for layer in ("transformer_blocks.1", "single_transformer_blocks.1", 1, 4):
        seen.append(call(pipe, SkipLayerGuidance(layers=(layer,), **EVERYWHERE), "FluxPipeline")[0])
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_a_list_of_layers_is_one_pass():
    """Two layers are two blocks missing from one pass, not two passes."""
    pipe = deep_pipeline("PixArtSigmaPipeline")
    out, report = call(
        pipe, SkipLayerGuidance(1.0, layers=(1, 2), **EVERYWHERE), "PixArtSigmaPipeline", steps=1
    )
    assert report.rows == 2
    cond, _ = call(pipe, CFG(1.0), "PixArtSigmaPipeline", steps=1)
    lacking = without_block(without_block(pipe, "transformer_blocks.2"), "transformer_blocks.1")
    skipped, _ = call(lacking, CFG(1.0), "PixArtSigmaPipeline", steps=1)
    expected = cond.double() + 2.8 * (cond.double() - skipped.double())
    assert (out - expected).abs().max() <= 256 * torch.finfo(torch.float32).eps * out.abs().max()
