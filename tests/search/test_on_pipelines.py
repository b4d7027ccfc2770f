"""Every method through the door, on tiny pipelines of random weights."""

import dataclasses

import pytest
import torch

import diffalign as da
from diffalign.testing import tiny_inputs, tiny_pipeline

PROMPT = "a photo of a red apple and a green clock"
PIPELINES = {
    "StableDiffusionPipeline": {"guidance_scale": 3.0, "height": 16, "width": 16},
    "StableDiffusion3Pipeline": {"guidance_scale": 3.0, "height": 32, "width": 32},
}
STEPS = 4
# method -> (evaluations of 4 steps by its formula and of the final call, whether the sampler draws)
METHODS = {
    "zero-order:neighbours=2,rounds=2,patience=none": (4 * (1 + 4) + 4, False),
    "path-search:paths=1,children=2,begin=0.5,forward=1,backward=2,searches=1": (10 + 6, False),
    "beam:beams=1,children=2,every=2,searches=1": (8 + 4, True),
    "beam:preset=svdd,children=2,searches=1": (8 + 4, True),
    "beam:preset=dsearch,children=1,searches=1": (None, True),
    "rbf:starts=2,quota=2,searches=1": (2 + 2 * 3 + 4, True),
    "draft-commit:inner='best-of-n:n=3',commits=1": (3 * 2 + 4 + 4, False),
    "draft-commit:inner='zero-order:rounds=1,neighbours=2',steps=3,commits=1": (9 + 4 + 4, False),
    "prompt-search:rounds=1,children=2,draws=1,final=1": (4 * (1 + 3 + 2 + 1), False),
}


def redness(images, prompts):
    """A reward that is cheap and depends on every pixel."""
    weights = torch.linspace(-1.0, 1.0, images[0].numel()).reshape(images[0].shape)
    return (images * weights).flatten(1).sum(1)


def texts_by_hash(pipe):
    """Stands for the three encoders of Stable Diffusion 3: embeddings that follow from the text."""
    inputs = tiny_inputs("StableDiffusion3Pipeline")
    shapes = [inputs[name].shape[1:] for name in ("prompt_embeds", "pooled_prompt_embeds")]

    def encode_prompt(prompt, *args, num_images_per_prompt=1, **kwargs):
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        rows = [[embedding(text, shape) for text in prompts] for shape in shapes]
        empty = [[embedding("", shape)] * len(prompts) for shape in shapes]
        full, pooled, no_full, no_pooled = (torch.stack(part) for part in (*rows, *empty))
        return full, no_full, pooled, no_pooled

    pipe.encode_prompt = encode_prompt
    return pipe


def embedding(text, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(text.encode())))


@pytest.fixture(scope="module")
def pipes():
    pipes = {
        "StableDiffusionPipeline": tiny_pipeline("StableDiffusionPipeline", text=True),
        "StableDiffusion3Pipeline": texts_by_hash(tiny_pipeline("StableDiffusion3Pipeline")),
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


def run(pipes, name, method, **options):
    draws = next(d for text, (_, d) in METHODS.items() if text == method)
    kernel = {"kernel": da.Eta(1.0)} if draws else {}
    call = {**PIPELINES[name], "num_inference_steps": STEPS}
    return da.align(pipes[name], PROMPT, method=method, reward=redness, **kernel, **call, **options)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", list(PIPELINES))
def test_cost_result_and_replay(pipes, name, method):
    result = run(pipes, name, method)
    evaluations, _ = METHODS[method]
    spent = result.ledger.evaluations
    if method.startswith("prompt-search"):
        # the comparison is left out where no wording is better
        assert spent in (evaluations, evaluations - 2 * STEPS)
    elif evaluations is not None:
        assert spent == evaluations
    assert result.score >= result.first.score - 1e-4
    assert float(redness(result.tensor[None], [PROMPT])[0]) == pytest.approx(result.score, abs=1e-5)
    again = torch.tensor(list(result.replay().tobytes()))
    assert torch.equal(again, torch.tensor(list(result.image.tobytes())))


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_the_image_that_was_scored_is_the_one_that_is_made_again(pipes, method):
    """Within what another batch changes in the last bits, 1e-4 of the largest pixel."""
    result = run(pipes, "StableDiffusionPipeline", method)
    assert result.top[0].lineage == result.lineage or dataclasses.is_dataclass(result.lineage)
    assert torch.allclose(result.top[0].image, result.tensor, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_a_budget_is_kept(pipes, method):
    endless = method.replace("searches=1", "searches=none").replace("rounds=2", "rounds=none")
    name = "StableDiffusionPipeline"
    METHODS.setdefault(endless, METHODS[method])
    result = run(pipes, name, endless, budget=da.Budget(nfe=101))
    assert result.ledger.nfe <= 101
    assert result.scored >= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_that_was_cut_goes_on_to_the_same_end(pipes, method, tmp_path):
    whole = run(pipes, "StableDiffusionPipeline", method)
    calls = []

    def stop(status):
        calls.append(status)
        if len(calls) == 2:
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        run(pipes, "StableDiffusionPipeline", method, folder=tmp_path / "run", show=stop)
    rest = run(pipes, "StableDiffusionPipeline", method, folder=tmp_path / "run")
    assert rest.score == whole.score
    assert torch.equal(rest.tensor, whole.tensor)
    assert rest.ledger.evaluations == whole.ledger.evaluations
