"""Pipelines that go on from frames: lengths, seeds, prefixes and costs, on each of them."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import diffalign as da
from diffalign.core import Meter, UnsupportedModel
from diffalign.search.video.choice import expander_of
from diffalign.search.video.expander import Branch, Prefix
from diffalign.search.video.last_frame import LastFrame
from diffalign.search.video.look_ahead import LookAhead, reads
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline

SKYREELS = "SkyReelsV2DiffusionForcingVideoToVideoPipeline"
# class of the pipeline -> frames of a clip, frames that it reads by itself
CASES = {
    "WanVACEPipeline": (9, 1),
    "LTXConditionPipeline": (9, 1),
    SKYREELS: (9, 1),
    "WanImageToVideoPipeline": (5, 1),
    "CogVideoXImageToVideoPipeline": (9, 1),
    "LTXImageToVideoPipeline": (9, 1),
    "HunyuanSkyreelsImageToVideoPipeline": (5, 1),
}
STEPS = 2


@pytest.fixture(scope="module")
def make(request, text):
    """``make(name, **options)``: an expander of a tiny pipeline of that class."""
    pipes = {SKYREELS: request.getfixturevalue("skyreels")}

    def make(name, meter=None, techniques=(), **options):
        if name not in pipes:
            variant = "2.2-5b" if name == "WanImageToVideoPipeline" else ""
            pipes[name] = tiny_pipeline(name, variant=variant)
        if name == SKYREELS:
            call = {**text, "height": 32, "width": 32, "guidance_scale": 3.0}
        else:
            call = tiny_inputs(name)
            call = {k: v for k, v in call.items() if k not in ("generator", "output_type")}
        if name == "LTXConditionPipeline":
            del call["image"]
        call |= {"num_frames": CASES[name][0], "num_inference_steps": STEPS, "chunks": 3}
        return expander_of(pipes[name], techniques, meter, **call | options)

    return make


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(2)
def test_chunks_follow_from_prefix_and_seed(make, name):
    meter = Meter()
    with make(name, meter) as expander:
        window, read = CASES[name]
        assert expander.partition == (window, window - read, window - read)
        assert not expander.exact_prefix
        (first,) = expander.expand([Branch(None, 3)])
        plain = first.pieces[0]
        assert plain.shape == (window, 3, 32, 32)
        assert plain.min() >= 0
        assert plain.max() <= 1
        assert meter.rows == expander.price(0).rows
        copy = plain.clone()
        pair = expander.expand([Branch(first, 4), Branch(first, 5, 11)])
        assert meter.rows == expander.price(0).rows + 2 * expander.price(1).rows
        assert meter.evaluations == 3 * expander.count
        assert meter.decodes == 0  # none was looked at yet
        (again,) = expander.expand([Branch(first, 4)])
    assert torch.equal(again.pieces[1], pair[0].pieces[1])
    assert (pair[0].pieces[1] - pair[1].pieces[1]).abs().max() > 1e-4
    assert pair[1].path == (0, 11)
    assert pair[1].pieces[0] is plain
    assert torch.equal(plain, copy)
    assert len(pair[0].pieces[1]) == window - read
    frames = expander.decode(pair[0])
    assert meter.decodes == 1
    assert len(frames) == sum(expander.partition[:2])
    assert torch.equal(expander.decode(pair[0], [0, -1]), frames[[0, -1]])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(1)
def test_the_first_chunk_is_a_plain_call_and_the_next_reads_the_prefix(make, name):
    expander = make(name)
    with expander:
        (first,) = expander.expand([Branch(None, 3)])
        dark = Prefix((torch.zeros_like(first.pieces[0]),), (0,), (None,))
        ((near,), (far,)) = (expander.expand([Branch(p, 4)]) for p in (first, dark))
        assert (near.pieces[1] - far.pieces[1]).abs().max() > 1e-5
        outputs = []
        run = expander.run
        expander.run = lambda *args: outputs.append(run(*args)) or outputs[0]
        expander.expand([Branch(first, 4)])
    # what the pipeline shows of the frames that it read is not what it was given
    overlap = outputs[0][-expander.window :][: expander.overlap]
    assert not torch.equal(overlap, first.pieces[0][-expander.overlap :])
    if name == SKYREELS:  # made by the text-to-video pipeline of its parts
        return
    call = {k: v for k, v in expander.call.items() if k != "chunks"}
    rng = torch.Generator().manual_seed(3)
    plain = expander.pipe(**call, generator=rng, output_type="pt").frames[0]
    assert torch.equal(first.pieces[0], plain)


@pytest.mark.parametrize("name", ["WanVACEPipeline", "LTXConditionPipeline"])
def test_a_longer_overlap_and_a_clip(make, name):
    window = {"WanVACEPipeline": 9, "LTXConditionPipeline": 17}[name]
    overlap = {"WanVACEPipeline": 5, "LTXConditionPipeline": 9}[name]
    with make(name, num_frames=window, overlap=overlap) as expander:
        assert expander.partition == (window, window - overlap, window - overlap)
        assert expander.price(1).forwards == expander.price(1).rows * window / (window - overlap)
        prefix = expander.encode(torch.rand(overlap + 2, 3, 32, 32))
        (child,) = expander.expand([Branch(prefix, 1)])
        assert len(expander.decode(child)) == overlap + 2 + window - overlap
        words = f"has 3 frames and the pipeline reads the last {overlap}"
        with pytest.raises(ValueError, match=words):
            expander.encode(torch.rand(3, 3, 32, 32))
        dark = Prefix((torch.zeros(9, 3, 16, 32),), (0,), (1,))
        with pytest.raises(ValueError, match=r"must be \['any', 3, 32, 32\] here"):
            expander.expand([Branch(dark, 1)])


@pytest.mark.parametrize("name", ["WanVACEPipeline", "LTXConditionPipeline"])
def test_previews_end_the_call_early(make, name):
    meter = Meter()
    with make(name, meter, num_inference_steps=4) as expander:
        branch = Branch(None, 3)
        ((same, frames),) = expander.preview([branch], 3)
        assert same is branch
        assert meter.rows == expander.price(0, 0, 3).rows
        assert (meter.evaluations, meter.decodes) == (3, 1)
        assert expander.first_look == (2 if name == "LTXConditionPipeline" else 1)
        (whole,) = expander.expand([branch])
        plain = whole.pieces[0]
        assert frames.shape == plain.shape
        assert not torch.equal(frames, plain)
        assert (frames - plain).abs().mean() < (torch.rand_like(plain) - plain).abs().mean()
        if name == "LTXConditionPipeline":
            with pytest.raises(ValueError, match="use step=2 or more"):
                expander.preview([branch], 1)


def test_a_budget_of_decodes_counts_whole_videos(monkeypatch):
    """Of a pipeline that decodes each chunk itself: three videos and the final call."""
    pipe, inputs = tiny_pipeline("WanVACEPipeline"), tiny_inputs("WanVACEPipeline")
    embeds = inputs["prompt_embeds"][:1]
    monkeypatch.setattr(type(pipe), "encode_prompt", lambda *args, **options: (embeds, embeds))
    call = {"height": 32, "width": 32, "guidance_scale": 1.0, "num_frames": 5, "chunks": 2}

    def search(method, **options):
        options = call | {"num_inference_steps": STEPS} | options
        return da.align(pipe, "a dog", method=method, reward="brightness", **options)

    result = search("linear-search:n=5", budget=da.Budget(decodes=4))
    assert (result.scored, result.ledger.decodes) == (3, 4)
    assert result.ledger.evaluations == 4 * 2 * STEPS
    for name, value in (("chunks", "2"), ("chunks", 1.5), ("num_frames", True), ("height", 0)):
        with pytest.raises(ValueError, match=f"{name}=...\\) must be an integer of at least 1"):
            search("linear-search:n=2", **{name: value})


def test_what_a_step_predicts_is_read_exactly():
    """With the exact velocity of one clean latent every preview is that latent."""
    rng = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 3, 3, generator=rng, dtype=torch.float64)
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    for scheduler in (euler, unipc):
        assert reads(scheduler)
        scheduler.set_timesteps(5)

        class Pipe:
            _interrupt = False

        pipe, look, latents = Pipe(), LookAhead(3), noise
        pipe.scheduler = scheduler
        for index, time in enumerate(scheduler.timesteps[:3]):
            latents = scheduler.step(noise - clean, time, latents, return_dict=False)[0]
            answer = look(pipe, index, time, {"latents": latents})
            assert pipe._interrupt == (index == 2)
            assert bool(answer) == (index == 2)
        assert (answer["latents"] - clean).abs().max() < 1e-5
    assert not reads(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))


def test_an_image_is_handed_on_in_8_bits(make):
    expander = make("CogVideoXImageToVideoPipeline")
    tail = torch.rand(1, 3, 32, 32)
    image = np.asarray(expander.behind(tail)["image"])
    assert image.shape == (32, 32, 3)
    assert np.abs(image / 255 - tail[0].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    with pytest.raises(UnsupportedModel, match="CogVideoXDDIMScheduler does not show"), expander:
        expander.preview([Branch(None, 1)], 1)


def test_lengths_that_cannot_work(make):
    for name, options, words in (
        ("WanVACEPipeline", {"num_frames": 8}, r"must be 4 k \+ 1 .* got 8. Use 5 or 9"),
        ("WanVACEPipeline", {"overlap": 2}, r"overlap must be 4 k \+ 1 .* got 2. Use 1 or 5"),
        ("WanVACEPipeline", {"overlap": 0}, "overlap must be"),
        ("WanVACEPipeline", {"overlap": 9}, "overlap must be below num_frames=9"),
        ("WanVACEPipeline", {"chunks": 0}, "chunks must be at least 1; got 0"),
        ("WanVACEPipeline", {"video": [1]}, "video=.* is set by the expander"),
        ("LTXConditionPipeline", {"conditions": [1]}, "conditions=.* is set by the expander"),
        ("CogVideoXImageToVideoPipeline", {"overlap": 5}, "reads 1 frame of the prefix; got ov"),
        (SKYREELS, {"causal_block_size": 2}, "makes 3 frames of latents, and causal_block_size=2"),
        (SKYREELS, {"overlap_history": 5}, "overlap_history=.* is set by the expander"),
    ):
        with pytest.raises(ValueError, match=words):
            make(name, **options)


def test_image_to_video_begins_with_an_image(make):
    expander = make("CogVideoXImageToVideoPipeline")
    del expander.call["image"]
    with expander:
        with pytest.raises(ValueError, match="begins with an image; give image="):
            expander.expand([Branch(None, 1)])
        assert isinstance(expander, LastFrame)


def test_noise_on_known_frames_comes_from_the_seed(make):
    before = torch.get_rng_state()
    with make(SKYREELS, addnoise_condition=20) as expander:
        prefix = Prefix((torch.rand(9, 3, 32, 32, generator=torch.Generator()),), (0,), (None,))
        (one,), (two,) = (expander.expand([Branch(prefix, 1)]) for _ in range(2))
    assert torch.equal(one.pieces[1], two.pieces[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_asynchronous_steps_are_counted(make):
    meter = Meter()
    with make(SKYREELS, meter, ar_step=1) as expander:
        (first,) = expander.expand([Branch(None, 1)])
        assert meter.rows == expander.price(0).rows > 2 * STEPS
        expander.expand([Branch(first, 1)])
        assert meter.rows == expander.price(0).rows + expander.price(1).rows
