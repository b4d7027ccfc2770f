"""Calibration: curves against the network's raw outputs, costs against real runs, the choice
against brute force, presets."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler

import diffalign as da
from diffalign.calibration.adaptive import calibrate_adaptive_guidance, check_saving
from diffalign.calibration.curves import Curves, record
from diffalign.core import UnsupportedModel
from diffalign.core.presets import VARIABLE, preset
from diffalign.core.seeds import seed_of
from diffalign.guidance.adaptive_guidance import AdaptiveGuidance
from diffalign.testing.tiny import tiny_pipeline

SCALE, STEPS = 3.0, 6
PROMPTS = [
    "a red apple",
    "two cats",
    "a bench",
    "a green clock and a dog",
    "a photo of a car",
    "three cups",
]
CALL = {"scale": SCALE, "batch": 4, "seed": 5}


def make(seed=0):
    pipe = tiny_pipeline("StableDiffusionPipeline", text=True, seed=seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make()


def generators(first, count):
    """Of the images that start with number ``first``, as ``CALL`` seeds them."""
    texts = PROMPTS[first : first + count]
    return [torch.Generator().manual_seed(seed_of(text, 0, base=CALL["seed"])) for text in texts]


def slow_latch(curve, threshold, minimum):
    """The rule in words: the first step that may latch and reaches the threshold is the last guided
    one."""
    for i, value in enumerate(curve):
        if i + 1 >= minimum and value >= threshold:
            return i
    return len(curve)


def random_curves(seed, evaluations, minimum=2, images=7):
    rng = np.random.default_rng(seed)
    return Curves(
        torch.from_numpy(rng.uniform(0.9, 1.0, (images, len(evaluations)))), evaluations, minimum
    )


@pytest.mark.parametrize(
    ("evaluations", "minimum"), [((1,) * 6, 2), ((2, 2, 2, 2, 1), 1), ((1,) * 8, 4), ((1, 1), 2)]
)
def test_latch_and_cost_of_every_threshold_are_those_of_the_rule(evaluations, minimum):
    curves = random_curves(1, evaluations, minimum)
    for threshold in [-1.0, 0.5, *curves.cosine.flatten().tolist(), 1.01]:
        latches = [slow_latch(curve, threshold, minimum) for curve in curves.cosine.tolist()]
        assert curves.latches(threshold).tolist() == latches
        costs = [
            sum(n * (2 if i <= at else 1) for i, n in enumerate(evaluations)) for at in latches
        ]
        assert curves.nfe(threshold).tolist() == costs
        assert curves.saving(threshold) == pytest.approx(
            1 - sum(costs) / len(costs) / (2 * sum(evaluations)), abs=1e-12
        )


@pytest.mark.parametrize("saving", [0.05, 0.1, 0.21, 1 / 3])
def test_the_chosen_threshold_is_the_highest_that_saves_enough(saving):
    """Against every threshold between and beside the recorded values."""
    for seed in range(4):
        curves = random_curves(seed, (1,) * 6)
        found = curves.threshold_for(saving)
        assert curves.saving(found) >= saving
        values = sorted(curves.cosine.flatten().tolist())
        above = [
            v
            for v in (*values, *(np.nextafter(v, 2) for v in values))
            if v > found and curves.saving(v) >= saving
        ]
        # a higher number that saves as much latches the same images at the same steps: only the
        # digits are fewer here
        assert all(torch.equal(curves.latches(v), curves.latches(found)) for v in above)
        assert len(repr(found)) <= 6


def test_a_saving_out_of_reach_is_refused():
    curves = random_curves(0, (1,) * 6)
    assert curves.saving(curves.threshold_for(1 / 3)) == pytest.approx(
        1 / 3
    )  # two of six steps always guided: 12 - 8 of 12
    with pytest.raises(ValueError, match=r"at most 0\.333 for 6 steps.*got 0\.34"):
        curves.threshold_for(0.34)
    check_saving(1 / 3, 6)
    check_saving(
        5 / 18, 5, order=2
    )  # Heun: 2 + 2 + 2 + 2 + 1 = 9 evaluations, four of which are guided: 18 - 13 of 18
    for saving, steps, order in ((0.34, 6, 1), (0.28, 5, 2), (0.0, 20, 1)):
        with pytest.raises(ValueError, match=f"saving must be above 0.*got {saving:g}"):
            check_saving(saving, steps, order)
    for steps, order in ((1, 1), (2, 1), (2, 2)):
        with pytest.raises(ValueError, match="leave nothing to save"):
            check_saving(0.1, steps, order=order)


@pytest.mark.parametrize("space", ["eps", "x0"])
def test_curves_are_the_cosines_of_the_networks_own_outputs(pipe, space):
    """From the unmodified pipeline, watched by a hook: no code of ours between the network and the
    expected numbers."""
    seen = []
    hook = pipe.unet.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((args[0], args[1], out[0])), with_kwargs=True
    )
    try:
        images = pipe(
            PROMPTS,
            generator=generators(0, 6),
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            output_type="np",
        ).images
    finally:
        hook.remove()
    expected = []
    for x, time, out in seen:
        x, (uncond, cond) = x[:6].double().numpy(), (half.double().numpy() for half in out.chunk(2))
        bar = float(pipe.scheduler.alphas_cumprod[int(time)])
        if space == "x0":
            uncond, cond = ((x - (1 - bar) ** 0.5 * eps) / bar**0.5 for eps in (uncond, cond))
        a, b = cond.reshape(6, -1), uncond.reshape(6, -1)
        expected.append((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)))
    curves, plain = record(
        pipe, PROMPTS, space=space, **{**CALL, "batch": 6}, num_inference_steps=STEPS
    )
    # float32 sums over 256 values: 256 eps at most, far less in fact
    np.testing.assert_allclose(curves.cosine.numpy(), np.stack(expected, 1), atol=3e-5)
    assert curves.evaluations == (1,) * STEPS
    rounded = (images * 255).round().astype(np.uint8)
    assert np.array_equal(plain.permute(0, 2, 3, 1).numpy(), rounded)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("space", ["eps", "x0"])
def test_what_the_curves_predict_is_what_adaptive_guidance_does(scheduler, space):
    """The proof that no second generation is needed: latches and evaluations of real runs, for
    thresholds all over the range."""
    pipe = make()
    config = (
        {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    )  # as Stable Diffusion ships: one evaluation more than steps
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
    curves, _ = record(pipe, PROMPTS, space=space, **CALL, num_inference_steps=STEPS)
    assert len(curves.evaluations) == STEPS + (scheduler is PNDMScheduler)
    assert curves.evaluations[:-1] == ((2 if scheduler is HeunDiscreteScheduler else 1),) * (
        len(curves.evaluations) - 1
    )
    values = curves.cosine[:, 1:].flatten().unique()
    gaps = values.diff()
    inside = [
        int(gaps[a:b].argmax()) + a
        for a, b in (
            (0, len(gaps) // 3),
            (len(gaps) // 3, 2 * len(gaps) // 3),
            (2 * len(gaps) // 3, len(gaps)),
        )
    ]
    thresholds = [
        float(values[i] + values[i + 1]) / 2 for i in inside
    ]  # far from every cosine: last bits decide nothing
    different = set()
    for threshold in [-1.0, *thresholds]:
        crossed, rows = [], 0.0
        with da.apply(pipe, AdaptiveGuidance(SCALE, threshold=threshold, space=space)) as session:
            for first in range(0, 6, 4):
                texts = PROMPTS[first : first + 4]
                pipe(
                    texts,
                    generator=generators(first, len(texts)),
                    num_inference_steps=STEPS,
                    output_type="latent",
                )
                crossed += session.report().extras["unet"]["crossed"]
                rows += session.report().rows
        steps = len(curves.evaluations)
        assert [steps if at is None else at for at in crossed] == curves.latches(threshold).tolist()
        assert rows == curves.nfe(threshold).sum()
        different.add(tuple(crossed))
    assert len(different) > 2


@pytest.fixture(scope="module")
def found(pipe):
    return calibrate_adaptive_guidance(pipe, PROMPTS, **CALL, steps=STEPS, saving=0.2, space="x0")


def images(pipe, *techniques):
    with da.apply(pipe, *techniques) as session:
        parts = [
            pipe(
                PROMPTS[i : i + 4],
                generator=generators(i, len(PROMPTS[i : i + 4])),
                num_inference_steps=STEPS,
                output_type="np",
            ).images
            for i in (0, 4)
        ]
    return (np.concatenate(parts) * 255).round(), session.report()


def test_calibration_reports_the_cost_and_the_change_of_its_threshold(pipe, found):
    assert found.curves.saving(found.threshold) >= 0.2
    assert found.nfe == pytest.approx(float(found.curves.nfe(found.threshold).double().mean()))
    plain, _ = images(pipe, da.CFG(SCALE))
    ours, _ = images(pipe, AdaptiveGuidance(SCALE, threshold=found.threshold, space="x0"))
    np.testing.assert_allclose(
        found.difference.numpy(), np.abs(ours - plain).mean((1, 2, 3)) / 255, atol=1e-12
    )
    assert found.difference.max() > 0
    chosen = [row for row in found.table() if row[0] == found.threshold]
    assert chosen == [
        (
            found.threshold,
            found.nfe,
            found.curves.saving(found.threshold),
            int((found.curves.latches(found.threshold) < 6).sum()),
        )
    ]
    assert found.plot().size == (900, 960)


def test_nothing_to_save_is_refused_before_the_first_step(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.unet), "forward", lambda *a, **k: pytest.fail("computed"))
    with pytest.raises(UnsupportedModel, match="nothing to save"):
        record(pipe, PROMPTS, scale=1.0, num_inference_steps=STEPS)
    with pytest.raises(ValueError, match="saving must be"):
        calibrate_adaptive_guidance(pipe, PROMPTS, scale=SCALE, steps=STEPS, saving=0.4)


@pytest.fixture
def own(found, tmp_path, monkeypatch):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(found.preset("measured here")))
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def resolved(pipe, **change):
    given = {"num_inference_steps": STEPS, "guidance_scale": SCALE, **change}
    with da.apply(pipe, AdaptiveGuidance(space="x0")) as session:
        pipe(["a bench"], generator=generators(0, 1), output_type="latent", **given)
    return session.report().resolved["adaptive-guidance"]["threshold"]


def test_a_preset_of_the_user_wins_where_all_its_conditions_agree(pipe, found, own):
    assert resolved(pipe) == (found.threshold, "measured here")
    with da.apply(pipe, AdaptiveGuidance(SCALE)) as session:
        pipe(
            ["a bench"], num_inference_steps=STEPS, output_type="latent", generator=generators(0, 1)
        )
    assert session.report().resolved["adaptive-guidance"]["space"] == ("x0", "measured here")
    with da.apply(pipe, AdaptiveGuidance(SCALE, space="eps")) as session:
        pipe(
            ["a bench"], num_inference_steps=STEPS, output_type="latent", generator=generators(0, 1)
        )
    assert (
        session.report().resolved["adaptive-guidance"]["threshold"][0] == 0.991
    )  # not the space that was calibrated


@pytest.mark.parametrize("change", [{"guidance_scale": 4.0}, {"num_inference_steps": 5}])
def test_a_preset_for_another_call_does_not_apply(pipe, own, change):
    assert resolved(pipe, **change)[0] == 0.99


def test_a_preset_for_another_model_or_scheduler_does_not_apply(own):
    assert resolved(make(seed=1))[0] == 0.99
    pipe = make()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    assert resolved(pipe)[0] == 0.99


def test_without_the_variable_the_shipped_presets_stand(pipe):
    assert resolved(pipe)[0] == 0.99


def test_an_earlier_file_wins_and_files_are_separated_as_paths_are(
    found, own, tmp_path, monkeypatch
):
    import os

    other = tmp_path / "other.json"
    other.write_text(json.dumps(dataclasses.replace(found, threshold=0.5).preset("second")))
    facts = {**found.when}
    monkeypatch.setenv(VARIABLE, os.pathsep.join(map(str, (own, other))))
    assert preset("adaptive-guidance", "threshold", facts) == (found.threshold, "measured here")
    monkeypatch.setenv(VARIABLE, os.pathsep.join(map(str, (other, own))))
    assert preset("adaptive-guidance", "threshold", facts) == (0.5, "second")


def test_the_model_is_asked_for_only_where_everything_else_agrees(found, own):
    asked = []
    facts = {**found.when, "model": lambda: asked.append(1) or found.when["model"]}
    preset("adaptive-guidance", "threshold", {**facts, "steps": 7})
    assert not asked
    assert preset("adaptive-guidance", "threshold", facts)[0] == found.threshold
    assert asked == [1]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        '{"a": 1}',
        '{"a": [{"option": "threshold"}]}',
        '{"a": [{"option": "threshold", "when": {}, "source": "no value"}]}',
        '{"a": [{"option": 1, "when": {}, "source": ""}]}',
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_variable(tmp_path, monkeypatch, text):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(ValueError, match=rf"{VARIABLE} names .*broken\.json"):
        AdaptiveGuidance().resolve(
            da.core.Context("P", "sd", "unet", "DDIMScheduler", 5.0, "call", 20)
        )
