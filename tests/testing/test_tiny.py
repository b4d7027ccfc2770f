"""Tiny pipelines: they run, they depend on their inputs, they repeat bit for bit, and they leave
the global random state alone."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.testing import tiny_inputs, tiny_names, tiny_pipeline, tiny_unet_pipeline
from diffalign.testing.tiny import tiny_variants

CASES = [(name, variant) for name in tiny_names(slow=False) for variant in tiny_variants(name)]


def run(pipe: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """One native call under a fixed global seed: SD3 ControlNets sample their control latents from
    the global state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.as_tensor(pipe(**inputs, return_dict=False)[0])


def denoisers(pipe: Any) -> list[torch.nn.Module]:
    found = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    return [module for module in found if module is not None]


def first(output: Any) -> torch.Tensor:
    value = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(list(value)) if isinstance(value, list) else value


def change_text(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same call with another conditional text."""
    if "class_labels" in inputs:
        return inputs | {"class_labels": [label + 1 for label in inputs["class_labels"]]}
    if "prompt" in inputs:
        return inputs | {"prompt": ["green clock" for _ in inputs["prompt"]]}
    name = next(name for name in inputs if name.startswith("prompt_embeds"))
    embeds = inputs[name]
    return inputs | {name: [e + 0.5 for e in embeds] if isinstance(embeds, list) else embeds + 0.5}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.few(20)
def test_runs_repeats_and_reads_its_text(name: str, variant: str) -> None:
    pipe = tiny_pipeline(name, variant=variant)
    assert type(pipe).__name__ == name
    seen: list[torch.Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _m, _i, output: seen.append(first(output)))
        for m in denoisers(pipe)
    ]
    made = run(pipe, tiny_inputs(name, variant=variant, steps=2))
    for hook in hooks:
        hook.remove()
    assert torch.isfinite(made).all()
    assert 0.1 < seen[0].float().std() < 10  # predictions are of order one
    again = run(tiny_pipeline(name, variant=variant), tiny_inputs(name, variant=variant, steps=2))
    assert torch.equal(made, again)
    other_text = run(pipe, change_text(tiny_inputs(name, variant=variant, steps=2)))
    assert (other_text - made).abs().max() > 1e-3 * made.std()
    other_weights = run(
        tiny_pipeline(name, variant=variant, seed=1), tiny_inputs(name, variant=variant, steps=2)
    )
    assert not torch.equal(made, other_weights)


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.few(20)
def test_guidance_changes_the_output_exactly_where_there_is_an_unconditional_branch(
    name: str, variant: str
) -> None:
    pipe = tiny_pipeline(name, variant=variant)
    guided = run(pipe, tiny_inputs(name, variant=variant, steps=2))
    plain = run(pipe, tiny_inputs(name, variant=variant, steps=2, guided=False))
    assert torch.equal(guided, plain) == (variant == "schnell")


@pytest.mark.parametrize("name", tiny_names(slow=True))
@pytest.mark.slow
def test_pipelines_that_encode_large_images(name: str) -> None:
    pipe = tiny_pipeline(name)
    made = run(pipe, tiny_inputs(name, steps=1))
    other_text = run(pipe, change_text(tiny_inputs(name, steps=1)))
    assert torch.isfinite(made).all()
    assert (other_text - made).abs().max() > 1e-3 * made.std()


@pytest.mark.parametrize("name", tiny_names(text=True))
@pytest.mark.few(6)
def test_prompts_as_strings(name: str) -> None:
    pipe = tiny_pipeline(name, text=True)
    made = run(pipe, tiny_inputs(name, text=True, steps=2))
    other_text = run(pipe, change_text(tiny_inputs(name, text=True, steps=2)))
    assert (other_text - made).abs().max() > 1e-3 * made.std()


def test_tokens_of_different_words_differ_and_long_prompts_are_cut() -> None:
    tokenizer = tiny_pipeline("StableDiffusionPipeline", text=True).tokenizer
    ids = tokenizer(
        ["red apple", "green clock", "é中 " * 90],
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    ).input_ids
    assert ids.shape == (3, 77)
    assert not torch.equal(ids[0], ids[1])
    assert ids[0].tolist()[:3] == [
        0,
        tokenizer.convert_tokens_to_ids("r"),
        tokenizer.convert_tokens_to_ids("e"),
    ]
    assert int(ids[2].max()) < 514
    assert int(ids[2, -1]) == 1


def test_global_random_state_is_untouched() -> None:
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for name in (
        "StableDiffusionPipeline",
        "StableDiffusionXLControlNetPipeline",
        "FluxPipeline",
        "WanPipeline",
    ):
        tiny_pipeline(name)
        tiny_inputs(name)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_seed_and_label_decide_weights_and_inputs() -> None:
    first_unet = tiny_pipeline("StableDiffusionPipeline").unet.state_dict()
    sibling = tiny_pipeline("StableDiffusionImg2ImgPipeline", text=True).unet.state_dict()
    assert all(torch.equal(first_unet[key], sibling[key]) for key in first_unet)
    one, two = tiny_inputs("WanPipeline"), tiny_inputs("WanPipeline", seed=1)
    assert not torch.equal(one["prompt_embeds"], two["prompt_embeds"])
    assert one["prompt_embeds"].shape[1] != one["negative_prompt_embeds"].shape[1]
    rows = tiny_inputs("StableDiffusionPipeline", batch=2)["generator"]
    assert rows[0].initial_seed() != rows[1].initial_seed()


def test_no_parameter_is_constant() -> None:
    pipe = tiny_pipeline("StableDiffusionControlNetPipeline")
    for part in (pipe.unet, pipe.controlnet, pipe.vae):
        for name, parameter in part.named_parameters():
            assert parameter.numel() == 1 or parameter.std() > 0, name


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "WanPipeline",
        "ZImagePipeline",
    ],
)
def test_bfloat16_as_from_pretrained_casts(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name, dtype=torch.bfloat16)
    model = getattr(pipe, "unet", None) or pipe.transformer
    tiny_pipeline(name).save_pretrained(tmp_path)
    folder = tmp_path / ("unet" if hasattr(pipe, "unet") else "transformer")
    loaded = type(model).from_pretrained(folder, torch_dtype=torch.bfloat16).state_dict()
    ours = model.state_dict()
    assert {k: v.dtype for k, v in loaded.items()} == {k: v.dtype for k, v in ours.items()}
    assert all(torch.equal(loaded[key], ours[key]) for key in ours)
    assert torch.isfinite(run(pipe, tiny_inputs(name, dtype=torch.bfloat16, steps=2)).float()).all()


def test_benchmark_unet_has_the_size_asked_for() -> None:
    pipe = tiny_unet_pipeline(1_000_000)
    size = sum(p.numel() for p in pipe.unet.parameters())
    assert 1_000_000 <= size < 1_500_000
    assert torch.isfinite(run(pipe, tiny_inputs("StableDiffusionPipeline", steps=1))).all()


def test_errors_name_argument_and_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"got 'StableDifusionPipeline'. Nearest: StableDiffusionPipeline"
    ):
        tiny_pipeline("StableDifusionPipeline")
    with pytest.raises(ValueError, match=r"variant of WanPipeline must be one of .*; got '3'"):
        tiny_pipeline("WanPipeline", variant="3")
    with pytest.raises(ValueError, match="text=True needs a family"):
        tiny_inputs("WanPipeline", text=True)
    with pytest.raises(ValueError, match="batch=2"):
        tiny_inputs("WanVACEPipeline", batch=2)
    with pytest.raises(ValueError, match="batch=2"):
        tiny_inputs("QwenImageEditPlusPipeline", batch=2)
    with pytest.raises(ValueError, match="got 0"):
        tiny_unet_pipeline(0)
