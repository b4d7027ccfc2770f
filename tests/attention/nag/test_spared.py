"""What NAG does not compute: texts that other rows have, tokens that nobody reads, image streams
that are the same; that the result is right all the same is tested in test_lockstep.py."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import diffalign as da
from diffalign.seams.attention.dense import Dense
from diffalign.testing.calls import model_of
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD, SD3, FLUX, PIXART = (
    "StableDiffusionPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtAlphaPipeline",
)
EPS = torch.finfo(torch.float32).eps


def nag(**options):
    return da.NAG(4.0, **{"tau": 1.6, "alpha": 0.7, "sigma": (0.0, math.inf), **options})


def negative(name, length=7, **others):
    """A negative text that is not the call's."""
    width = tiny_inputs(name)["prompt_embeds"].shape[-1]
    rng = torch.Generator().manual_seed(3)
    return {"negative_prompt_embeds": torch.randn(1, length, width, generator=rng), **others}


def run(pipe, name, *techniques, **more):
    inputs = {**tiny_inputs(name, batch=2, steps=2), **more}
    with da.apply(pipe, *techniques) as session:
        return final(pipe, inputs), session.report()


def rows_of(pipe, path):
    """Shapes of what a module gets, call by call; for a list, a handle to stop it."""
    shapes = []
    module = model_of(pipe).get_submodule(path)
    return shapes, module.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))


@pytest.mark.parametrize("name", [SD, PIXART])
def test_a_text_that_the_unconditional_rows_have_is_not_added(name):
    pipe = tiny_pipeline(name)
    lengths = []
    handle = model_of(pipe).register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]),
        with_kwargs=True,
    )
    given = tiny_inputs(name, batch=2)
    text = given["negative_prompt_embeds"]
    expected, report = run(pipe, name, nag())
    assert report.layers["NAG"][0] == report.layers["NAG"][1] > 0
    same = {key: value for key, value in given.items() if key.startswith("negative_prompt_")}
    got, _ = run(pipe, name, nag(negative_embeds=same))
    assert torch.equal(got, expected)
    assert set(lengths) == {text.shape[1]}
    lengths.clear()
    run(pipe, name, nag(), guidance_scale=1.0)  # no such rows
    other = {**same, "negative_prompt_embeds": text + 1}
    run(pipe, name, nag(negative_embeds=other))
    handle.remove()
    assert set(lengths) == {2 * text.shape[1]}


def test_a_text_that_a_callback_changes_is_no_longer_borrowed():
    """From then on NAG adds its own, which is what it was."""
    pipe = tiny_pipeline(SD)
    texts = tiny_inputs(SD, batch=2)

    def change(pipe, index, timestep, values):
        values["prompt_embeds"] = values["prompt_embeds"].clone()
        values["prompt_embeds"][:2] += 1
        return values

    def change_in_place(pipe, index, timestep, values):
        values["prompt_embeds"][:2] += 1
        return values

    results = []
    for callback in (change, change_in_place):
        for embeds in (None, {"negative_prompt_embeds": texts["negative_prompt_embeds"].clone()}):
            got, _ = run(
                pipe,
                SD,
                nag(negative_embeds=embeds),
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
            )
            results.append(got)
    assert all(torch.equal(results[0], other) for other in results[1:])
    untouched, _ = run(pipe, SD, nag())
    assert not torch.equal(results[0], untouched)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (SD, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
        (PIXART, "caption_projection"),
        (SD3, "transformer_blocks.0.attn.add_q_proj"),
        (SD3, "transformer_blocks.0.attn.to_add_out"),
        (SD3, "transformer_blocks.0.ff_context"),
    ],
)
def test_no_negative_tokens_of_unconditional_rows(name, path):
    """Two images in two branches with 7 tokens each, and 5 of the negative text for two rows."""
    pipe = tiny_pipeline(name)
    embeds = negative(name, 5)
    if name == PIXART:
        embeds["negative_prompt_attention_mask"] = torch.ones(1, 5, dtype=torch.int64)
    shapes, handle = rows_of(pipe, path)
    run(pipe, name, nag(negative_embeds=embeds))
    handle.remove()
    tokens = {shape[:-1].numel() for shape in shapes}
    prompt = tiny_inputs(name)["prompt_embeds"].shape[1]
    assert tokens == {4 * prompt + 2 * 5}


def test_one_image_stream_in_the_double_blocks_of_the_published_layout():
    pipe = tiny_pipeline(FLUX)
    for path, rows in (
        ("transformer_blocks.0.attn.to_q", 2),
        ("transformer_blocks.0.ff", 2),
        ("transformer_blocks.0.attn.add_q_proj", 4),
        ("single_transformer_blocks.0.attn.to_q", 4),
    ):
        shapes, handle = rows_of(pipe, path)
        run(pipe, FLUX, nag(share_image=False), true_cfg_scale=1.0)
        handle.remove()
        assert {shape[0] for shape in shapes} == {rows}


def operations(pipe, name, *techniques, **more):
    """Of a run, torch's attention kernel for CPUs included."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: counted})
    with counter:
        run(pipe, name, *techniques, output_type="latent", **more)
    return counter.get_total_flops()


def counted(q, k, v, *rest, out_shape=None, **options):
    return sdpa_flop(q, k, v)


@pytest.mark.parametrize(
    ("name", "more", "options"),
    [
        (FLUX, {"true_cfg_scale": 1.0}, {}),
        (FLUX, {"true_cfg_scale": 1.0}, {"share_image": False}),
        (SD3, {}, {}),
    ],
)
def test_the_image_attends_to_itself_once(monkeypatch, name, more, options):
    """Operations: those of two whole attentions less one of the image with itself, in each layer
    that has one image."""
    pipe = tiny_pipeline(name)
    pooled = {"negative_pooled_prompt_embeds": torch.zeros(1, 16)}
    technique = nag(negative_embeds=negative(name, **pooled), **options)
    ours = operations(pipe, name, technique, **more)
    monkeypatch.setattr(Dense, "part", lambda *_: None)
    whole = operations(pipe, name, technique, **more)
    layers = {FLUX: 1 if options else 2, SD3: 2}[name]
    width = {FLUX: 32, SD3: 16}[name]
    saved = 4 * TOKENS[name] ** 2 * width  # two products of two operations each
    steps, images = 2, 2
    assert whole - ours == saved * layers * steps * images


TOKENS = {FLUX: 16, SD3: 16}


def test_a_pooled_text_that_is_not_used_is_said():
    pipe = tiny_pipeline(FLUX)
    pooled = {"negative_pooled_prompt_embeds": torch.zeros(1, 16)}

    def notes(technique, **more):
        _, report = run(pipe, FLUX, technique, **more)
        return [note for note in report.notes if "does not use" in note]

    (note,) = notes(nag(negative_embeds=negative(FLUX, **pooled)))
    assert "negative_pooled_prompt_embeds" in note
    assert "share_image=False uses it" in note
    assert notes(nag(negative_embeds=negative(FLUX))) == []
    assert notes(nag(negative_embeds=negative(FLUX, **pooled), share_image=False)) == []
    assert len(notes(nag(), true_cfg_scale=1.0)) == 1  # the call's, which no guidance reads
    assert notes(nag()) == []
