"""A searched policy: against brute force on a short schedule, its cost against the meter, and its
trials against a search that was stopped."""

import dataclasses

import pytest
import torch

import diffalign as da
from diffalign.calibration import policy as module
from diffalign.calibration.policy import check_policy, most_trials, search_policy
from diffalign.testing.tiny import tiny_pipeline

PROMPTS = ["a red apple", "two cats", "a bench", "a green clock and a dog"]
CALL = {"scale": 3.0, "steps": 4, "batch": 2, "seed": 5}


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline("StableDiffusionPipeline", text=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_one_step_less_is_the_best_of_all_steps(pipe):
    """Only one choice of guided steps is made, so it must be the best of all of them."""
    known = {}
    found = search_policy(pipe, PROMPTS, nfe=7, factors=(), known=known, **CALL)
    assert sorted(found.shares) == [0, 1, 1, 1]
    assert len(known) == found.trials == most_trials(4, 7, ()) == 4
    assert known[found.shares] == min(known.values()) == found.error_seen


@pytest.mark.slow
def test_errors_are_those_of_plain_calls(pipe):
    found = search_policy(pipe, PROMPTS, nfe=6, **CALL)
    assert found.nfe == 6
    assert 0 < found.error < found.unguided
    jobs = module.jobs_of(PROMPTS, base=5)[2:]

    def latents(*techniques, scale):
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        with da.apply(pipe, *techniques) as session:
            result = pipe(
                [job.prompt for job in jobs],
                num_inference_steps=4,
                guidance_scale=scale,
                generator=generators,
                output_type="latent",
            )[0]
        return result, session.report()

    plain, _ = latents(scale=3.0)
    ours, report = latents(found.technique, scale=3.0)
    assert report.nfe == 6
    assert found.error == pytest.approx(float((ours - plain).square().mean()), rel=1e-5)
    unguided, _ = latents(scale=1.0)
    assert found.unguided == pytest.approx(float((unguided - plain).square().mean()), rel=1e-4)


@pytest.mark.slow
def test_weights_move_only_where_that_helps(pipe):
    fixed = search_policy(pipe, PROMPTS, nfe=6, factors=(), **CALL)
    moved = search_policy(pipe, PROMPTS, nfe=6, **CALL)
    assert moved.error_seen <= fixed.error_seen
    assert [bool(share) for share in moved.shares] == [bool(share) for share in fixed.shares]
    choices = {1.0, *module.FACTORS}
    assert set(moved.shares) - {0.0} <= choices


def test_a_stopped_search_goes_on(pipe):
    known = {}
    calls = []

    def stop():
        calls.append(1)
        if len(calls) > 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_policy(pipe, PROMPTS, nfe=7, factors=(), known=known, step=stop, **CALL)
    tried = len(known)
    assert tried
    found = search_policy(pipe, PROMPTS, nfe=7, factors=(), known=known, **CALL)
    assert found.trials == 4 - tried
    whole = search_policy(pipe, PROMPTS, nfe=7, factors=(), **CALL)
    assert found == dataclasses.replace(whole, trials=found.trials)


@pytest.mark.parametrize(
    ("nfe", "order", "words"),
    [(4, 1, "above 4"), (8, 1, "below 8"), (6, 2, "one evaluation a step")],
)
def test_what_leaves_nothing_to_search_is_refused(nfe, order, words):
    with pytest.raises(ValueError, match=words):
        check_policy(nfe, 4, order)


def test_shares_serve_their_number_of_steps_only(pipe):
    technique = da.ScheduledCFG(3.0, shape="steps", shares=(1.0, 0.0, 1.0))
    with (
        da.apply(pipe, technique),
        pytest.raises(da.UnsupportedModel, match="its 3 shares are for 3 steps"),
    ):
        pipe("a cat", num_inference_steps=4)
    for wrong in ({"shape": "steps"}, {"shape": "linear", "shares": (1.0,)}):
        with pytest.raises(ValueError, match="belong together"):
            da.ScheduledCFG(3.0, **wrong)
