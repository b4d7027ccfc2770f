"""The words of a text encoder, and texts whose embeddings are changed while they are read."""

import pytest
import torch

from diffalign.core import UnsupportedModel
from diffalign.core.words import Shift
from diffalign.seams.trajectory.sampler import PipelineSampler
from diffalign.seams.words import open_clip_tower, shifted, tower_of
from diffalign.testing import tiny_pipeline

SD = "StableDiffusionPipeline"
PROMPT = "a red dog"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(SD, text=True)


def sampler_of(pipe, shift=None, **options):
    return PipelineSampler(
        pipe, shift=shift, prompt=PROMPT, num_inference_steps=2, height=16, width=16, **options
    )


def test_features_are_those_of_the_encoder(pipe):
    tower = tower_of(pipe)
    tokens = tower.tokens(PROMPT)
    assert tower.text(tokens) == PROMPT
    assert tower.room == 75
    row = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipe.text_encoder(row).pooler_output
        ours = tower.features(torch.tensor([tokens]))
        again = tower.features(torch.tensor([tokens]), tower.table[tokens][None])
        other = tower.features(torch.tensor([tokens]), 2 * tower.table[tokens][None])
    assert torch.equal(ours, expected)
    assert torch.equal(again, expected)
    assert not torch.allclose(other, expected)
    with pytest.raises(ValueError, match="room for 75 tokens; got 76"):
        tower.features(torch.zeros(1, 76, dtype=torch.long))


@pytest.mark.slow
def test_the_words_of_open_clip():
    from diffalign.embedded import load

    clip = load("emoji-clip")
    tower = open_clip_tower(clip.model, clip.tokenizer)
    tokens = tower.tokens("a photo of a red apple")
    assert tower.text(tokens) == "a photo of a red apple"
    assert len(tokens) == 6
    assert tower.room == 22
    with torch.no_grad():
        ours = torch.nn.functional.normalize(tower.features(torch.tensor([tokens])), dim=-1)
    assert torch.equal(ours, clip.text(["a photo of a red apple"]))


def test_a_shift_reaches_its_tokens_and_leaves_nothing_behind(pipe):
    tower, cls = tower_of(pipe), type(tower_of(pipe).layer)
    word = tower.tokens("dog")
    values = torch.ones(len(word), tower.table.shape[1])
    ids = torch.tensor([[0, *tower.tokens("a dog"), 1], [0, *tower.tokens("a cat"), 1]])
    plain = tower.layer(ids)
    with shifted(pipe, Shift(tuple(word), values)):
        changed = tower.layer(ids)
    difference = changed - plain
    assert torch.allclose(difference[0, 2:5], torch.ones(3, 1).expand(3, plain.shape[-1]))
    assert not difference[0, :2].any()
    assert not difference[0, 5:].any()
    assert not difference[1].any()
    assert type(tower.layer) is cls
    assert torch.equal(tower.layer(ids), plain)


def test_a_shift_of_nothing_changes_no_bit(pipe):
    tokens = tower_of(pipe).tokens(PROMPT)
    nothing = Shift(tuple(tokens), torch.zeros(len(tokens), 32))
    images = []
    for shift in (None, nothing):
        with sampler_of(pipe, shift, guidance_scale=3.0) as sampler:
            images.append(sampler.decode(sampler.run(sampler.start([1]))))
    assert torch.equal(*images)


def test_the_gradient_in_words_is_that_of_central_differences(pipe):
    pipe = tiny_pipeline(SD, text=True, dtype=torch.float64)
    tokens = tower_of(pipe).tokens(PROMPT)
    rng = torch.Generator().manual_seed(0)
    direction = torch.randn(len(tokens), 32, generator=rng, dtype=torch.float64)

    def images(values, grad):
        with sampler_of(pipe, Shift(tuple(tokens), values), guidance_scale=3.0) as sampler:
            noise = sampler.start([3]).latents
            return sampler.render(noise, grad=grad)

    leaf = torch.zeros(len(tokens), 32, dtype=torch.float64, requires_grad=True)
    first = images(leaf, True)
    inside = (first > 0.05) & (first < 0.95)
    weights = torch.linspace(0.5, 1.5, first.numel()).reshape(first.shape) * inside
    (gradient,) = torch.autograd.grad((first * weights).sum(), leaf)
    h = 1e-3
    ends = [(images(k * h * direction, False) * weights).sum() for k in (1, -1)]
    slope = float(ends[0] - ends[1]) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-3)


def test_what_is_refused(pipe):
    with pytest.raises(ValueError, match="has the tokens"):
        sampler_of(pipe, Shift((5, 6), torch.zeros(2, 32)))
    with pytest.raises(UnsupportedModel, match="no text encoder"):
        tower_of(tiny_pipeline(SD))
