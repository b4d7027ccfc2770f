"""The readers of emoji-clip: probabilities by hand, the grammar, the mixture by category."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from diffalign import rewards
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS
from diffalign.rewards.emoji_readers import (
    AWARE,
    EmojiAware,
    EmojiColours,
    EmojiNumbers,
    EmojiObjects,
    tag_of,
)
from diffalign.tasks.geneval.verdict import TAGS

CAT, DOG, RED = OBJECTS.index("cat"), OBJECTS.index("dog"), COLOURS.index("red")


class Known:
    """Logits of our own instead of a network."""

    def __init__(self) -> None:
        self.pairs, self.numbers = torch.full((2, 80, 11), -30.0), torch.zeros(2, 80, 5)

    def read(self, images):
        return self.pairs, self.numbers


@pytest.fixture
def model():
    known = Known()
    known.pairs[0, CAT, RED], known.pairs[0, CAT, 10] = 0.0, math.log(3)
    known.pairs[0, DOG, 10] = math.log(4)
    known.numbers[0, CAT, 2] = math.log(4)
    return known


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def first(reward, prompt: str) -> float:
    return float(reward(IMAGES, [prompt, prompt])[0])


def test_probabilities_by_hand(model):
    # a cat in red with 1/2, in its own colours with 3/4: in some colour with 1 - 1/2 * 1/4
    objects = EmojiObjects(model)
    assert first(objects, "a photo of a cat") == pytest.approx(math.log(7 / 8), abs=1e-6)
    both = math.log(7 / 8) + math.log(4 / 5)
    assert first(objects, "a photo of a cat and a dog") == pytest.approx(both, abs=1e-6)
    colours = EmojiColours(model)
    assert first(colours, "a photo of a red cat") == pytest.approx(math.log(1 / 2), abs=1e-6)
    assert first(colours, "a photo of a cat") == 0.0
    # four times as likely as each of the four other numbers
    numbers = EmojiNumbers(model)
    assert first(numbers, "a photo of two cats") == pytest.approx(math.log(4 / 8), abs=1e-6)
    assert first(numbers, "a photo of a cat") == pytest.approx(math.log(1 / 8), abs=1e-6)
    assert float(numbers.unit(torch.tensor(math.log(0.25)))) == pytest.approx(0.25)


def test_what_is_surely_there_or_not_has_a_gradient(model):
    model.pairs = (model.pairs - 100).requires_grad_()
    score = EmojiObjects(model)(IMAGES, ["a photo of a cat"] * 2)
    (gradient,) = torch.autograd.grad(score.sum(), model.pairs)
    assert bool(score.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_prompts_that_they_do_not_know(model):
    with pytest.raises(ValueError, match="emoji-objects: prompts must be in GenEval's grammar"):
        EmojiObjects(model)(IMAGES, ["a poem"] * 2)
    with pytest.raises(ValueError, match="counts to 4; the prompt asks for 5 of 'cat'"):
        EmojiNumbers(model)(IMAGES, ["a photo of five cats"] * 2)
    with pytest.raises(ValueError, match="emoji-aware: prompts must be"):
        tag_of("a poem")
    assert tag_of("a photo of two cats") == {"counting": 1.0}


def test_weights_are_those_that_were_measured():
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "ratings.json"
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(AWARE) == list(TAGS) == list(rows)
    for tag, weights in AWARE.items():
        columns = [v for key, v in rows[tag].items() if key.endswith(", weight")]
        assert list(weights) == columns
        assert sum(weights) == pytest.approx(5.0, abs=0.03)


@pytest.fixture(scope="module")
def aware():
    return rewards.load("emoji-aware")


def test_the_mixture_is_the_sum_of_its_parts(aware):
    assert isinstance(aware, EmojiAware)
    prompts = ["a photo of a red cat", "a photo of two dogs"]
    with torch.no_grad():
        total = aware(IMAGES, prompts)
        for place, prompt in enumerate(prompts):
            parts = aware.parts_of(prompt)
            assert 1 <= len(parts) <= 5
            assert all(weight > 0 for weight, _ in parts)
            row = IMAGES[place : place + 1]
            expected = sum(weight * float(part(row, [prompt])) for weight, part in parts)
            assert float(total[place]) == pytest.approx(expected, abs=1e-5)


def test_the_mixture_in_float64_batches_as_singles_and_has_the_right_slope(aware):
    """Central differences along one direction."""
    prompt, images = "a photo of a red cat", IMAGES[:1].clone().requires_grad_()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    (gradient,) = torch.autograd.grad(aware(images, [prompt]).sum(), images)
    slope, step = float((gradient * direction).sum()), 2e-2
    with torch.no_grad():
        ends = [aware(images + sign * step * direction, [prompt]) for sign in (1, -1)]
        alone = torch.cat([aware(IMAGES[i : i + 1], [prompt]) for i in (0, 1)])
        assert torch.allclose(aware(IMAGES, [prompt] * 2), alone, atol=1e-5)
    assert slope == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=0.05, abs=1e-4)
