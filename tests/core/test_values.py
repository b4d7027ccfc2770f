"""Values as text and as JSON, there and back."""

import json
import math
from typing import Literal

import pytest

from diffalign.core.values import converted, plain, split, type_text, value_text


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (float | None, "number or none"),
        (tuple[float, float] | None, "(number, number) or none"),
        (tuple[str, ...], "(text, ...)"),
        (tuple[int | str, ...] | None, "(integer or text, ...) or none"),
        (Literal["eps", "x0"], "eps | x0"),
        (bool, "true | false"),
        (int, "integer"),
    ],
)
def test_types_as_text(hint, text):
    assert type_text(hint) == text


@pytest.mark.parametrize(
    ("hint", "value", "text"),
    [
        (float, 1.0, "1"),
        (float, math.inf, "inf"),
        (bool, True, "true"),
        (float | None, None, "none"),
        (tuple[float, float], (0.0, 1.5), "(0,1.5)"),
        (tuple[str, ...], ("a", "b.*"), "(a,b.*)"),
        (tuple[int | str, ...], (1, "mid"), "(1,mid)"),
        (str, "eps", "eps"),
        (int, 1, "1"),
        (Literal["l1", "l2"], "l2", "l2"),
        (str | tuple[str, ...], "a, b", "a, b"),
    ],
)
def test_values_as_text_and_back(hint, value, text):
    assert value_text(value) == text
    assert converted(text, hint, "x") == value
    assert converted(json.loads(json.dumps(plain(value))), hint, "x") == value


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (float, "b", "x must be a number; got 'b'"),
        (int, "1.5", "x must be an integer; got '1.5'"),
        (bool, "maybe", "x must be true or false; got 'maybe'"),
        (Literal["eps", "x0"], "v", "x must be one of eps, x0; got 'v'"),
        (tuple[float, float], "(1,2,3)", r"x must be 2 values like \(0.2,5.0\); got '\(1,2,3\)'"),
        (tuple[float, ...], "(1,b)", "x must be a number; got 'b'"),
        (str, ["a"], r"x must be a text; got \['a'\]"),
        (float | None, "b", "x must be a number; got 'b'"),
    ],
)
def test_bad_text_is_named(hint, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        converted(value, hint, "x")


def test_commas_inside_brackets_and_quotes_do_not_split():
    text = "a=(1,2),b='x,y',c=[(1,2),3]"
    assert split(text) == ["a=(1,2)", "b='x,y'", "c=[(1,2),3]"]
    assert converted("'x, y'", str, "b") == "x, y"


def test_json_has_no_infinity():
    assert plain({"a": (math.inf, [math.nan, 1.0])}) == {"a": ["inf", ["nan", 1.0]]}
