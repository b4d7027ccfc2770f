"""A weighted sum of rewards on their own scales."""

import pytest
import torch

from diffalign.rewards import Scale, Weighted, load
from diffalign.rewards.weighted import load_sum


class Channel:
    differentiable = True

    def __init__(self, index):
        self.index = index
        self.name = "rgb"[index]

    def __call__(self, images, prompts):
        return images[:, self.index].mean((1, 2))


IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a dog"] * 4


def test_it_is_the_weighted_sum():
    reward = Weighted([(Channel(0), 2.0), (Channel(1), -1.0)])
    expected = 2 * IMAGES[:, 0].mean((1, 2)) - IMAGES[:, 1].mean((1, 2))
    assert torch.allclose(reward(IMAGES, PROMPTS), expected)
    assert reward.name == "2 r+-1 g"
    assert reward.differentiable


def test_scales_make_standard_deviations():
    scores = Channel(2)(IMAGES, PROMPTS)
    reward = Weighted([(Channel(2), 1.0)], [Scale.of(scores)])
    values = reward(IMAGES, PROMPTS)
    assert float(values.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(values.std()) == pytest.approx(1.0, abs=1e-5)


def test_gradients_pass():
    images = IMAGES.clone().requires_grad_()
    Weighted([(Channel(0), 2.0), (Channel(1), -1.0)])(images, PROMPTS).sum().backward()
    means = images.grad.sum((2, 3))[0]
    assert means.tolist() == pytest.approx([2.0, -1.0, 0.0])


def test_names_are_loaded():
    assert Weighted({"emoji-clip": 0.5}).name == "0.5 emoji-clip"


@pytest.mark.parametrize(
    ("rewards", "scales", "text"),
    [
        ([], None, "at least one reward"),
        ([(Channel(0), 1.0)], [Scale(), Scale()], "one for each of 1 rewards; got 2"),
        ([(Channel(0), float("nan"))], None, "finite weights"),
        ([(Channel(0), 1.0)], [Scale(0.0, 0.0)], "std above 0"),
    ],
)
def test_bad_input(rewards, scales, text):
    with pytest.raises(ValueError, match=text):
        Weighted(rewards, scales)


def test_a_scale_needs_scores_that_differ():
    with pytest.raises(ValueError, match="two scores that differ"):
        Scale.of(torch.tensor([1.0, 1.0]))


def test_a_sum_as_text():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    parts = [load(name)(images, ["x"] * 3) for name in ("brightness", "redness", "jpeg-size")]
    reward = load_sum("2*brightness+redness + 0.5*jpeg-size:quality=80")
    other = load("jpeg-size:quality=80")(images, ["x"] * 3)
    expected = 2 * parts[0] + parts[1] + 0.5 * other
    assert torch.allclose(reward(images, ["x"] * 3), expected)
    assert torch.allclose(load_sum("-1*redness")(images, ["x"] * 3), -parts[1])
    assert load_sum("brightness").name == "brightness"
    for text, words in (
        ("brightness+rednes", "Unknown reward 'rednes'"),
        ("0*brightness+redness", "weight 0"),
        ("brightness+2", "brightness"),
        ("2*", "Unknown reward"),
    ):
        with pytest.raises(ValueError, match=words):
            load_sum(text)
