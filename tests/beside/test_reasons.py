"""What ``supports`` says is what happens: a reason is raised with the same words, and a technique
without one runs."""

import pytest

import diffalign as da
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SLOW = (
    "DiTPipeline",
    "FluxPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "QwenImagePipeline",
    "Cosmos2TextToImagePipeline",
    "ZImagePipeline",
    "LTXConditionPipeline",
)
CASES = [
    ("StableDiffusionPipeline", ""),
    *(pytest.param(name, "", marks=pytest.mark.slow) for name in SLOW),
]
# what a call of a few steps on random weights cannot have
NEEDS = {"linear-ag": "policy", "dynamic-cfg": "evaluator", "auto-guidance": "weak"}


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_supports_tells_what_happens(name, variant):
    pipe = tiny_pipeline(name, variant=variant)
    classes = da.techniques()
    checked = 0
    for row in da.supports(pipe):
        if row.name in NEEDS:
            continue
        technique, checked = classes[row.name], checked + 1

        def run(technique=technique):
            with da.apply(pipe, technique()) as session:
                final(pipe, tiny_inputs(name, variant=variant, steps=2))
            return session.report()

        if row.works:
            assert run().steps, row.name
        else:
            with pytest.raises((da.UnsupportedModel, ValueError, LookupError)) as error:
                run()
            assert row.reason.rstrip(".") in str(error.value), row.name
    assert checked > 8


@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "FluxPipeline", "WanPipeline", "LTXPipeline"]
)
def test_a_negative_prompt_that_is_missing_is_what_the_reason_says(name):
    pipe = tiny_pipeline(name)
    inputs = {
        key: value
        for key, value in tiny_inputs(name, steps=2).items()
        if not key.startswith("negative")
    }
    with da.apply(pipe, da.CFG(3.0)), pytest.raises(da.UnsupportedModel) as error:
        pipe(**inputs)
    asked = "negative_prompt_embeds"
    assert asked in str(error.value)
    missing = {key: value for key, value in tiny_inputs(name, steps=2).items() if "negative" in key}
    assert asked in missing
    with da.apply(pipe, da.CFG(3.0)):
        final(pipe, {**inputs, **missing})
