"""Measures without a network: pixels, frames of a video, text that can be read."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffalign.rewards import HeldOut, Scale, Weighted, load
from diffalign.rewards.ocr_text import OCRText, distance, target_of
from diffalign.rewards.video import for_videos

RNG = torch.Generator().manual_seed(4)
IMAGES = torch.rand(2, 3, 24, 32, generator=RNG)
PROMPTS = ["a dog", "a cat"]


def test_brightness_and_redness():
    image = torch.zeros(1, 3, 4, 4)
    image[:, 0] = 0.8
    image[:, 1] = 0.2
    assert float(load("redness")(image, ["x"])) == pytest.approx(0.7)
    assert float(load("brightness")(image, ["x"])) == pytest.approx(1 / 3)
    assert float(load("redness").unit(torch.tensor(-1.0))) == 0.0
    leaf = image.clone().requires_grad_()
    load("redness")(leaf, ["x"]).sum().backward()
    assert leaf.grad.sum((0, 2, 3)).tolist() == pytest.approx([1.0, -0.5, -0.5])


def test_jpeg_size_is_that_of_pillow():
    scores = load("jpeg-size", quality=80)(IMAGES, PROMPTS)
    sizes = []
    for image in IMAGES:
        file = io.BytesIO()
        levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(file, format="JPEG", quality=80)
        sizes.append(-len(file.getvalue()) / 1000)
    assert scores.tolist() == pytest.approx(sizes)
    flat = load("jpeg-size")(torch.full((1, 3, 24, 32), 0.5), ["x"])
    assert float(flat) > float(scores.max())
    large = load("jpeg-size", quality=80, sign=1)(IMAGES, PROMPTS)
    assert torch.equal(large, -scores)
    assert not load("jpeg-size").differentiable
    with pytest.raises(ValueError, match="quality from 1 to 95"):
        load("jpeg-size", quality=0)


VIDEO = torch.rand(2, 6, 3, 8, 8, generator=RNG, dtype=torch.float64)


def test_frames_of_a_video():
    brightness = VIDEO.mean((2, 3, 4))
    for take, expected in (
        ("mean", brightness.mean(1)),
        ("min", brightness.min(1).values),
        ("first", brightness[:, 0]),
        ("last", brightness[:, -1]),
        ("middle", brightness[:, 3]),
        ("stages", brightness[:, [0, 3, 5]].mean(1)),
    ):
        reward = load("frames", reward="brightness", take=take)
        assert torch.allclose(reward(VIDEO, PROMPTS), expected)
        assert reward.name == f"{take}(brightness)"
    some = load("frames", reward="brightness", frames=3)
    assert torch.allclose(some(VIDEO, PROMPTS), brightness[:, [0, 2, 5]].mean(1))
    one = load("frames", reward="brightness", frames=1)
    assert torch.allclose(one(VIDEO, PROMPTS), brightness[:, 3])
    assert torch.allclose(one(VIDEO[:, 0], PROMPTS), brightness[:, 0])


def test_each_frame_gets_the_prompt_of_its_video():
    seen = []

    class Spy:
        differentiable, name = False, "spy"

        def __call__(self, images, prompts):
            seen.extend(prompts)
            return images.mean((1, 2, 3))

    load("frames", reward=Spy(), frames=2)(VIDEO, PROMPTS)
    assert seen == ["a dog", "a dog", "a cat", "a cat"]


def test_gradients_reach_every_scored_frame():
    leaf = VIDEO.clone().requires_grad_()
    load("frames", reward="brightness", frames=2)(leaf, PROMPTS).sum().backward()
    assert [bool(leaf.grad[0, t].abs().sum() > 0) for t in range(6)] == [True, *[False] * 4, True]


def test_motion_by_hand():
    fade = torch.linspace(0, 1, 5).view(1, 5, 1, 1, 1).expand(1, 5, 3, 4, 4)
    assert float(load("motion-smoothness")(fade, ["x"])) == pytest.approx(1.0)
    assert float(load("flicker")(fade, ["x"])) == pytest.approx(0.75)
    blink = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 4, 4)
    assert float(load("motion-smoothness")(blink, ["x"])) == pytest.approx(0.0)
    assert float(load("flicker")(blink, ["x"])) == pytest.approx(0.0)
    still = VIDEO[:1, :1].expand(1, 4, 3, 8, 8)
    assert float(load("flicker")(still, ["x"])) == 1.0


def test_a_stage_sees_its_own_frame():
    brightness = VIDEO.mean((2, 3, 4))
    whole = load("frames", reward="brightness", take="stages")
    for stage, place in (("first", 0), ("middle", 3), ("last", 5)):
        assert torch.allclose(whole.at(stage)(VIDEO, PROMPTS), brightness[:, place])
    mean = load("frames", reward="brightness")
    assert mean.at("first") is mean
    scaled = Weighted([(whole, 2.0)], [Scale(0.5, 0.1)]).parts[0][1]
    expected = (brightness[:, 5] - 0.5) / 0.1
    assert torch.allclose(scaled.at("last")(VIDEO, PROMPTS), expected)


def test_rewards_of_images_score_the_frames_of_videos():
    brightness = VIDEO.mean((2, 3, 4)).mean(1)
    reward = for_videos(load("brightness"))
    assert torch.allclose(reward(VIDEO, PROMPTS), brightness)
    both = for_videos(Weighted({"brightness": 2.0, "flicker": 1.0}))
    expected = 2 * brightness + load("flicker")(VIDEO, PROMPTS)
    assert torch.allclose(both(VIDEO, PROMPTS), expected)
    assert both.least == 2
    held = for_videos(HeldOut("brightness"))
    assert torch.allclose(held(VIDEO, PROMPTS), brightness)
    assert for_videos(print) is print


def features(images):
    """The mean colour of an image."""
    return images.mean((2, 3))


def test_subject_consistency_by_hand():
    """Red, green, red: cosines to the first frame 0 and 1, to the one before 0 and 0."""
    red, green = torch.eye(3)[0], torch.eye(3)[1]
    video = torch.stack([red, green, red])[None, :, :, None, None].expand(1, 3, 3, 4, 4)
    reward = load("subject-consistency", features=features)
    assert float(reward(video, ["x"])) == pytest.approx((0 + 0 + 1 + 0) / 4)
    assert float(reward(video[:, :1].expand(1, 4, 3, 4, 4), ["x"])) == pytest.approx(1.0)
    leaf = video.clone().requires_grad_()
    reward(leaf, ["x"]).sum().backward()
    assert bool(leaf.grad.abs().sum() > 0)
    with pytest.raises(ValueError, match="features must be dino, clip-i, emoji-clip"):
        load("subject-consistency", features="clip")
    with pytest.raises(ValueError, match="needs at least 2 frames"):
        reward(video[:, :1], ["x"])


@pytest.mark.slow
def test_subject_consistency_with_what_ships():
    reward = load("subject-consistency:features=emoji-clip")
    video = torch.rand(1, 1, 3, 64, 64, generator=RNG).expand(1, 3, 3, 64, 64)
    assert float(reward(video, ["x"])) == pytest.approx(1.0, abs=1e-5)


def test_bad_videos():
    with pytest.raises(ValueError, match="needs at least 3 frames; got 2"):
        load("motion-smoothness")(VIDEO[:, :2], PROMPTS)
    with pytest.raises(ValueError, match=r"videos must be \[B, T, 3, H, W\]"):
        load("flicker")(VIDEO[0, 0], PROMPTS)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        load("flicker")(VIDEO, ["x"])
    with pytest.raises(ValueError, match="take must be one of mean, min"):
        load("frames", reward="brightness", take="best")
    with pytest.raises(ValueError, match="frames must be at least 1"):
        load("frames", reward="brightness", frames=0)


@pytest.mark.parametrize(
    ("a", "b", "count"),
    [("", "", 0), ("", "abc", 3), ("helo", "hello", 1), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_distance(a, b, count):
    assert distance(a, b) == distance(b, a) == count


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("hello", 1.0),
        ("helo", 0.8),
        ("", 0.0),
        ("xx Hel lo yy", 1.0),
        ("completely different words", 0.0),
    ],
)
def test_ocr_score_by_hand(text, score):
    reward = OCRText(ocr=lambda pixels: text)
    assert float(reward(IMAGES[:1], ['a sign "Hello"'])) == pytest.approx(score)


def test_ocr_needs_a_quoted_text():
    for prompt in ("a sign that says hello", 'an empty sign ""', "it's a dog's sign"):
        with pytest.raises(ValueError, match="must hold the wanted text in double quotes"):
            target_of(prompt)
    assert target_of("a “Big Sale” today") == "bigsale"


def test_ocr_sees_bytes_of_each_image():
    seen = []
    OCRText(ocr=lambda pixels: seen.append(pixels) or "")(IMAGES, ['"a"', '"b"'])
    expected = (IMAGES * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(a, b) for a, b in zip(seen, expected))


def rendered(text, colour=(20, 20, 120)):
    """A sign with this text, drawn by Pillow."""
    picture = Image.new("RGB", (320, 120), (250, 245, 230))
    ImageDraw.Draw(picture).text((24, 36), text, colour, font=ImageFont.load_default(48))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.slow
def test_rendered_text_is_read():
    """``rapidocr`` itself, with the models of its package."""
    reward = load("ocr")
    images = torch.cat([rendered("bakery"), torch.ones(1, 3, 120, 320)])
    assert reward(images, ['a sign "Bakery"', 'a sign "bakery"']).tolist() == [1.0, 0.0]
