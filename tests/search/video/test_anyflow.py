"""AnyFlow-FAR made chunk after chunk is one call of its pipeline."""

import pytest
import torch

from diffalign.core import Budget, BudgetExceeded, Meter, SessionError, UnsupportedModel
from diffalign.seams.swap import original_class
from diffalign.search.video.anyflow import AnyFlowFAR
from diffalign.search.video.choice import expander_of
from diffalign.search.video.expander import Branch, Prefix, Price
from diffalign.testing.tiny.anyflow import PARTITION

STEPS = 3


@pytest.fixture(scope="module")
def call(text):
    """Arguments of the pipeline, with both branches."""
    return {
        **text,
        "height": 32,
        "width": 32,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
    }


@pytest.fixture(scope="module")
def quick(call):
    """The same without guidance."""
    rest = {name: value for name, value in call.items() if name != "negative_prompt_embeds"}
    return rest | {"guidance_scale": 1.0}


def noise(seed, frames):
    return torch.randn(4, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


def chain(expander, seeds, prefix=None):
    for seed in seeds:
        (prefix,) = expander.expand([Branch(prefix, seed)])
    return prefix


@pytest.fixture(scope="module")
def video(anyflow, quick):
    """A whole video made chunk after chunk, without guidance."""
    with expander_of(anyflow, **quick) as expander:
        return chain(expander, [10, 11, 12, 13])


@pytest.mark.slow
def test_chunk_by_chunk_is_one_call(anyflow, call):
    """With the guided pipeline's own noise, rows and frames; the rows are counted from outside."""
    meter = Meter()
    with expander_of(anyflow, (), meter, **call) as expander:
        prefix = chain(expander, [10, 11, 12, 13])
        assert meter.rows == sum(expander.price(chunk).rows for chunk in range(4))
        frames = expander.decode(prefix)
    start = torch.cat([noise(10 + i, n) for i, n in enumerate(PARTITION)], 1)[None]
    arguments = {**call, "num_frames": 17, "latents": start}
    rows = []
    handle = anyflow.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    whole = anyflow(**arguments, output_type="latent").frames
    handle.remove()
    assert (torch.cat(prefix.pieces, 1) - whole[0]).abs().max() < 1e-4
    assert meter.rows == sum(rows) == 2 * (4 * STEPS + 3)
    assert meter.evaluations == 4 * STEPS
    native = anyflow(**arguments, output_type="pt").frames[0]
    assert frames.shape == (17, 3, 32, 32)
    assert (frames - native).abs().max() < 1e-4


def test_what_a_chunk_costs(anyflow, quick):
    expander = expander_of(anyflow, **quick)
    assert expander.partition == (1, 8, 4, 4)
    # steps, and one row that reads the chunks before: as many chunks as there are
    assert [expander.price(chunk) for chunk in range(4)] == [
        Price(3, 3.0),
        Price(4, 4.0),
        Price(4, 5.0),
        Price(4, 6.0),
    ]
    assert expander.price(2, 1) == Price(3, 4.0)
    assert expander.price(2, 0, 2) == Price(3, 4.0)


@pytest.mark.slow
def test_rows_of_a_batch_are_single_videos(anyflow, quick, video):
    first = video.pieces[0]
    with expander_of(anyflow, **quick) as expander:
        many = expander.expand([Branch(None, seed, i) for i, seed in enumerate([10, 20, 10])])
        assert (many[0].pieces[0] - first).abs().max() <= 1e-5
        assert (many[0].pieces[0] - many[2].pieces[0]).abs().max() <= 1e-5
        assert (many[1].pieces[0] - first).abs().max() > 1e-2
        again = expander.expand([Branch(None, 10)])[0]
        assert torch.equal(again.pieces[0], first)  # the same call is the same chunk, bit for bit
        branches = [Branch(many[1], 5, 12), Branch(video_of(video, 1), 11)]
        pair = expander.expand(branches)
    assert pair[0].path == (1, 12)
    assert pair[0].seeds == (20, 5)
    assert pair[0].pieces[0] is many[1].pieces[0]  # stored once
    assert (pair[1].pieces[1] - video.pieces[1]).abs().max() <= 1e-5


def video_of(video, chunks):
    """The first chunks of a video."""
    return type(video)(video.pieces[:chunks], video.path[:chunks], video.seeds[:chunks])


@pytest.mark.slow
def test_the_prefix_stays_bit_for_bit(anyflow, quick, video):
    copies = [piece.clone() for piece in video.pieces]
    with expander_of(anyflow, **quick) as expander:
        assert expander.exact_prefix
        prefix = video_of(video, 2)
        latents = expander._run([Branch(prefix, 30)], {})
    assert torch.equal(latents[0, :, :3], torch.cat(video.pieces[:2], 1))
    assert all(torch.equal(a, b) for a, b in zip(copies, video.pieces))


@pytest.mark.slow
def test_previews_are_shorter_schedules_and_lead_on(anyflow, quick, video):
    meter = Meter()
    with expander_of(anyflow, (), meter, **quick) as expander:
        ((branch, frames),) = expander.preview([Branch(None, 10)], 2)
        assert meter.rows == expander.price(0, 0, 2).rows == 2
        assert branch.step == 1
        (whole,) = expander.expand([branch])
        assert meter.rows == 2 + expander.price(0, 1).rows == 4
        assert (whole.pieces[0] - video.pieces[0]).abs().max() < 1e-5
        ((second, later),) = expander.preview([Branch(whole, 11)], 1)
        assert second.step == 0  # one evaluation went straight to the end
        assert later.shape == (8, 3, 32, 32)
        with pytest.raises(ValueError, match=r"preview\(step=3\) must be above 0 and below 3"):
            expander.preview([Branch(None, 10)], 3)
    # the pipeline's own call with the first two levels ends in the same frames
    levels = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64).tolist()[:2]
    options = {"sigmas": levels, "num_frames": 9, "chunk_partition": [1, 2]}
    start = torch.cat([noise(10, 1), noise(11, 2)], 1)[None]
    native = anyflow(**quick | options, latents=start, output_type="pt").frames[0, :1]
    assert (frames - native).abs().max() < 1e-5


def test_a_clip_goes_on(anyflow, quick):
    clip = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with expander_of(anyflow, **quick) as expander:
        prefix = expander.encode(clip)
        latents = anyflow.encode_video(clip[None], height=32, width=32)
        assert [piece.shape[1] for piece in prefix.pieces] == [1, 2]
        assert torch.equal(torch.cat(prefix.pieces, 1), latents[0].permute(1, 0, 2, 3))
        assert prefix.seeds == (None, None)
        child = chain(expander, [5], prefix)
        frames = expander.decode(child, [8, 9])
    assert child.pieces[0] is prefix.pieces[0]
    arguments = {**quick, "num_frames": 13, "chunk_partition": [1, 2, 1]}
    start = torch.cat([torch.zeros(4, 3, 4, 4), noise(5, 1)], 1)[None]
    native = anyflow(**arguments, video=clip[None], latents=start, output_type="pt").frames[0]
    assert (frames - native[[8, 9]]).abs().max() < 1e-4
    for count, words in ((7, r"no chunk ends there; chunks end after \[1, 9, 13, 17\]"),):
        with pytest.raises(ValueError, match=words):
            expander.encode(clip[:count])
    with pytest.raises(ValueError, match="the whole video"):
        expander.encode(torch.rand(17, 3, 32, 32))
    with pytest.raises(ValueError, match="The clip is 16 x 32 and the call makes 32 x 32"):
        expander.encode(torch.rand(9, 3, 32, 16))
    with pytest.raises(ValueError, match=r"values in \[0, 1\]; got"):
        expander.encode(2 * torch.ones(9, 3, 32, 32))
    with pytest.raises(TypeError, match=r"must be a tensor .* got list"):
        expander.encode([clip])
    with pytest.raises(ValueError, match=r"must be \[F, 3, H, W\]"):
        expander.encode(torch.rand(9, 32, 32))


@pytest.mark.slow
def test_branches_that_cannot_be_made(anyflow, quick, video):
    expander = expander_of(anyflow, **quick, chunks=2)
    assert expander.partition == (1, 8)
    with pytest.raises(SessionError, match="not open"):
        expander.expand([Branch(None, 1)])
    with expander:
        with pytest.raises(SessionError, match="open already"):
            expander.__enter__()
        with pytest.raises(ValueError, match="at least one branch"):
            expander.expand([])
        with pytest.raises(ValueError, match=r"one chunk and step; got .*\[\(0, 0\), \(1, 0\)\]"):
            expander.expand([Branch(None, 1), Branch(video_of(video, 1), 1)])
        with pytest.raises(ValueError, match="has 2 chunks and the prefix has them all"):
            expander.expand([Branch(video_of(video, 2), 1)])
        words = r"Chunk 0 of the prefix is \[4, 2, 4, 4\] and must be \[4, 1, 4, 4\] here"
        with pytest.raises(ValueError, match=words):
            expander.expand([Branch(Prefix((torch.zeros(4, 2, 4, 4),), (0,), (1,)), 1)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 10}, r"does not end where a chunk of .* ends; use one of \[1, 9, 13, 17\]"),
        ({"chunk_partition": [1, 0]}, "positive numbers"),
        ({"chunk_partition": [1, 3], "num_frames": 17}, r"use one of \[13\]"),
        ({"chunks": 5}, "chunks must be in 1 to 4; got 5"),
        ({"latents": torch.zeros(1)}, "latents=.* is set by the expander"),
        ({"video": torch.zeros(1)}, "video=.* is set by the expander"),
        ({"prompt_embeds": torch.zeros(2, 7, 24)}, "one prompt; got 2"),
        ({"num_inference_steps": 0}, "must be at least 1; got 0"),
    ],
)
def test_arguments_that_cannot_work(anyflow, quick, options, words):
    with pytest.raises(ValueError, match=words):
        expander_of(anyflow, **quick | options)


def test_other_arguments_and_models(anyflow, quick, monkeypatch):
    assert expander_of(anyflow, **quick | {"num_frames": 9}).partition == (1, 8)
    own = expander_of(anyflow, **quick | {"num_frames": 13, "chunk_partition": [2, 2]})
    assert own.partition == (5, 8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'frames'"):
        expander_of(anyflow, **quick, frames=3)
    config = anyflow.transformer.config
    longer = type(config)({**config, "full_chunk_limit": 4})
    monkeypatch.setattr(anyflow.transformer, "_internal_dict", longer)
    with pytest.raises(UnsupportedModel, match="full_chunk_limit is above 3"):
        AnyFlowFAR(anyflow, **quick)


@pytest.mark.slow
def test_a_budget_ends_before_the_work_and_nothing_stays(anyflow, quick, monkeypatch):
    before = dict(vars(anyflow))
    meter = Meter(Budget(nfe=4))
    with expander_of(anyflow, (), meter, **quick) as expander:
        prefix = chain(expander, [1])
        with pytest.raises(BudgetExceeded, match="nfe: 5 would pass the budget of 4"):
            chain(expander, [2], prefix)
        assert meter.rows == 4

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        meter.budget = Budget()
        with monkeypatch.context() as patch:
            patch.setattr(anyflow.scheduler, "step", stop)
            with pytest.raises(KeyboardInterrupt):
                chain(expander, [2], prefix)
        assert chain(expander, [2], prefix).chunks == 2
    assert type(anyflow) is original_class(anyflow)
    assert type(anyflow.transformer) is original_class(anyflow.transformer)
    assert {"encode_prompt", "encode_kv_cache"}.isdisjoint(vars(anyflow))
    assert set(before) - {"_num_timesteps"} <= set(vars(anyflow))
