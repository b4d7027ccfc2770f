"""The denoiser's second stage: it starts from given weights, resumes to the bit, and draws the
steps that it says."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from diffalign.embedded.workshop import train_denoiser, train_vae
from diffalign.embedded.workshop.training import Team, save_state
from diffalign.embedded.world.scenes import DEFAULT_MIX, KINDS
from diffalign.embedded.world.tokens import build_tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def trainer(tokenizer: CLIPTokenizer, *arguments: str) -> train_denoiser.DenoiserTrainer:
    options = train_denoiser.parser().parse_args(
        ["--captions", "noisy", "--mix", "relations", "--top", "0.5", "--batch", "4", *arguments]
    )
    return train_denoiser.DenoiserTrainer(
        Team(), options, train_vae.build(3), tokenizer.get_vocab()
    )


def test_the_stage_starts_from_the_weights_of_a_folder(
    tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    """The folder's fp16 weights, widened, are the first master weights and the first average."""
    unet, text = train_denoiser.build(99, len(tokenizer.get_vocab()))
    pipe = train_denoiser.pipeline(train_vae.build(3), tokenizer, unet, text)
    pipe.to(torch.float16).save_pretrained(tmp_path)
    parameters = [p.detach().float().flatten() for part in (unet, text) for p in part.parameters()]
    stage = trainer(tokenizer, "--from", str(tmp_path))
    assert torch.equal(stage.flat.master, torch.cat(parameters))
    assert torch.equal(stage.ema, torch.cat(parameters))


@pytest.mark.slow
def test_an_exported_folder_loads_without_arguments(
    tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    """Weights in fp16 on disk, every part in fp32 once loaded, or in the type that was asked."""
    save_state(tmp_path / "state.pt", {"trainer": trainer(tokenizer).state()})
    train_vae.build(3).save_pretrained(tmp_path / "vae")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folders = [tmp_path / name for name in ("vae", "tokenizer", "emoji")]
    train_denoiser.export(tmp_path / "state.pt", *folders)
    for arguments in ({}, {"dtype": torch.float16}):
        pipe = StableDiffusionPipeline.from_pretrained(folders[-1], **arguments)
        kinds = {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)}
        assert kinds == {arguments.get("dtype", torch.float32)}
    stored = load_file(folders[-1] / "text_encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_a_folder_without_a_pipeline_is_refused(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="from: expected the folder of a pipeline"):
        trainer(tokenizer, "--from", str(tmp_path))


@pytest.mark.slow
def test_resume_repeats_the_bits(tokenizer: CLIPTokenizer) -> None:
    straight, first = trainer(tokenizer), trainer(tokenizer)
    losses = [straight.step() for _ in range(4)]
    for _ in range(2):
        first.step()
    second = trainer(tokenizer)
    second.load(first.state())
    assert [second.step() for _ in range(2)] == losses[2:]


@pytest.mark.slow
def test_a_lesson_resumes_and_ends(tokenizer: CLIPTokenizer) -> None:
    """Two steps with pairs, then two without; a resumed run repeats them."""
    arguments = ("--lesson", "2", "--pairs", "1")
    straight, first = trainer(tokenizer, *arguments), trainer(tokenizer, *arguments)
    assert straight.pairs() == 1
    losses = [straight.step() for _ in range(3)]
    assert straight.pairs() == 0
    first.step()
    second = trainer(tokenizer, *arguments)
    second.load(first.state())
    assert [second.step() for _ in range(2)] == losses[1:]


def test_the_pictures_of_a_pair_share_noise_and_step(tokenizer: CLIPTokenizer) -> None:
    stage = trainer(tokenizer, "--batch", "16", "--lesson", "9", "--pairs", "6")
    generator = torch.Generator().manual_seed(1)
    steps, noise = stage.draws(torch.Size((16, 16, 8, 8)), generator)
    assert torch.equal(steps[4::2], steps[5::2])
    assert torch.equal(noise[4::2], noise[5::2])
    assert steps[4:].min() >= 850
    assert len(noise.flatten(1).unique(dim=0)) == 4 + 6


def test_captions_are_noisy_only_where_asked(tokenizer: CLIPTokenizer) -> None:
    """Same seed, same pictures; some of the captions differ."""
    noisy = trainer(tokenizer, "--batch", "64").batch()
    true = trainer(tokenizer, "--batch", "64", "--captions", "true").batch()
    assert torch.equal(noisy[0], true[0])
    assert 0 < int((noisy[1] != true[1]).any(1).sum()) < 64


def test_noise_steps_without_a_top_are_the_first_stages() -> None:
    """The stratified steps of the first stage, from the same draws."""
    place = (torch.arange(16) + torch.rand(16, generator=torch.Generator().manual_seed(3))) / 16
    steps = train_denoiser.noise_steps(16, 1000, 0.0, torch.Generator().manual_seed(3))
    assert torch.equal(steps, (place**0.75 * 1000).long())


@pytest.mark.parametrize(("top", "least"), [(0.25, 4), (0.5, 8), (1.0, 16)])
def test_noise_steps_put_a_share_among_the_noisiest(top: float, least: int) -> None:
    """At least the share above .85; without it 1 - .85 ** (4 / 3) of the rest lies there, .195."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([train_denoiser.noise_steps(16, 1000, top, generator) for _ in range(200)])
    counts = (draws >= 850).sum(1).float()
    assert counts.min() >= least
    # A stratified count varies by less than one, so a mean of 200 by less than .1.
    expected = least + (16 - least) * (1 - 0.85 ** (4 / 3))
    assert counts.mean() == pytest.approx(expected, abs=0.1)
    assert draws.min() >= 0
    assert draws.max() < 1000


def test_the_mixture_of_relations_has_every_kind() -> None:
    mix = train_denoiser.RELATIONS_MIX
    assert set(mix) == set(KINDS) == set(DEFAULT_MIX)
    assert sum(mix.values()) == pytest.approx(1.0)
    assert mix["position"] == 2 * DEFAULT_MIX["position"]
