"""From a call as it was written to arguments by name, gates and resolved techniques."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import diffalign as da
from diffalign.core import Meter, UnsupportedModel
from diffalign.families import family_of
from diffalign.seams.plan import Arguments, bind, context_of, described, plan
from diffalign.testing import tiny_pipeline


class Mine(StableDiffusionPipeline):
    """Hands everything on."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def arguments(**values):
    return Arguments(values, values)


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, Mine])
def test_names_and_defaults_are_those_of_the_described_class(cls):
    call = bind(cls, None, ("a cat", 64), {"guidance_scale": 3.0})
    assert described(cls) is StableDiffusionPipeline
    assert call.given == {"prompt": "a cat", "height": 64, "guidance_scale": 3.0}
    assert call.values["guidance_scale"] == 3.0
    assert call.values["num_inference_steps"] == 50
    assert "self" not in call.values


def test_keyword_arguments_alone_are_bound_too():
    call = bind(Mine, None, (), {"prompt": "a cat", "eta": 1.0})
    assert call.given == {"prompt": "a cat", "eta": 1.0}
    assert call.values["guidance_scale"] == 7.5
    more = bind(Mine, None, (), {"prompt": "a cat", "callback_steps": 1})
    assert more.given == {"prompt": "a cat", "callback_steps": 1}


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"num_inference_steps": 7}, 7),
        ({"num_inference_steps": 50, "timesteps": torch.tensor([9, 5, 1])}, 3),
        ({"num_inference_steps": 50, "sigmas": [1.0, 0.5]}, 2),
        ({"num_inference_steps": 4, "timesteps": None, "sigmas": None}, 4),
        ({"num_inference_steps": None}, 0),
        ({}, 0),
    ],
)
def test_steps_are_those_of_the_tables_where_they_are_given(values, steps):
    assert arguments(**values).steps == steps


@pytest.mark.parametrize(
    ("values", "prompts"),
    [
        ({"prompt": "a"}, ("a",)),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 2}, ("a", "a", "b", "b")),
        ({"prompt": "a", "num_videos_per_prompt": 3}, ("a", "a", "a")),
        ({"prompt": ["a"], "num_images_per_prompt": None}, ("a",)),
        ({"prompt": None}, ()),
        ({"prompt": [["a"]]}, ()),
    ],
)
def test_images_of_one_prompt_stand_together(values, prompts):
    assert arguments(**values).prompts == prompts


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "a"), (["a", "a"], "a"), (["a", "b"], None), (None, None), ([], None)],
)
def test_a_negative_prompt_is_one_text_or_none(value, text):
    assert arguments(negative_prompt=value).negative_prompt == text


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("StableDiffusionPipeline")


def planned(pipe, *techniques, **call):
    return plan(pipe, family_of(type(pipe)), techniques, (), {"prompt": "a", **call}, Meter())


def test_a_guidance_opens_the_gate_with_a_placeholder(pipe):
    result = planned(pipe, da.CFG(3.0), guidance_scale=5.0, guidance_rescale=0.7)
    assert result.opened
    assert result.arguments == {"prompt": "a", "guidance_scale": 2.0, "guidance_rescale": 0.0}
    assert result.values["guidance_scale"] == 5.0
    assert result.options == {"guidance_rescale": 0.7}
    assert (result.guidance_name, result.guidances["unet"].scale) == ("cfg", 3.0)
    assert (result.free, result.resolved) == ((), {"cfg": {"scale": (3.0, "")}})


def test_a_guidance_that_needs_one_branch_closes_it(pipe):
    result = planned(pipe, da.CFG(1.0), guidance_scale=5.0)
    assert not result.opened
    assert result.arguments["guidance_scale"] == 1.0


def test_a_scale_left_to_the_call_is_free(pipe):
    result = planned(pipe, da.CFG(), guidance_scale=5.0)
    assert result.free == ("scale",)
    assert result.resolved["cfg"]["scale"] == (5.0, "guidance scale of the call")
    assert planned(pipe, da.CFG()).resolved["cfg"]["scale"] == (7.5, "default of the pipeline")


@pytest.mark.parametrize(("scale", "opened"), [(1.0, False), (1.1, True)])
def test_without_a_guidance_the_call_is_left_alone(pipe, scale, opened):
    result = planned(pipe, guidance_scale=scale)
    assert result.arguments == {"prompt": "a", "guidance_scale": scale}
    assert result.guidances == {}
    assert result.opened is opened


def test_embeddings_alone_are_refused_without_an_encoder(pipe):
    encoder, pipe.text_encoder = pipe.text_encoder, None
    try:
        with pytest.raises(UnsupportedModel, match="pass negative_prompt_embeds"):
            planned(pipe, da.CFG(3.0), prompt=None, prompt_embeds=torch.zeros(1, 2, 3))
    finally:
        pipe.text_encoder = encoder


def test_a_context_without_a_call_is_guided(pipe):
    family = family_of(type(pipe))
    context = context_of(pipe, family)
    assert (context.scale, context.scale_source, context.steps) == (7.5, "pipeline default", 50)
    closed = context_of(pipe, family, call=bind(type(pipe), pipe, (), {"guidance_scale": 0.5}))
    assert (closed.scale, closed.scale_source) == (1.0, "call")
