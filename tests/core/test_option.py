"""Options: one field says meaning, range, default and look-up; checks, text and values follow."""

import dataclasses
import math
import subprocess
import sys
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import pytest

from diffalign.core import CALL, FLOW, Context, Technique, auto, filled, option
from diffalign.core.option import REQUIRED, completed, derived, options_of, with_scale


@dataclass(frozen=True, slots=True)
class Everything(Technique):
    """An option of every kind."""

    size: float = auto(CALL, "guidance scale", usual=(1.0, 9.0))
    _: KW_ONLY
    cap: float = auto("apg/cap", "a norm", low=0.0, open_low=True, infinite=True)
    flow: bool = auto(FLOW, "flow or not")
    share: float = option(0.5, "a share", low=0.0, high=1.0, open_high=True)
    count: int = option(2, "a number of steps", low=1)
    kind: Literal["a", "b"] = option("a", "which of two")
    alpha: float = option(1.5, "one of two numbers", choices=(1.5, 2.0))
    bold: bool = option(False, "yes or no")
    pair: tuple[float, float] | None = option(None, "two numbers", low=0.0)
    names: tuple[int | str, ...] = option((), "some names")
    some: tuple[str, ...] | None = option(None, "at least one name", nonempty=True)
    text: str | None = option(None, "a file", nonempty=True)
    weights: object = option(None, "tensors", saved="tensors")
    worked_out: int = derived(0)


CONTEXT = Context("P", "sd", "unet", "DDIMScheduler", 5.0, "call", 20)


def test_an_option_tells_what_help_and_controls_need():
    facts = {
        name: (spec.type_text, spec.default_text, spec.range, spec.span)
        for name, spec in options_of(Everything).items()
    }
    assert facts == {
        "size": ("number or none", "none", "", (1.0, 9.0)),
        "cap": ("number or none", "none", "above 0", None),
        "flow": ("true | false or none", "none", "", None),
        "share": ("number", "0.5", "in [0, 1)", (0.0, 1.0)),
        "count": ("integer", "2", "at least 1", None),
        "kind": ("a | b", "a", "one of a or b", None),
        "alpha": ("1.5 | 2", "1.5", "one of 1.5 or 2.0", None),
        "bold": ("true | false", "false", "", None),
        "pair": ("(number, number) or none", "none", "at least 0", None),
        "names": ("(integer or text, ...)", "()", "", None),
        "some": ("(text, ...) or none", "none", "", None),
        "text": ("text or none", "none", "", None),
        "weights": ("object", "none", "", None),
    }
    assert all(spec.meaning for spec in options_of(Everything).values())


def test_a_required_option_says_so():
    @dataclass(frozen=True)
    class Needy(Technique):
        path: str = option(meaning="a file")

    (spec,) = options_of(Needy).values()
    assert (spec.default is REQUIRED, spec.default_text) == (True, "required")
    with pytest.raises(TypeError, match="path"):
        Needy()


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("size", math.nan, ValueError, "a number that is finite, or None for the pipeline's own"),
        ("size", "3", ValueError, "a number that is finite"),
        ("size", True, ValueError, "a number that is finite"),
        ("cap", 0.0, ValueError, "a number above 0, or None for the model's own value; got 0.0"),
        ("share", 1.0, ValueError, r"a number in \[0, 1\); got 1.0"),
        ("share", -1e-9, ValueError, r"a number in \[0, 1\)"),
        ("share", None, ValueError, r"a number in \[0, 1\); got None"),
        ("count", 0, ValueError, "an integer at least 1; got 0"),
        ("count", 2.0, ValueError, "an integer at least 1; got 2.0"),
        ("kind", "c", ValueError, "one of a or b; got 'c'"),
        ("alpha", 1.7, ValueError, "one of 1.5 or 2.0; got 1.7"),
        ("bold", 1, TypeError, "True or False; got 1"),
        ("flow", 0, TypeError, "True or False"),
        ("pair", 3.0, TypeError, r"2 values \(number, number\) or None; got 3.0"),
        ("pair", (1.0,), ValueError, r"2 values \(number, number\) or None; got \(1.0,\)"),
        ("pair", (1.0, -1.0), ValueError, r"each entry must be a number at least 0; got \(1.0, -1"),
        (
            "names",
            (1.5,),
            ValueError,
            r"each entry must be an integer; got \(1.5,\)",
        ),
        ("some", (), ValueError, "at least one entry or None"),
        ("some", "name", TypeError, "a tuple or None; got 'name'"),
        ("text", "", ValueError, r"a text that is not empty \(a file\) or None"),
        ("text", 3, ValueError, "text"),
    ],
)
def test_bad_values_are_named_with_what_was_expected(name, value, error, text):
    with pytest.raises(error, match=rf"^Everything\({name}=\.\.\.\).*{text}"):
        Everything(**{name: value})


def test_good_values_pass_and_lists_become_tuples():
    technique = Everything(
        3, cap=math.inf, share=0.0, pair=[0, 2.5], names=["a", 1], some=["b"], weights=[1.0]
    )
    assert (technique.pair, technique.names, technique.some) == ((0, 2.5), ("a", 1), ("b",))
    assert technique.weights == [1.0]
    assert dataclasses.replace(technique, kind="b").kind == "b"


def test_none_is_looked_up_and_the_source_is_noted():
    technique = filled(Everything(count=3), CONTEXT)
    values = (technique.size, technique.cap, technique.flow, technique.count)
    assert values == (5.0, math.inf, False, 3)
    assert CONTEXT.sources["size"] == "guidance scale of the call"
    assert "no published value" in CONTEXT.sources["cap"]
    assert CONTEXT.sources["flow"] == "parametrisation of DDIMScheduler"
    fresh = CONTEXT.fresh()
    assert filled(Everything(1.0, cap=2.0, flow=True), fresh) == Everything(1.0, cap=2.0, flow=True)
    assert fresh.sources == {}
    assert technique.asked_scale == 5.0
    assert Everything().asked_scale is None


def test_conditions_of_presets_may_name_options_before():
    """The scale of the technique counts, not that of the call."""
    seen = []

    class Asked(Context):
        def look_up(self, name, source, **options):
            seen.append((name, options))
            return 1.0 if name != "flow" else False

    context = Asked(**{f.name: getattr(CONTEXT, f.name) for f in dataclasses.fields(CONTEXT)})
    filled(Everything(2.0), context)
    assert seen[0] == ("cap", {"size": 2.0})
    assert seen[1] == ("flow", {"size": 2.0, "cap": 1.0})


def test_what_resolve_works_out_is_no_option():
    technique = completed(Everything(2.0), worked_out=7)
    assert technique.worked_out == 7
    assert technique == Everything(2.0)
    assert "worked_out" not in repr(technique)
    assert "worked_out" not in options_of(Everything)
    assert Everything(2.0).worked_out == 0
    with pytest.raises(TypeError, match="worked_out"):
        Everything(worked_out=3)


def test_a_scale_that_the_user_gave_stays():
    assert with_scale(Everything(), 4.0).size == 4.0
    assert with_scale(Everything(2.0), 4.0).size == 2.0


def test_options_that_contradict_each_other_are_told_after_each_is_right():
    @dataclass(frozen=True)
    class Ordered(Technique):
        low: float = option(0.0, "an end")
        high: float = option(1.0, "an end")

        def check(self):
            if self.low > self.high:
                raise ValueError("Ordered needs low <= high.")

    with pytest.raises(ValueError, match="low <= high"):
        Ordered(2.0)
    with pytest.raises(ValueError, match="a number"):
        Ordered("2")


def test_contracts_load_nothing():
    code = "import sys, diffalign.core, diffalign.core.registry as r; print('torch' in sys.modules)"
    package = "import types; sys.modules['diffalign'] = p = types.ModuleType('diffalign')"
    path = f"p.__path__ = [{str(__import__('diffalign').__path__[0])!r}]"
    run = [sys.executable, "-c", "\n".join(["import sys", package, path, code])]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "False\n"
