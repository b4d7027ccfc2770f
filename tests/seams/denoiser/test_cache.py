"""Feature caches and compiled models: what they are known by, and what they forbid."""

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from diffalign.core import UnsupportedModel
from diffalign.seams.denoiser import cache


class Model(nn.Module, CacheMixin):
    def __init__(self, config=None):
        super().__init__()
        self.block = nn.Linear(1, 1)
        self._cache_config = config


class Counter(BaseState):
    value = 0

    def reset(self):
        self.value = 0


class Remembering(ModelHook):
    _is_stateful = True

    def __init__(self):
        super().__init__()
        self.state = StateManager(Counter)

    def reset_state(self, module):
        self.state.reset()


def wrapped(model, name="_orig_mod"):
    wrapper = nn.Module()
    wrapper.add_module(name, model)
    return wrapper


def test_a_cache_is_seen_through_wrappers():
    assert not cache.is_cached(Model())
    assert cache.is_cached(wrapped(Model(FirstBlockCacheConfig())))
    assert not cache.keeps_both(Model(FirstBlockCacheConfig()))
    assert cache.keeps_both(wrapped(Model(FasterCacheConfig()), "module"))


def test_a_compiled_block_is_not_a_model_compiled_as_a_whole():
    plain, part, whole = Model(), Model(), wrapped(Model())
    part.block = wrapped(part.block)
    assert [cache.is_compiled(m) for m in (plain, part, whole)] == [False, True, True]
    assert [cache.is_compiled_whole(m) for m in (plain, part, whole)] == [False, False, True]
    in_place = Model()
    in_place._compiled_call_impl = in_place._call_impl  # as ``compile`` leaves it
    assert cache.is_compiled_whole(in_place)


def test_row_counts_are_fixed_by_either():
    models = (Model(), wrapped(Model()), Model(FirstBlockCacheConfig()))
    assert [cache.fixed_rows(model) for model in models] == [False, True, True]


def test_faster_cache_takes_whole_batches_only():
    faster = Model(FasterCacheConfig())
    cache.check_rows(faster, 4, 4)
    with pytest.raises(UnsupportedModel, match=r"runs 2 of 4 rows.*Disable the cache"):
        cache.check_rows(faster, 2, 4)
    cache.check_rows(Model(FirstBlockCacheConfig()), 2, 4)


def test_faster_cache_needs_both_branches_beside_a_second_pass():
    faster = Model(FasterCacheConfig())
    cache.check_branches(faster, 1)
    with pytest.raises(UnsupportedModel, match=r"unconditional branch, which .* does not run"):
        cache.check_branches(faster, 2)
    distilled = Model(FasterCacheConfig(is_guidance_distilled=True))
    assert not cache.keeps_both(distilled)
    cache.check_branches(distilled, 2)


def test_an_emptied_cache_keeps_its_place():
    model, hook = Model(FirstBlockCacheConfig()), Remembering()
    HookRegistry.check_if_exists_or_initialize(model.block).register_hook(hook, "remember")
    with model.cache_context("cond"):
        hook.state.get_state().value = 3
        context = hook.state.context
        cache.empty_cache(wrapped(model))
        assert hook.state.context is context
        assert hook.state.get_state().value == 0


class Doubled(ModelHook):
    """A cache of diffusers, by the module that it says it is of."""

    __module__ = "diffusers.hooks.mag_cache"

    def new_forward(self, module, value):
        return 2 * self.fn_ref.original_forward(value)

    def post_forward(self, module, output):
        return output + 1


class Shifted(Doubled):
    """A hook that is no cache."""

    __module__ = "elsewhere"

    def new_forward(self, module, value):
        return self.fn_ref.original_forward(value) + 100


def test_a_pass_of_ours_neither_gives_to_a_cache_nor_takes():
    model, value = Model(FirstBlockCacheConfig()), torch.ones(1, 1)
    plain = model.block(value)
    registry = HookRegistry.check_if_exists_or_initialize(model.block)
    registry.register_hook(Doubled(), "doubled")
    registry.register_hook(Shifted(), "shifted")
    hooked = model.block(value)
    assert torch.equal(hooked, 2 * plain + 102)
    with cache.uncached(wrapped(model)):
        assert torch.equal(model.block(value), plain + 101)
    assert torch.equal(model.block(value), hooked)
    with pytest.raises(KeyError), cache.uncached(model):
        raise KeyError
    assert torch.equal(model.block(value), hooked)
