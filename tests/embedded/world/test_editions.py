"""The first edition to the bit, and the second against its own definition: sizes, places,
backgrounds, and a truth that equals the drawing."""

import hashlib
import random
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from diffalign.embedded.world.editions import EDITIONS, FIRST, SECOND
from diffalign.embedded.world.glyphs import RAMPS
from diffalign.embedded.world.scenes import KINDS, Object, Scene, World, stamp
from diffalign.embedded.world.tokens import grammar_words
from diffalign.embedded.world.vocabulary import COLOURS

SIDES = sorted({side for sides in SECOND.cells.values() for side in sides})


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(World(edition=SECOND).scenes(1_000_000, 400))


def cell_of(thing: Object) -> tuple[int, int, int]:
    """The only cell whose picture has the box of this object."""
    x1, y1, x2, y2 = thing.box
    cells = []
    for side in SIDES:
        left, top, right, bottom = stamp(thing.name, "native", side).box
        if (right - left, bottom - top) == (x2 - x1, y2 - y1):
            cells.append((x1 - left, y1 - top, side))
    assert len(cells) == 1
    return cells[0]


def test_the_first_edition_is_bit_identical_to_what_models_were_trained_on() -> None:
    """Hash of 300 scenes with captions and truth, taken before there were editions."""
    images, captions, truth = World().arrays(1_000_000, 300)
    digest = hashlib.sha256(images.tobytes())
    digest.update("\n".join(captions).encode())
    digest.update(truth.tobytes())
    assert digest.hexdigest()[:16] == "ba13bc0ec4c2e5b4"


def test_objects_have_the_sizes_of_the_edition_and_stand_at_any_pixel(scenes: list[Scene]) -> None:
    assert (SIDES[0], SIDES[-1], SECOND.side, SECOND.most) == (24, 64, 128, 5)
    cells = []
    for scene in scenes:
        assert scene.image.shape == (128, 128, 3)
        for thing in scene.objects:
            x, y, side = cell_of(thing)
            assert side in SECOND.cells[len(scene.objects)]
            assert 0 <= x <= 128 - side
            assert 0 <= y <= 128 - side
            cells.append((x, y, side))
    assert {side for _, _, side in cells} == set(SIDES)
    assert {x % 8 for x, _, _ in cells} == {y % 8 for _, y, _ in cells} == set(range(8))


def test_cells_do_not_overlap(scenes: list[Scene]) -> None:
    for scene in scenes:
        for first, second in combinations(map(cell_of, scene.objects), 2):
            assert any(
                first[i] + first[2] <= second[i] or second[i] + second[2] <= first[i]
                for i in (0, 1)
            )


def test_up_to_five_objects() -> None:
    counts = {len(scene.objects) for scene in World({"numbers": 1.0}, edition=SECOND).scenes(3, 99)}
    assert counts == {3, 4, 5}
    _, _, truth = World({"numbers": 1.0}, edition=SECOND).arrays(3, 99)
    assert truth.shape == (99, 5, 6)
    assert set((truth[:, :, 0] >= 0).sum(1)) == counts


def test_pixels_have_the_colour_of_the_truth(scenes: list[Scene]) -> None:
    """Where a picture is opaque, the mean of the scene's pixels is nearest to the middle of the
    named ramp; a native picture is found there as it was drawn."""
    middles = np.array([(np.array(low) + np.array(high)) / 2 for low, high in RAMPS.values()])
    colours = set()
    for scene in scenes:
        for thing in scene.objects:
            x, y, side = cell_of(thing)
            picture = stamp(thing.name, thing.colour, side)
            opaque = picture.clear[..., 0] == 0
            pixels = scene.image[y : y + side, x : x + side][opaque]
            assert (pixels == picture.colour[opaque]).all()
            if thing.colour in COLOURS:
                mean = pixels.mean(0)
                assert COLOURS[((middles - mean) ** 2).sum(1).argmin()] == thing.colour
                colours.add(thing.colour)
    assert colours == set(COLOURS)


def test_outside_the_boxes_there_is_background_alone(scenes: list[Scene]) -> None:
    """Free pixels take at most two colours a row beside the ramp of the dividing line: pixels that
    are equal to a neighbour are nearly all."""
    for scene in scenes[:100]:
        free = np.ones((128, 128), dtype=bool)
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box
            free[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = False
        pairs = free[:, 1:] & free[:, :-1]
        step = np.abs(np.diff(scene.image.astype(int), axis=1)).max(-1)
        # A dividing line crosses each row once, three pixels wide at most unless it is nearly
        # level; then it touches some rows over their whole length.
        assert (step[pairs] > 1).mean() < 0.06


def test_backgrounds_are_coloured_and_half_of_them_have_two_tones() -> None:
    rng = random.Random(4)
    pictures = [SECOND.background(rng) for _ in range(400)]
    two = [
        max(np.ptp(picture, axis=1).max() - 1e-3, 0) > 0 for picture in pictures
    ]  # one tone: rows are constant
    # 200 expected with a standard deviation of 10; five of them
    assert abs(sum(two) - 200) < 50
    corners = np.array([picture[0, 0] for picture in pictures])
    saturation = 1 - corners.min(1) / corners.max(1)
    assert 0.45 < saturation.max() <= 0.5 + 1e-5
    assert corners.max() <= 215 + 12
    assert corners.max(1).min() >= 95 - 12


def test_relations_hold_by_genevals_rule_and_their_opposites_do_not(
    geneval_relations: Callable[[tuple[int, ...], tuple[int, ...]], set[str]],
) -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    counts = dict.fromkeys(opposite, 0)
    for scene in World({"position": 1.0}, edition=SECOND).scenes(1_000_001, 1_000):
        subject, target = scene.objects
        relations = geneval_relations(subject.box, target.box)
        assert scene.relation in relations
        assert opposite[scene.relation] not in relations
        counts[scene.relation] += 1
    assert min(counts.values()) > 180


@pytest.mark.slow
def test_captions_kinds_and_words_are_those_of_the_first_edition() -> None:
    """The same sentences can be told of both editions; only the two pairs of numbers that make
    five are new, and their words are not."""
    words = set(grammar_words())
    for edition in EDITIONS.values():
        scenes = list(World(edition=edition).scenes(5, 600))
        assert {scene.kind for scene in scenes} == set(KINDS)
        assert {
            word for scene in scenes for word in scene.caption.replace(",", " ,").split()
        } <= words


def test_a_seed_fixes_the_stream(scenes: list[Scene]) -> None:
    again = list(World(edition=SECOND).scenes(1_000_000, 20))
    assert all(
        (a.image == b.image).all() and a.caption == b.caption and a.objects == b.objects
        for a, b in zip(scenes, again, strict=False)
    )


def test_wrong_prompts_are_about_the_same_edition() -> None:
    pairs = list(World(edition=SECOND).wrong(1_000_002, 40))
    assert {scene.image.shape for scene, _ in pairs} == {(128, 128, 3)}
    assert {scene.image.shape for scene, _ in World(edition=FIRST).wrong(3, 5)} == {(64, 64, 3)}
