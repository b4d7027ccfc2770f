"""Tiny pipelines: real diffusers classes with random weights of a few kilobytes, built without
downloads in well under a second.

``tiny_pipeline(name)`` builds one, ``tiny_inputs(name)`` gives matching call arguments. Predictions
depend on text, time and noise and are of order one. Neither function touches a global random state.
"""

from __future__ import annotations

import pkgutil
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch

from diffalign.core.types import Pipeline
from diffalign.testing.tiny.base import RECIPES, Draw, Inputs, Recipe, Request, assemble

__all__ = [
    "tiny_inputs",
    "tiny_names",
    "tiny_pipeline",
    "tiny_recipe",
    "tiny_unet_pipeline",
    "tiny_variants",
]

for _module in pkgutil.iter_modules(__path__):  # each enters its recipes
    import_module(f"{__name__}.{_module.name}")


def _request(name: str, variant: str, text: bool, **rest: Any) -> Request:
    if name not in RECIPES:
        near = ", ".join(get_close_matches(name, RECIPES, 3)) or "see tiny_names()"
        raise ValueError(
            f"class_name must be a pipeline class with a tiny form; got {name!r}. Nearest: {near}."
        )
    recipe = RECIPES[name]
    if variant not in recipe.variants:
        raise ValueError(
            f"variant of {name} must be one of {list(recipe.variants)}; got {variant!r}."
        )
    if text and not recipe.text:
        raise ValueError(
            f"text=True needs a family with tiny text encoders; {name} takes embeddings only. Use "
            "text=False."
        )
    return Request(name=name, variant=variant, text=text, **rest)


def tiny_names(*, text: bool | None = None, slow: bool | None = None) -> tuple[str, ...]:
    """Class names with a tiny form, sorted.

    ``text`` selects by whether the class also exists with text encoders, ``slow`` by whether one
    call takes more than half a second.
    """
    names = (
        n
        for n, recipe in RECIPES.items()
        if text in (None, recipe.text) and slow in (None, recipe.slow)
    )
    return tuple(sorted(names))


def tiny_variants(class_name: str) -> tuple[str, ...]:
    """Variants of a class, the default ``""`` first."""
    _request(class_name, "", False)
    return RECIPES[class_name].variants


def tiny_recipe(class_name: str) -> Recipe:
    """How the class is built, and what tests must know of it."""
    _request(class_name, "", False)
    return RECIPES[class_name]


def tiny_pipeline(
    class_name: str,
    *,
    variant: str = "",
    text: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Pipeline:
    """A pipeline of exactly that diffusers class with random weights.

    ``variant`` picks another published configuration of the class (``"2.2"`` for the two-expert
    Wan); ``text=True`` adds tiny text encoders and a byte-level tokenizer, so that prompts can be
    strings. Equal arguments give equal weights, bit for bit.

    Raises: ValueError for an unknown class, variant or a family without text encoders.
    """
    return assemble(_request(class_name, variant, text, dtype=dtype, seed=seed))


def tiny_inputs(
    class_name: str,
    *,
    variant: str = "",
    text: bool = False,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    seed: int = 0,
    steps: int = 4,
    guided: bool = True,
) -> Inputs:
    """Call arguments for ``tiny_pipeline(class_name)``: embeddings (or strings), images, size, one
    generator per row, latent output.

    Positive and negative embeddings differ, in length too where the pipeline allows it. ``guided``
    keeps classifier-free guidance on with a scale of 3; without it the scale is 1 (the family's way
    of switching the unconditional branch off). Generators are stateful: make fresh inputs for each
    call that must repeat.
    """
    request = _request(class_name, variant, text, dtype=dtype, seed=seed, batch=batch, steps=steps)
    draw = Draw(seed, dtype)
    inputs: Inputs = {
        "num_inference_steps": steps,
        "generator": [draw.generator(f"noise {row}") for row in range(batch)],
        "output_type": "latent",
    }
    inputs |= RECIPES[class_name].inputs(request, draw)
    if not guided:
        gate = "true_cfg_scale" if "true_cfg_scale" in inputs else "guidance_scale"
        inputs[gate] = 0.0 if class_name.startswith("ZImage") else 1.0
        if class_name == "AnyFlowFARPipeline":  # it would run the negative text all the same
            inputs.pop("negative_prompt_embeds", None)
    return inputs


def tiny_unet_pipeline(
    params: int = 5_000_000, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Pipeline:
    """A StableDiffusionPipeline whose UNet has at least ``params`` parameters, for overhead
    benchmarks.

    Call it with the inputs of ``tiny_inputs("StableDiffusionPipeline")``.

    Raises: ValueError if ``params`` is not positive.
    """
    if params <= 0:
        raise ValueError(f"params must be a positive number of parameters; got {params}.")
    return assemble(Request("StableDiffusionPipeline", dtype=dtype, seed=seed, params=params))
