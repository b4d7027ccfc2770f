"""Packages that replace methods of classes while a class of ours stands in."""

import functools

import pytest

from diffalign.seams import swap


class Pipe:
    @functools.wraps(lambda self, value: value)
    def __call__(self, value):
        return [value]


def find(obj):
    return obj.__dict__.get("handler")


def handler(pipe):
    def handle(original, args, kwargs):
        with swap.beneath(pipe):
            return {"ours": original(*args, **kwargs)}

    return handle


def patch(cls):
    """As cache-dit does: the method that is there, inside one of its own."""
    original = cls.__call__

    @functools.wraps(original)
    def call(self, value):
        return ("theirs", original(self, value))

    cls.__call__ = call
    cls._original = original


def unpatch(cls):
    cls.__call__ = cls._original
    del cls._original


@pytest.fixture
def pipe():
    class Local(Pipe):
        __call__ = Pipe.__call__

    pipe = Local()
    pipe.handler = handler(pipe)
    return pipe


@pytest.fixture
def plain(pipe):
    return dict(vars(type(pipe)))


PLAIN, THEIRS = [1], ("theirs", [1])


def test_a_method_is_replaced_and_put_back_while_ours_stands_in(pipe, plain):
    cls = type(pipe)
    swap.acquire(pipe, "__call__", find)
    assert pipe(1) == {"ours": PLAIN}
    patch(pipe.__class__)
    assert pipe(1) == {"ours": THEIRS}
    unpatch(pipe.__class__)
    assert pipe(1) == {"ours": PLAIN}
    swap.release(pipe)
    assert dict(vars(cls)) == plain
    assert pipe(1) == PLAIN


def test_a_method_replaced_inside_stays_afterwards_and_is_the_original_when_put_back(pipe, plain):
    cls = type(pipe)
    swap.acquire(pipe, "__call__", find)
    patch(pipe.__class__)
    swap.release(pipe)
    assert type(pipe) is cls
    assert pipe(1) == THEIRS
    swap.acquire(pipe, "__call__", find)
    assert pipe(1) == {"ours": THEIRS}
    swap.release(pipe)
    unpatch(cls)
    assert dict(vars(cls)) == plain


def test_a_method_replaced_before_and_put_back_inside(pipe, plain):
    cls = type(pipe)
    patch(cls)
    swap.acquire(pipe, "__call__", find)
    assert pipe(1) == {"ours": THEIRS}
    unpatch(pipe.__class__)
    assert pipe(1) == {"ours": PLAIN}
    swap.release(pipe)
    assert dict(vars(cls)) == plain


def test_two_packages_one_after_the_other(pipe):
    swap.acquire(pipe, "__call__", find)
    patch(pipe.__class__)
    patch(pipe.__class__)
    assert pipe(1) == {"ours": ("theirs", THEIRS)}
    swap.release(pipe)
    assert pipe(1) == ("theirs", THEIRS)


def test_what_is_read_from_the_class_asks_for_the_handler(pipe):
    """Also in the form that gets past a decorator."""
    swap.acquire(pipe, "__call__", find)
    assert type(pipe).__call__(pipe, 1) == {"ours": PLAIN}
    assert type(pipe).__call__ is type(pipe).__call__
    assert type(pipe).__call__.__wrapped__(pipe, 1) == {"ours": 1}
    swap.release(pipe)


def test_a_call_from_inside_a_callback_is_its_own(pipe):
    calls = []

    def again(original, args, kwargs):
        calls.append(args)
        if len(calls) == 1:
            with swap.beneath(pipe):
                swap.outside(lambda: type(pipe).__call__(pipe, 2), (), {})
        return original(*args, **kwargs)

    pipe.handler = again
    swap.acquire(pipe, "__call__", find)
    assert type(pipe).__call__(pipe, 1) == PLAIN
    swap.release(pipe)
    assert calls == [(1,), (2,)]


def test_any_value_may_be_set(pipe):
    cls = type(pipe)
    swap.acquire(pipe, "__call__", find)
    pipe.__class__.limits = [1]
    pipe.__class__.name = "a name"
    swap.release(pipe)
    assert (cls.limits, cls.name) == ([1], "a name")
