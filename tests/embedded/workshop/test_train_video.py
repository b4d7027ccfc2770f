"""The parts and the training of ``emoji-video``: the pass over all chunks is the pipeline's own,
captions lose one fact, runs resume to the bit, and plain diffusers runs the folder."""

import random
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from diffusers import AnyFlowFARPipeline
from torch import Tensor

from diffalign.embedded.load import FOLDER
from diffalign.embedded.nets.video_judge import ClipVerdict
from diffalign.embedded.workshop import (
    direction_pairs,
    noisy_stories,
    score_video,
    train_video,
    train_video_vae,
    video_parts,
)
from diffalign.embedded.workshop.noisy_captions import CaptionNoise
from diffalign.embedded.workshop.train_video import VideoTrainer
from diffalign.embedded.workshop.train_video_vae import VideoVaeTrainer
from diffalign.embedded.workshop.training import save_state
from diffalign.embedded.workshop.video_forward import velocities, windows
from diffalign.embedded.world.clips import DEFAULT_MIX, Clip, ClipWorld
from diffalign.embedded.world.stories import reading, telling

TEACHER = FOLDER / "emoji" / "vae"
PROMPT = "a photo of a dog moving left and a red unheard-of thing"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipe() -> AnyFlowFARPipeline:
    """A narrow pipeline with random weights everywhere."""
    model, text = video_parts.transformer(1, 32, 2), video_parts.text_encoder(2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    result = video_parts.pipeline(model, video_parts.autoencoder(4), text)
    result.set_progress_bar_config(disable=True)
    return result


def ids(pipe: AnyFlowFARPipeline, prompt: str) -> Tensor:
    length = video_parts.LENGTH
    answer: Tensor = pipe.tokenizer(
        prompt, padding="max_length", max_length=length, return_tensors="pt"
    ).input_ids
    return answer


def one_step(
    pipe: AnyFlowFARPipeline, noise: Tensor, clean: Tensor, level: float, length: int
) -> Tensor:
    """The pipeline's prediction for the chunk behind ``clean`` [1, k, C, 8, 8], from one step of
    its solver: it goes from the level to 0."""
    k = clean.shape[1]
    sigma = level / (video_parts.SHIFT - (video_parts.SHIFT - 1) * level)
    output = pipe(
        prompt=PROMPT,
        height=64,
        width=64,
        num_frames=4 * k + 1,
        chunk_partition=[1] * (k + 1),
        latents=noise[:, : k + 1].transpose(1, 2),
        video_latents=clean if k else None,
        sigmas=[sigma],
        num_inference_steps=1,
        max_sequence_length=length,
        output_type="latent",
    ).frames
    answer: Tensor = (noise[:, k] - output[:, :, k]) / level
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("length", [24, 512])
def test_all_chunks_at_once_are_the_pipeline_chunk_by_chunk(
    pipe: AnyFlowFARPipeline, length: int
) -> None:
    """The oracle is diffusers: its cache, its flexible attention, its padding of keys and text."""
    generator = torch.Generator().manual_seed(5)
    clean, noise = (torch.randn(1, 4, 16, 8, 8, generator=generator) for _ in range(2))
    levels = torch.tensor([[0.9, 0.5, 0.7, 0.3]])
    with torch.no_grad():
        text = video_parts.features(pipe.text_encoder, ids(pipe, PROMPT))
        ours = velocities(
            pipe.transformer, noise, clean[:, :3], levels, text, torch.tensor([length - 24])
        )
    for k in range(4):
        theirs = one_step(pipe, noise, clean[:, :k], float(levels[0, k]), length)
        torch.testing.assert_close(ours[:, k], theirs, rtol=1e-4, atol=2e-4)


def test_a_chunk_sees_the_clean_ones_before_it() -> None:
    """Changing what comes later, or another noisy chunk, changes no bit."""
    model = video_parts.transformer(1, 24, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    clean, noise = torch.randn(1, 3, 16, 8, 8), torch.randn(1, 4, 16, 8, 8)
    levels, text, extra = torch.full((1, 4), 0.5), torch.zeros(1, 3, 128), torch.tensor([0])
    before = velocities(model, noise, clean, levels, text, extra)
    clean[:, 2], noise[:, 0] = 0, 0
    after = velocities(model, noise, clean, levels, text, extra)
    assert [bool((before[:, k] == after[:, k]).all()) for k in range(4)] == [
        False,
        True,
        True,
        False,
    ]


def test_windows_of_two_chunks() -> None:
    """One clean chunk of two tokens, and two noisy ones behind it."""
    parts = [(part.query, part.keys, part.sink) for part in windows(2, 2)]
    assert parts == [(0, (0,), 0), (1, (1,), 126), (2, (0, 2), 126)]


@pytest.mark.parametrize("width", [16, 100])
def test_a_head_needs_room_for_three_axes(width: int) -> None:
    with pytest.raises(ValueError, match="width: expected a multiple of 8 of at least 24, got"):
        video_parts.transformer(1, width)


def test_an_untrained_model_predicts_nothing() -> None:
    model = video_parts.transformer(1, 24, 1)
    answer = velocities(
        model,
        torch.ones(1, 4, 16, 8, 8),
        torch.ones(1, 3, 16, 8, 8),
        torch.full((1, 4), 0.5),
        torch.ones(1, 3, 128),
        torch.tensor([0]),
    )
    assert answer.shape == (1, 4, 16, 8, 8)
    assert not answer.any()


def test_words_are_tokens_and_text_is_the_pipelines(pipe: AnyFlowFARPipeline) -> None:
    tokens = pipe.tokenizer.convert_ids_to_tokens(ids(pipe, "A dog, blurry")[0])
    assert tokens[:6] == ["a", "dog", ",", "<unk>", "</s>", "<pad>"]
    theirs, _ = pipe.encode_prompt([PROMPT, "a cat"], None, False, max_sequence_length=24)
    rows = torch.cat([ids(pipe, PROMPT), ids(pipe, "a cat")])
    ours = video_parts.features(pipe.text_encoder, rows)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not ours[1, 3:].any()


def test_the_parts_are_small() -> None:
    """10 MB in fp16, tokenizer and settings apart; 12 are allowed."""
    parts = (video_parts.transformer(0), video_parts.text_encoder(0), video_parts.autoencoder(0))
    count = sum(p.numel() for part in parts for p in part.parameters())
    assert 2 * count < 10e6


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return list(ClipWorld().clips(1_000_000, 6))


def test_latents_are_those_of_the_key_pictures(clips: list[Clip]) -> None:
    vae = train_video_vae.teacher(TEACHER)
    latents = train_video_vae.key_latents(vae, clips)
    assert latents.shape == (6, 4, 16, 8, 8)
    for clip, latent in zip(clips, latents, strict=True):
        frames = torch.from_numpy(clip.pictures()[::4]).permute(0, 3, 1, 2) / 255
        expected = vae.encoder((2 * frames - 1).to(vae.dtype)).float()
        # sums in bf16 depend on the size of a batch
        torch.testing.assert_close(latent, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("caption", "answers"),
    [
        ("a photo of a dog", {"a photo of a dog"}),
        ("a photo of a red apple", {"a photo of an apple"}),
        (
            "a photo of a dog moving left and a red apple",
            {
                "a photo of a dog and a red apple",
                "a photo of a red apple",
                "a photo of a dog moving left and an apple",
                "a photo of a dog moving left",
            },
        ),
        (
            "a photo of a cat that appears before a clock",
            {"a photo of a cat", "a photo of a clock", "a photo of a cat and a clock"},
        ),
    ],
)
def test_a_caption_leaves_one_fact_out(caption: str, answers: set[str]) -> None:
    rng, story = random.Random(1), reading(caption)
    assert {telling(noisy_stories.omitted(rng, story)) for _ in range(60)} == answers


def test_captions_are_noisy_and_clips_are_not(clips: list[Clip]) -> None:
    world, noise = ClipWorld(), CaptionNoise()
    same, captions = noisy_stories.told(world, noise, 1_000_000, 6)
    assert [clip.story for clip in same] == [clip.story for clip in clips]
    assert noisy_stories.told(world, noise, 1_000_000, 6)[1] == captions
    true, texts = noisy_stories.told(world, CaptionNoise(0.0, 0.0), 5, 50)
    assert texts == [clip.caption for clip in true]
    more, texts = noisy_stories.told(world, noise, 5, 400)
    faults = sum(text != clip.caption for text, clip in zip(texts, more, strict=True))
    # half of the captions, less those that have nothing to leave out
    assert 130 <= faults <= 220


def options(tmp_path: Path, *arguments: str) -> Namespace:
    small = ["--width", "32", "--layers", "1", "--batch", "2", "--pictures", "1", "--alone", "1"]
    places = ["--out", str(tmp_path), "--teacher", str(TEACHER)]
    return train_video.parser().parse_args([*places, *small, *arguments])


@pytest.mark.slow
def test_resume_repeats_the_bits(tmp_path: Path) -> None:
    straight, first = (VideoTrainer(options(tmp_path)) for _ in range(2))
    values = [straight.step() for _ in range(4)]
    for _ in range(2):
        first.step()
    second = VideoTrainer(options(tmp_path))
    second.load(first.state())
    assert [second.step() for _ in range(2)] == values[2:]


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_a_folder(
    pipe: AnyFlowFARPipeline, tmp_path: Path
) -> None:
    video_parts.save(pipe, tmp_path / "pipe")
    arguments = ("--width", "32", "--layers", "2", "--from", str(tmp_path / "pipe"), "--done", "7")
    with pytest.raises(ValueError, match="done: expected --from beside it, got 7 alone"):
        VideoTrainer(options(tmp_path, "--done", "7"))
    run = VideoTrainer(options(tmp_path, *arguments))
    assert run.done == 7
    for mine, theirs in ((run.model, pipe.transformer), (run.text, pipe.text_encoder)):
        for (name, ours), other in zip(
            mine.state_dict().items(), theirs.state_dict().values(), strict=True
        ):
            assert torch.equal(ours.float(), other.half().float().to(ours.dtype).float()), name


def test_plain_diffusers_runs_the_folder(tmp_path: Path) -> None:
    """Trained, saved, loaded without our code: 13 frames, and chunk by chunk the same."""
    run = VideoTrainer(options(tmp_path))
    run.step()
    save_state(tmp_path / "state.pt", {"trainer": run.state(), "seconds": 1.0})
    video_parts.autoencoder(4).save_pretrained(tmp_path / "vae")
    settings = options(tmp_path, "--vae", str(tmp_path / "vae"))
    made = train_video.export(settings, tmp_path / "model")
    pipe = AnyFlowFARPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    for ours, theirs in zip(
        made.text_encoder.parameters(), pipe.text_encoder.parameters(), strict=True
    ):
        assert theirs.dtype == torch.float32
        torch.testing.assert_close(ours.half().float(), theirs, rtol=0, atol=0)
    call = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 2}
    call |= {"guidance_scale": 2.0, "max_sequence_length": 24}
    noise = torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    frames = pipe(**call, num_frames=13, latents=noise, output_type="pt").frames
    assert frames.shape == (1, 13, 3, 64, 64)
    whole = pipe(**call, num_frames=13, latents=noise, output_type="latent").frames
    prefix = None
    for k in range(4):
        latents = pipe(
            **call,
            num_frames=4 * k + 1,
            chunk_partition=[1] * (k + 1),
            latents=noise[:, :, : k + 1],
            video_latents=prefix,
            output_type="latent",
        ).frames
        prefix = latents.transpose(1, 2)
    torch.testing.assert_close(prefix.transpose(1, 2), whole, rtol=0, atol=1e-4)


def test_an_update_needs_clips_and_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch, pictures: expected at least 1 of each, got 2 and"):
        VideoTrainer(options(tmp_path, "--pictures", "0"))


def test_export_needs_a_state(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state: expected a training state at"):
        train_video.export(options(tmp_path), None)


def vae_trainer(tmp_path: Path) -> VideoVaeTrainer:
    arguments = ["--out", str(tmp_path), "--teacher", str(TEACHER), "--batch", "1"]
    arguments += ["--pictures", "2", "--alone", "1"]
    return VideoVaeTrainer(train_video_vae.parser().parse_args(arguments))


@pytest.mark.slow
def test_the_autoencoder_resumes_to_the_bit(tmp_path: Path) -> None:
    """One update on pictures, then clips: whole ones at multiples of four."""
    straight, first = vae_trainer(tmp_path), vae_trainer(tmp_path)
    values = [straight.step() for _ in range(3)]
    assert [sorted(value) for value in values] == [["mse", "reading"], ["mse"], ["mse"]]
    first.step()
    second = vae_trainer(tmp_path)
    second.load(first.state())
    assert [second.step() for _ in range(2)] == values[1:]


@pytest.mark.slow
def test_drawing_is_the_decoder_without_its_clamp() -> None:
    vae = video_parts.autoencoder(4)
    latents = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        free, clamped = train_video_vae.drawing(vae, latents), vae.decode(latents).sample
        assert free.shape == (1, 3, 9, 64, 64)
        torch.testing.assert_close(free.clamp(-1, 1), clamped, rtol=0, atol=0)
        moments = vae._encode(clamped)
    assert moments.shape == (1, 32, 3, 8, 8)
    assert (moments[:, 16:] == -12).all()


def test_it_starts_as_one_that_looks_at_key_pictures() -> None:
    vae = video_parts.autoencoder(4)
    train_video_vae.look_at_key_pictures(vae)
    latents = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        film = train_video_vae.drawing(vae, latents)
        with train_video_vae.one_picture(vae):
            pictures = train_video_vae.drawing(vae, latents.transpose(1, 2).reshape(6, 16, 1, 8, 8))
        again = train_video_vae.drawing(vae, latents)
        moments = vae._encode(film)
        keys = film[:, :, ::4].transpose(1, 2).reshape(6, 3, 1, 64, 64)
        with train_video_vae.one_picture(vae):
            alone = vae._encode(keys)
    torch.testing.assert_close(
        moments.transpose(1, 2).reshape(6, 32, 8, 8), alone[:, :, 0], rtol=0, atol=1e-4
    )
    pictures = pictures.reshape(2, 3, 3, 64, 64)
    for frame, key in zip(range(9), (0, 1, 1, 1, 1, 2, 2, 2, 2), strict=True):
        torch.testing.assert_close(film[:, :, frame], pictures[:, key], rtol=0, atol=1e-5)
    assert torch.equal(film, again)


@pytest.mark.slow
def test_one_part_learns_and_the_other_is_taken(tmp_path: Path) -> None:
    other = video_parts.autoencoder(9)
    other.save_pretrained(tmp_path / "vae")
    arguments = ["--out", str(tmp_path), "--teacher", str(TEACHER), "--pictures", "2"]
    arguments += ["--from", str(tmp_path / "vae"), "--parts", "encoder", "--updates", "2"]
    with pytest.raises(ValueError, match="parts: an encoder learns from pictures alone"):
        VideoVaeTrainer(train_video_vae.parser().parse_args([*arguments, "--alone", "1"]))
    run = VideoVaeTrainer(train_video_vae.parser().parse_args([*arguments, "--alone", "2"]))
    before = run.vae.encoder.conv_in.weight.detach().clone()
    assert list(run.step()) == ["reading"]
    assert not torch.equal(run.vae.encoder.conv_in.weight, before)
    made = run.export()
    for name in ("decoder", "post_quant_conv"):
        ours, theirs = (part.get_submodule(name).state_dict() for part in (made, other))
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key


def test_pairs_of_a_lesson_differ_in_a_word_and_are_true() -> None:
    """A quarter go two ways from one place, the others opposite ways from mirrored places; all stay
    inside."""
    clips = direction_pairs.pairs(5, 200, plain=1.0)
    again = direction_pairs.pairs(5, 200, plain=1.0)
    assert [clip.actors for clip in clips] == [clip.actors for clip in again]
    same = 0
    for first, second in zip(clips[::2], clips[1::2], strict=True):
        assert (first.background == second.background).all()
        (one,), (two,) = first.actors, second.actors
        assert (one.role.name, one.role.colour) == (two.role.name, two.role.colour)
        assert one.role.motion != two.role.motion
        words = [
            {*clip.caption.split()} - {*other.caption.split()}
            for clip, other in ((first, second), (second, first))
        ]
        assert words == [{one.role.motion}, {two.role.motion}]
        for clip, actor in ((first, one), (second, two)):
            assert reading(clip.caption) == clip.story
            for frame in (0, 12):
                corner = actor.corner(frame)
                assert corner is not None
                assert all(0 <= value <= 32 for value in corner)
        if one.place == two.place:
            same += 1
            assert {one.role.motion, two.role.motion} & {"left", "right"}
            assert {one.role.motion, two.role.motion} & {"up", "down"}
        else:
            assert direction_pairs.OPPOSITES[one.role.motion or ""] == two.role.motion
    # 4.5 standard errors of 200 draws
    assert abs(same - 50) <= 28


def test_a_lesson_begins_at_the_edges() -> None:
    clips = direction_pairs.pairs(7, 60, plain=1.0, wide=0.0)
    starts = {"left": (32, 16), "right": (0, 16), "up": (16, 32), "down": (16, 0)}
    apart = [
        actor
        for first, second in zip(clips[::2], clips[1::2], strict=True)
        if first.actors[0].place != second.actors[0].place
        for actor in (*first.actors, *second.actors)
    ]
    assert len(apart) > 60
    assert all(actor.place == starts[actor.role.motion or ""] for actor in apart)


def test_pairs_of_events_exchange_the_roles() -> None:
    clips = direction_pairs.pairs(6, 20, plain=0.5, events=1.0)
    for first, second in zip(clips[::2], clips[1::2], strict=True):
        assert first.story.event == second.story.event is not None
        assert first.story.roles == second.story.roles[::-1]
        for one, two in zip(first.actors, second.actors, strict=True):
            assert (one.place, one.entrance) == (two.place, two.entrance)
            assert one.role != two.role


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_of_a_lesson_are_checked(share: float) -> None:
    with pytest.raises(ValueError, match=r"plain: expected a share in \[0, 1\], got"):
        direction_pairs.pairs(1, 1, plain=share)
    with pytest.raises(ValueError, match=r"wide: expected a share in \[0, 1\], got"):
        direction_pairs.pairs(1, 1, plain=1.0, wide=share)
    with pytest.raises(ValueError, match=r"events: expected a share in \[0, 1\], got"):
        direction_pairs.pairs(1, 1, plain=1.0, events=share)


@pytest.mark.slow
def test_a_lesson_shares_noise_within_its_pairs(tmp_path: Path) -> None:
    run = VideoTrainer(options(tmp_path, "--lesson", "0", "1", "--pairs", "2"))
    latents = torch.zeros(4, 2, 16, 8, 8)
    ids = run.ids(["a photo of a dog moving left"] * 4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        errors, levels = run.errors(latents, ids, generator, paired=True)
    assert torch.equal(errors[::2], errors[1::2])
    assert torch.equal(levels[::2], levels[1::2])
    assert not torch.equal(levels[0], levels[2])
    assert "lesson2" in run.step()
    assert not any(name.startswith("lesson") for name in run.step())


def test_sentences_are_fixed_and_cover_the_categories() -> None:
    with pytest.raises(ValueError, match="each: expected at least 1 sentence"):
        score_video.sentences(0)
    pairs = score_video.sentences(3)
    assert pairs == score_video.sentences(4)[:3] + [
        pair for i in (1, 2, 3) for pair in score_video.sentences(4)[4 * i : 4 * i + 3]
    ]
    assert [category for _, category in pairs[::3]] == ["object", "colour", "motion", "order"]
    for prompt, category in pairs:
        story = reading(prompt)
        assert (story.event is not None) == (category == "order")
        assert any(role.motion for role in story.roles) == (category == "motion")


@pytest.mark.slow
def test_reconstructions_come_from_either_latent(clips: list[Clip]) -> None:
    """With the teacher's latents the encoder has no say, and with its own the teacher has none."""
    vae = video_parts.autoencoder(4)
    first, own = (
        score_video.reconstructed(vae, clips[:1], source)
        for source in (train_video_vae.teacher(TEACHER), None)
    )
    assert first.shape == own.shape == (1, 13, 3, 64, 64)
    with torch.no_grad():
        for parameter in vae.encoder.parameters():
            parameter.zero_()
    source = train_video_vae.teacher(TEACHER)
    assert torch.equal(score_video.reconstructed(vae, clips[:1], source), first)
    assert not torch.equal(score_video.reconstructed(vae, clips[:1]), own)


def test_a_summary_counts_clips_and_facts() -> None:
    verdicts = [
        ClipVerdict((True,), (None,), (None,), None),
        ClipVerdict((True, False), (True, None), (False, None), None),
        ClipVerdict((True, True), (None, None), (None, None), True),
    ]
    assert score_video.summary(verdicts, ["object", "motion", "order"]) == {
        "object": 1.0,
        "motion": 0.0,
        "order": 1.0,
        "mean": 0.667,
        "fact_objects": 0.8,
        "fact_colours": 1.0,
        "fact_motions": 0.0,
        "fact_order": 1.0,
    }


def test_the_curriculum_ends_in_the_mixture_of_the_world() -> None:
    easy, full = train_video.EASY, dict(DEFAULT_MIX)
    assert train_video.curriculum(-1) == {kind: easy.get(kind, 0.0) for kind in full}
    assert train_video.curriculum(2) == full
    assert train_video.curriculum(0.5)["still"] == pytest.approx((0.35 + 0.12) / 2)


def test_levels_are_stratified_and_a_quarter_is_high(tmp_path: Path) -> None:
    run = VideoTrainer(options(tmp_path))
    levels = run.levels(16, 4, torch.Generator().manual_seed(1))
    assert levels.shape == (16, 4)
    assert bool((levels > 0).all() & (levels < 1).all())
    # four of each column are drawn above TOP; by chance others are
    assert bool(((levels > train_video.TOP).sum(0) >= 4).all())


def test_a_sheet_shows_four_frames_of_each_film() -> None:
    films = torch.zeros(5, 13, 3, 64, 64)
    films[0, 12] = 1.0
    verdict = ClipVerdict((True,), (None,), (None,), None)
    image = score_video.sheet(films, [PROMPT] * 5, [verdict] * 5)
    assert image.size == (4 * (4 * 64 + 8), 2 * (64 + 26))
    assert image.getpixel((3 * 64 + 32, 32)) == (255, 255, 255)
    assert image.getpixel((2 * 64 + 32, 32)) == (0, 0, 0)
