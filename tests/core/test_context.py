"""What a technique is told: values with the place that each comes from."""

from dataclasses import dataclass, replace

import pytest
from torch import nn

from diffalign.core import Context
from diffalign.core.option import CALL, FLOW
from diffalign.core.presets import VARIABLE, Entry

CONTEXT = Context("StableDiffusionPipeline", "sd", "unet", "DDIMScheduler", 7.5, "call", 20)


@pytest.fixture(autouse=True)
def _no_preset_files(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_the_scale_of_the_call_says_whether_the_call_gave_it():
    context = replace(CONTEXT, sources={})
    assert context.look_up("scale", CALL) == 7.5
    assert context.sources == {"scale": "guidance scale of the call"}
    context = replace(CONTEXT, scale=5.0, scale_source="pipeline default", sources={})
    assert context.look_up("strength", CALL) == 5.0
    assert context.sources == {"strength": "default of the pipeline"}


@pytest.mark.parametrize("flow", [True, False])
def test_the_parametrisation_is_the_schedulers(flow):
    context = replace(CONTEXT, flow=flow, sources={})
    assert context.look_up("flow", FLOW) is flow
    assert context.sources == {"flow": "parametrisation of DDIMScheduler"}


def test_a_preset_is_looked_up_by_technique_and_option():
    defaults = {
        "mine": (
            Entry("width", 3, "paper A"),
            Entry("width", 4, "paper B", {"space": "x0"}),
            Entry("height", 9, "paper C"),
        ),
        "other": (Entry("width", 5, "paper D"),),
    }
    context = replace(CONTEXT, defaults=defaults, sources={})
    assert context.look_up("w", "mine/width") == 3
    assert context.look_up("w2", "mine/width", space="x0") == 4
    assert context.look_up("w3", "other/width") == 5
    assert context.sources == {"w": "paper A", "w2": "paper B", "w3": "paper D"}
    with pytest.raises(LookupError, match="No preset for mine:depth fits"):
        context.look_up("depth", "mine/depth")
    assert "depth" not in context.sources


def test_a_fresh_copy_has_looked_nothing_up():
    context = replace(CONTEXT, sources={})
    context.look_up("scale", CALL)
    copy = context.fresh()
    assert copy.sources == {}
    assert copy == context
    copy.look_up("flow", FLOW)
    assert list(context.sources) == ["scale"]


def test_facts_read_the_model_only_when_asked():
    module = nn.Linear(2, 2)
    module.config = type("Config", (), {"in_channels": 16})()
    facts = replace(CONTEXT, module=module).facts()
    model = facts.pop("model")
    assert facts == {
        "family": "sd",
        "pipeline": "StableDiffusionPipeline",
        "scheduler": "DDIMScheduler",
        "steps": 20,
        "scale": 7.5,
        "flow": False,
        "in_channels": 16,
    }
    assert len(model()) == 16
    alone = CONTEXT.facts()
    assert alone["in_channels"] is alone["model"]() is None


@dataclass(frozen=True)
class Technique:
    tokens: bool = False


def test_a_refusal_is_of_a_technique_or_of_one_option_in_use():
    context = replace(CONTEXT, refusals={"a/tokens": "no tokens", "b": "never"})
    assert context.refusal("a", Technique()) is None
    assert context.refusal("a", Technique(tokens=True)) == "no tokens"
    assert context.refusal("b", Technique()) == "never"
    assert context.refusal("c", Technique(tokens=True)) is None
