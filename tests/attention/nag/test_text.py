"""Where NAG's negative text comes from, and which image gets which."""

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch

import diffalign as da
from diffalign.core import COND, UNCOND, Guidance
from diffalign.families import FAMILIES
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

ALWAYS = (0.0, math.inf)
SD, FLUX = "StableDiffusionPipeline", "FluxPipeline"


def nag(scale=4.0, **options):
    return da.NAG(scale, **{"tau": 1.6, "alpha": 0.7, "sigma": ALWAYS, **options})


def test_where_the_negative_text_comes_from(monkeypatch):
    pipe = tiny_pipeline(SD, text=True)
    seen = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].clone()),
        with_kwargs=True,
    )

    def encoded(*texts):
        return FAMILIES[SD].encoder(pipe, texts)["encoder_hidden_states"]

    def run(technique, **more):
        seen.clear()
        given = {**tiny_inputs(SD, text=True, batch=2, steps=1, guided=False), **more}
        with da.apply(pipe, technique) as session:
            final(pipe, {key: value for key, value in given.items() if value is not None})
        negative = seen[0][:, 77:]
        return negative, next(note for note in session.report().notes if "negative text" in note)

    negative, note = run(nag(negative_prompt="low quality"))
    assert torch.equal(negative, encoded("low quality", "low quality"))
    assert "NAG(negative_prompt=...)" in note
    negative, note = run(nag(negative_prompt=("blue", "red")))
    assert torch.equal(negative, encoded("blue", "red"))
    negative, note = run(nag())
    assert torch.equal(negative, encoded("blurry 0", "blurry 1"))
    assert "negative_prompt of the call" in note
    negative, note = run(nag(), negative_prompt=None)
    assert torch.equal(negative, encoded("", ""))
    assert "the empty prompt" in note
    given = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(0))
    negative, note = run(nag(), negative_prompt=None, negative_prompt_embeds=given)
    assert torch.equal(negative, given)
    assert "negative_prompt_embeds of the call" in note
    negative, note = run(nag(negative_embeds={"negative_prompt_embeds": given[:1]}))
    assert torch.equal(negative, given[:1].expand(2, -1, -1))
    with pytest.raises(ValueError, match="3 negative texts for 2 prompts; give one"):
        run(nag(negative_prompt=("a", "b", "c")))
    handle.remove()


def test_several_images_per_prompt_take_their_prompts_negative():
    pipe = tiny_pipeline(SD, text=True)
    seen = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].clone()),
        with_kwargs=True,
    )
    given = {**tiny_inputs(SD, text=True, batch=2, steps=1), "num_images_per_prompt": 2}
    given["generator"] = [torch.Generator().manual_seed(i) for i in range(4)]
    with da.apply(pipe, da.CFG(3.0), nag(negative_prompt=("blue", "red"))):
        final(pipe, given)
    handle.remove()
    blue, red = FAMILIES[SD].encoder(pipe, ["blue", "red"])["encoder_hidden_states"]
    assert seen[0].shape[:2] == (8, 154)
    for row, text in zip(seen[0][4:, 77:], (blue, blue, red, red)):
        assert torch.equal(row, text)


@dataclass(frozen=True, slots=True)
class SecondImageOnly(Guidance[None]):
    """Guides one of two images."""

    def passes(self, step, state):
        return (COND, replace(UNCOND, rows=(1,)))

    def combine(self, preds, step, state):
        guided = preds[COND].clone()
        guided[1] = step.mix(preds[COND][1:], preds[UNCOND], 3.0)[0]
        return guided, state


@pytest.mark.parametrize(
    "whole", [False, True], ids=["rows that are asked for", "whole branches of a compiled model"]
)
def test_each_row_gets_its_images_negative(monkeypatch, whole):
    pipe = tiny_pipeline(SD, text=True)
    seen = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].clone()),
        with_kwargs=True,
    )
    if whole:
        monkeypatch.setattr("diffalign.seams.denoiser.evaluate.fixed_rows", lambda module: True)
    with da.apply(pipe, SecondImageOnly(), nag(negative_prompt=("blue", "red"))):
        final(pipe, tiny_inputs(SD, text=True, batch=2, steps=1))
    handle.remove()
    blue, red = FAMILIES[SD].encoder(pipe, ["blue", "red"])["encoder_hidden_states"]
    expected = torch.stack(
        [blue, red, blue, red] if whole else [red, blue, red]
    )  # unconditional rows first
    assert torch.equal(seen[0][:, 77:], expected)


def test_no_text_encoder_and_no_embeddings_is_an_error():
    pipe = tiny_pipeline("FluxFillPipeline")
    with pytest.raises(da.UnsupportedModel, match="negative_prompt_embeds"), da.apply(pipe, nag()):
        final(pipe, tiny_inputs("FluxFillPipeline"))
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    with da.apply(pipe, nag(negative_embeds={"negative_prompt_embeds": text})) as session:
        final(pipe, tiny_inputs("FluxFillPipeline"))
    assert session.report().layers["NAG"] == (2, 2)
    with (
        pytest.raises(ValueError, match="negative_text"),
        da.apply(
            pipe, nag(negative_embeds={"negative_prompt_embeds": text, "negative_text": text})
        ),
    ):
        final(pipe, tiny_inputs("FluxFillPipeline"))


class TextEncoder(torch.nn.Identity):
    device = torch.device("cpu")


class Encoded(Exception):
    """What ``encode_prompt`` was called with."""


def encoded_by(name, monkeypatch, technique, **call):
    """The arguments with which the negative text is encoded, on pipelines whose text encoders have
    no tiny form too."""
    pipe = tiny_pipeline(name)
    monkeypatch.setattr(pipe, "text_encoder", TextEncoder(), raising=False)
    encode = type(pipe).encode_prompt

    @functools.wraps(encode)
    def fake(self, **kwargs):
        raise Encoded(kwargs)

    monkeypatch.setattr(type(pipe), "encode_prompt", fake)
    with pytest.raises(Encoded) as caught, da.apply(pipe, technique):
        pipe(prompt=["one", "two"], num_inference_steps=1, **call)
    return caught.value.args[0]


def test_the_second_encoder_gets_its_own_negative(monkeypatch):
    call = encoded_by(FLUX, monkeypatch, nag(), negative_prompt="alpha", negative_prompt_2="beta")
    assert (call["prompt"], call["prompt_2"]) == (["alpha"], ["beta"])
    assert encoded_by(FLUX, monkeypatch, nag(), negative_prompt="alpha")["prompt_2"] is None
    xl = "StableDiffusionXLPipeline"
    call = encoded_by(
        xl, monkeypatch, nag(), negative_prompt="alpha", negative_prompt_2=["beta", "gamma"]
    )
    assert (call["negative_prompt"], call["negative_prompt_2"]) == (
        ["alpha", "alpha"],
        ["beta", "gamma"],
    )
    call = encoded_by(xl, monkeypatch, nag(), negative_prompt_2="blue")
    assert (call["negative_prompt"], call["negative_prompt_2"]) == ([""], ["blue"])


def test_the_scale_of_a_lora_reaches_the_text_encoder(monkeypatch):
    assert (
        encoded_by(SD, monkeypatch, nag(), cross_attention_kwargs={"scale": 0.3})["lora_scale"]
        == 0.3
    )
    assert (
        encoded_by(FLUX, monkeypatch, nag(), joint_attention_kwargs={"scale": 0.4})["lora_scale"]
        == 0.4
    )
    assert "lora_scale" not in encoded_by(SD, monkeypatch, nag())


@pytest.mark.parametrize(
    "name",
    [
        "QwenImageEditPipeline",
        pytest.param("QwenImageEditPlusPipeline", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_texts_that_are_encoded_with_an_image_must_be_given_encoded(name, monkeypatch):
    pipe = tiny_pipeline(name)
    monkeypatch.setattr(pipe, "text_encoder", TextEncoder(), raising=False)
    with (
        pytest.raises(da.UnsupportedModel, match=r"together with its image.*negative_embeds"),
        da.apply(pipe, nag(negative_prompt="blue")),
    ):
        final(pipe, tiny_inputs(name, steps=1))
    given = tiny_inputs(name, steps=1)
    own = {key: given[key] for key in ("negative_prompt_embeds", "negative_prompt_embeds_mask")}
    with da.apply(pipe, nag(negative_embeds=own)) as session:
        final(pipe, given)
    assert session.report().layers["NAG"][0] > 0


@pytest.mark.parametrize("name", [SD, "ZImagePipeline"])
def test_one_negative_or_one_per_prompt(name):
    """Not as many as happen to divide the images."""
    pipe = tiny_pipeline(name)
    for count in (2, 3):
        texts = tiny_inputs(name, batch=count)["negative_prompt_embeds"]
        technique = nag(negative_embeds={"negative_prompt_embeds": texts})
        with (
            pytest.raises(ValueError, match=f"{count} negative texts for 4 prompts"),
            da.apply(pipe, technique),
        ):
            final(pipe, tiny_inputs(name, batch=4, steps=1))


def test_pooled_embeddings_may_come_along():
    name = "StableDiffusionXLPipeline"
    pipe = tiny_pipeline(name)
    given = tiny_inputs(name, steps=1)
    embeds = {
        key: given[key] for key in ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    }
    with da.apply(pipe, nag(negative_embeds=embeds)) as session:
        final(pipe, given)
    assert session.report().layers["NAG"][0] > 0
