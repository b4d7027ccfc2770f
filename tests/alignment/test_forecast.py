"""What a run will take is said before it begins, and saying it changes nothing."""

import pytest
import torch

import diffalign as da
from diffalign.alignment.forecast import Forecast

CALL = {"num_inference_steps": 2, "guidance_scale": 2.0}


class Brightness:
    """A reward with gradient that counts what it has scored."""

    name, differentiable = "brightness", True

    def __init__(self):
        self.images = 0

    def __call__(self, images, prompts):
        self.images += len(images)
        return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def pipe():
    pipe = da.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def foresee(pipe, method, budget=None):
    forecasts = []
    result = da.align(
        pipe,
        "a cat",
        method=method,
        reward=Brightness(),
        budget=budget,
        announce=forecasts.append,
        **CALL,
    )
    (forecast,) = forecasts
    return forecast, result


@pytest.mark.parametrize(
    ("method", "budget", "images"),
    [
        ("best-of-n:n=3", None, 3),
        ("best-of-n", da.Budget(nfe=20), 4),
        ("best-of-n:n=3", da.Budget(rewards=3), 2),
        ("reno:iterations=2,force=true", None, 2),
        ("find:iterations=2,batch=2,draws=1", None, 5),
    ],
)
def test_images_follow_from_the_method_and_the_budget(pipe, method, budget, images):
    forecast, result = foresee(pipe, method, budget)
    assert forecast.images == images == result.scored
    assert forecast.price == 4
    assert forecast.seconds == pytest.approx((images + 1) * forecast.image_seconds)
    assert f"{images} images of 4 NFE" in str(forecast)


def test_a_budget_of_seconds_is_the_forecast(pipe):
    forecast, _ = foresee(pipe, "best-of-n", da.Budget(seconds=2.0))
    assert forecast.seconds == 2.0
    assert forecast.images == max(1, int(2.0 / forecast.image_seconds) - 1)


def test_the_run_is_the_same_with_and_without(pipe):
    _, result = foresee(pipe, "best-of-n:n=2")
    plain = da.align(pipe, "a cat", method="best-of-n:n=2", reward=Brightness(), **CALL)
    assert torch.equal(result.tensor, plain.tensor)
    assert result.ledger.nfe == plain.ledger.nfe
    assert result.ledger.rewards == plain.ledger.rewards


def test_a_run_without_an_end_says_what_an_image_takes():
    text = str(Forecast(0.25, None, None, price=40, memory=3 * 2**20))
    assert text == "0.25 s an image of 40 NFE and 3 MiB more memory (measured on one image)"


def test_long_runs_are_said_in_whole_seconds():
    text = str(Forecast(2.0, 1234.5, 600, price=40, memory=2**30))
    assert text.startswith("about 1,234 s for 600 images of 40 NFE and 1,024 MiB")


def test_memory_that_nobody_counts_is_left_out():
    text = str(Forecast(2.0, 4.0, 1, price=40, memory=None))
    assert text == "about 4 s for 1 image of 40 NFE (measured on one image)"
