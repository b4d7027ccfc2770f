"""Calls of one object go to a handler, and nobody else notices."""

import copy
import functools
import pickle
import threading

import pytest
from torch import nn

from diffalign.seams import swap


class Thing:
    def __init__(self, name="thing"):
        self.name = name

    def step(self, value, more=0):
        return value + more


def doubling(original, args, kwargs):
    return 2 * original(*args, **kwargs)


def wrapped(model, *names):
    for name in names:
        wrapper = nn.Module()
        wrapper.add_module(name, model)
        model = wrapper
    return model


@pytest.mark.parametrize("names", [(), ("_orig_mod",), ("module", "_fsdp_wrapped_module"), ("x",)])
def test_wrappers_of_known_names_are_looked_through(names):
    model = nn.Linear(1, 1)
    outer = wrapped(model, *names)
    assert swap.unwrapped(outer) is (outer if names == ("x",) else model)


def test_peft_holds_the_model_one_level_deeper():
    model = nn.Linear(1, 1)
    peft = wrapped(wrapped(wrapped(model, "_orig_mod"), "model"), "base_model")
    assert swap.unwrapped(peft) is model
    lone = wrapped(model, "base_model")  # no PEFT: the base has no model
    assert swap.unwrapped(lone) is lone


def test_only_this_object_in_this_context_is_intercepted():
    thing, other, answers = Thing(), Thing(), []
    with swap.intercepted({thing: ("step", doubling)}):
        assert thing.step(3, more=1) == 8
        assert other.step(3, more=1) == 4
        thread = threading.Thread(target=lambda: answers.append(thing.step(3)))
        thread.start()
        thread.join(20)
    assert answers == [3]
    assert thing.step(3) == 3
    assert type(thing) is Thing


def test_an_inner_block_replaces_the_handler_and_gives_it_back():
    thing = Thing()
    outer, inner = {thing: ("step", doubling)}, {thing: ("step", lambda *_: "inner")}
    with swap.intercepted(outer):
        with swap.intercepted(inner):
            assert thing.step(1) == "inner"
            assert swap.in_place(inner)
            assert not swap.in_place(outer)
        assert thing.step(1) == 2
        assert swap.outside(thing.step, (1,), {"more": 2}) == 3
        assert thing.step(1) == 2
    assert swap.handler_of(thing) is None


def test_an_error_restores_the_class():
    thing = Thing()
    with pytest.raises(KeyError), swap.intercepted({thing: ("step", doubling)}):
        raise KeyError
    assert type(thing) is Thing
    assert thing.step(1) == 1


def test_a_method_replaced_on_the_class_later_is_the_one_that_runs(monkeypatch):
    thing = Thing()
    with swap.intercepted({thing: ("step", doubling)}):
        monkeypatch.setattr(Thing, "step", lambda self, value: value + 100)
        assert thing.step(1) == 202
        assert swap.outside(thing.step, (1,), {}) == 101


def test_a_method_on_the_object_itself_is_intercepted_and_put_back():
    thing = Thing()

    def shadow(value):
        return value + 10

    thing.step = shadow
    with swap.intercepted({thing: ("step", doubling)}):
        assert thing.step(1) == 22
        assert swap.outside(thing.step, (1,), {}) == 11
    assert vars(thing)["step"] is shadow
    assert thing.step(1) == 11


def test_what_a_decorator_hides_asks_for_a_handler_too():
    def loud(function):
        @functools.wraps(function)
        def call(*args):
            return f"{function(*args)}!"

        return call

    class Loud:
        @loud
        def step(self, value):
            return value

    thing = Loud()
    with swap.intercepted({thing: ("step", lambda original, args, _: f"<{original(*args)}>")}):
        assert thing.step("a") == "<a!>"
        assert thing.step.__wrapped__(thing, "a") == "<a>"


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_and_pickles_are_plain(copied):
    thing = Thing("name")
    with swap.intercepted({thing: ("step", doubling)}):
        twin = copied(thing)
        assert type(twin) is Thing
        assert twin.name == "name"
        assert twin.step(1) == 1
        assert type(thing) is not Thing
        assert swap.original_class(thing) is Thing


def test_the_subclass_is_made_once_and_looks_like_its_base():
    first = swap.subclass(Thing, "step", swap.handler_of)
    assert first is swap.subclass(Thing, "step", swap.handler_of)
    assert first is not swap.subclass(Thing, "step", swap.handler_of, opaque=True)
    assert (first.__name__, first.__module__) == ("Thing", Thing.__module__)
    assert first.__qualname__ == Thing.__qualname__


def test_a_class_that_somebody_else_changed_is_left_to_them():
    class Another(Thing):
        pass

    thing = Thing()
    with swap.intercepted({thing: ("step", doubling)}):
        thing.__class__ = Another
    assert type(thing) is Another
