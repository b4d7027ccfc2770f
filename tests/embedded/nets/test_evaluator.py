"""The latent evaluator: its parts against plain arithmetic, its training repeated to the bit, the
shipped model, and choices on ``emoji``."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.stats import binom

import diffalign as da
from diffalign.core.seeds import seed_of
from diffalign.embedded.load import FOLDER, load
from diffalign.embedded.nets.evaluator import LatentEvaluator, _Words, level_features, word_mask
from diffalign.embedded.workshop.evaluator_report import choice_by_level, within_prompts
from diffalign.embedded.workshop.pairs import batch, pairs
from diffalign.embedded.workshop.train_evaluator import EvaluatorTrainer, corners, parser
from diffalign.embedded.workshop.trajectories import SCALES, Trajectories, generate, prompts
from diffalign.embedded.world.scenes import DEFAULT_MIX
from diffalign.tasks.geneval.verdict import verdict
from diffalign.testing import tiny_pipeline

PROMPTS = ["a photo of two dogs", "a photo of a red apple and a green clock"]


@pytest.fixture(autouse=True)
def untouched():
    state = torch.get_rng_state()
    yield
    assert torch.equal(state, torch.get_rng_state()), (
        "library code must not touch the global generator"
    )


@pytest.fixture(scope="module")
def pipe():
    return load("emoji")


@pytest.fixture(scope="module")
def trained():
    return load("emoji-evaluator")


def test_levels_are_cosines_of_the_logarithm() -> None:
    features = level_features(torch.tensor([0.02, 20.0, 0.02 * math.sqrt(1000), 0.0]))
    assert torch.allclose(features[0], torch.ones(16))
    assert torch.allclose(features[1], torch.tensor([1.0, -1.0] * 8), atol=1e-4)
    assert torch.allclose(features[2], torch.tensor([1.0, 0.0, -1.0, 0.0] * 4), atol=1e-4)
    assert torch.equal(features[3], features[0])


def test_words_look_at_cells_and_at_each_other_like_a_loop_over_words() -> None:
    """Numpy in float64, one word and one head at a time."""
    rng = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        layer = _Words(8, 6, 2).double()
    words, cells = (
        torch.randn(2, 3, 8, generator=rng).double(),
        torch.randn(2, 64, 6, generator=rng).double(),
    )
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = layer(words, cells, mask).detach().numpy()
    table = {name: value.numpy() for name, value in layer.state_dict().items()}

    def linear(x, name):
        return x @ table[f"{name}.weight"].T + table[f"{name}.bias"]

    def norm(x, i):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * table[f"norms.{i}.weight"] + table[f"norms.{i}.bias"]

    def gelu(x):
        return np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)

    for b in range(2):
        x, offer = words[b].numpy(), linear(cells[b].numpy(), "offer")
        query = linear(norm(x, 0), "ask")
        looked = np.zeros((3, 8))
        for word in range(3):
            for head in range(2):
                part, value = slice(4 * head, 4 * head + 4), slice(8 + 4 * head, 12 + 4 * head)
                for cell in range(64):
                    weight = 1 / (
                        1
                        + math.exp(
                            -(query[word, part] @ offer[cell, part] / 2 + table["bias"][head, 0, 0])
                        )
                    )
                    looked[word, part] += weight * offer[cell, value] / 8
        x = x + linear(looked, "outs.0")
        qkv, heard = linear(norm(x, 1), "qkv"), np.zeros((3, 8))
        for word in range(3):
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                others = [other for other in range(3) if mask[b, other]]
                score = np.exp([qkv[word, part] @ qkv[other, 8:16][part] / 2 for other in others])
                heard[word, part] = sum(
                    s * qkv[other, 16:][part]
                    for s, other in zip(score / score.sum(), others, strict=True)
                )
        x = x + linear(heard, "outs.1")
        x = x + linear(gelu(linear(norm(x, 2), "mlp.0")), "mlp.2")
        assert np.abs(found[b] - x).max() < 1e-12


def test_the_mask_ends_with_the_first_end_token() -> None:
    ids = torch.tensor([[0, 7, 9, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 5, 6, 7, 8, 9]])
    assert word_mask(ids).int().tolist() == [
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]


def test_corners_are_the_cells_that_hold_the_boxes() -> None:
    truth = batch(1_000_300, 40).truth
    marks = corners(truth).view(-1, 8, 8)
    assert torch.equal(marks.sum((1, 2)), torch.from_numpy((truth[:, :, 0] >= 0).sum(1)).float())
    for rows, mark in zip(truth, marks, strict=True):
        places = [(int(x), int(y)) for y, x in mark.nonzero().tolist()]
        for _, _, x1, y1, x2, y2 in rows[rows[:, 0] >= 0].tolist():
            assert any(
                8 * x <= x1 and x2 <= 8 * x + 32 and 8 * y <= y1 and y2 <= 8 * y + 32
                for x, y in places
            )


def few(seed: int = 5) -> Trajectories:
    rng = torch.Generator().manual_seed(seed)
    captions = ("a photo of two dogs", "a photo of a red apple", "a photo of a cat")
    right = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])
    sigmas = torch.tensor([3.0, 0.5])
    return Trajectories(
        torch.randn(3, 3, 2, 16, 8, 8, generator=rng).half(),
        captions,
        right,
        sigmas,
        (1.0, 2.0, 4.0),
    )


@pytest.mark.slow
def test_the_first_steps_repeat_and_a_resumed_run_is_the_same_to_the_bit(pipe) -> None:
    options = parser().parse_args(
        ["--out", "unused", "--pairs", "4", "--spoilt", "2", "--from", "2", "--updates", "4"]
    )
    runs = [EvaluatorTrainer(options, load("emoji"), few()) for _ in range(2)]
    steps = [[trainer.step() for _ in range(4)] for trainer in runs]
    assert steps[0] == steps[1]
    assert ["ranking" in step for step in steps[0]] == [False, False, True, True]
    first = EvaluatorTrainer(options, load("emoji"), few())
    early = [first.step() for _ in range(2)]
    resumed = EvaluatorTrainer(options, load("emoji"), few())
    resumed.load(first.state())
    assert [*early, resumed.step(), resumed.step()] == steps[0]
    for name, value in runs[0].modules.state_dict().items():
        assert torch.equal(value, resumed.modules.state_dict()[name]), name


@pytest.mark.slow
def test_the_log_that_ships_is_that_of_the_script() -> None:
    """The first updates again; another kind of machine rounds bfloat16 products (8 bits) in another
    order."""
    header, *records = [
        json.loads(line)
        for line in (FOLDER / "emoji-evaluator" / "log.jsonl").read_text().splitlines()
    ]
    options = parser().parse_args(["--out", "unused"])
    for key in ("seed", "pairs", "spoilt", "updates", "begin"):
        setattr(options, key, header["header"][key])
    trainer = EvaluatorTrainer(options, load("emoji"))
    for record in records[:10]:
        assert trainer.step()["loss"] == pytest.approx(record["loss"], rel=4 * 2**-7)
        assert trainer.done == record["updates"]


def test_ranking_is_the_mean_over_right_and_wrong_pairs(pipe) -> None:
    options = parser().parse_args(["--out", "unused", "--from", "0"])
    trainer, known = EvaluatorTrainer(options, load("emoji"), few()), few()
    assert known.mixed().tolist() == [0, 1]
    trainer.net.compare = lambda cells, words, mask: cells.mean(
        (1, 2)
    )  # any number of the latents will do
    trainer.net.look = lambda latents, sigma: latents.flatten(2).transpose(1, 2)
    from diffalign.embedded.workshop.training import step_generator

    rng = step_generator(options.seed, 1, 0)
    chosen = known.mixed()[torch.randint(2, (6,), generator=rng)].tolist()
    at = torch.randint(2, (6,), generator=rng).tolist()
    losses = []
    for i, step in zip(chosen, at, strict=True):
        scores = known.latents[i, :, step].float().mean((1, 2, 3)).tolist()
        good = [s for s, right in zip(scores, known.right[i].tolist(), strict=True) if right]
        bad = [s for s, right in zip(scores, known.right[i].tolist(), strict=True) if not right]
        losses += [math.log1p(math.exp(b - g)) for g in good for b in bad]
    assert float(trainer.ranking()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_without_trajectories_the_second_half_says_what_it_needs(pipe) -> None:
    options = parser().parse_args(["--out", "unused", "--from", "0"])
    with pytest.raises(ValueError, match="pass --trajectories FILE"):
        EvaluatorTrainer(options, load("emoji")).ranking()
    with pytest.raises(ValueError, match="there is none"):
        Trajectories(
            torch.zeros(1), ("a",), torch.tensor([[True, True]]), torch.zeros(1), (1.0, 2.0)
        ).mixed()


@pytest.mark.slow
def test_trajectories_are_the_states_of_plain_calls(pipe, tmp_path) -> None:
    records, judge = prompts(3, 3), load("emoji-judge-audit")
    made = generate(pipe, judge, records, 7, steps=3)
    made.save(tmp_path / "file.pt")
    sampled = Trajectories.load(tmp_path / "file.pt")
    assert sampled.captions == tuple(records)
    assert sampled.scales == SCALES
    for column, scale in enumerate(SCALES):
        seeds = [seed_of(caption, column % 2, 7) for caption in records]
        rng = [torch.Generator().manual_seed(seed) for seed in seeds]
        with da.apply(pipe, da.CFG(scale)) as session:
            latents = pipe(
                list(records), num_inference_steps=3, generator=rng, output_type="latent"
            ).images
        assert torch.equal(sampled.latents[:, column, -1], latents.half())
        images = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        said = [
            verdict(records[c], d, judge.thresholds).correct
            for c, d in zip(records, judge.detect(images), strict=True)
        ]
        assert sampled.right[:, column].tolist() == said
        assert sampled.sigmas[:-1].tolist() == pytest.approx(session.report().sigma[1:], rel=1e-5)
    assert not set(prompts(3, 3)) & set(prompts(3, 3, set(records)))


def test_what_ships_is_small_and_says_where_it_comes_from() -> None:
    folder = FOLDER / "emoji-evaluator"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    assert sum(p.numel() for p in load("emoji-evaluator").parameters()) < 1_500_000
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    record = json.loads((folder / "training.json").read_text())
    assert records[0]["header"]["model"] == "emoji-evaluator"
    assert records[-1]["updates"] == record["updates"]


@pytest.mark.slow
def test_the_true_caption_beats_the_hard_negative_at_any_useful_level(pipe, trained) -> None:
    """Held-out pairs; the bounds are 5 standard errors below the figures of the model card."""
    count = 100
    found = choice_by_level(
        trained, pipe, list(pairs(1_000_400, count, DEFAULT_MIX, plain=1.0)), times=(799, 349)
    )
    for time, share in (("799", 0.83), ("349", 0.95)):
        assert found[time]["all"] * 2 * count >= binom.ppf(3e-7, 2 * count, share)


def test_other_models_are_refused_by_name(pipe) -> None:
    other = tiny_pipeline("StableDiffusionPipeline", text=True)
    other.set_progress_bar_config(disable=True)
    technique = da.DynamicCFG(1.5, candidates=(1.0, 2.0), evaluators=("emoji-alignment",))
    with (
        da.apply(other, technique),
        pytest.raises(
            da.UnsupportedModel, match=r"the vae of this StableDiffusionPipeline is another one"
        ),
    ):
        other("a dog", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    states = pipe.encode_prompt("a dog", "cpu", 1, True)
    with da.apply(pipe, technique), pytest.raises(ValueError, match="prompts as text"):
        pipe(
            prompt_embeds=states[0],
            negative_prompt_embeds=states[1],
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(0),
        )


def test_a_row_is_judged_by_its_own_prompt_alone(pipe, trained) -> None:
    latents = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    both = LatentEvaluator(trained, pipe, PROMPTS).score(latents, 0.7, [0, 1, 1, 0])
    for row, prompt in enumerate(PROMPTS):
        mine = [i for i, owner in enumerate([0, 1, 1, 0]) if owner == row]
        alone = LatentEvaluator(trained, pipe, [prompt]).score(latents[mine], 0.7, [0, 0])
        assert torch.allclose(both[mine], alone, atol=1e-4)
    assert len(set(both.tolist())) == 4


@pytest.mark.slow
def test_choices_on_emoji_are_the_best_of_plain_steps(pipe, trained) -> None:
    """One real DDIM step at each weight, scored with the states that the pipeline itself encodes;
    two prompts, two images each."""
    candidates = (1.0, 1.5, 3.0)

    def call(technique, steps=None, **options):
        states = []
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]

        def keep(_, index, timestep, given):
            states.append(given["latents"])
            return {}

        with da.apply(pipe, technique) as session:
            pipe(
                PROMPTS,
                num_images_per_prompt=2,
                num_inference_steps=4,
                generator=generators,
                output_type="latent",
                callback_on_step_end=keep,
                **options,
            )
        return states, session.report()

    _, report = call(da.DynamicCFG(1.5, candidates=candidates, evaluators=("emoji-alignment",)))
    chosen = report.extras["unet"]["chosen"]
    assert (report.nfe, report.rewards, report.decodes) == (8, 0, 0)
    ids = pipe.tokenizer(
        PROMPTS, padding="max_length", max_length=24, return_tensors="pt"
    ).input_ids
    words = pipe.encode_prompt(PROMPTS, "cpu", 2, False)[0]
    mask = (ids.cummax(1).values >= 0) & ((ids == 1).cumsum(1) <= 1)
    mask = mask.repeat_interleave(2, 0)
    cumulative = pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[1])]
    level = float(((1 - cumulative) / cumulative).sqrt())
    scores = []
    for weight in candidates:
        states, _ = call(da.CFG(weight))
        with torch.no_grad():
            scores.append(trained(states[0], torch.full((4,), level), words, mask))
    assert chosen[0] == [candidates[k] for k in torch.stack(scores).argmax(0).tolist()]
    assert {weight for row in chosen for weight in row} <= {*candidates}


@pytest.mark.slow
def test_a_reward_through_the_decoder_picks_the_best_picture(pipe) -> None:
    """One step to a clean image: the choice has to be the weight whose finished picture the reward
    likes best."""
    candidates, reward = (1.0, 2.0, 5.0), da.rewards.load("emoji-clip")
    before = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(before.config, set_alpha_to_one=True)
    try:

        def call(technique):
            generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
            with da.apply(pipe, technique) as session:
                images = pipe(
                    PROMPTS,
                    num_images_per_prompt=2,
                    num_inference_steps=1,
                    generator=generators,
                    output_type="pt",
                ).images
            return images, session.report()

        _, report = call(
            da.DynamicCFG(1.5, candidates=candidates, evaluators=("reward:emoji-clip",))
        )
        scores = torch.stack(
            [reward(call(da.CFG(w))[0], [p for p in PROMPTS for _ in range(2)]) for w in candidates]
        )
    finally:
        pipe.scheduler = before
    assert report.extras["unet"]["chosen"] == [[candidates[k] for k in scores.argmax(0).tolist()]]
    assert (report.nfe, report.decodes, report.rewards) == (2, 12, 12)
    assert "12 decoded and 12 scored while sampling" in str(report)


def test_areas_by_step_are_within_prompts(pipe) -> None:
    """A judge that reads the answer off the latents has area 1 at the step where it stands, and one
    half where nothing stands."""
    known = few()
    known.latents.zero_()
    known.latents[:, :, 1] += known.right[:, :, None, None, None].half()

    class Reader:
        def to(self, device):
            return self

        def __call__(self, latents, sigma, words, mask):
            return latents.mean((1, 2, 3))

    found = within_prompts(Reader(), pipe, known)
    assert found["prompts"] == 2
    assert found["auc by step"] == [0.5, 1.0]
