import dataclasses
import math

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from diffalign.core import COND, UNCOND, Context, StepInfo, UnsupportedModel
from diffalign.guidance import CFG, AdaptiveGuidance
from diffalign.guidance.adaptive_guidance import AdaptiveState, agreement
from diffalign.testing.contracts import GuidanceContract
from diffalign.testing.oracles import run


class TestAdaptiveGuidance(GuidanceContract):
    def make(self):
        return AdaptiveGuidance(3.0, threshold=0.9, space="x0")

    def off(self):
        return AdaptiveGuidance(3.0, threshold=1.5), CFG(3.0)

    def rows(self, steps, batch):
        # images whose x0-cosine first reaches 0.9 at step k cost steps + k + 1; found below by a
        # float64 run of plain CFG
        crossings = crossing_steps(self, threshold=0.9, minimum=2)
        assert len(set(crossings)) > 1, (
            "the images of this contract must latch at different steps to test anything"
        )
        return sum(steps + min(k + 1, steps) for k in crossings)


def crossing_steps(contract, threshold, minimum):
    """For each image the step at which plain CFG's x0-cosine reaches the threshold, from the
    denoiser's formula in float64."""
    model, found = contract.model(), [10**9] * contract.batch
    scheduler = contract.scheduler()
    scheduler.set_timesteps(contract.steps)
    x = contract.noise(torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        bar = float(scheduler.alphas_cumprod[int(t)])
        sigma = math.sqrt((1 - bar) / bar)
        c, n = (model(x, sigma, "x0", p).flatten(1) for p in (COND, UNCOND))
        cosine = (c * n).sum(1) / (c.square().sum(1) * n.square().sum(1)).sqrt()
        for row, value in enumerate(cosine.tolist()):
            if value >= threshold and i + 1 >= minimum:
                found[row] = min(found[row], i)
        c, n = (model(x, sigma, "eps", p) for p in (COND, UNCOND))
        x = scheduler.step(n + 3.0 * (c - n), t, x).prev_sample
    return found


def predictions(cosines):
    """Pairs of [4] vectors with cosine k/2 in {1, 0.5, 0} to the bit."""
    cond = torch.tensor([[1.0, 1.0, 1.0, 1.0]] * len(cosines))
    table = {
        1.0: [2.0, 2.0, 2.0, 2.0],
        0.5: [1.0, 1.0, 1.0, -1.0],
        0.0: [1.0, 1.0, -1.0, -1.0],
        -1.0: [-1.0] * 4,
    }
    return cond, torch.tensor([table[c] for c in cosines])


def at(index, count, **options):
    return StepInfo(index, count, 1.0, convert=lambda value, *_: value, **options)


def play(technique, script, rows=None):
    """Drive a technique through predictions with chosen cosines, ``script[step][row]``; returns
    evaluated rows and outputs per step."""
    state, counts, outputs = technique.init(len(script[0])), [], []
    for i, cosines in enumerate(script):
        step = at(i, len(script))
        wanted = technique.passes(step, state)
        cond, uncond = predictions(cosines)
        preds = {
            p: (cond if p == COND else uncond)[list(range(len(cond)) if p.rows is None else p.rows)]
            for p in wanted
        }
        counts.append(sum(len(v) for v in preds.values()))
        out, state = technique.combine(preds, step, state)
        outputs.append(out)
    return counts, outputs, state


def test_latch_index_by_hand_and_equality_latches():
    made = AdaptiveGuidance(3.0, threshold=0.5, min_guided_steps=1)
    counts, outputs, state = play(made, [[0.0, 0.0], [0.0, 0.5], [0.5, 0.0], [0.0, 0.0]])
    assert state.crossed == (2, 1)
    assert counts == [4, 4, 3, 2]
    cond, _ = predictions([0.0])
    # the crossing step is guided: image 1 at step 1 has uncond (1, 1, 1, -1), hence -1 + 3 * 2 = 5
    # in the last place
    assert outputs[1][1].tolist() == [1.0, 1.0, 1.0, 5.0]
    assert outputs[2][1].tolist() == cond[0].tolist()
    assert outputs[3].tolist() == [cond[0].tolist()] * 2


def test_just_below_the_threshold_does_not_latch():
    above = math.nextafter(0.5, 1.0)
    assert play(AdaptiveGuidance(3.0, threshold=above, min_guided_steps=1), [[0.5]] * 3)[
        2
    ].crossed == (None,)


def test_never_switched_back():
    counts, _, state = play(
        AdaptiveGuidance(3.0, threshold=0.5, min_guided_steps=1), [[0.5], [-1.0], [-1.0], [-1.0]]
    )
    assert counts == [2, 1, 1, 1]
    assert state.crossed == (0,)


@pytest.mark.parametrize(("minimum", "guided"), [(1, 1), (2, 2), (4, 4), (9, 6)])
def test_threshold_of_minus_one_guides_the_least_number_of_steps(minimum, guided):
    counts, _, _ = play(
        AdaptiveGuidance(3.0, threshold=-1.0, min_guided_steps=minimum), [[0.0]] * 6
    )
    assert counts == [2] * guided + [1] * (6 - guided)


def test_default_protects_the_first_step():
    assert play(AdaptiveGuidance(3.0, threshold=0.9), [[1.0]] * 4)[0] == [2, 2, 1, 1]


def test_above_one_is_cfg_to_the_bit_and_costs_two_passes():
    contract = TestAdaptiveGuidance()
    trace = contract.sample(AdaptiveGuidance(3.0, threshold=math.nextafter(1.0, 2.0)))
    assert trace.rows == 2 * contract.steps * contract.batch


def test_scale_one_never_pays():
    contract = TestAdaptiveGuidance()
    trace = contract.sample(AdaptiveGuidance(1.0, threshold=0.9))
    assert torch.equal(trace.sample, contract.sample(CFG(1.0)).sample)
    assert trace.rows == contract.steps * contract.batch


def test_decides_once_per_step_of_a_two_evaluation_solver():
    contract = TestAdaptiveGuidance()
    made = AdaptiveGuidance(3.0, threshold=0.9, space="x0")

    def sample(technique):
        scheduler = HeunDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
        return run(technique, contract.model(), scheduler, contract.noise(), steps=8)

    trace = sample(made)
    for row, at in enumerate(trace.state.crossed):
        # both evaluations of the crossing step are guided
        guided = [
            s.index
            for s, passes in zip(trace.steps, trace.passes)
            if any(p == UNCOND and row in (p.rows or range(3)) for p in passes)
        ]
        last = 7 if at is None else at
        assert guided == [i for i in range(last + 1) for _ in range(1 if i == 7 else 2)]
    assert len(set(trace.state.crossed)) > 1


def test_agreement_at_a_second_evaluation_does_not_latch():
    made = AdaptiveGuidance(3.0, threshold=0.9)
    cond, uncond = predictions([1.0])
    _, second = made.combine({COND: cond, UNCOND: uncond}, at(3, 4, evaluation=1), made.init(1))
    _, first = made.combine({COND: cond, UNCOND: uncond}, at(3, 4, evaluation=0), made.init(1))
    assert (second.crossed, first.crossed) == ((None,), (3,))


def test_mixing_wider_than_the_model_keeps_latched_rows():
    """Pipelines that mix in float32 hand a wider result back; images already latched are widened
    with it."""
    made = AdaptiveGuidance(3.0, threshold=0.5)
    step = at(2, 4, mix=lambda c, n, s: n.float() + s * (c.float() - n.float()))
    cond, uncond = (v.bfloat16() for v in predictions([0.0, 0.0]))
    out, _ = made.combine({COND: cond, UNCOND: uncond[[1]]}, step, AdaptiveState((0, None)))
    assert out.dtype == torch.float32
    assert out[0].tolist() == cond[0].tolist()
    assert out[1].tolist() == [1.0, 1.0, 5.0, 5.0]


def test_two_rows_with_different_latches_equal_two_single_runs():
    made, script = (
        AdaptiveGuidance(3.0, threshold=0.5, min_guided_steps=1),
        [[0.0, 0.0], [0.0, 0.5], [0.5, 0.0], [0.0, 0.0]],
    )
    _, both, _ = play(made, script)
    for row in range(2):
        _, single, _ = play(made, [[line[row]] for line in script])
        assert all(torch.equal(a[[row]], b) for a, b in zip(both, single))


def test_space_decides():
    """Equal variances: the eps-cosine starts near 1 and falls, the x0-cosine rises."""
    contract = TestAdaptiveGuidance()
    eps = contract.sample(
        AdaptiveGuidance(3.0, threshold=0.9, space="eps", min_guided_steps=1)
    ).state.crossed
    x0 = contract.sample(
        AdaptiveGuidance(3.0, threshold=0.9, space="x0", min_guided_steps=1)
    ).state.crossed
    assert eps == (0, 0, 0)
    # the prompt moves image 0 so little that its denoised images always agree; the others come
    # together late
    assert x0 == (0, *crossing_steps(contract, 0.9, 1)[1:])
    assert min(x0[1:]) >= contract.steps // 2


def test_space_is_looked_up_with_the_threshold_and_stays_the_papers_beside_your_own():
    context = Context("P", "no-such-family", "unet", "DDIMScheduler", 5.0, "call", 20)
    made = AdaptiveGuidance().resolve(context)
    assert (made.space, made.threshold) == ("eps", 0.991)
    assert "2312.12487" in context.sources["space"]
    context = context.fresh()
    made = AdaptiveGuidance(threshold=0.5).resolve(context)
    assert (made.space, made.threshold) == ("eps", 0.5)
    assert context.sources["space"] == "the threshold is yours"


@pytest.mark.parametrize(("space", "value"), [("eps", 0.991), ("x0", 0.99)])
def test_threshold_is_looked_up_and_says_where_it_comes_from(space, value):
    context = Context("P", "no-such-family", "unet", "DDIMScheduler", 5.0, "call", 20)
    made = AdaptiveGuidance(space=space).resolve(context)
    assert (made.scale, made.threshold) == (5.0, value)
    assert "not calibrated for this model" in context.sources["threshold"]
    assert "call" in context.sources["scale"]
    context = context.fresh()
    AdaptiveGuidance(2.0, threshold=0.7, space=space).resolve(context)
    assert context.sources == {}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scale": math.nan}, "scale"),
        ({"threshold": math.inf}, "threshold"),
        ({"space": "v"}, "space"),
        ({"min_guided_steps": 0}, "min_guided"),
    ],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(ValueError, match=f"AdaptiveGuidance.*{word}"):
        AdaptiveGuidance(**options)


def test_nothing_to_save_is_refused() -> None:
    """Without guidance there is no branch to leave out: the technique says so instead of running
    without effect."""
    facts = Context(
        "FluxPipeline",
        "flux",
        "transformer",
        "FlowMatchEulerDiscreteScheduler",
        1.0,
        "pipeline default",
        20,
        flow=True,
    )
    with pytest.raises(UnsupportedModel, match="nothing to save"):
        AdaptiveGuidance().resolve(facts)
    assert AdaptiveGuidance(1.0).resolve(facts).scale == 1.0


def test_the_cosine_of_a_large_latent_is_summed_in_float64():
    """262,144 values, those of a 128 x 128 latent of 16 channels; torch's cosine in float32 is off
    by 3e-6."""
    rng = torch.Generator().manual_seed(0)
    cond = torch.randn(2, 16, 128, 128, generator=rng)
    uncond = cond + 0.1 * torch.randn(2, 16, 128, 128, generator=rng)
    a, b = (value.flatten(1).double() for value in (cond, uncond))
    exact = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    step = StepInfo(0, 4, 1.0)
    found = agreement(cond, uncond, dataclasses.replace(step, convert=lambda x, *_: x), "eps")
    bound = 262_144 * torch.finfo(torch.float64).eps  # of a sum of that many terms
    assert (found - exact).abs().max() <= bound
