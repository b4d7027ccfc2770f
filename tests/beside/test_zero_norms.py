"""Predictions that are zero, or equal in both branches: every rule stays finite, and the report
shows no direction where there is none."""

import pytest
import torch

import diffalign as da
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD, SD3 = "StableDiffusionPipeline", "StableDiffusion3Pipeline"
RULES = (
    da.CFG(4.0),
    da.APG(4.0, cap=1.0, momentum=-0.5),
    da.TCFG(4.0),
    da.MagnitudeAware(4.0),
    da.RescaledCFG(4.0),
    da.FDG(4.0, high=3.0),
    da.BetaCFG(4.0),
    da.AdaptiveGuidance(4.0, threshold=0.99, space="eps"),
    da.AdaptiveGuidance(4.0, threshold=0.99, space="x0"),
)
ZEROED = {"both": slice(None), "unconditional": slice(0, 1), "conditional": slice(1, 2)}


def zero(rows):
    def hook(module, args, output):
        value = output[0].clone()
        value[rows] = 0.0
        return (value, *output[1:])

    return hook


@pytest.mark.parametrize("zeroed", ZEROED)
@pytest.mark.parametrize("technique", [*RULES, da.CFGZeroStar(4.0, zero_steps=0)], ids=repr)
@pytest.mark.few(10)
def test_a_prediction_of_zeros(technique, zeroed):
    name = SD3 if isinstance(technique, da.CFGZeroStar) else SD
    pipe = tiny_pipeline(name)
    (getattr(pipe, "unet", None) or pipe.transformer).register_forward_hook(zero(ZEROED[zeroed]))
    with da.apply(pipe, technique) as session:
        assert torch.isfinite(final(pipe, tiny_inputs(name, steps=2))).all()
    report = session.report()
    if report.guided_steps == 2 and name == SD and getattr(technique, "space", "eps") == "eps":
        assert report.cosine == [None, None]
    if zeroed == "both":
        assert report.scale == report.orthogonal == [None, None]
    assert "nan" not in str(report)
    assert "inf" not in str(report)


@pytest.mark.parametrize("technique", RULES, ids=repr)
def test_branches_that_agree(technique):
    pipe = tiny_pipeline(SD)
    inputs = tiny_inputs(SD, steps=3)
    inputs["negative_prompt_embeds"] = inputs["prompt_embeds"]
    with da.apply(pipe, technique) as session:
        assert torch.isfinite(final(pipe, inputs)).all()
    report = session.report()
    assert {value for value in (*report.scale, *report.orthogonal) if value is not None} == set()
    shown = [value for value in report.cosine if value is not None]
    assert shown == pytest.approx([1.0] * len(shown))
