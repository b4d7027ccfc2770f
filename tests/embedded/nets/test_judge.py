"""The judges: targets and losses against hand numbers, damage that keeps its promises, the shipped
networks on held-out scenes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from diffalign.embedded.load import FOLDER, load
from diffalign.embedded.nets.audit import AuditJudge, AuditNet, cell_targets
from diffalign.embedded.nets.judge import Judge, JudgeNet, Maps
from diffalign.embedded.workshop import train_judge
from diffalign.embedded.workshop.degrade import blurred, corrupt, moved, noisy
from diffalign.embedded.workshop.judge_loss import focal, heat_targets, judge_loss
from diffalign.embedded.workshop.judge_report import detection_figures, overlap, verdict_figures
from diffalign.embedded.workshop.train_judge import JudgeTrainer, parser
from diffalign.embedded.world.editions import FIRST, SECOND
from diffalign.embedded.world.scenes import World
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS
from diffalign.tasks.geneval.verdict import Detection, Thresholds

JUDGES = ("emoji-judge", "emoji-judge-audit")
EDITION = {
    "emoji-judge": FIRST,
    "emoji-judge-audit": FIRST,
    "emoji-judge-2": SECOND,
    "emoji-judge-audit-2": SECOND,
}


@pytest.fixture(autouse=True)
def one_thread():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert torch.equal(state, torch.get_rng_state()), (
        "library code must not touch the global generator"
    )


def at_least(count: int, bar: float) -> int:
    """Successes of ``count`` below which a rate of ``bar`` is refuted at one in ten thousand."""
    return int(binom.ppf(1e-4, count, bar))


def truth_of(*rows: tuple[float, ...]) -> torch.Tensor:
    table = torch.full((1, 4, 6), -1.0)
    for i, row in enumerate(rows):
        table[0, i] = torch.tensor(row)
    return table


def test_heat_targets_by_hand() -> None:
    heat, cell = heat_targets(truth_of((7, 3, 10, 20, 30, 40), (7, 3, 40, 20, 60, 40)), 80, 16)
    assert cell[0, :2].tolist() == [
        [7, 5],
        [7, 12],
    ]  # centres (20, 30) and (50, 30) in cells of 4 pixels
    assert heat[0, 7, 7, 5] == heat[0, 7, 7, 12] == 1
    assert heat[0, 7, 6, 5].item() == pytest.approx(math.exp(-0.5))
    assert heat[0, 7, 8, 7].item() == pytest.approx(math.exp(-2.5))
    assert heat[0, 7, 7, 8].item() == pytest.approx(math.exp(-4.5))  # the larger of the two bumps
    assert heat.sum() == heat[0, 7].sum()


def test_focal_equals_its_formula_in_plain_loops() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, target = (
        3 * torch.randn(2, 3, 4, 4, generator=rng),
        torch.rand(2, 3, 4, 4, generator=rng),
    )
    target[0, 0, 1, 1] = target[1, 2, 3, 0] = 1.0
    total, objects = 0.0, 0
    for x, y in zip(
        logits.double().flatten().tolist(), target.double().flatten().tolist(), strict=True
    ):
        p = 1 / (1 + math.exp(-x))
        if y == 1:
            objects += 1
            total -= (1 - p) ** 2 * math.log(p)
        else:
            total -= (1 - y) ** 4 * p**2 * math.log(1 - p)
    # 96 terms of float32, each with a few roundings of 2**-24.
    assert focal(logits, target).item() == pytest.approx(total / objects, rel=1e-5)


def test_loss_is_zero_for_perfect_maps_and_the_box_part_has_its_units() -> None:
    truth = truth_of((2, 4, 16, 8, 44, 40))
    heat, _ = heat_targets(truth, 80, 16)
    maps = Maps(
        torch.where(heat == 1, 40.0, -40.0),
        torch.zeros(1, 4, 16, 16),
        torch.full((1, 11, 16, 16), -50.0),
    )
    maps.colour[:, 4] = 50.0
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    maps.box[0, 0], maps.box[0, 1] = (30 - (x + 0.5) * 4) / 32, (24 - (y + 0.5) * 4) / 32
    maps.box[0, 2], maps.box[0, 3] = 28 / 32, 1.0
    parts = judge_loss(maps, truth)
    assert all(float(value) < 1e-6 for value in parts.values())
    maps.box[0, 2] += 8 / 32  # eight pixels too wide: L1 of a quarter, weight 2
    assert float(judge_loss(maps, truth)["box"]) == pytest.approx(0.5, rel=1e-5)


def test_peaks_become_detections_in_pixels_of_the_given_image() -> None:
    class Fixed(JudgeNet):
        def forward(self, images: torch.Tensor) -> Maps:
            assert images.shape[2:] == (64, 64)
            heat = torch.full((1, 80, 16, 16), -9.0)
            heat[0, 5, 4, 6], heat[0, 5, 4, 7], heat[0, 5, 12, 6] = 2.0, 1.5, 0.0
            box = torch.zeros(1, 4, 16, 16)
            box[0, :, 4, 6] = torch.tensor([0.0, 0.125, 0.5, 1.0])
            box[0, 2:, 12, 6] = 0.25
            colour = torch.zeros(1, 11, 16, 16)
            colour[0, 10], colour[0, 4] = 9.0, 3.0
            return Maps(heat, box, colour)

    first, second = Judge(Fixed(), Thresholds()).detect(torch.zeros(1, 3, 128, 192))[0]
    assert (first.name, first.colour, first.score) == (
        OBJECTS[5],
        COLOURS[4],
        pytest.approx(1 / (1 + math.exp(-2))),
    )
    # centre ((6.5 * 4, 4.5 * 4 + 4)) = (26, 22), size (16, 32); scale 3 across and 2 down
    assert first.box == pytest.approx((54, 12, 102, 76))
    assert second.score == pytest.approx(0.5)
    assert second.box == pytest.approx(((26 - 4) * 3, (50 - 4) * 2, (26 + 4) * 3, (50 + 4) * 2))


def test_images_of_the_wrong_kind_are_refused() -> None:
    judge = Judge(JudgeNet(), Thresholds())
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        judge.detect(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="Divide uint8"):
        judge.detect(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_moved_boxes_follow_the_picture() -> None:
    images = torch.zeros(32, 3, 64, 64)
    images[:, :, 20:44, 12:40] = 1
    boxes = torch.tensor([12.0, 20.0, 40.0, 44.0]).expand(32, 4, 4)
    out, where = moved(images, boxes, torch.Generator().manual_seed(1), share=1.0)
    assert where[:, 0].std(0).min() > 0.5
    for picture, box in zip(out[:, 0], where[:, 0], strict=True):
        # The mass of a bilinearly resampled rectangle equals its area; edges are linear ramps, so
        # the half-level lies on the edge.
        x1, y1, x2, y2 = box.tolist()
        assert float(picture[32].sum()) == pytest.approx(x2 - x1, abs=0.35)
        assert float(picture[:, 26].sum()) == pytest.approx(y2 - y1, abs=0.35)
        middle = float((picture[32] * (torch.arange(64) + 0.5)).sum() / picture[32].sum())
        assert middle == pytest.approx((x1 + x2) / 2, abs=0.35)


def test_tolerable_damage_keeps_shape_mean_and_determinism() -> None:
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    for damage in (blurred, noisy):
        one, two = (damage(images, torch.Generator().manual_seed(3), share=1.0) for _ in range(2))
        assert torch.equal(one, two)
        assert not torch.equal(one, images)
        assert torch.equal(damage(images, torch.Generator().manual_seed(3), share=0.0), images)
    flat = torch.full((2, 3, 64, 64), 0.3)
    assert torch.allclose(
        blurred(flat, torch.Generator().manual_seed(3), share=1.0), flat, atol=1e-6
    )


def test_corruption_strikes_the_object_and_nothing_else() -> None:
    arrays, _, rows = World({"two": 0.5, "single": 0.5}).arrays(4, 60)
    images, truth = (
        torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255,
        torch.from_numpy(rows),
    )
    out, left = corrupt(images, truth, torch.Generator().manual_seed(5), share=1.0)
    kept = permuted = 0
    for before, after, old, new in zip(images, out, truth, left, strict=True):
        struck = [i for i in range(4) if old[i, 0] >= 0 and new[i, 0] < 0]
        assert struck
        outside = torch.ones(64, 64, dtype=torch.bool)
        for i in struck:
            x, y = ((int(old[i, 2 + k]) + int(old[i, 4 + k])) // 2 for k in (0, 1))
            outside[max(0, y - 20) : y + 20, max(0, x - 20) : x + 20] = False
        assert torch.equal(before[:, outside], after[:, outside])
        assert not torch.equal(before, after)
        kept += sum(
            bool((old[i] == new[i]).all()) for i in range(4) if i not in struck and old[i, 0] >= 0
        )
        permuted += torch.equal(before.flatten(1).sort(1).values, after.flatten(1).sort(1).values)
    assert kept > 5  # in scenes of two objects shuffling and blurring leave the other one
    assert permuted > 15  # shuffling and exchanging move pixels without changing them


def test_cells_of_the_second_judge_answer_for_the_nearest_object() -> None:
    kind, row = cell_targets(truth_of((3, 0, 1, 1, 31, 31), (9, 0, 33, 1, 63, 31)), 8)
    # Centres (16, 16) and (48, 16): cell centres within 10 pixels are 12 and 20 for the first, 44
    # and 52 for the second.
    expected = torch.full((8, 8), 80)
    expected[1:3, 1:3], expected[1:3, 5:7] = 3, 9
    assert torch.equal(kind[0], expected)
    assert row[0, 1, 5] == 1


def test_the_second_judge_merges_overlapping_answers() -> None:
    class Fixed(AuditNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            output = torch.zeros(1, 96, 8, 8)
            output[0, 80] = 20.0
            for y, x, left in ((1, 1, 12.0), (1, 2, 20.0), (5, 5, 12.0)):
                output[0, 6, y, x] = 22.0 + x
                output[0, 81:85, y, x] = torch.tensor([left, 12.0, 24.0 - left, 12.0]) / 32
                output[0, 85 + 2, y, x] = 1.0
            return output

    found = AuditJudge(Fixed(), Thresholds()).detect(torch.zeros(1, 3, 64, 64))[0]
    assert [d.name for d in found] == [OBJECTS[6]] * 2
    assert found[0].box == pytest.approx((32, 32, 56, 56))
    assert found[1].box == pytest.approx((0, 0, 24, 24))
    assert found[0].colour == COLOURS[2]


def test_a_box_may_be_the_mean_of_the_cells_that_answer() -> None:
    """Two cells with chances .6 and .3 and edges 8 pixels apart: 6:3 of the way."""

    class Fixed(AuditNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            output = torch.zeros(1, 96, 8, 8)
            output[0, 80] = 30.0
            for x, chance in ((1, 0.6), (2, 0.3)):
                output[0, :80, 1, x] = float("-inf")
                output[0, 80, 1, x], output[0, 6, 1, x] = math.log(1 - chance), math.log(chance)
                output[0, 81:85, 1, x] = 12.0 / 32
            return output

    blank = torch.zeros(1, 3, 64, 64)
    (one,) = AuditJudge(Fixed(), Thresholds(), mean=True).detect(blank)[0]
    assert one.score == pytest.approx(0.6)
    assert one.box == pytest.approx((8 / 3, 0, 24 + 8 / 3, 24))
    (best,) = AuditJudge(Fixed(), Thresholds()).detect(blank)[0]
    assert best.box == pytest.approx((0, 0, 24, 24))
    # Boxes 24 wide and 8 apart overlap by 16 / 32.
    assert len(AuditJudge(Fixed(), Thresholds(), overlap=0.55).detect(blank)[0]) == 2


def test_figures_by_hand() -> None:
    scene = next(World({"colour": 1.0}).scenes(6, 1))
    thing = scene.objects[0]
    box = tuple(float(v) for v in thing.box)
    other = next(name for name in OBJECTS if name != thing.name)
    answers = [
        Detection(thing.name, 0.9, box, thing.colour),
        Detection(thing.name, 0.8, box, "red"),
        Detection(other, 0.2, box, "red"),
    ]
    figures = detection_figures([scene], [answers], 0.3)
    assert figures == {"precision": 0.5, "recall": 1.0, "overlap": 1.0, "colour": 1.0}
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert verdict_figures([scene.metadata()], [answers], Thresholds()) == {
        "all": 1.0,
        "colors": 1.0,
    }
    assert verdict_figures([scene.metadata()], [answers[2:]], Thresholds()) == {
        "all": 0.0,
        "colors": 0.0,
    }


@pytest.mark.parametrize("name", EDITION)
@pytest.mark.few(1)
def test_the_shipped_judges_meet_their_bars_on_held_out_scenes(name: str) -> None:
    judge = load(name)
    scenes = list(World(edition=EDITION[name]).scenes(1_000_400, 96))
    answers = judge.detect(
        torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float() / 255
    )
    figures = detection_figures(scenes, answers, judge.thresholds.threshold)
    objects = sum(len(scene.objects) for scene in scenes)
    assert round(figures["recall"] * objects) >= at_least(objects, 0.97)
    assert figures["precision"] >= at_least(objects, 0.97) / objects
    assert figures["colour"] >= at_least(60, 0.95) / 60  # about 60 of the objects are tinted
    asked = [
        (scene.metadata(), answer)
        for scene, answer in zip(scenes, answers, strict=True)
        if scene.tag
    ]
    right = verdict_figures(
        [record for record, _ in asked], [answer for _, answer in asked], judge.thresholds
    )["all"]
    assert round(right * len(asked)) >= at_least(len(asked), 0.95)


@pytest.mark.parametrize("name", EDITION)
@pytest.mark.slow
def test_the_shipped_judges_reject_wrong_scenes(name: str) -> None:
    judge = load(name)
    wrong = list(World(edition=EDITION[name]).wrong(1_000_500, 96))
    answers = judge.detect(
        torch.from_numpy(np.stack([s.image for s, _ in wrong])).permute(0, 3, 1, 2).float() / 255
    )
    fooled = verdict_figures([record for _, record in wrong], answers, judge.thresholds)[
        "all"
    ] * len(wrong)
    assert len(wrong) - round(fooled) >= at_least(len(wrong), 0.98)


@pytest.mark.parametrize("name", EDITION)
@pytest.mark.few(1)
def test_the_shipped_judges_do_not_count_spoilt_objects(name: str) -> None:
    """An object whose patches are shuffled keeps its palette and place; a judge that still names it
    judges palettes."""
    judge = load(name)
    edition = EDITION[name]
    arrays, _, rows = World({"single": 1.0}, edition=edition).arrays(1_000_600, 64)
    images, truth = (
        torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255,
        torch.from_numpy(rows),
    )
    rng = torch.Generator().manual_seed(7)
    spoilt, _ = corrupt(images, truth, rng, share=1.0, edition=edition)
    named = 0
    for answer, row in zip(judge.detect(spoilt), truth, strict=True):
        named += any(
            d.name == OBJECTS[int(row[0, 0])] and d.score > judge.thresholds.threshold
            for d in answer
        )
    assert 64 - named >= at_least(64, 0.9)


def options(model: str, **changes: int) -> object:
    found = parser().parse_args(
        ["--model", model, "--out", "unused", "--batch", "4", "--updates", "100"]
    )
    for key, value in changes.items():
        setattr(found, key, value)
    return found


@pytest.mark.parametrize("model", ["emoji-judge", "emoji-judge-audit"])
def test_a_resumed_run_repeats_the_bits(model: str) -> None:
    straight = JudgeTrainer(options(model))  # type: ignore[arg-type]
    losses = [straight.step()["loss"] for _ in range(4)]
    first = JudgeTrainer(options(model))  # type: ignore[arg-type]
    again = [first.step()["loss"] for _ in range(2)]
    second = JudgeTrainer(options(model, seed=99))  # type: ignore[arg-type]
    second.options.seed = first.options.seed
    second.load(first.state())
    again += [second.step()["loss"] for _ in range(2)]
    assert again == losses
    assert all(math.isfinite(loss) for loss in losses)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            straight.net.state_dict().values(), second.net.state_dict().values(), strict=True
        )
    )


def test_the_second_phase_asks_for_its_autoencoder() -> None:
    run = options("emoji-judge", updates=0, vae_updates=1)
    trainer = JudgeTrainer(run)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass --vae"):
        trainer.step()


def test_a_judge_of_the_second_edition_sees_its_size() -> None:
    """Images of 128 pixels reach the network as they are, and boxes are its own pixels."""

    class Fixed(JudgeNet):
        def forward(self, images: torch.Tensor) -> Maps:
            assert images.shape[2:] == (128, 128)
            heat, box = torch.full((1, 80, 32, 32), -9.0), torch.zeros(1, 4, 32, 32)
            heat[0, 5, 4, 6] = 2.0
            box[0, :, 4, 6] = torch.tensor([0.0, 0.125, 0.5, 1.0])
            return Maps(heat, box, torch.zeros(1, 11, 32, 32))

    judge = Judge(Fixed(), Thresholds(), side=128)
    for size, factor in ((128, 1), (64, 0.5)):
        (thing,) = judge.detect(torch.zeros(1, 3, size, size))[0]
        assert thing.box == pytest.approx([factor * edge for edge in (18, 6, 34, 38)])


def test_places_are_stretched_between_their_neighbours() -> None:
    """A row of 1 and 3 becomes 1, 1.5, 2.5, 3: cells half as wide, edges held."""
    place = torch.tensor([1.0, 3.0, 1.0, 3.0]).view(1, 4, 1)
    assert train_judge.stretched(place, 4).view(4, 4).tolist() == [[1.0, 1.5, 2.5, 3.0]] * 4


@pytest.mark.parametrize("model", JUDGES)
def test_a_judge_goes_on_from_a_folder(model: str) -> None:
    """All weights are the folder's, and the network reads the larger images."""
    shipped = load(model).net.state_dict()
    net = train_judge.build(model, 0, SECOND, FOLDER / model)
    for name, value in net.state_dict().items():
        if name != "place":
            assert torch.equal(
                value, shipped[name].float() if value.dtype.is_floating_point else value
            )
    output = net.eval()(torch.zeros(1, 3, 128, 128))
    assert (output.heat if model == "emoji-judge" else output).shape[-1] == 128 // (
        4 if model == "emoji-judge" else 8
    )


def test_a_step_on_the_second_edition() -> None:
    run = options("emoji-judge", batch=4)
    run.edition, run.source = "second", FOLDER / "emoji-judge"  # type: ignore[attr-defined]
    trainer = JudgeTrainer(run)  # type: ignore[arg-type]
    images, truth = trainer.batch()
    assert images.shape == (4, 3, 128, 128)
    assert truth.shape == (4, 5, 6)
    assert math.isfinite(trainer.step()["loss"])


def test_corruption_of_the_second_edition_strikes_the_object_and_nothing_else() -> None:
    world = World({"two": 0.5, "single": 0.5}, edition=SECOND)
    arrays, _, rows = world.arrays(4, 40)
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    truth = torch.from_numpy(rows)
    rng = torch.Generator().manual_seed(5)
    out, after = corrupt(images, truth, rng, share=1.0, edition=SECOND)
    for before, picture, old, new in zip(images, out, truth, after, strict=True):
        struck = [i for i in range(5) if old[i, 0] >= 0 and new[i, 0] < 0]
        assert struck
        outside = torch.ones(128, 128, dtype=torch.bool)
        for i in struck:
            x1, y1, x2, y2 = old[i, 2:].tolist()
            half = -(-max(x2 - x1, y2 - y1) // 8) * 4
            x, y = (x1 + x2) // 2, (y1 + y2) // 2
            # a square at the border is shifted inwards by as much as it would stick out
            outside[max(0, y - half - 4) : y + half + 4, max(0, x - half - 4) : x + half + 4] = (
                False
            )
        assert torch.equal(before[:, outside], picture[:, outside])
        assert not torch.equal(before, picture)
