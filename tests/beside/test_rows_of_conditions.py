"""Pictures, masks and control images that travel with rows: where passes or rows are left out, each
image keeps its own."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers.models.attention_processor import (
    IPAdapterAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterTimeImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import diffalign as da
from diffalign.core import COND, UNCOND, Guidance
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

BATCH, GUIDED = 3, (0, 2)


@dataclass(frozen=True, slots=True)
class Some(Guidance[None]):
    """CFG at scale 3 for the images 0 and 2, the conditional model for the others."""

    def passes(self, step, state):
        return (COND, replace(UNCOND, rows=GUIDED))

    def combine(self, preds, step, state):
        guided, rows = preds[COND].clone(), list(GUIDED)
        (uncond,) = (value for p, value in preds.items() if not p.conditioned)
        guided[rows] = step.mix(preds[COND][rows], uncond, 3.0)
        return guided, None


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half(pictures, guided):
    """Negative and positive pictures [2 K, ...]; a pipeline without guidance wants the second half
    alone."""
    return pictures if guided else pictures[len(pictures) // 2 :]


def unet_adapters(pipe, count, text):
    def new(key):
        width = pipe.unet.get_submodule(key.removesuffix(".processor")).to_q.in_features
        tokens, scale = (4,) * count, [0.8] * count
        return IPAdapterAttnProcessor2_0(width, text, num_tokens=tokens, scale=scale)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.unet.set_attn_processor(
            {k: new(k) if "attn2" in k else old for k, old in pipe.unet.attn_processors.items()}
        )
        projections = [ImageProjection(16, text, 4) for _ in range(count)]
        pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
        pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


def sd_two_with_masks():
    """Two adapters, each with a mask of its own."""
    name = "StableDiffusionPipeline"
    pipe = tiny_pipeline(name)
    unet_adapters(pipe, 2, 32)
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, ..., :8] = masks[1, ..., 8:] = 1.0
    pictures = [noise(2, 1, 16), noise(2, 1, 16, seed=1)]

    def given(images, guided):
        return {
            "ip_adapter_image_embeds": [half(picture, guided) for picture in pictures],
            "cross_attention_kwargs": {"ip_adapter_masks": masks},
        }

    return name, pipe, given


def sdxl_one(*shape):
    def make():
        name = "StableDiffusionXLPipeline"
        pipe = tiny_pipeline(name)
        unet_adapters(pipe, 1, 32)

        def given(images, guided):
            return {"ip_adapter_image_embeds": [half(noise(*shape), guided)]}

        return name, pipe, given

    return make


def sd3_one():
    name = "StableDiffusion3Pipeline"
    pipe = tiny_pipeline(name)
    model = pipe.transformer
    head, size = model.config.attention_head_dim, model.inner_dim
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"hidden_size": size, "ip_hidden_states_dim": size, "head_dim": head}
        model.set_attn_processor(
            {
                key: SD3IPAdapterJointAttnProcessor2_0(**options, timesteps_emb_dim=32)
                for key in model.attn_processors
            }
        )
        model.image_proj = IPAdapterTimeImageProjection(
            16, size, 32, heads=2, dim_head=16, num_queries=5, timestep_in_dim=8
        )

    def given(images, guided):
        return {"ip_adapter_image_embeds": half(noise(2, 5, 16), guided)}

    return name, pipe, given


def flux_two(pictures):
    def make():
        name = "FluxPipeline"
        pipe, size = tiny_pipeline(name), 32
        with torch.random.fork_rng():
            torch.manual_seed(0)
            processors = {
                key: old
                if "single" in key
                else FluxIPAdapterAttnProcessor(size, size, num_tokens=(4, 4), scale=[1.0, 0.5])
                for key, old in pipe.transformer.attn_processors.items()
            }
            pipe.transformer.set_attn_processor(processors)
            projections = [ImageProjection(16, size, 4) for _ in range(2)]
            pipe.transformer.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
        embeds = [noise(pictures, 1, 16, seed=i) for i in range(4)]
        names = ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
        return name, pipe, lambda images, guided: dict(zip(names, (embeds[:2], embeds[2:])))

    return make


def control(name, key="image"):
    """A control image for each image."""

    def make():
        pipe, pictures = tiny_pipeline(name), torch.rand(BATCH, 3, 16, 16)
        return name, pipe, lambda images, guided: {key: pictures[images]}

    return make


CONDITIONS = {
    "sd, two adapters and masks": sd_two_with_masks,
    "sdxl, one picture": sdxl_one(2, 1, 16),
    "sdxl, two pictures": sdxl_one(2, 2, 16),
    "sdxl, three pictures in rows": sdxl_one(6, 1, 16),
    "sd3, one adapter": sd3_one,
    "flux, two adapters": flux_two(1),
    "flux, two adapters, two pictures": flux_two(2),
    "sd control": control("StableDiffusionControlNetPipeline"),
    "sdxl control": control("StableDiffusionXLControlNetPipeline"),
    "sd t2i adapter": control("StableDiffusionAdapterPipeline"),
    "flux control": control("FluxControlNetPipeline", "control_image"),
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.few(4)
def test_each_image_keeps_its_condition(condition):
    """Row subsets, then no unconditional pass at all: every image is what it is alone."""
    name, pipe, rows = CONDITIONS[condition]()

    def run(images, *techniques, on=True):
        whole = tiny_inputs(name, batch=BATCH, steps=3)
        inputs = {
            key: value[images] if torch.is_tensor(value) and len(value) == BATCH else value
            for key, value in whole.items()
        }
        inputs["generator"] = [inputs["generator"][i] for i in images]
        with da.apply(pipe, *techniques):
            return final(pipe, {**inputs, **rows(images, on)})

    every = list(range(BATCH))
    alone = {i: [run([i], da.CFG(3.0))[0], run([i], da.CFG(1.0))[0]] for i in every}
    slack = 1e-5 * float(max(image.abs().max() for pair in alone.values() for image in pair))
    some, none = run(every, Some()), run(every, da.IntervalCFG(3.0, sigma=(0.0, 1e-9)))
    assert (alone[0][0] - alone[0][1]).abs().max() > 100 * slack
    for i in every:
        assert (some[i] - alone[i][0 if i in GUIDED else 1]).abs().max() <= slack
        assert (none[i] - alone[i][1]).abs().max() <= slack
    assert torch.equal(run(every), run(every, da.CFG()))


def test_masks_that_the_pipeline_does_not_repeat_are_refused():
    """Hunyuan-DiT repeats given texts for every image of a prompt, and their masks not."""
    name = "HunyuanDiTPipeline"
    pipe = tiny_pipeline(name)
    inputs = {**tiny_inputs(name, steps=1), "num_images_per_prompt": 2}
    inputs["generator"] = [torch.Generator().manual_seed(row) for row in range(2)]
    off = da.IntervalCFG(3.0, sigma=(0.0, 1e-9))
    with da.apply(pipe, off), pytest.raises(da.UnsupportedModel, match="4 rows in text_embedding"):
        pipe(**inputs)
