"""Things by name: exports, plugins, classes of a notebook; as text, as JSON data and back."""

import json
from dataclasses import KW_ONLY, dataclass
from importlib.metadata import EntryPoint

import pytest

import diffalign as da
from diffalign.core import CALL, StepInfo, Tensor, TwoBranches, auto, option
from diffalign.core import registry as room
from diffalign.core.registry import TECHNIQUES, Registry, kebab
from diffalign.testing.contracts import GuidanceContract


@dataclass(frozen=True, slots=True)
class HalfGuidance(TwoBranches[None]):
    """Mixes with a share of the scale, as a user would write it in a notebook.

    A Person 2026, arXiv:2601.00001.
    Cost: 2 passes per step; 1 at scale 1.
    """

    scale: float = auto(CALL, "1 is off")
    _: KW_ONLY
    share: float = option(0.5, "share of the scale", low=0.0, high=1.0)

    def guide(self, cond: Tensor, uncond: Tensor, step: StepInfo, state: None):
        return step.mix(cond, uncond, 1.0 + self.share * (self.scale - 1.0)), None


@pytest.fixture(autouse=True)
def _names(monkeypatch):
    monkeypatch.setattr(TECHNIQUES, "registered", {"half-guidance": HalfGuidance})


class TestAClassOfANotebook(GuidanceContract):
    def make(self):
        return HalfGuidance(3.0, share=0.25)

    def off(self):
        return HalfGuidance(3.0, share=1.0), da.CFG(3.0)

    def rows(self, steps, batch):
        return 2 * steps * batch


def test_a_class_of_a_notebook_travels_with_settings():
    technique = HalfGuidance(3.0, share=0.25)
    pipe = da.load("emoji")
    with da.apply(pipe, technique) as session:
        settings = json.loads(json.dumps(session.config()))
        pipe("a red apple", num_inference_steps=2, output_type="latent")
    assert settings["techniques"] == [{"name": "half-guidance", "scale": 3.0, "share": 0.25}]
    assert da.techniques_of(settings) == (technique,)
    assert "half-guidance(scale=3.0" in str(session.report())
    assert da.techniques()["half-guidance"] is HalfGuidance
    assert "half-guidance" in {row.name for row in da.supports(pipe) if row.works}


def test_a_cell_that_runs_again_gives_the_name_anew():
    @dataclass(frozen=True)
    class HalfGuidance(TwoBranches[None]):
        scale: float = auto(CALL, "another class of that name")

    da.register("half-guidance", HalfGuidance)
    assert da.techniques()["half-guidance"] is HalfGuidance
    assert TECHNIQUES.name_of(HalfGuidance(2.0)) == "half-guidance"


@pytest.mark.parametrize(
    ("name", "cls", "error", "text"),
    [
        ("cfg", HalfGuidance, ValueError, "'cfg' is taken"),
        ("diffusers-guider", HalfGuidance, ValueError, "is taken"),
        ("Half", HalfGuidance, ValueError, "lower case with hyphens"),
        ("half_guidance", HalfGuidance, ValueError, "lower case with hyphens"),
        ("half:1", HalfGuidance, ValueError, "lower case with hyphens"),
        ("mine", HalfGuidance(2.0), TypeError, "a frozen dataclass that derives"),
        ("mine", dict, TypeError, "a frozen dataclass that derives"),
    ],
)
def test_names_and_classes_that_cannot_be_registered(name, cls, error, text):
    with pytest.raises(error, match=text):
        da.register(name, cls)


def test_names_are_those_of_the_exports():
    names = {
        "adaptive-guidance", "apg", "auto-guidance", "beta-cfg", "cfg", "cfg-plus-plus",
        "cfg-zero-star", "dynamic-cfg", "interval-cfg", "linear-ag", "magnitude-aware", "nag",
        "pag", "pladis", "rescaled-cfg", "s2-guidance", "scheduled-cfg", "seg",
        "skip-layer-guidance", "tcfg",
    }  # fmt: skip
    assert names <= set(da.techniques())
    assert list(da.techniques()) == sorted(da.techniques())
    for name, cls in da.techniques().items():
        assert kebab(cls.__name__) == name
        assert TECHNIQUES.get(name) is cls
        assert cls.__name__ == "HalfGuidance" or getattr(da, cls.__name__) is cls


def test_text_makes_techniques_in_that_order():
    assert TECHNIQUES.make("cfg") == (da.CFG(),)
    made = TECHNIQUES.make("Interval-CFG: scale=3, sigma=(0.2,1.6) + nag:negative-prompt='a, b'")
    assert made == (da.IntervalCFG(3.0, sigma=(0.2, 1.6)), da.NAG(negative_prompt="a, b"))
    assert TECHNIQUES.make("adaptive-guidance:threshold=none")[0] == da.AdaptiveGuidance()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Technique '' has an empty part"),
        ("cfg+", "has an empty part; write name:key=value"),
        ("cgf", "Unknown technique 'cgf'. Nearest: .*cfg.*`diffalign techniques` lists all"),
        ("cfg:scale", "'scale' in 'cfg:scale' is not key=value"),
        ("cfg:scal=3", "cfg has no option 'scal'. Nearest: scale"),
        ("cfg:scale=x", "cfg:scale must be a number; got 'x'"),
        ("apg:cap=-1", r"APG\(cap=...\) must be a number above 0"),
    ],
)
def test_bad_text_is_explained(text, message):
    with pytest.raises(ValueError, match=message):
        TECHNIQUES.make(text)


def test_an_object_without_a_name_goes_by_its_class():
    assert TECHNIQUES.name_of(object()) == "object"
    guider = TECHNIQUES.build("diffusers-guider", {"guider": "ClassifierFreeGuidance"})
    assert TECHNIQUES.name_of(guider) == "diffusers-guider"
    assert "diffusers-guider" not in TECHNIQUES.names()


def plugins(monkeypatch, *entries):
    def entry_points(*, group):
        return [EntryPoint(name, value, group) for name, value in entries]

    monkeypatch.setattr(room, "entry_points", entry_points)


def test_other_packages_join_by_entry_points(monkeypatch):
    plugins(monkeypatch, ("half", f"{__name__}:HalfGuidance"))
    things = Registry("thing", "some.group", targets={"whole": HalfGuidance})
    assert things.names() == ("half", "whole")
    assert things.plugins == {"half": f"{__name__}:HalfGuidance"}
    plugins(monkeypatch, ("fraction", "fractions:Fraction"))
    things = Registry("thing", "some.group")
    assert things.get("fraction").__name__ == "Fraction"
    assert things.name_of(things.get("fraction")(1, 2)) == "fraction"
    with pytest.raises(ValueError, match="'fraction' is taken"):
        things.register("fraction", int)


def test_a_plugin_may_not_take_a_name_of_ours(monkeypatch):
    plugins(monkeypatch, ("whole", "other:Whole"))
    things = Registry("thing", "some.group", targets={"whole": HalfGuidance})
    with pytest.raises(ValueError, match=r"'other:Whole' registers the thing 'whole', which is"):
        things.names()


@pytest.mark.parametrize(
    "text",
    [
        "cfg",
        "cfg:scale=2.5",
        "interval-cfg:start=0.2,stop=0.8",
        'nag:scale=5,negative_prompt="a red, big one"',
        "skip-layer-guidance:layers=(7,8,9)",
    ],
)
def test_what_is_written_is_read_again(text):
    (technique,) = TECHNIQUES.make(text)
    again = room.written(TECHNIQUES, technique)
    assert TECHNIQUES.make(again) == (technique,)


def test_an_option_without_a_text_cannot_be_written():
    import torch

    from diffalign.attention import NAG

    technique = NAG(negative_embeds={"negative_prompt_embeds": torch.zeros(1, 2, 3)})
    with pytest.raises(ValueError, match="negative_embeds"):
        room.written(TECHNIQUES, technique)
