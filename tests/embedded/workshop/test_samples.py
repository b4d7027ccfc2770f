"""Generated pictures: the noise of each follows from its caption and number, verdicts from its
judge."""

import pytest
import torch

import diffalign as da
from diffalign.core.seeds import seed_of
from diffalign.embedded.load import load
from diffalign.embedded.workshop import samples, score
from diffalign.tasks.geneval.verdict import verdict

STEPS = 3


@pytest.fixture(scope="module")
def pipe():
    return load("emoji")


@pytest.fixture(scope="module")
def judge():
    return load("emoji-judge")


def plain(pipe, caption, seed, scale):
    """One picture by the pipeline alone."""
    with da.apply(pipe):
        return pipe(
            caption,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images


@pytest.mark.slow
def test_pictures_do_not_depend_on_their_batch(pipe, judge):
    records = samples.official_prompts(3)
    whole = samples.generate(pipe, judge, records, 2, 7, steps=STEPS)
    assert whole.images.shape == (3, 2, 3, 64, 64)
    assert whole.captions == tuple(records)
    last = dict([list(records.items())[-1]])
    alone = samples.generate(pipe, judge, last, 2, 7, steps=STEPS, batch=1)
    # float32 sums of another order, rounded to 8 bits
    assert (whole.images[-1:].int() - alone.images.int()).abs().max() <= 1
    caption = next(iter(last))
    image = plain(pipe, caption, seed_of(caption, 1, 7), 3.0)
    assert torch.equal(alone.images[0, 1], (image[0] * 255).round().byte())
    expected = verdict(records[caption], judge.detect(image)[0], judge.thresholds).correct
    assert bool(alone.right[0, 1]) == expected


@pytest.mark.slow
def test_scored_pictures_are_those_of_the_seed_rule(pipe, judge):
    records = score.spread_prompts(6)
    images, correct = score.score(pipe, records, 2.0, STEPS, 5, batch=1)
    assert images.shape == (6, 3, 64, 64)
    text = records[2]["prompt"]
    image = plain(pipe, text, seed_of(text, 0, 5), 2.0)
    assert torch.equal(images[2], image[0])
    assert correct[2] == verdict(records[2], judge.detect(image)[0], judge.thresholds).correct
