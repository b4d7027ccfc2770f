"""Video searches through the door on a tiny AnyFlow-FAR of random weights: costs, prefixes, memory,
clips, and a run that was cut."""

import pytest
import torch

import diffalign as da
from diffalign.core.memory import Peak
from diffalign.testing import tiny_inputs, tiny_pipeline

NAME, PROMPT = "AnyFlowFARPipeline", "a dog moving left"
STEPS = 2
TREE = "tree-of-frames:branch=(3,2,1),keep=(2)"


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline(NAME, text=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def change(videos, prompts):
    """How far the last frame is from the first, in a fixed direction."""
    weights = torch.linspace(-1.0, 1.0, videos[0, 0].numel()).reshape(videos[0, 0].shape)
    return ((videos[:, -1] + videos[:, 0]) * weights).flatten(1).sum(1)


def call(**options):
    inputs = tiny_inputs(NAME, text=True)
    names = ("height", "width", "num_frames", "max_sequence_length")
    usual = {name: inputs[name] for name in names}
    return usual | {"num_inference_steps": STEPS, "guidance_scale": 1.0} | options


def run(pipe, method, reward=change, **options):
    return da.align(pipe, PROMPT, method=method, reward=reward, **call(**options))


def test_a_tree_without_choices_is_linear_search(pipe):
    linear = run(pipe, "linear-search:n=3")
    tree = run(pipe, "tree-of-frames:branch=(3,1),keep=(0)")
    assert tree.lineage == linear.lineage
    assert torch.equal(tree.tensor, linear.tensor)
    assert tree.ledger.nfe == linear.ledger.nfe
    assert tree.tensor.shape == (17, 3, 32, 32)


@pytest.mark.slow
def test_cost_result_and_replay(pipe):
    result = run(pipe, TREE)
    linear = run(pipe, "linear-search:n=1")
    whole = linear.ledger.nfe // 2
    # 3 first chunks, 4 second ones, 2 and 2; a later chunk also reads its context in one row
    assert whole == STEPS + 3 * (STEPS + 1)
    assert result.ledger.nfe == 3 * STEPS + (4 + 2 + 2) * (STEPS + 1) + whole
    assert torch.allclose(result.top[0].image, result.tensor, atol=1e-4)
    again = torch.tensor(list(result.replay().tobytes()))
    assert torch.equal(again, torch.tensor(list(result.image.tobytes())))
    assert len(result.frames) == 17


@pytest.mark.slow
def test_a_cut_run_goes_on_and_stores_beginnings_once(pipe, tmp_path):
    class Cut(RuntimeError):
        pass

    def stop(status):
        if status.step == 2:
            raise Cut

    whole = run(pipe, TREE)
    with pytest.raises(Cut):
        run(pipe, TREE, folder=tmp_path, show=stop)
    state = torch.load(tmp_path / "state.pt", weights_only=False)["method"]
    prefixes = [branch.prefix for branch in state.states.scheduler.branches]
    firsts = {prefix.pieces[0].untyped_storage().data_ptr() for prefix in prefixes}
    parents = {prefix.path[:1] for prefix in prefixes}
    assert len(firsts) == len(parents)
    rest = run(pipe, TREE, folder=tmp_path)
    assert torch.equal(rest.tensor, whole.tensor)
    assert rest.ledger.nfe == whole.ledger.nfe


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["best-of-n:n=2", "tree-of-frames:branch=(2),keep=(1)"])
def test_drafts_of_videos(pipe, inner):
    result = run(pipe, da.DraftCommit(inner, steps=1, commits=1))
    assert result.scored == 1
    assert result.score == pytest.approx(result.top[0].score, abs=1e-3)


@pytest.mark.slow
def test_a_clip_goes_on_where_a_chunk_ends(pipe):
    clip = torch.rand(5 + 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = run(pipe, "tree-of-frames:branch=(2,1),keep=(1)", clip=clip)
    assert len(result.tensor) == 17
    assert result.lineage.moves[0].step == 0
    other = run(pipe, "linear-search:n=1", clip=clip.flip(0))
    assert not torch.equal(result.tensor[:9], other.tensor[:9])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"clip": torch.zeros(8, 3, 32, 32)}, "F one of 1, 9, 13 of the video's 17 frames; got"),
        ({"clip": torch.zeros(9, 3, 16, 16)}, "The clip is 16 x 16 and the call makes 32 x 32"),
        ({"kernel": da.Eta(1.0)}, "does not act on a video that is made chunk after chunk"),
        ({"num_frames": 15}, "num_frames=15 does not end where a chunk"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(pipe, options, text):
    with pytest.raises(ValueError, match=text):
        run(pipe, "tree-of-frames", **options)


def test_a_clip_is_a_tensor(pipe):
    with pytest.raises(TypeError, match=r"takes frames as a tensor \[F, 3, H, W\] .* got list"):
        run(pipe, "tree-of-frames", clip=[0.0])


@pytest.mark.parametrize("method", ["zero-order", "beam", "dts"])
def test_searches_of_images_refuse_a_video_by_chunks(pipe, method):
    with pytest.raises(da.UnsupportedModel):
        run(pipe, method)


def test_a_pipeline_in_one_piece_has_no_tree():
    pipe = tiny_pipeline("StableDiffusionPipeline", text=True)
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "reward": "brightness"}
    clip = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"TreeOfFrames cannot act here: .* Use LinearSearch"):
        da.align(pipe, PROMPT, method="tree-of-frames", **options)
    with pytest.raises(ValueError, match=r"clip=... needs a pipeline and a method that go on"):
        da.align(pipe, PROMPT, method="linear-search", clip=clip, **options)


@pytest.mark.slow
def test_an_image_reward_scores_frames(pipe):
    result = run(pipe, "linear-search:n=2", reward="brightness", judges=("redness",))
    places = [0, 2, 5, 7, 9, 11, 14, 16]  # eight of 17 frames, evenly spread
    assert result.score == pytest.approx(float(result.tensor[places].mean()), abs=1e-5)
    assert list(result.judges) == ["mean(redness)"]


@pytest.mark.exhaustive
def test_the_memory_of_a_tree_is_that_of_linear_search(pipe):
    """Peaks of the process in equal batches, after a run that warms up."""
    options = {"batch": 4, "height": 96, "width": 96, "reward": "redness"}
    run(pipe, "linear-search:n=4", **options)
    peaks = []
    for method in ("linear-search:n=8", "tree-of-frames:branch=(8,2,1),keep=(2)"):
        with Peak(torch.device("cpu")) as peak:
            run(pipe, method, **options)
        peaks.append(peak.more)
    assert peaks[1] <= 1.3 * peaks[0]


@pytest.mark.parametrize("method", ["find:iterations=2,batch=2,draws=2", "random-search:noises=3"])
def test_start_noise_of_all_chunks_is_searched(pipe, method):
    """The noise of the result makes its video again in one plain call, which is another sum."""
    result = run(pipe, method)
    assert result.scored == (6 if method.startswith("find") else 3)
    assert result.tensor.shape == (17, 3, 32, 32)
    assert torch.equal(
        torch.tensor(result.score), change(result.tensor[None], [PROMPT])[0].double()
    )
    if method.startswith("find"):
        law = da.NoisePolicy.of(result.findings)
        assert law.mean.shape == result.noise.shape
        again = pipe(PROMPT, latents=result.noise[None], output_type="pt", **call()).frames[0]
        assert torch.allclose(again.float(), result.tensor, atol=1e-4)


def test_noise_of_chunks_is_that_of_their_seeds(pipe):
    """Given what the seeds draw, videos are bit for bit those of the seeds, each its own; noise of
    another shape is refused."""
    from diffalign.core import Meter
    from diffalign.search.video.choice import expander_of
    from diffalign.search.video.sampler import ChunkSampler

    with ChunkSampler(expander_of(pipe, (), Meter(), prompt=PROMPT, **call())) as sampler:
        noise = sampler.noise([5, 6])
        own = sampler.decode(sampler.run(sampler.start([5, 6])))
        given = sampler.decode(sampler.run(sampler.start([5, 6], noise)))
        assert torch.equal(own, given)
        other = sampler.decode(sampler.run(sampler.start([5], noise[1:])))
        assert torch.allclose(other[0], own[1], atol=1e-4)
        with pytest.raises(ValueError, match=r"start\(noise=...\) must be \[1, 4, 5"):
            sampler.start([5], noise[:1, :, :3])
