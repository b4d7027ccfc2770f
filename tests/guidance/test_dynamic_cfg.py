import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler

import diffalign as da
from diffalign.core import COND, UNCOND, Context, Guidance, Meter, StepInfo, UnsupportedModel
from diffalign.core.registry import from_config, parse, to_config
from diffalign.guidance import CFG, DecodedReward, DynamicCFG
from diffalign.guidance.evaluators import EVALUATORS, decoder_of, preferred
from diffalign.testing import tiny_pipeline
from diffalign.testing.contracts import GuidanceContract, ddim
from diffalign.testing.oracles import run

W = (0.0, 1.0, 2.0, 5.0, 9.0)


@dataclass
class Judge:
    """Scores by ``rule(latents, rows)`` and remembers what it saw."""

    rule: object
    sees: str = "x0"
    seen: list = field(default_factory=list)

    def score(self, latents, sigma, rows):
        self.seen.append((latents, sigma, list(rows)))
        return self.rule(latents, rows)


def constant(latents, rows):
    return torch.ones(len(latents))


def by_candidate(sign):
    return lambda latents, rows: (
        sign
        * torch.arange(len(latents) // len(set(rows)), dtype=torch.float32).repeat(len(set(rows)))
    )


def towards(target):
    return lambda latents, rows: -(latents.double() - target).flatten(1).square().sum(1)


def targets_of(model):
    reach = torch.tensor([0.0, 2.0, 7.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    return model.mean_uncond + reach * (model.mean_cond - model.mean_uncond)


def per_image(latents, rows):
    """Each image has its own target, so that images and steps choose differently."""
    return (
        -(latents.double() - targets_of(TestDynamicCFG().model())[list(rows)])
        .flatten(1)
        .square()
        .sum(1)
    )


@pytest.fixture(autouse=True, scope="module")
def _registered():
    def bright(context):
        return Judge(lambda latents, rows: latents.flatten(1).mean(1), sees="next")

    EVALUATORS.register("test-small", lambda context: Judge(towards(0.3)))
    EVALUATORS.register("test-bright", bright)
    yield
    EVALUATORS.registered.clear()


class TestDynamicCFG(GuidanceContract):
    def make(self):
        return DynamicCFG(3.0, candidates=W, evaluators=("test-small", "test-bright"), stop=0.75)

    def off(self):
        return DynamicCFG(3.0, candidates=(3.0,), evaluators=("test-small",)), CFG(3.0)

    def rows(self, steps, batch):
        return 2 * steps * batch


class TestDynamicCFGOnFlow(TestDynamicCFG):
    flow = True


@dataclass(frozen=True)
class Replay(Guidance[None]):
    """Given weights per step and image, by plain CFG one image at a time."""

    weights: tuple[torch.Tensor, ...]

    def passes(self, step, state):
        return (COND, UNCOND)

    def combine(self, preds, step, state):
        cond, uncond = preds[COND], preds[UNCOND]
        rows = []
        for row, weight in enumerate(self.weights[step.index].tolist()):
            given = {p: v[[row]] for p, v in preds.items()}
            made = CFG(round(weight, 6))
            rows.append(made.combine({p: given[p] for p in made.passes(step, None)}, step, None)[0])
        assert len(rows) == len(cond) == len(uncond)
        return torch.cat(rows), None


def sample(judge, contract=None, scheduler=None, **options):
    contract = TestDynamicCFG() if contract is None else contract
    made = DynamicCFG(3.0, **{"candidates": W, "evaluators": (judge,), **options})
    return run(
        made,
        contract.model(),
        scheduler or contract.scheduler(),
        contract.noise(),
        steps=contract.steps,
    )


def test_a_constant_judge_leaves_the_default_weight():
    trace = sample(Judge(constant))
    assert torch.equal(torch.stack(trace.state.weights), torch.full((8, 3), 3.0))
    assert torch.equal(trace.sample, TestDynamicCFG().sample(CFG(3.0)).sample)


@pytest.mark.parametrize(("sign", "weight"), [(1.0, 9.0), (-1.0, 0.0)])
def test_a_judge_of_the_weight_itself_takes_the_extreme(sign, weight):
    trace = sample(Judge(by_candidate(sign)))
    assert torch.equal(torch.stack(trace.state.weights), torch.full((8, 3), weight))
    assert torch.equal(trace.sample, TestDynamicCFG().sample(CFG(weight)).sample)


def test_weight_one_is_the_conditional_model_to_the_bit():
    trace = sample(Judge(lambda latents, rows: torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0]).repeat(3)))
    assert torch.equal(trace.sample, TestDynamicCFG().sample(CFG(1.0)).sample)


def test_two_evaluations_per_step_for_any_number_of_candidates():
    for k in (2, 24):
        trace = sample(Judge(by_candidate(1.0)), candidates=tuple(float(i) for i in range(k)))
        assert trace.rows == 2 * 8 * 3


def test_one_candidate_is_never_scored():
    judge = Judge(constant)
    sample(judge, candidates=(5.0,))
    assert judge.seen == []


def test_choice_equals_brute_force_row_by_row():
    """Denoised images in float64 from the exact denoiser, for every weight; each image takes the
    one nearest to its own target."""
    contract = TestDynamicCFG()
    model = contract.model()
    targets = targets_of(model)
    trace = sample(Judge(per_image))
    scheduler = contract.scheduler()
    scheduler.set_timesteps(8)
    x = contract.noise()
    for i, t in enumerate(scheduler.timesteps):
        sigma = trace.steps[i].sigma
        c, u = (model(x.double(), sigma, "x0", p) for p in (COND, UNCOND))
        distance = torch.stack([(u + w * (c - u) - targets).flatten(1).square().sum(1) for w in W])
        assert trace.state.weights[i].tolist() == [W[k] for k in distance.argmin(0).tolist()]
        x = scheduler.step(trace.guided[i], t, x).prev_sample
    assert (
        len({tuple(row) for row in torch.stack(trace.state.weights).T.tolist()}) == 3
    )  # images chose differently


@pytest.mark.parametrize("scheduler", [ddim, DPMSolverMultistepScheduler], ids=["ddim", "dpm"])
def test_replaying_the_chosen_weights_is_exact(scheduler):
    """A multistep scheduler's history must have seen the winners only."""
    trace = sample(Judge(per_image), scheduler=scheduler())
    assert len(set(torch.stack(trace.state.weights).flatten().tolist())) > 1
    contract = TestDynamicCFG()
    again = run(
        Replay(trace.state.weights), contract.model(), scheduler(), contract.noise(), steps=8
    )
    assert torch.equal(again.sample, trace.sample)


def test_a_second_evaluation_keeps_the_choice():
    trace = sample(Judge(per_image), scheduler=HeunDiscreteScheduler(beta_schedule="scaled_linear"))
    assert len(trace.state.weights) == 8
    again = run(
        Replay(trace.state.weights),
        TestDynamicCFG().model(),
        HeunDiscreteScheduler(beta_schedule="scaled_linear"),
        TestDynamicCFG().noise(),
        steps=8,
    )
    assert torch.equal(again.sample, trace.sample)


def test_scaling_one_judge_changes_nothing():
    rules = towards(0.3), lambda latents, rows: latents.flatten(1).mean(1)
    one = [sample(Judge(rules[0]), evaluators=(Judge(rules[0]), Judge(rules[1])))]
    one.append(
        sample(
            Judge(rules[0]), evaluators=(Judge(lambda x, r: 1024 * rules[0](x, r)), Judge(rules[1]))
        )
    )
    assert torch.equal(torch.stack(one[0].state.weights), torch.stack(one[1].state.weights))


@pytest.mark.parametrize("flow", [False, True])
def test_next_latents_are_those_of_one_first_order_step(flow):
    """With one step of DDIM or Euler from the same state, by the real scheduler, at each weight."""
    contract = TestDynamicCFGOnFlow() if flow else TestDynamicCFG()
    judge = Judge(by_candidate(1.0), sees="next")
    sample(judge, contract)
    latents, sigma, rows = judge.seen[0]
    assert rows == [0] * 5 + [1] * 5 + [2] * 5
    for k, weight in enumerate(W):
        plain = run(
            CFG(weight), contract.model(), contract.scheduler(), contract.noise(), steps=8, stop=1
        )
        assert sigma == plain.steps[0].sigma_next
        # float32 conversions divide by alpha once: about 8 roundings of the largest intermediate,
        # weight / alpha times the latents
        largest = (1 + weight) * 8 * plain.sample.abs().max()
        assert (latents[k::5] - plain.sample).abs().max() < 8 * torch.finfo(
            torch.float32
        ).eps * largest


def test_the_window_keeps_the_default_elsewhere():
    judge = Judge(by_candidate(1.0))
    trace = sample(judge, start=0.5)
    assert torch.stack(trace.state.weights)[:, 0].tolist() == [3.0] * 4 + [9.0] * 4
    assert len(judge.seen) == 4


def test_weights_between_judges_by_hand():
    # judge 0 likes the first candidate, judge 1 the last, by the same standardised distance
    now = torch.tensor([[[2.0, 1.0, 0.0]], [[0.0, 10.0, 20.0]]])  # means 1 and 10
    assert preferred(now, None).tolist() == [-1]  # equal weights: every total is 0, a tie
    assert preferred(now, torch.tensor([[0.5], [9.0]])).tolist() == [0]  # improvements 1 and 1/9
    assert preferred(now, torch.tensor([[0.9], [5.0]])).tolist() == [2]  # 1/9 and 1
    assert preferred(now, torch.tensor([[2.0], [9.0]])).tolist() == [
        2
    ]  # judge 0 fell: floored at 0
    assert preferred(now, torch.tensor([[2.0], [11.0]])).tolist() == [
        -1
    ]  # both fell: equal weights, a tie
    assert preferred(now, torch.tensor([[-1.0], [9.0]])).tolist() == [
        0
    ]  # (1 - -1) / |-1| = 2 against 1/9


def test_judges_without_an_opinion_have_no_say():
    flat, bad = torch.full((1, 1, 3), 7.0), torch.tensor([[[1.0, math.nan, 2.0]]])
    liking = torch.tensor([[[0.0, 3.0, 1.0]]])
    assert preferred(torch.cat([flat, liking]), torch.tensor([[1.0], [9.0]])).tolist() == [1]
    assert preferred(torch.cat([bad, liking]), None).tolist() == [1]
    assert preferred(bad, None).tolist() == [-1]


def test_equal_weighting_ignores_the_levels():
    trace = sample(
        Judge(constant), evaluators=(Judge(by_candidate(1.0)), Judge(constant)), adaptive=False
    )
    assert torch.stack(trace.state.weights).eq(9.0).all()


def test_choosing_needs_no_gradient_and_gives_none():
    contract = TestDynamicCFG()
    noise = contract.noise().requires_grad_()
    trace = run(
        DynamicCFG(3.0, candidates=W, evaluators=(Judge(towards(0.3)),)),
        contract.model(),
        contract.scheduler(),
        noise,
        steps=4,
    )
    assert trace.sample.requires_grad
    assert not any(w.requires_grad for w in trace.state.weights)


def test_any_reward_judges_through_a_decoder_and_is_charged():
    meter = Meter()
    prompts = ("a", "bb", "ccc")
    asked = []

    class Length:
        differentiable = False

        def __call__(self, images, given):
            asked.append(list(given))
            return images.mean((1, 2, 3)) * torch.tensor([float(len(p)) for p in given])

    judge = DecodedReward(lambda latents: latents[:, :3].sigmoid(), Length(), prompts, meter)
    trace = sample(judge)
    assert trace.rows == 2 * 8 * 3
    assert (meter.decodes, meter.rewards, meter.rows) == (8 * 15, 8 * 15, 0)
    assert asked[0] == ["a"] * 5 + ["bb"] * 5 + ["ccc"] * 5


def test_settings_with_objects_are_json_and_say_what_is_missing():
    made = DynamicCFG(3.0, evaluators=(Judge(constant), "test-small"))
    config = json.loads(json.dumps(to_config(made)))
    assert config["evaluators"] == ["Judge", "test-small"]
    resolved = made.resolve(Context("P", "sd", "unet", "DDIMScheduler", 5.0, "call", 20))
    assert resolved.evaluators == ("Judge", "test-small")
    assert [type(judge) for judge in resolved.judges] == [Judge, Judge]
    with pytest.raises(ValueError, match="Unknown evaluator 'Judge'"):
        from_config(config).resolve(Context("P", "sd", "unet", "DDIMScheduler", 5.0, "call", 20))


def test_wrong_use_is_explained():
    context = Context("P", "sd", "unet", "DDIMScheduler", 5.0, "call", 20)
    with pytest.raises(ValueError, match="no evaluator to choose with"):
        DynamicCFG(3.0).resolve(context)
    with pytest.raises(ValueError, match=r"Unknown evaluator 'test-smal'\. Nearest: test-small"):
        DynamicCFG(3.0, evaluators=("test-smal",)).resolve(context)
    with pytest.raises(TypeError, match="evaluators"):
        DynamicCFG(3.0, evaluators=(3,))
    with pytest.raises(ValueError, match="candidates"):
        DynamicCFG(3.0, candidates=())
    with pytest.raises(ValueError, match="candidates"):
        DynamicCFG(3.0, candidates=(1.0, math.inf))
    with pytest.raises(ValueError, match="differ"):
        DynamicCFG(3.0, candidates=(1.0, 1.0))
    made = DynamicCFG(3.0, evaluators=(Judge(lambda latents, rows: torch.ones(2)),)).resolve(
        context
    )
    cond = torch.zeros(1, 4)
    step = StepInfo(0, 2, 1.0, convert=lambda value, *_: value)
    with pytest.raises(ValueError, match=r"must score 5 latents .* got \[2\]"):
        made.combine({COND: cond, UNCOND: cond}, step, made.init(1))


def test_candidates_come_from_the_preset_of_the_model():
    pipe = da.load("emoji")
    facts = {
        "pipeline": "StableDiffusionPipeline",
        "family": "sd",
        "denoiser": "unet",
        "scheduler": "DDIMScheduler",
        "scale": 1.5,
    }
    facts |= {"scale_source": "call", "steps": 20}
    context = Context(**facts, module=pipe.unet)
    known = DynamicCFG(evaluators=("test-small",)).resolve(context)
    assert known.candidates == (1.0, 2.0, 2.5, 3.0, 5.0)
    assert "emoji" in context.sources["candidates"]
    context = Context(**facts)
    other = DynamicCFG(evaluators=("test-small",)).resolve(context)
    assert other.candidates == (1.0, 3.0, 7.5, 11.0, 15.0)
    assert "2509.16131" in context.sources["candidates"]


def test_evaluators_are_given_by_name_on_the_command_line():
    one = parse("dynamic-cfg:scale=1.5,evaluators=emoji-alignment,candidates=2")[0]
    assert (one.evaluators, one.candidates) == (("emoji-alignment",), (2.0,))
    two = parse("dynamic-cfg:evaluators=(emoji-alignment,reward:emoji-clip),candidates=(1,2.5)")[0]
    assert (two.evaluators, two.candidates) == (
        ("emoji-alignment", "reward:emoji-clip"),
        (1.0, 2.5),
    )
    with pytest.raises(ValueError, match=r"candidates must be a number; got 'b'"):
        parse("dynamic-cfg:candidates=(1,b)")


def seen_in_a_call(pipe, *args, **options):
    """The context that an evaluator is made with, and the report."""
    contexts = []

    def maker(context):
        contexts.append(context)
        return DecodedReward(
            decoder_of(context),
            lambda images, texts: images.mean((1, 2, 3)),
            context.prompts,
            context.meter,
        )

    EVALUATORS.register("test-context", maker)
    try:
        with da.apply(
            pipe, DynamicCFG(3.0, candidates=(1.0, 3.0), evaluators=("test-context",))
        ) as session:
            pipe(*args, num_inference_steps=2, output_type="latent", **options)
    finally:
        del EVALUATORS.registered["test-context"]
    return contexts[0], session.report()


def test_a_judge_is_made_with_the_prompt_of_every_image():
    pipe = tiny_pipeline("StableDiffusionPipeline", text=True)
    pipe.set_progress_bar_config(disable=True)
    rng = [torch.Generator().manual_seed(i) for i in range(4)]
    context, report = seen_in_a_call(pipe, ["a", "b"], num_images_per_prompt=2, generator=rng)
    assert context.prompts == ("a", "a", "b", "b")
    assert context.pipe is pipe
    assert (report.decodes, report.rewards) == (2 * 4 * 2, 2 * 4 * 2)
    assert seen_in_a_call(pipe, "a", generator=rng[0])[0].prompts == ("a",)
    states = pipe.encode_prompt("a", "cpu", 1, True)
    with pytest.raises(ValueError, match="one prompt per image"):
        seen_in_a_call(
            pipe, prompt_embeds=states[0], negative_prompt_embeds=states[1], generator=rng[0]
        )


def test_the_decoder_is_the_pipelines_own():
    pipe = tiny_pipeline("StableDiffusionPipeline", text=True)
    pipe.vae.register_to_config(shift_factor=0.25)
    context = Context("P", "sd", "unet", "DDIMScheduler", 5.0, "call", 20, pipe=pipe)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + 0.25).sample
        found = decoder_of(context)(latents)
    assert torch.allclose(found, pipe.image_processor.postprocess(plain, output_type="pt"))
    with pytest.raises(UnsupportedModel, match="autoencoder"):
        decoder_of(Context("P", "sd", "unet", "DDIMScheduler", 5.0, "call", 20))
    with pytest.raises(UnsupportedModel, match=r"shape \[2, 16, 64\]"):
        decoder_of(context)(torch.zeros(2, 16, 64))
