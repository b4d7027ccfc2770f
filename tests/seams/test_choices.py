"""Presets: ready tuples that act, and refusals that say why."""

import pytest
import torch

import diffalign as da
from diffalign.seams.choices import PRESETS
from diffalign.testing.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("StableDiffusionPipeline", text=True)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.slow
def test_a_preset_is_a_tuple_that_apply_takes_and_that_changes_the_image(pipe, name):
    def image():
        generator = torch.Generator().manual_seed(0)
        given = {
            "num_inference_steps": 4,
            "guidance_scale": 4.0,
            "generator": generator,
            "output_type": "latent",
        }
        return pipe("a photo of a cat", negative_prompt="blurry", **given).images

    plain = image()
    with da.apply(pipe, *da.preset(name, pipe)) as session:
        assert not torch.equal(image(), plain)
    assert session.report().resolved
    assert torch.equal(image(), plain)


@pytest.mark.slow
def test_fast_is_adaptive_guidance_with_the_models_own_threshold():
    """On emoji it is what benchmarks/adaptive.py measured; the options stay open until the call."""
    pipe = da.load("emoji")
    with da.apply(pipe, *da.preset("fast", pipe)) as session:
        pipe(
            "a photo of a cat",
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    resolved = session.report().resolved["adaptive-guidance"]
    assert (resolved["space"][0], resolved["threshold"][0]) == ("x0", 0.95)
    assert "benchmarks/adaptive.py" in resolved["threshold"][1]
    assert 21 <= session.report().nfe < 40


def test_a_name_that_is_none_offers_the_nearest(pipe):
    with pytest.raises(ValueError, match="fast"):
        da.preset("fats", pipe)


def test_a_technique_that_cannot_act_is_named_with_its_reason(pipe, monkeypatch):
    monkeypatch.setitem(PRESETS, "flow", ("cfg-zero-star",))
    with pytest.raises(
        da.UnsupportedModel, match=r"cfg-zero-star on StableDiffusionPipeline: .*flow"
    ):
        da.preset("flow", pipe)
