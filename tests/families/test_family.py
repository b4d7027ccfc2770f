"""The arithmetic of families by hand: scales, mixes, post-processors, what schedulers receive."""

import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

import diffalign.families
from diffalign.core import Context, UnsupportedModel
from diffalign.families import FAMILIES, Family, family_of
from diffalign.families.arithmetic import first_channels, negated, renorm, rescale, upcast_mix
from diffalign.families.cosmos import COSMOS2
from diffalign.families.dit import every_row
from diffalign.families.family import entries
from diffalign.families.flux import DISTILLED, FLUX, KONTEXT
from diffalign.families.hunyuan_dit import half_rescale
from diffalign.families.ltx import without_first_frame
from diffalign.families.lumina import LUMINA2
from diffalign.families.qwen import QWEN
from diffalign.families.sd import SD
from diffalign.families.text import Encoder
from diffalign.families.zimage import ZIMAGE, cap, padded


@pytest.mark.parametrize(
    ("family", "native", "scale"),
    [(SD, 7.5, 7.5), (SD, 1.5, 1.5), (ZIMAGE, 4.0, 5.0), (ZIMAGE, 0.5, 1.5), (COSMOS2, 7.0, 8.0)],
)
def test_scales_there_and_back(family, native, scale):
    assert family.scale(native) == scale
    assert family.native(scale) == native


@pytest.mark.parametrize(
    ("family", "native"), [(SD, 1.0), (SD, 0.0), (SD, None), (ZIMAGE, 0.0), (ZIMAGE, -1.0)]
)
def test_a_pipeline_that_does_not_guide_has_scale_one(family, native):
    assert family.scale(native) == 1.0


def test_scale_one_is_the_pipelines_off():
    assert SD.native(1.0) == 1.0
    assert ZIMAGE.native(1.0) == 0.0
    assert COSMOS2.native(1.0) == 1.0  # its own off, which is not 1 - offset
    for family in FAMILIES.values():
        assert family.scale(family.off) == 1.0
        assert family.scale(family.placeholder) != 1.0


@pytest.mark.parametrize(
    ("family", "guided"),
    [(SD, [7.0, -1.0]), (ZIMAGE, [7.0, -1.0]), (COSMOS2, [7.0, -1.0])],
)
def test_every_mix_is_guidance_in_our_scale(family, guided):
    cond, uncond = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    assert family.mix(cond, uncond, 3.0).tolist() == guided


def test_mixes_in_float32():
    cond, uncond = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    assert upcast_mix(cond, uncond, 1.0 + 2**-12).item() == 1.0 + 2**-12
    assert ZIMAGE.mix(cond, uncond, 1.0 + 2**-12).dtype == torch.float32


def test_renorm_keeps_the_norm_of_each_token():
    guided, cond = (
        torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]),
        torch.tensor([[[0.0, 1.0], [6.0, 8.0]]]),
    )
    assert torch.allclose(renorm(guided, cond, True), torch.tensor([[[0.6, 0.8], [0.0, 10.0]]]))
    assert renorm(guided, cond, False) is guided


def test_rescale_keeps_the_spread_of_each_image():
    guided, cond = torch.tensor([[0.0, 4.0], [0.0, 6.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    assert torch.allclose(rescale(guided, cond, 1.0), cond)
    assert torch.allclose(rescale(guided, cond, 0.5), (cond + guided) / 2)
    assert rescale(guided, cond, 0.0) is guided


def test_half_rescale_leaves_the_variance():
    guided = torch.tensor([[[0.0, 4.0], [0.0, 6.0]]])
    cond = torch.tensor([[[0.0, 1.0], [0.0, 3.0]]])
    assert half_rescale(guided, cond, 1.0).tolist() == [[[0.0, 1.0], [0.0, 6.0]]]
    assert half_rescale(guided, cond, 0.0) is guided


def test_cap_limits_the_norm_of_each_image():
    guided, cond = torch.tensor([[6.0, 8.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    assert torch.allclose(cap(guided, cond, 1.5), torch.tensor([[1.8, 2.4], [0.0, 1.0]]))
    assert cap(guided, cond, False) is guided


def test_what_the_scheduler_receives():
    guided = torch.arange(8.0).reshape(1, 4, 2)
    assert torch.equal(negated(guided, guided), -guided)
    assert torch.equal(first_channels(guided, torch.zeros(1, 2, 2)), guided[:, :2])
    assert torch.equal(every_row(guided, torch.zeros(2, 2, 2)), torch.cat([guided[:, :2]] * 2))
    assert torch.equal(every_row(guided, torch.zeros(1, 2, 2)), guided[:, :2])
    assert torch.equal(ZIMAGE.to_step(guided[:, :, None], guided), -guided)
    # two frames of 1 x 2 tokens with one channel; the first frame is the image
    tokens = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    assert without_first_frame(tokens, torch.zeros(1, 1, 1, 1, 2)).tolist() == [[[[[3.0, 4.0]]]]]


def test_truncated_guidance():
    ratio = LUMINA2.options[1].stops
    assert [ratio(0.5, index, 4, 0.0) for index in range(4)] == [False, False, True, True]
    limit = ZIMAGE.options[1].stops
    assert [limit(0.5, 0, 4, time) for time in (900.0, 500.0, 499.0)] == [False, False, True]
    assert not limit(None, 0, 4, 0.0)
    assert not limit(2.0, 0, 4, 0.0)


def test_row_parts():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    denoiser = SimpleNamespace(config=SimpleNamespace(patch_size=2))
    call = {"hidden_states": torch.zeros(2, 4, 4, 6), "encoder_attention_mask": mask}
    assert LUMINA2.attention.row_parts(denoiser, call) == (
        {"prompt": slice(0, 2), "image": slice(2, 8)},
        {"prompt": slice(0, 3), "image": slice(3, 9)},
    )
    call = {"x": [torch.zeros(4, 1, 4, 6)], "cap_feats": [torch.zeros(40, 8)]}
    assert ZIMAGE.attention.row_parts(denoiser, call) == (
        {"prompt": slice(32, 96), "image": slice(0, 32)},
    )
    assert [padded(n) for n in (1, 32, 33)] == [32, 32, 64]
    with pytest.raises(UnsupportedModel, match="reference images"):
        ZIMAGE.attention.row_parts(denoiser, {"x": [[torch.zeros(1)]], "cap_feats": [0]})


def test_the_first_missing_denoiser_is_not_present():
    wan = FAMILIES["WanPipeline"]
    pipe = SimpleNamespace(transformer="first", transformer_2=None)
    assert wan.present(pipe) == {"transformer": "first"}


def test_what_a_call_must_bring():
    bare = SimpleNamespace()
    assert SD.missing_negative(bare, {"prompt": "a cat"}) is None
    assert "negative_prompt_embeds" in SD.missing_negative(bare, {"prompt_embeds": 1})
    assert SD.missing_negative(bare, {"prompt_embeds": 1, "negative_prompt_embeds": 1}) is None
    assert SD.missing_negative(SimpleNamespace(text_encoder=1), {"prompt_embeds": 1}) is None
    assert QWEN.negative_given(bare, {"negative_prompt_embeds": 1})
    assert not QWEN.negative_given(bare, {"negative_prompt": None})
    assert SD.negative_given(bare, {})
    named = replace(SD, encoder=Encoder(arguments={"prompt_embeds_t5": "text"}))
    assert named.embeddings == "prompt_embeds_t5"
    assert "negative_prompt_embeds_t5" in named.missing_negative(bare, {"prompt_embeds_t5": 1})
    both = {"prompt_embeds_t5": 1, "negative_prompt_embeds_t5": 1}
    assert named.missing_negative(bare, both) is None


def test_distilled_models_have_nothing_to_guide():
    assert "use NAG" in DISTILLED.check(None)
    assert FLUX.check(None) is None
    unet = SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=256))
    assert "use NAG" in SD.check(SimpleNamespace(unet=unet))


def test_refusals_of_techniques_and_of_their_options():
    @dataclass
    class ZeroStar:
        zero_steps: int

    qwen, cosmos = (
        Context("P", family.name, "transformer", "S", 1.0, "call", 20, refusals=family.refusals)
        for family in (QWEN, COSMOS2)
    )
    assert "zero_steps=0" in qwen.refusal("cfg-zero-star", ZeroStar(1))
    assert qwen.refusal("cfg-zero-star", ZeroStar(0)) is None
    assert qwen.refusal("cfg", ZeroStar(1)) is None
    assert "falling" in cosmos.refusal("cfg-plus-plus", object())


def test_entries_and_the_defaults_of_relatives():
    first, second = entries("a paper", {"flow": True}, scale=2.0, tau=1.5)
    assert (first.option, first.value, first.source, first.when) == (
        "scale",
        2.0,
        "a paper",
        {"flow": True},
    )
    assert second.option == "tau"
    assert KONTEXT.defaults["nag"][: len(FLUX.defaults["nag"])] == FLUX.defaults["nag"]


def test_a_subclass_inherits_its_family():
    class Mine(type("StableDiffusionPipeline", (), {})):
        pass

    assert family_of(Mine) is SD
    with pytest.raises(UnsupportedModel, match=r"is not supported: .*"):
        family_of(type("AudioLDMPipeline", (), {}))
    with pytest.raises(UnsupportedModel, match="Nearest: FluxPipeline"):
        family_of(type("FluxxPipeline", (), {}))


def test_a_class_stands_in_one_family():
    twice = [("FluxPipeline", FLUX), ("FluxPipeline", replace(FLUX, name="flux-2"))]
    with pytest.raises(ValueError, match="FluxPipeline stands in two families, flux and flux-2"):
        diffalign.families._by_class(iter(twice))


def test_a_family_is_its_name_and_what_differs():
    plain = Family("plain", pipelines=("PlainPipeline",))
    assert (plain.mode, plain.gates, plain.scale(3.0)) == ("batched", ("guidance_scale",), 3.0)
    assert Encoder().arguments == {"prompt_embeds": "encoder_hidden_states"}


def test_families_load_neither_torch_nor_diffusers():
    """Without the package's own doors, which this file does not test."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('diffalign')\n"
        f"package.__path__ = {list(diffalign.__path__)!r}\n"
        "sys.modules['diffalign'] = package\n"
        "import diffalign.families\n"
        "assert len(diffalign.families.FAMILIES) > 70\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
