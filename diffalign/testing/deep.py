"""Tiny pipelines with more transformer blocks, and the same without one: the oracle of everything
that skips blocks."""

from __future__ import annotations

import copy
from typing import Any

import torch

from diffalign.core.types import Pipeline
from diffalign.families import FAMILIES
from diffalign.seams.blocks.sites import sites
from diffalign.testing.tiny import tiny_pipeline, tiny_recipe
from diffalign.testing.tiny.base import randomise


def _one_per_family() -> dict[str, str]:
    first: dict[str, str] = {}
    for name, family in FAMILIES.items():
        if family.blocks and tiny_recipe(name).deep is not None:
            first.setdefault(family.name, name)
    return {name: tiny_recipe(name).deep or "" for name in first.values()}


PIPELINES = _one_per_family()
"""One class of each family whose blocks are known -> the variant to test them with."""


def deep_pipeline(name: str, variant: str = "", *, extra: int = 2) -> Pipeline:
    """``tiny_pipeline(name)`` with ``extra`` more blocks in each stack, every one with weights of
    its own; U-Nets have enough already."""
    pipe, rng = tiny_pipeline(name, variant=variant), torch.Generator().manual_seed(7)
    rigid = tiny_recipe(name).rigid
    for attribute in FAMILIES[name].denoisers:
        module = getattr(pipe, attribute, None)
        if module is None or attribute == "unet":
            continue
        if rigid is not None:
            depth = {name: module.config[name] + extra for name in rigid.depth}
            module = type(module).from_config({**module.config, **depth})
            randomise(module, rng)
            setattr(pipe, attribute, module.eval())
            continue
        for stack in {site.name.rpartition(".")[0]: None for site in sites(module)}:
            blocks: Any = module.get_submodule(stack)
            for _ in range(extra):
                block = copy.deepcopy(blocks[0])
                randomise(block, rng)
                blocks.insert(1, block)
    return pipe


def without_block(pipe: Pipeline, block: str) -> Pipeline:
    """A copy of the pipeline whose first denoiser really lacks the block of that name."""
    shorter = copy.deepcopy(pipe)
    module = getattr(shorter, FAMILIES[type(pipe).__name__].denoisers[0])
    stack, _, index = block.rpartition(".")
    blocks: Any = module.get_submodule(stack)
    rigid = tiny_recipe(type(pipe).__name__).rigid
    if rigid is not None:
        setattr(blocks, index, rigid.absent(stack))
    else:
        del blocks[int(index)]
    return shorter
