"""Rewards by name, the smooth verdict against GenEval's rules and hand numbers, and gradients
against finite differences in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from diffalign import rewards
from diffalign.core import Reward as RewardProtocol
from diffalign.embedded.nets.clip import Clip, build_clip
from diffalign.embedded.nets.judge import Judge, JudgeNet, Maps
from diffalign.embedded.world.editions import FIRST, SECOND, Edition
from diffalign.embedded.world.scenes import World
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS
from diffalign.rewards.emoji_clip import EmojiClip
from diffalign.rewards.emoji_judge import SHARP, EmojiJudge, peaks, soft_relation, soft_verdict
from diffalign.tasks.geneval.verdict import Thresholds, parse_prompt, relations


@pytest.fixture(autouse=True)
def one_thread():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert torch.equal(state, torch.get_rng_state()), (
        "library code must not touch the global generator"
    )


class Words:
    """A tokenizer of eight words, enough for an untrained model."""

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [[0, *(2 + len(word) % 8 for word in text.split()[:20]), 1] for text in texts]
        return torch.tensor([row + [1] * (24 - len(row)) for row in rows])


def clip() -> EmojiClip:
    model, heads = build_clip(16, 3)
    return EmojiClip(Clip(model, Words(), heads))


def judge() -> EmojiJudge:
    return EmojiJudge(Judge(JudgeNet(seed=3), Thresholds()))


def test_names() -> None:
    assert {info.name for info in rewards.available()} >= {"emoji-clip", "emoji-judge"}
    assert all(
        info.differentiable and info.description
        for info in rewards.available()
        if info.name.startswith("emoji") and info.name != "emoji-story"
    )
    with pytest.raises(ValueError, match=r"'emoji-clap'\. Nearest: emoji-clip"):
        rewards.load("emoji-clap")
    assert isinstance(clip(), RewardProtocol)
    assert isinstance(judge(), rewards.BaseReward)


@pytest.mark.parametrize("make", [clip, judge])
def test_arguments_are_checked(make) -> None:
    reward, images = make(), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with pytest.raises(TypeError, match="one string"):
        reward(images, "a photo of a dog")
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        reward(images, ["a photo of a dog"])
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        reward(images[0], ["a photo of a dog"])
    with pytest.raises(ValueError, match="Divide uint8"):
        reward((images * 255).byte(), ["a photo of a dog"] * 2)


@pytest.mark.parametrize("make", [clip, judge])
def test_rows_are_independent_and_sizes_free(make) -> None:
    reward, images = make(), torch.rand(3, 3, 96, 80, generator=torch.Generator().manual_seed(2))
    prompts = ["a photo of a dog", "a photo of two cats", "a photo of a red car left of a blue bus"]
    if isinstance(reward, EmojiJudge):
        prompts[2] = "a photo of a red car and a blue bus"
    together = reward(images, prompts)
    assert together.shape == (3,)
    for i in range(3):
        # Batch composition changes the last bits of float32 sums only.
        assert float(reward(images[i : i + 1], prompts[i : i + 1])) == pytest.approx(
            float(together[i]), rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize("make", [clip, judge])
def test_gradients_equal_finite_differences(make) -> None:
    reward = make()
    (reward.model.model if isinstance(reward, EmojiClip) else reward.judge.net).double()
    rng = torch.Generator().manual_seed(4)
    images = torch.rand(1, 3, 64, 64, generator=rng, dtype=torch.float64)
    prompt = ["a photo of a dog left of a cat"]
    images.requires_grad_(True)
    score = reward(images, prompt)
    score.sum().backward()
    gradient = images.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().sum()) > 0
    step = 1e-7
    for y, x in ((20, 20), (33, 40), (10, 52)):
        # A 2 x 2 patch along a fixed direction; central differences err by 2**-52 * |score| / step
        # (2e-8), and in proportion to the step where a rectifier switches in between.
        way = torch.zeros_like(images)
        way[0, :, y : y + 2, x : x + 2] = torch.randn(3, 2, 2, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            slope = float(
                reward(images + step * way, prompt) - reward(images - step * way, prompt)
            ) / (2 * step)
        assert slope == pytest.approx(float((gradient * way).sum()), rel=1e-4, abs=1e-7)


def test_the_judge_has_no_opinion_on_free_text() -> None:
    with pytest.raises(ValueError, match="GenEval's grammar"):
        judge()(torch.zeros(1, 3, 64, 64), ["a serene landscape"])


def test_peaks_by_hand() -> None:
    heat = torch.zeros(16, 16)
    heat[3, 4], heat[3, 5], heat[3, 7], heat[10, 0] = 9.0, 8.0, 5.0, 6.0
    y, x = peaks(heat, 3)
    assert list(zip(y.tolist(), x.tolist(), strict=True)) == [
        (3, 4),
        (10, 0),
        (3, 7),
    ]  # (3, 5) belongs to the first
    assert len(peaks(torch.rand(16, 16, generator=torch.Generator().manual_seed(1)), 11)[0]) == 11


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_the_smooth_relation_flips_where_the_rule_does(relation: str) -> None:
    rng, half = torch.Generator().manual_seed(6), math.log(0.5)
    seen = set()
    for _ in range(400):
        a, b = (
            torch.cat([torch.rand(2, generator=rng), 0.1 + torch.rand(2, generator=rng)]).double()
            for _ in range(2)
        )
        edges = [
            (
                float(v[0] - v[2] / 2),
                float(v[1] - v[3] / 2),
                float(v[0] + v[2] / 2),
                float(v[1] + v[3] / 2),
            )
            for v in (a, b)
        ]
        holds = relation in relations(edges[0], edges[1])
        assert (float(soft_relation(a, b, relation)) > half) == holds
        seen.add(holds)
    assert seen == {True, False}


def maps_with(*objects: tuple[str, int, int, float, str]) -> Maps:
    """Maps that hold the given objects (class, row, column, logit, colour) of half the image's
    side."""
    heat, box, colour = (
        torch.full((1, 80, 16, 16), -7.0),
        torch.zeros(1, 4, 16, 16),
        torch.zeros(1, 11, 16, 16),
    )
    box[:, 2:] = 1.0
    for name, y, x, logit, tint in objects:
        heat[0, OBJECTS.index(name), y, x] = logit
        colour[0, COLOURS.index(tint), y, x] = 2.0
    return Maps(heat, box, colour)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_the_smooth_verdict_by_hand() -> None:
    maps = maps_with(
        ("dog", 4, 4, 3.0, "red"), ("cat", 4, 12, 2.0, "blue"), ("dog", 12, 4, 1.0, "red")
    )
    tint = 2 - math.log(math.exp(2) + 9)  # log softmax over ten colours

    def score(prompt: str) -> float:
        record = parse_prompt(prompt)
        assert record is not None
        return float(soft_verdict(maps, 0, record))

    assert score("a photo of a dog") == pytest.approx(log_sigmoid(3))
    assert score("a photo of a red dog") == pytest.approx(log_sigmoid(3) + tint)
    assert score("a photo of a red dog and a blue cat") == pytest.approx(
        log_sigmoid(3) + log_sigmoid(2) + 2 * tint
    )
    assert score("a photo of two dogs") == pytest.approx(
        log_sigmoid(3) + log_sigmoid(1) + log_sigmoid(7)
    )
    assert score("a photo of three dogs") == pytest.approx(
        log_sigmoid(3) + log_sigmoid(1) + log_sigmoid(-7) + log_sigmoid(7)
    )
    # Centres one unit apart, both of size 1: shrunk by .1 * 2 to .8, so .3 beyond the border of .5.
    beyond = score("a photo of a dog left of a cat") - log_sigmoid(3) - log_sigmoid(2)
    assert beyond == pytest.approx(log_sigmoid(SHARP * 0.3), abs=1e-5)
    assert score("a photo of a dog right of a cat") == pytest.approx(
        log_sigmoid(3) + log_sigmoid(2) + log_sigmoid(SHARP * -1.3), abs=1e-4
    )


@pytest.mark.parametrize(
    ("name", "edition"), [("emoji-clip", FIRST), ("emoji-judge", FIRST), ("emoji-clip-2", SECOND)]
)
def test_shipped_rewards_prefer_the_true_prompt_and_their_gradient_improves_a_picture(
    name: str, edition: Edition
) -> None:
    """On 64 held-out scenes with a wrong prompt each the true prompt wins; both rewards have a rate
    above .9 there, so that fewer than 48 wins have a chance below one in ten thousand (binomial). A
    small step along the gradient then raises the score of most pictures."""
    reward = rewards.load(name)
    found = list(World(edition=edition).wrong(1_000_700, 64))
    images = (
        torch.from_numpy(np.stack([scene.image for scene, _ in found])).permute(0, 3, 1, 2).float()
        / 255
    )
    true = [scene.metadata()["prompt"] for scene, _ in found]
    wrong = [record["prompt"] for _, record in found]
    with torch.no_grad():
        assert int((reward(images, true) > reward(images, wrong)).sum()) >= binom.ppf(1e-4, 64, 0.9)
    images.requires_grad_(True)
    before = reward(images, wrong)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    assert bool(gradient.isfinite().all())
    norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    with torch.no_grad():
        after = reward(images + 0.05 * gradient / norm, wrong)
    assert int((after > before).sum()) >= 60
