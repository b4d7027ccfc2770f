"""The dual encoder: its pairs, losses and figures against plain arithmetic; the shipped model on
held-out pairs; open_clip alone."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from scipy.stats import binom

from diffalign.embedded.load import FOLDER, load
from diffalign.embedded.workshop.clip_loss import (
    chosen_right,
    contrast,
    patch_loss,
    patch_truth,
    place_truth,
    ranked,
    scene_truth,
)
from diffalign.embedded.workshop.clip_report import auc, choice_figures, within_prompt
from diffalign.embedded.workshop.pairs import CHANGES, TURNED, Pair, batch, pairs
from diffalign.embedded.workshop.samples import (
    MIRROR,
    MIXES,
    Samples,
    mirrored,
    official_prompts,
    reworded,
    training_prompts,
)
from diffalign.embedded.workshop.samples import OPPOSITE as TURNED_WORDS
from diffalign.embedded.workshop.train_clip import ClipTrainer, begin, parser
from diffalign.embedded.workshop.training import STATE, load_state
from diffalign.embedded.world.captions import words
from diffalign.embedded.world.editions import FIRST, SECOND, Edition
from diffalign.embedded.world.scenes import DEFAULT_MIX
from diffalign.embedded.world.tokens import encode, grammar_words
from diffalign.embedded.world.vocabulary import COLOURS, NATIVE, OBJECTS, OPPOSITE
from diffalign.tasks.geneval.verdict import prompts

MODELS = {"emoji-clip": FIRST, "emoji-clip-2": SECOND}
VOCAB = {"<s>": 0, "<e>": 1} | {f"{word}</w>": 2 + i for i, word in enumerate(grammar_words())}


@pytest.fixture(autouse=True)
def one_thread():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert torch.equal(state, torch.get_rng_state()), (
        "library code must not touch the global generator"
    )


@pytest.fixture(scope="module")
def found() -> list[Pair]:
    return list(pairs(1_000_100, 600))


def test_pairs_differ_in_the_one_fact_they_name(found: list[Pair]) -> None:
    for pair in found:
        a, b = pair.first, pair.second
        changed = [i for i, (x, y) in enumerate(zip(a.groups, b.groups, strict=True)) if x != y]
        if pair.change == "relation":
            assert not changed
            assert a.relation != b.relation
        elif pair.change == "binding":
            assert changed == [0, 1]
            assert a.relation == b.relation
            assert [g.name for g in a.groups] == [g.name for g in b.groups]
            assert sorted((g.colour, g.count) for g in a.groups) == sorted(
                (g.colour, g.count) for g in b.groups
            )
        else:
            assert len(changed) == 1
            assert a.relation == b.relation
            x, y = a.groups[changed[0]], b.groups[changed[0]]
            assert [x.name != y.name, x.colour != y.colour, x.count != y.count] == [
                pair.change == kind for kind in ("class", "colour", "count")
            ]
        assert a.caption != b.caption
    counts = Counter(pair.change for pair in found)
    assert min(counts[change] for change in CHANGES) > 40


def test_pictures_of_pairs_show_their_facts(found: list[Pair]) -> None:
    for pair in found[:200]:
        for picture in (pair.first, pair.second):
            rows = picture.truth[picture.truth[:, 0] >= 0]
            shown = Counter((OBJECTS[k], (*COLOURS, NATIVE)[c]) for k, c in rows[:, :2].tolist())
            assert shown == Counter({(g.name, g.colour): g.count for g in picture.groups})
            if picture.relation:
                (ax, ay), (bx, by) = (((r[2] + r[4]) / 2, (r[3] + r[5]) / 2) for r in rows.tolist())
                gap = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}[
                    picture.relation
                ]
                assert gap > 20
    free = [np.ptp(p.first.image.astype(int) - p.second.image.astype(int)) for p in found[:20]]
    assert min(free) > 0  # the two pictures of a pair are never the same


def test_pairs_of_the_second_edition_show_their_facts() -> None:
    """Up to five objects, at most four of a class; a changed relation keeps background and, mostly,
    the two cells."""
    found = list(pairs(1_000_150, 300, edition=SECOND))
    assert max(len(p.first.scene.objects) for p in found) == 5
    kept = []
    for pair in found:
        for picture in (pair.first, pair.second):
            assert picture.image.shape == (128, 128, 3)
            rows = picture.truth[picture.truth[:, 0] >= 0]
            shown = Counter((OBJECTS[k], (*COLOURS, NATIVE)[c]) for k, c in rows[:, :2].tolist())
            assert shown == Counter({(g.name, g.colour): g.count for g in picture.groups})
            assert max(g.count for g in picture.groups) <= 4
            if picture.relation:
                assert SECOND.allows(picture.scene.layout, picture.relation)
        tones = [picture.scene.tones for picture in (pair.first, pair.second)]
        assert np.array_equal(*tones)
        if pair.change == "relation" and pair.second.relation == OPPOSITE[pair.first.relation]:
            kept.append(pair.first.scene.layout == pair.second.scene.layout[::-1])
    assert len(kept) > 5
    assert all(kept)


def test_a_batch_marks_equal_facts_and_repeats_the_pairs() -> None:
    images, captions, truth, same, scenes = batch(5, 150)
    again = [picture for pair in pairs(5, 150) for picture in (pair.first, pair.second)]
    assert captions == [picture.caption for picture in again]
    assert all(
        (a == b.image).all() and (t == b.truth).all()
        for a, b, t in zip(images, again, truth, strict=True)
    )
    assert all((a == b.image).all() for a, b in zip(images, scenes, strict=True))
    assert (same == same.T).all()
    assert not same.diagonal().any()
    assert 0 < same.sum() < 600
    for i, j in zip(*same.nonzero(), strict=True):
        assert Counter(again[i].groups) == Counter(again[j].groups)


def test_contrast_equals_its_definition_in_float64_loops() -> None:
    rng = torch.Generator().manual_seed(1)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(6, 5, generator=rng).double(), dim=-1)
        for _ in range(2)
    )
    spoilt = torch.nn.functional.normalize(torch.randn(2, 5, generator=rng).double(), dim=-1)
    same = torch.zeros(6, 6, dtype=torch.bool)
    same[0, 3] = same[3, 0] = True
    dot = [[7.0 * float((a * b).sum()) for b in texts] for a in images]
    extra = [[7.0 * float((b * s).sum()) for s in spoilt] for b in texts]
    forward = backward = choice = 0.0
    for i in range(6):
        open_ = [j for j in range(6) if not same[i, j]]
        forward += math.log(sum(math.exp(dot[i][j]) for j in open_)) - dot[i][i]
        backward += (
            math.log(sum(math.exp(dot[j][i]) for j in open_) + sum(map(math.exp, extra[i])))
            - dot[i][i]
        )
        partner = i + 1 if i % 2 == 0 else i - 1
        choice += math.log1p(math.exp(dot[i][partner] - dot[i][i])) + math.log1p(
            math.exp(dot[partner][i] - dot[i][i])
        )
    both, two_way = contrast(images, texts, spoilt, torch.tensor(7.0, dtype=torch.float64), same)
    assert float(both) == pytest.approx((forward + backward) / 12, rel=1e-12)
    assert float(two_way) == pytest.approx(choice / 12, rel=1e-12)


def test_the_chance_to_choose_a_right_picture_by_hand() -> None:
    """Scores 0 and log 3 and log 4: the softmax draws the second with 3/8; two of them with 4/8."""
    scores = torch.tensor([[0.0, math.log(3), math.log(4)]], dtype=torch.float64)
    for right, chance in (
        ([False, True, False], 3 / 8),
        ([True, True, False], 4 / 8),
        ([True, True, True], 1.0),
    ):
        loss = chosen_right(scores, torch.tensor([right]))
        assert float(loss) == pytest.approx(-math.log(chance), abs=1e-12)
    both = chosen_right(
        scores.expand(2, 3), torch.tensor([[False, True, False], [True, True, False]])
    )
    assert float(both) == pytest.approx(-(math.log(3 / 8) + math.log(4 / 8)) / 2, abs=1e-12)


def test_targets_by_hand() -> None:
    truth = torch.full((1, 4, 6), -1.0)
    truth[0, 0] = torch.tensor([5.0, 2.0, 8, 16, 24, 24])
    truth[0, 1] = torch.tensor([5.0, 10.0, 40, 0, 64, 8])
    kind, colour = patch_truth(truth)
    expected = torch.full((8, 8), 80)
    expected[2, 1:3] = expected[0, 5:] = 5
    assert torch.equal(kind.view(8, 8), expected)
    assert colour.view(8, 8)[2, 1] == 2
    assert colour.view(8, 8)[0, 7] == 10
    assert (colour == 11).sum() == 59
    presence, numbers = scene_truth(truth)
    assert numbers[0, 5] == 2
    assert numbers.sum() == 2
    assert presence[0, 5].nonzero().flatten().tolist() == [2, 10]
    where, there = place_truth(truth)
    # Centres (16, 20) and (52, 4), mean (34, 12), from -1 to 1 across 64 pixels.
    assert where[0, 5].tolist() == pytest.approx([34 / 32 - 1, 12 / 32 - 1])
    assert there.nonzero().tolist() == [[0, 5]]


def test_area_under_the_curve_by_hand() -> None:
    assert auc([3.0, 1.0, 2.0, 0.0], [True, True, False, False]) == 0.75
    assert auc([1.0, 1.0], [True, False]) == 0.5
    with pytest.raises(ValueError, match="2 right and 0 wrong"):
        auc([1.0, 2.0], [True, True])


def test_training_prompts_are_not_official_and_all_words_are_known(tmp_path: Path) -> None:
    records = training_prompts(41, 60)
    assert len(records) == 60
    assert not set(records) & {str(record["prompt"]) for record in prompts()}
    assert len(official_prompts(100)) == 100
    ids = Samples.ids(list(records), VOCAB)
    assert ids.shape == (60, 24)
    images = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)
    samples = Samples(images, ("a", "b"), torch.tensor([[True, False, True], [True, True, True]]))
    samples.save(tmp_path / "s.pt")
    again = Samples.load(tmp_path / "s.pt")
    assert again.captions == ("a", "b")
    _, captions, right = again.groups(3, torch.Generator().manual_seed(0))
    assert captions == ["a"] * 3
    assert right.tolist() == [[True, False, True]] * 3
    both = Samples.joined([tmp_path / "s.pt", tmp_path / "s.pt"])
    assert both.captions == ("a", "b", "a", "b")
    assert both.images.shape == (4, 3, 3, 4, 4)
    assert both.right.tolist() == samples.right.tolist() * 2


def test_hard_prompts_are_new_and_of_the_named_kinds() -> None:
    records = training_prompts(42, 60, MIXES["hard"])
    assert {str(record["tag"]) for record in records.values()} == {
        "colors",
        "two_object",
        "counting",
        "position",
        "color_attr",
    }
    others = training_prompts(42, 60, MIXES["hard"], exclude=set(list(records)[:20]))
    assert not set(list(records)[:20]) & set(others)
    assert list(others)[:40] == list(records)[20:]


def options(**changes: int | str) -> argparse.Namespace:
    found = parser().parse_args(
        [
            "--out",
            "unused",
            "--tokenizer",
            "unused",
            "--pairs",
            "2",
            "--spoilt",
            "2",
            "--updates",
            "100",
        ]
    )
    found.focus = 2  # the last step of the test is in focus
    for key, value in changes.items():
        setattr(found, key, value)
    return found


@pytest.mark.slow
def test_a_resumed_run_repeats_the_bits() -> None:
    straight = ClipTrainer(options(), VOCAB)
    losses = [straight.step() for _ in range(3)]
    first = ClipTrainer(options(), VOCAB)
    again = [first.step()]
    second = ClipTrainer(options(seed=77), VOCAB)
    second.options.seed = first.options.seed
    second.load(first.state())
    again += [second.step() for _ in range(2)]
    assert again == losses
    assert all(math.isfinite(value) for part in losses for value in part.values())
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            straight.modules.state_dict().values(),
            second.modules.state_dict().values(),
            strict=True,
        )
    )


@pytest.mark.slow
def test_ranking_pushes_right_above_wrong() -> None:
    """One step on the ranking loss alone raises the margin between right and wrong pictures of a
    prompt."""
    images = torch.randint(
        0, 256, (1, 4, 3, 64, 64), generator=torch.Generator().manual_seed(3)
    ).byte()
    right = torch.tensor([[True, False, False, True]])
    trainer = ClipTrainer(
        options(updates=0), VOCAB, samples=Samples(images, ("a photo of a dog",), right)
    )
    losses = []
    for _ in range(4):
        scores, _, right = trainer.compared(torch.tensor(10.0))
        loss = ranked(scores, right)
        losses.append(float(loss.detach()))
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        trainer.tokens.clear()
    assert losses[-1] < losses[0]


def test_captions_are_mirrored_and_turned_round() -> None:
    left, above = "a photo of a cat left of a dog", "a photo of a cat above a dog"
    assert (
        reworded(left, MIRROR) == reworded(left, TURNED_WORDS) == "a photo of a cat right of a dog"
    )
    assert reworded(above, MIRROR) == above
    assert reworded(above, TURNED_WORDS) == "a photo of a cat below a dog"
    assert reworded("a photo of two dogs", TURNED_WORDS) == "a photo of two dogs"


def test_half_of_the_groups_are_mirrored_with_their_captions() -> None:
    images = torch.arange(20.0).view(20, 1, 1, 1, 1) + torch.arange(2.0)
    captions = ["a photo of a cat left of a dog"] * 20
    turned, texts = mirrored(images, captions, torch.Generator().manual_seed(2))
    for image, text, source in zip(turned, texts, images, strict=True):
        right = "right of" in text
        assert torch.equal(image, source.flip(-1) if right else source)
    assert 5 < sum("right of" in text for text in texts) < 15


def test_the_loss_of_patches_is_that_of_two_guesses_without_knowledge() -> None:
    truth = torch.full((2, 4, 6), -1.0)
    truth[0, 0] = torch.tensor([5.0, 2.0, 8, 16, 24, 24])
    even = patch_loss(torch.zeros(2, 64, 81 + 12), truth)
    assert float(even) == pytest.approx(math.log(81) + math.log(12))
    kind, colour = patch_truth(truth)
    hot = torch.nn.functional.one_hot
    sure = torch.cat([hot(kind, 81), hot(colour, 12)], dim=-1) * 99.0
    assert float(patch_loss(sure, truth)) == pytest.approx(0.0, abs=1e-6)


def test_the_last_phase_asks_for_the_opposite_only_of_relations() -> None:
    images = torch.zeros(2, 2, 3, 64, 64, dtype=torch.uint8)
    captions = ("a photo of a cat left of a dog", "a photo of two dogs")
    samples = Samples(images, captions, torch.tensor([[True, False]] * 2))
    phase = options(updates=0, last_updates=5, groups=6)
    trainer = ClipTrainer(phase, VOCAB, samples=samples)
    with torch.no_grad():
        scores, opposite, right = trainer.compared(torch.tensor(10.0))
    assert scores.shape == opposite.shape == right.shape == (6, 2)
    assert scores.isfinite().all()
    known = opposite.isfinite()
    assert torch.equal(known[:, 0], known[:, 1])
    assert set(known[:, 0].tolist()) == {True, False}
    assert (opposite[known] != scores[known]).all()


def test_the_last_phases_have_rates_of_their_own() -> None:
    phases = {"updates": 100, "vae_updates": 100, "sample_updates": 100}
    phases |= {"drill_updates": 100, "last_updates": 200}
    trainer, rates = ClipTrainer(options(**phases), VOCAB), {}
    for done in (0, 99, 100, 199, 200, 299, 300, 350, 399, 400, 419, 440, 599):
        trainer.done = done
        rates[done] = (trainer.phase, trainer.rate())
    phases_ = [phase for phase, _ in rates.values()]
    assert phases_ == [0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
    assert rates[299][1] < 0.03 * 1e-3
    assert rates[300][1] == pytest.approx(8e-4 / 50)
    assert rates[350][1] == rates[399][1] == 8e-4
    assert rates[400][1] == pytest.approx(5e-4 / 20)
    assert rates[419][1] == rates[440][1] == 5e-4
    assert rates[599][1] < 0.03 * 5e-4


def test_the_drill_turns_relations_round() -> None:
    turned = [pair for pair in pairs(5, 200, TURNED, weight=20, turned=1.0) if pair.first.relation]
    changed = [pair for pair in turned if pair.change == "relation"]
    assert len(changed) > 100
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert all(opposite[str(p.first.relation)] == p.second.relation for p in changed)
    trainer = ClipTrainer(options(updates=0, drill_updates=5), VOCAB)
    pictures, ids, *_ = trainer.batch()  # no autoencoder, nothing spoilt
    assert len(pictures) == len(ids) == 4
    assert set(trainer.losses()) == {"contrast", "choice", "objects", "places"}


def test_a_run_goes_on_from_exported_weights(tmp_path: Path) -> None:
    """It has their count of updates, their seconds and their log, and does not begin twice."""
    folder, out = FOLDER / "emoji-clip", tmp_path / "out"
    vocab = load("emoji-clip").tokenizer.tokenizer.get_vocab()
    trainer = ClipTrainer(options(), vocab)
    begin(trainer, folder, out)
    state = load_state(out / STATE)
    record = json.loads((folder / "training.json").read_text())
    assert state is not None
    assert (state["trainer"]["done"], state["seconds"]) == (record["updates"], record["seconds"])
    assert (out / "log.jsonl").read_bytes() == (folder / "log.jsonl").read_bytes()
    shipped = load("emoji-clip")
    for module, twin in ((trainer.model, shipped.model), (trainer.heads, shipped.heads)):
        pairs_ = zip(module.state_dict().values(), twin.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs_)
    (out / "log.jsonl").write_text("later\n")
    begin(ClipTrainer(options(), vocab), folder, out)
    assert (out / "log.jsonl").read_text() == "later\n"


def test_the_second_edition_starts_with_the_eyes_of_the_first(tmp_path: Path) -> None:
    """On pictures of twice the side, every pixel four times, the stretched patches give what the
    shipped ones give on the pictures themselves."""
    vocab = load("emoji-clip").tokenizer.tokenizer.get_vocab()
    second = options(edition="second")
    trainer = ClipTrainer(second, vocab)
    begin(trainer, FOLDER / "emoji-clip", tmp_path / "out")
    state = load_state(tmp_path / "out" / STATE)
    assert state is not None
    assert (state["trainer"]["done"], state["seconds"]) == (0, 0.0)
    pictures = batch(7, 4).images
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        trainer.model.eval()
        found = trainer.model.encode_image((large - 0.5) / 0.25, normalize=True)
    assert torch.allclose(found, load("emoji-clip").image(images), atol=1e-5)
    trainer.tokens.clear()


def test_the_second_edition_spoils_and_redraws_by_codes() -> None:
    """Boxes come in 64ths of a side; a quarter of the pictures and half of the spoilt ones are the
    decoder's."""
    vae = AutoencoderTiny.from_pretrained(FOLDER / "emoji-dit" / "vae")
    later = options(edition="second", updates=0, vae_updates=5, pairs=4, spoilt=4)
    trainer = ClipTrainer(later, VOCAB, vae)
    pictures, ids, truth, _, sources = trainer.batch()
    assert pictures.shape == (12, 3, 128, 128)
    assert (len(ids), truth.shape, len(sources)) == (8, (8, 5, 6), 4)
    there = truth[truth[..., 0] >= 0]
    assert 10 < float((there[:, 4:] - there[:, 2:4]).mean()) < 32
    assert float(truth[..., 2:].max()) <= 64
    assert math.isfinite(trainer.step()["loss"])


def test_later_phases_ask_for_what_they_need() -> None:
    with pytest.raises(ValueError, match="pass --vae"):
        ClipTrainer(options(updates=0, vae_updates=1), VOCAB).step()


@pytest.mark.parametrize("name", MODELS)
def test_open_clip_loads_the_folder_without_our_code(name: str) -> None:
    import open_clip

    folder = FOLDER / name
    with torch.random.fork_rng():
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    assert isinstance(model, open_clip.CLIP)
    clip = load(name)
    vocab = clip.tokenizer.tokenizer.get_vocab()
    captions = [pair.first.caption for pair in pairs(9, 40)]
    assert tokenizer(captions).tolist() == [
        encode(vocab, " ".join(words(caption))) for caption in captions
    ]
    with torch.no_grad():
        ours, theirs = (
            clip.text(captions),
            model.eval().encode_text(tokenizer(captions), normalize=True),
        )
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert tuple(preprocess.transforms[-1].mean) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("name", "edition"), MODELS.items())
@pytest.mark.slow
def test_the_true_caption_beats_its_hard_negative(name: str, edition: Edition) -> None:
    clip = load(name)
    for change, bar in [("all", 0.75), *((change, 0.65) for change in CHANGES)]:
        seed = 1_000_200 + len(change)
        sample = list(pairs(seed, 150, DEFAULT_MIX, plain=1.0, edition=edition))
        sample = [pair for pair in sample if change in ("all", pair.change)]
        count = 2 * len(sample)
        share = choice_figures(clip, sample)[change]
        assert round(share * count) >= binom.ppf(1e-4, count, bar), change


@pytest.mark.parametrize(("name", "edition"), MODELS.items())
def test_similarity_takes_any_size_and_its_heads_know_the_scene(
    name: str, edition: Edition
) -> None:
    clip = load(name)
    pictures = [pair.first for pair in pairs(1_000_300, 64, edition=edition)]
    images = (
        torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2).float() / 255
    )
    large = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    captions = [picture.caption for picture in pictures]
    # Halving an exact doubling with an antialiased triangle mixes neighbours a little; the answer
    # stays close.
    assert (
        float((clip.similarity(images, captions) - clip.similarity(large, captions)).abs().mean())
        < 0.15
    )
    presence, numbers = clip.read(images)
    truth, counts = scene_truth(torch.from_numpy(np.stack([p.truth for p in pictures])).float())
    best = presence.flatten(1).argmax(1)
    assert float(truth.flatten(1).gather(1, best[:, None]).mean()) > 0.8
    kind = counts.argmax(1)
    every = torch.arange(len(kind))
    assert float((numbers[every, kind].argmax(-1) == counts[every, kind]).float().mean()) > 0.6
    with pytest.raises(ValueError, match="one caption per image"):
        clip.similarity(images, captions[:3])


def test_within_prompt_figures_skip_prompts_with_one_verdict() -> None:
    clip = load("emoji-clip")
    pictures = [pair.first for pair in pairs(1_000_350, 8)]
    images = torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2)
    stack = torch.stack([images[:2], images[2:4]])
    right = torch.tensor([[True, False], [True, True]])
    figures = within_prompt(clip, Samples(stack, (pictures[0].caption, pictures[2].caption), right))
    assert figures == {"auc": 1.0, "prompts": 1}
