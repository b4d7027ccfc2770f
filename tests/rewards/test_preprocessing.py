"""Resizing against Pillow, and the three fits against each other and by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.rewards.preprocessing import MEAN, STD, fitted, normalised, resized


def pictures(height, width):
    rng = np.random.default_rng(4)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    picture = small.resize((width, height), Image.Resampling.BILINEAR)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double() / 255
    return picture, tensor


@pytest.mark.parametrize(("height", "width"), [(96, 64), (48, 72)])
def test_resizing_is_pillows(height, width):
    picture, tensor = pictures(height, width)
    expected = np.array(picture.resize((28, 42), Image.Resampling.BICUBIC)) / 255
    result = resized(tensor, 42, 28)[0].permute(1, 2, 0).numpy()
    # Pillow rounds to 8 bits after each of two passes: one level, and the half of a rounding
    assert np.abs(result - expected).max() < 1.5 / 255


def test_crop_is_clip_processors():
    from transformers import CLIPImageProcessor

    picture, tensor = pictures(75, 50)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    expected = processor(picture, return_tensors="pt")["pixel_values"].double()
    result = normalised(fitted(tensor, 28, "crop"))
    # one level of 8 bits in units of the smallest standard deviation
    assert float((result - expected).abs().max()) < 1.5 / 255 / min(STD)


def test_fits_differ_on_a_rectangle_and_agree_on_a_square():
    _, wide = pictures(40, 60)
    _, square = pictures(60, 60)
    results = [fitted(wide, 28, fit) for fit in ("crop", "pad", "squash")]
    assert all(result.shape == (1, 3, 28, 28) for result in results)
    assert min(float((a - b).abs().max()) for a, b in pairwise(results)) > 0.05
    same = [fitted(square, 28, fit) for fit in ("crop", "pad", "squash")]
    assert all(torch.equal(same[0], other) for other in same[1:])


def test_pad_is_black_and_even():
    image = torch.full((1, 3, 10, 20), 0.5)
    result = fitted(image, 20, "pad")
    assert torch.equal(result[..., 5:15, :], image)
    assert float(result[..., :5, :].abs().sum() + result[..., 15:, :].abs().sum()) == 0


def test_an_image_of_the_right_size_is_untouched_and_a_clamp_lets_gradients_through():
    image = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    assert fitted(image, 28, "crop") is not None
    assert torch.equal(fitted(image, 28, "squash"), image)
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1.0
    edge.requires_grad_()
    result = resized(edge, 17, 17)
    assert float(result.detach().min()) >= 0
    assert float(result.detach().max()) <= 1 + 1e-6
    result.sum().backward()
    assert float(edge.grad.min()) > 0


def test_normalising():
    image = torch.ones(1, 3, 2, 2)
    expected = [(1 - m) / s for m, s in zip(MEAN, STD)]
    assert normalised(image)[0, :, 0, 0].tolist() == pytest.approx(expected)
