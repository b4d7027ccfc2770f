"""LinearAG: the fit against numpy's least squares and exact combinations, the technique against
hand-run sampling, refusals."""

import dataclasses

import numpy as np
import pytest
import torch

import diffalign as da
from diffalign.calibration.linear import Gram, fit_linear_ag, solve
from diffalign.core import UnsupportedModel
from diffalign.guidance.linear_ag import LinearAG
from diffalign.guidance.linear_policy import LinearPolicy, default_plan, policy_at
from diffalign.testing.final import final
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SD = "StableDiffusionPipeline"
PROMPTS = [
    "a red apple",
    "two cats",
    "a bench",
    "a green clock and a dog",
    "a photo of a car",
    "three cups",
]


def vectors(steps=6, rows=5, n=40, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, steps, n, generator=rng, dtype=torch.float64) for _ in range(2)]


def test_fit_is_least_squares():
    """Against numpy's solver on the stacked data; only one estimated step, so no estimate stands in
    for anything."""
    cond, uncond = vectors()
    gram = Gram()
    gram.add(cond[:2], uncond[:2], (40,))
    gram.add(cond[2:], uncond[2:], (40,))
    plan = ("guided", "guided", "guided", "estimated", "conditional", "conditional")
    weights, r2, gain = solve(gram.products, gram.sums, gram.size, plan, ridge=0.0)
    features = torch.cat([cond[:, :4], uncond[:, :3]], dim=1).movedim(1, 2).reshape(-1, 7).numpy()
    target = uncond[:, 3].reshape(-1).numpy()
    expected, residual, *_ = np.linalg.lstsq(features, target, rcond=None)
    np.testing.assert_allclose(weights[3].numpy(), expected, rtol=1e-9, atol=1e-12)
    assert r2[3] == pytest.approx(1 - residual[0] / ((target - target.mean()) ** 2).sum(), rel=1e-9)
    assert gain[3] == pytest.approx(
        1 - residual[0] / ((target - cond[:, 3].reshape(-1).numpy()) ** 2).sum(), rel=1e-9
    )


def test_an_exact_combination_is_found_and_estimates_stand_in():
    """e_n(1) and e_n(3) are exact combinations; the second one uses e_n(1), which sampling will
    only have as an estimate."""
    cond, uncond = vectors()
    uncond[:, 1] = 0.5 * cond[:, 0] - 0.2 * cond[:, 1] + 0.7 * uncond[:, 0]
    uncond[:, 3] = 1.5 * uncond[:, 1] - cond[:, 3]
    gram = Gram()
    gram.add(cond, uncond, (40,))
    weights, r2, gain = solve(
        gram.products,
        gram.sums,
        gram.size,
        (*default_plan(6)[:3], "estimated", "conditional", "conditional"),
        1e-12,
    )
    torch.testing.assert_close(
        weights[1], torch.tensor([0.5, -0.2, 0.7], dtype=torch.float64), rtol=1e-6, atol=1e-8
    )
    assert min(*r2.values(), *gain.values()) > 1 - 1e-8
    estimate = torch.einsum("k,bkn->bn", weights[3], torch.cat([cond[:, :4], uncond[:, :3]], dim=1))
    torch.testing.assert_close(estimate, uncond[:, 3], rtol=1e-5, atol=1e-5)


def test_default_plan_is_the_papers_cost():
    plan = default_plan(20)
    assert sum(2 if mode == "guided" else 1 for mode in plan) == 25
    assert plan[:3] == ("guided", "estimated", "guided")
    assert set(plan[10:]) == {"conditional"}


@pytest.fixture
def pipe():
    return tiny_pipeline(SD, text=True)


@pytest.fixture(scope="module")
def fitted():
    """A policy of the tiny pipeline, whose weights are the same each time it is made."""
    return fit_linear_ag(tiny_pipeline(SD, text=True), PROMPTS, scale=3.0, steps=8, batch=4)


@pytest.fixture
def policy(fitted, tmp_path):
    fitted.save(tmp_path / "policy")
    return fitted, str(tmp_path / "policy")


def call(steps=8, **more):
    given = tiny_inputs(SD, text=True, batch=2, steps=steps)
    return {
        **{k: v for k, v in given.items() if k not in ("negative_prompt", "guidance_scale")},
        **more,
    }


def test_files_round_trip(policy):
    made, path = policy
    read = LinearPolicy.load(path)
    assert dataclasses.replace(read, coefficients={}) == dataclasses.replace(made, coefficients={})
    assert all(torch.equal(read.coefficients[i], made.coefficients[i]) for i in made.coefficients)
    assert made.trajectories == len(PROMPTS)
    assert set(made.coefficients) == {1, 3}


def test_costs_what_the_plan_says_and_starts_as_cfg(pipe, policy):
    _, path = policy
    with da.apply(pipe, LinearAG(policy=path)) as session:
        got = final(pipe, call())
    report = session.report()
    assert report.nfe == 8 + 2
    assert report.guided_steps == 2
    with da.apply(pipe, da.CFG(3.0)):
        full = final(pipe, call())
    with da.apply(pipe, da.CFG(1.0)):
        plain = final(pipe, call())
    assert (got - full).norm() < (plain - full).norm()


def test_a_policy_without_estimates_is_interval_guidance(pipe, policy, tmp_path):
    made, _ = policy
    plain = dataclasses.replace(
        made,
        plan=("guided",) * 4 + ("conditional",) * 4,
        coefficients={0: torch.zeros(1, dtype=torch.float64)},
    )
    plain.save(tmp_path / "half")
    with da.apply(pipe, LinearAG(policy=str(tmp_path / "half"))):
        got = final(pipe, call())
    with da.apply(pipe, da.IntervalCFG(3.0, start=0.0, stop=0.5)):
        assert torch.equal(final(pipe, call()), got)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 6}, "steps: fitted 8, here 6"),
        ({"negative_prompt": ["blurry", "blurry"]}, "negative_prompt: fitted '', here 'blurry'"),
    ],
)
def test_another_call_is_refused_with_both_identities(pipe, policy, change, said):
    with da.apply(pipe, LinearAG(policy=policy[1])), pytest.raises(UnsupportedModel, match=said):
        final(
            pipe,
            {**call(**({"steps": change.pop("steps")} if "steps" in change else {})), **change},
        )


def test_another_model_or_scheduler_is_refused(pipe, policy):
    from diffusers import EulerDiscreteScheduler

    other = tiny_pipeline(SD, text=True, seed=1)
    with (
        da.apply(other, LinearAG(policy=policy[1])),
        pytest.raises(UnsupportedModel, match="model: fitted"),
    ):
        final(other, call())
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with (
        da.apply(pipe, LinearAG(policy=policy[1])),
        pytest.raises(UnsupportedModel, match="scheduler: fitted"),
    ):
        final(pipe, call())


def test_the_scale_of_the_call_must_be_the_policys(pipe, policy):
    made = LinearAG(policy=policy[1])
    with (
        da.apply(pipe, made),
        pytest.raises(UnsupportedModel, match=r"scale: fitted 3\.0, here 5\.0"),
    ):
        final(pipe, call(guidance_scale=5.0))
    with (
        pytest.raises(UnsupportedModel, match=r"scale: fitted 3\.0, here 2\.0"),
        da.apply(pipe, LinearAG(2.0, policy=policy[1])),
    ):
        final(pipe, call())
    with da.apply(pipe, made) as session:
        final(pipe, call(guidance_scale=3.0))
    assert session.report().resolved["linear-ag"]["scale"] == (3.0, "the policy")


def test_a_policy_written_again_is_read_again(pipe, policy):
    made, path = policy
    with da.apply(pipe, LinearAG(policy=path)) as session:
        final(pipe, call())
        dataclasses.replace(made, plan=("guided",) * 3 + made.plan[3:]).save(path)
        final(pipe, call())
    assert session.report().guided_steps == 3


def test_a_name_with_a_dot_and_either_suffix(policy, tmp_path):
    made, _ = policy
    made.save(tmp_path / "w1.5")
    made.save(tmp_path / "w1.6.json")
    assert {p.name for p in tmp_path.glob("w*")} == {
        f"w1.{i}.{suffix}" for i in (5, 6) for suffix in ("json", "safetensors")
    }
    for name in ("w1.5", "w1.5.json", "w1.6.safetensors"):
        assert LinearPolicy.load(tmp_path / name).identity == made.identity


def test_a_policy_is_written_whole_or_not_at_all(policy, tmp_path, monkeypatch):
    made, _ = policy
    monkeypatch.setattr(
        "diffalign.guidance.linear_policy.save",
        lambda tensors: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        made.save(tmp_path / "half")
    assert not list(tmp_path.glob("half*"))


def test_fit_needs_guidance_steps_and_one_evaluation_per_step(pipe, monkeypatch):
    from diffusers import HeunDiscreteScheduler

    monkeypatch.setattr(type(pipe.unet), "forward", lambda *a, **k: pytest.fail("computed"))
    with pytest.raises(UnsupportedModel, match="nothing to fit"):
        fit_linear_ag(pipe, PROMPTS, scale=1.0, steps=8)
    with pytest.raises(UnsupportedModel, match="at least 4"):
        fit_linear_ag(pipe, PROMPTS, scale=3.0, steps=3)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UnsupportedModel, match="HeunDiscreteScheduler takes 2"):
        fit_linear_ag(pipe, PROMPTS, scale=3.0, steps=8)


def test_without_a_policy_the_tiny_model_has_none(pipe):
    with (
        da.apply(pipe, LinearAG()),
        pytest.raises(
            UnsupportedModel,
            match=r"no shipped policy \(emoji-20, emoji-50\) fits.*8 steps.*fit linear",
        ),
    ):
        final(pipe, call())


@pytest.fixture(scope="module")
def emoji():
    made = da.load("emoji")
    made.set_progress_bar_config(disable=True)
    return made


def sample(pipe, technique, steps, **more):
    with da.apply(pipe, technique) as session:
        rng = torch.Generator().manual_seed(0)
        images = pipe(
            "a photo of a red apple",
            num_inference_steps=steps,
            generator=rng,
            output_type="latent",
            **more,
        ).images
    return images, session.report()


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "nfe"), [(20, 25), (50, 63)])
def test_shipped_policies_are_found_and_cost_what_the_paper_says(emoji, steps, nfe):
    """Half the steps alternate between two evaluations and one, the rest take one: 5 + 20 and 13 +
    50."""
    named, report = sample(emoji, LinearAG(policy=f"emoji-{steps}"), steps)
    assert (report.nfe, report.resolved["linear-ag"]["scale"][0]) == (nfe, 3.0)
    found, report = sample(emoji, LinearAG(), steps, guidance_scale=3.0)
    assert report.nfe == nfe
    assert report.resolved["linear-ag"]["policy"] == (f"emoji-{steps}", "shipped")
    assert torch.equal(named, found)
    assert policy_at(f"emoji-{steps}").trajectories == 200


@pytest.mark.slow
def test_a_shipped_policy_estimates_and_does_not_only_leave_out(emoji):
    """Nearer to plain guidance than as many guided steps at the start without the estimates, and
    those nearer than none."""
    full, _ = sample(emoji, da.CFG(3.0), 20)
    ours, _ = sample(emoji, LinearAG(policy="emoji-20"), 20)
    none, _ = sample(emoji, da.CFG(1.0), 20)
    half, _ = sample(
        emoji, da.IntervalCFG(3.0, stop=0.25), 20
    )  # 25 evaluations as well: the first five steps guided
    assert (ours - full).norm() < (half - full).norm() < (none - full).norm()


def test_a_shipped_policy_refuses_another_scheduler_with_both_named():
    from diffusers import EulerDiscreteScheduler

    emoji = da.load("emoji")
    emoji.scheduler = EulerDiscreteScheduler.from_config(emoji.scheduler.config)
    with pytest.raises(
        UnsupportedModel, match="scheduler: fitted 'DDIMScheduler', here 'EulerDiscreteScheduler'"
    ):
        sample(emoji, LinearAG(policy="emoji-20"), 20)
    with pytest.raises(
        UnsupportedModel, match=r"no shipped policy .*EulerDiscreteScheduler, 20 steps"
    ):
        sample(emoji, LinearAG(), 20)


def test_bad_arguments():
    with pytest.raises(ValueError, match="path or name"):
        LinearAG(policy="")
    with pytest.raises(ValueError, match=r"nothing\.json and nothing\.safetensors"):
        LinearAG(policy="nothing").passes(da.core.StepInfo(0, 8, 1.0), None)
    with pytest.raises(ValueError, match="guided first"):
        fit_linear_ag(None, PROMPTS, scale=3.0, steps=2, plan=("estimated", "guided"))
    with pytest.raises(ValueError, match="only conditional ones after"):
        fit_linear_ag(
            None, PROMPTS, scale=3.0, steps=4, plan=("guided", "estimated", "conditional", "guided")
        )
