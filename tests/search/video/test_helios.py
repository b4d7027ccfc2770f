"""Helios made chunk after chunk is one call of its pipeline."""

import pytest
import torch

from diffalign.core import Meter, UnsupportedModel
from diffalign.search.video.choice import expander_of
from diffalign.search.video.expander import Branch, Price

STEPS, FRAMES = 3, 2


@pytest.fixture(scope="module")
def call(text):
    return {
        **text,
        "height": 32,
        "width": 32,
        "num_frames": 15,
        "num_latent_frames_per_chunk": FRAMES,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
    }


@pytest.fixture(scope="module")
def video(helios, call):
    meter = Meter()
    with expander_of(helios, (), meter, **call) as expander:
        prefix = None
        for seed in (10, 11, 12):
            (prefix,) = expander.expand([Branch(prefix, seed)])
        assert meter.rows == sum(expander.price(chunk).rows for chunk in range(3)) == 6 * STEPS
    return prefix


@pytest.mark.slow
def test_chunk_by_chunk_is_one_call(helios, call, video, monkeypatch):
    """The pipeline draws the noise of all chunks from one generator: here it is given that of the
    chunks' own seeds."""
    seeds = iter((10, 11, 12))

    def draw(*args, **kwargs):
        rng = torch.Generator().manual_seed(next(seeds))
        return torch.randn(1, 4, FRAMES, 4, 4, generator=rng)

    monkeypatch.setattr(helios, "prepare_latents", draw)
    whole = helios(**call, output_type="latent").frames
    assert (torch.cat(video.pieces, 1) - whole[0]).abs().max() < 1e-4
    seeds = iter((10, 11, 12))
    native = helios(**call, output_type="pt").frames[0]
    expander = expander_of(helios, **call)
    frames = expander.decode(video)
    assert frames.shape[0] == sum(expander.partition) == 15
    assert len(native) == 13  # it cuts what is no 4 k + 1
    assert (frames[:13] - native).abs().max() < 1e-4
    assert torch.equal(expander.decode(video, [-1, 6]), frames[[14, 6]])


@pytest.mark.slow
def test_a_batch_is_single_videos_and_prefixes_stay(helios, call, video):
    one = type(video)(video.pieces[:1], (0,), (10,))
    with expander_of(helios, **call) as expander:
        assert expander.exact_prefix
        assert expander.price(1) == Price(2 * STEPS, 2.0 * STEPS)
        pair = expander.expand([Branch(one, 11), Branch(one, 50, 1)])
        arguments = expander.call_of(1) | {"num_frames": 5, "output_type": "latent"}
    noiseless = {"add_noise_to_video_latents": False, "add_noise_to_image_latents": False}
    first = one.pieces[0][None]
    rng = torch.Generator().manual_seed(11)
    latents = helios(
        **arguments | noiseless, video_latents=first, image_latents=first[:, :, :1], generator=rng
    ).frames
    assert torch.equal(latents[:, :, :FRAMES], first)
    assert (pair[0].pieces[1] - video.pieces[1]).abs().max() < 1e-5
    assert (pair[1].pieces[1] - video.pieces[1]).abs().max() > 1e-2
    assert pair[1].pieces[0] is one.pieces[0]
    assert pair[1].path == (0, 1)


@pytest.mark.slow
def test_previews(helios, call, video):
    meter = Meter()
    with expander_of(helios, (), meter, **call) as expander:
        assert expander.previews
        branch = Branch(None, 10)
        ((same, frames),) = expander.preview([branch], 2)
        assert same is branch  # it begins anew
        assert meter.rows == expander.price(0, 0, 2).rows == 4
        whole = expander.decode(type(video)(video.pieces[:1], (0,), (10,)))
        assert frames.shape == whole.shape
        assert 0 < (frames - whole).abs().mean() < (torch.rand_like(whole) - whole).abs().mean()


def test_a_clip_goes_on(helios, call):
    clip = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expander = expander_of(helios, **call)
    prefix = expander.encode(clip)
    video = helios.video_processor.preprocess_video(clip[None])
    mean, std = (
        torch.tensor(values).view(1, 4, 1, 1, 1)
        for values in (helios.vae.config.latents_mean, helios.vae.config.latents_std)
    )
    with torch.no_grad():
        latents = (helios.vae.encode(video).latent_dist.mode() - mean) / std
    assert (prefix.pieces[0] - latents[0]).abs().max() < 1e-6
    with pytest.raises(ValueError, match="7 frames and a chunk 5; cut it to a multiple of 5"):
        expander.encode(torch.rand(7, 3, 32, 32))
    with pytest.raises(ValueError, match="the whole video; give chunks=4"):
        expander.encode(torch.rand(15, 3, 32, 32))
    with pytest.raises(ValueError, match="chunks must be at least 1"):
        expander_of(helios, **call, chunks=0)


def test_techniques_need_a_family(helios, call):
    import diffalign as da

    with pytest.raises(UnsupportedModel, match="HeliosPipeline is not supported: it denoises"):
        expander_of(helios, [da.CFG()], **call)


def test_start_noise_cannot_be_chosen(helios, call):
    with pytest.raises(UnsupportedModel, match="HeliosPipeline draws the noise of each chunk its"):
        expander_of(helios, **call).noise(0, 1)
