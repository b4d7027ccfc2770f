"""What each family's file says is true of the real diffusers classes, read off tiny pipelines."""

import dataclasses
import inspect
import re

import diffusers
import pytest
import torch
from torch import nn

from diffalign.core.registry import techniques
from diffalign.families import FAMILIES, block_streams, families, modular_families
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline, tiny_variants

# options that a pipeline always applies, without an argument of its call
ALWAYS_ON = {"cfg_renorm"}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture
def family(pipe):
    return FAMILIES[type(pipe).__name__]


def parameters(function):
    return inspect.signature(function).parameters


def test_the_pipeline_has_what_the_family_names(pipe, family):
    call = parameters(type(pipe).__call__)
    denoisers = family.present(pipe)
    assert list(denoisers)[:1] == list(family.denoisers)[:1]
    assert all(isinstance(module, nn.Module) for module in denoisers.values())
    assert set(family.gates) <= set(call)
    assert len(family.gates) == (len(family.denoisers) if family.mode != "single" else 0)
    if family.needs_negative:
        assert family.negative_given(pipe, {"negative_prompt": ""})
        assert not family.negative_given(pipe, {})
        assert "negative_prompt" in call


def test_the_denoiser_has_the_text_arguments(pipe, family):
    for module in family.present(pipe).values():
        forward = parameters(module.forward)
        for argument in family.text:
            assert {argument.name, argument.mask, argument.positions} - {None} <= set(forward)
        if family.encoder is not None:
            assert set(family.encoder.arguments) <= set(family.encoder.results)
            assert family.text[0].name in family.encoder.arguments.values()
            # SDXL's pooled text goes into a dictionary, so it is no argument
            assert set(family.encoder.arguments.values()) <= set(forward)


def test_the_layers_that_see_text_are_there(pipe, family):
    if family.attention is None:
        assert family.second_text is None
        return
    for module in family.present(pipe).values():
        layers = [
            part
            for name, part in module.named_modules()
            if hasattr(part, "processor") and re.fullmatch(family.attention.pattern, name)
        ]
        assert layers
        crossing = [getattr(part, "is_cross_attention", None) for part in layers]
        assert (True in crossing) <= (family.attention.kind == "cross")


def test_the_layers_that_see_the_image_alone_are_there(pipe, family):
    """Self-attention has a softmax map; where diffalign knows none, the techniques that change it
    are refused."""
    if family.self_attention is None:
        joint = family.attention is not None and family.attention.kind == "joint"
        refused = {"pag", "seg"} <= set(family.refusals)
        assert joint or refused or family.name in ("auraflow", "cogview4")
        return
    for module in family.present(pipe).values():
        layers = [
            part
            for name, part in module.named_modules()
            if hasattr(part, "processor") and re.fullmatch(family.self_attention, name)
        ]
        assert layers or family.name == "sd3"  # SD3.5 medium alone has a second attention
        assert not any(getattr(part, "is_cross_attention", False) for part in layers)


def test_packed_predictions_are_lists_of_tokens(pipe, family):
    """The first prediction of the denoiser has three axes exactly where the family says so."""
    name = type(pipe).__name__
    if name != family.pipelines[0]:
        return
    seen = []
    module = next(iter(family.present(pipe).values()))
    handle = module.register_forward_hook(lambda _m, _i, output: seen.append(output))
    pipe(**tiny_inputs(name, steps=2))
    handle.remove()
    value = seen[0][0] if isinstance(seen[0], tuple) else seen[0].sample
    axes = value[0].ndim + 1 if isinstance(value, list) else value.ndim
    assert family.packed == (axes == 3)


def test_a_second_text_finds_its_modules(pipe, family):
    second = family.second_text
    if second is None:
        return
    assert family.encoder is not None
    for module in family.present(pipe).values():
        assert isinstance(second.in_rows(module), bool)
        for name in second.around:
            assert isinstance(module.get_submodule(name), nn.Module)
        assert (second.image_stack is None) == (second.pooled is None)
        if second.image_stack is not None:
            assert isinstance(module.get_submodule(second.image_stack), nn.ModuleList)
            assert second.pooled in parameters(module.forward)


def test_blocks_return_parameters_of_their_forward(pipe, family):
    for module in family.present(pipe).values():
        blocks = {type(part).__name__: part for part in module.modules()}
        assert set(family.blocks) <= set(blocks)
        for name, streams in family.blocks.items():
            assert set(streams) <= set(parameters(blocks[name].forward))


def test_times_are_the_schedulers(pipe, family):
    """The first call of a denoiser carries a timestep of the scheduler in the family's units."""
    name = type(pipe).__name__
    if name != family.pipelines[0]:
        return
    times = []
    module = next(iter(family.present(pipe).values()))
    order = list(parameters(module.forward))

    def note(part, args, kwargs):
        call = {**dict(zip(order, args)), **kwargs}
        times.append(next(call[name] for name in ("timestep", "timesteps", "t") if name in call))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    pipe(**tiny_inputs(name, steps=2))
    handle.remove()
    value = family.time(float(torch.as_tensor(times[0]).max()), pipe)
    assert any(value == pytest.approx(time, rel=1e-3) for time in pipe.scheduler.timesteps.tolist())


@pytest.mark.parametrize("name", sorted(modular_families()))
def test_modular_pipelines_exist(name):
    assert issubclass(getattr(diffusers, name), diffusers.ModularPipeline)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.pipelines[0])
def test_a_family_agrees_with_its_classes_and_techniques(family):
    known = techniques()
    calls = [parameters(getattr(diffusers, name).__call__) for name in family.pipelines]
    for argument, reason in family.refuses.items():
        assert any(argument in call for call in calls), argument
        assert reason.endswith(".")
    for option in family.options:
        assert option.name in ALWAYS_ON or any(option.name in call for call in calls), option.name
    for technique, defaults in family.defaults.items():
        fields = {field.name for field in dataclasses.fields(known[technique])}
        assert {entry.option for entry in defaults} <= fields
        assert all(entry.source for entry in defaults)
    for key, reason in family.refusals.items():
        technique, _, option = key.partition("/")
        fields = {field.name for field in dataclasses.fields(known[technique])}
        assert not option or option in fields
        assert reason.endswith(".")
    for block, streams in family.blocks.items():
        assert block_streams()[block] == streams, "two families disagree on a block"


def test_every_variant_is_of_the_same_family():
    """A variant is another published configuration of the class: its blocks are known too."""
    for name, family in FAMILIES.items():
        for variant in tiny_variants(name) if name == family.pipelines[0] else ():
            module = next(iter(family.present(tiny_pipeline(name, variant=variant)).values()))
            classes = {type(part).__name__ for part in module.modules()}
            assert set(family.blocks) <= classes, (name, variant)
