"""The world's truth against its pixels, its grammar against GenEval's published prompts, its
relations against GenEval's formula."""

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from diffalign.embedded.world.captions import Group, geneval
from diffalign.embedded.world.glyphs import GLYPH, RAMPS, sprite, sprites
from diffalign.embedded.world.scenes import CELL, KINDS, Scene, World
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS

Relations = Callable[[tuple[int, ...], tuple[int, ...]], set[str]]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(World().scenes(1_000_000, 400))


def test_a_seed_fixes_the_stream_and_a_longer_stream_begins_alike() -> None:
    short, long = list(World().scenes(7, 20)), list(World().scenes(7, 40))
    assert all(
        (a.image == b.image).all() and a.caption == b.caption and a.objects == b.objects
        for a, b in zip(short, long, strict=False)
    )
    assert any(a.caption != b.caption for a, b in zip(short, World().scenes(8, 20), strict=True))


def test_arrays_repeat_the_scenes() -> None:
    images, captions, truth = World().arrays(3, 30)
    for i, scene in enumerate(World().scenes(3, 30)):
        assert (images[i] == scene.image).all()
        assert captions[i] == scene.caption
        boxes = [tuple(row[2:]) for row in truth[i] if row[0] >= 0]
        assert boxes == [thing.box for thing in scene.objects]
        assert [OBJECTS[row[0]] for row in truth[i] if row[0] >= 0] == [
            thing.name for thing in scene.objects
        ]


def test_boxes_contain_all_that_differs_from_the_background(scenes: list[Scene]) -> None:
    """Rows of the background are constant, so a pixel unlike its row's free pixels belongs to an
    object; alpha <= 24/255 is not counted."""
    for scene in scenes:
        inside = np.zeros((64, 64), dtype=bool)
        for thing in scene.objects:
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= 64
            assert 0 <= y1 < y2 <= 64
            inside[y1:y2, x1:x2] = True
        for y in range(64):
            free = scene.image[y][~inside[y]]
            if len(free):
                background = np.median(free, axis=0)
                # A pixel outside has alpha <= 24 of 255, so it moves by at most 24/255 of 255 grey
                # levels, plus one for rounding.
                assert np.abs(free - background).max() <= 25


def test_boxes_are_tight(scenes: list[Scene]) -> None:
    """Every edge row and column of a box holds a visible pixel of the picture with alpha > 24."""
    for scene in scenes[:100]:
        for thing in scene.objects:
            alpha = sprites(CELL, 1)[OBJECTS.index(thing.name), -1, ..., 3] > 24
            rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
            assert thing.box[2] - thing.box[0] == columns[-1] - columns[0] + 1
            assert thing.box[3] - thing.box[1] == rows[-1] - rows[0] + 1
            assert (thing.box[0] - columns[0]) % 8 == 0
            assert (thing.box[1] - rows[0]) % 8 == 0


def test_opaque_pixels_lie_on_the_ramp_of_their_colour() -> None:
    """At the atlas's own size nothing is resampled: each opaque pixel is a point of the segment, to
    rounding."""
    for colour in COLOURS:
        low, high = (np.array(end, dtype=float) for end in RAMPS[colour])
        for name in OBJECTS[::8]:
            pixels = sprite(name, colour, GLYPH)
            opaque = pixels[pixels[..., 3] == 255][:, :3].astype(float)
            place = ((opaque - low) @ (high - low)) / ((high - low) @ (high - low))
            assert np.abs(low + place[:, None] * (high - low) - opaque).max() <= 1
            assert place.min() > -0.02
            assert place.max() < 1.02


def test_mean_colours_of_tints_are_nearest_to_their_own_ramp() -> None:
    """A classifier that knows only the ramps' middles names the tint of every one of the 800
    pictures."""
    table = sprites(CELL, 1).astype(float)
    middles = np.array([(np.array(low) + np.array(high)) / 2 for low, high in RAMPS.values()])
    for index in range(10):
        for picture in table[:, index]:
            opaque = picture[picture[..., 3] == 255][:, :3]
            assert ((middles - opaque.mean(0)) ** 2).sum(1).argmin() == index


def test_pixels_in_the_scene_have_the_colour_of_the_truth(scenes: list[Scene]) -> None:
    """Where a picture is opaque, the scene's pixels are its tint: their mean is nearest to the
    middle of the named ramp."""
    middles = np.array([(np.array(low) + np.array(high)) / 2 for low, high in RAMPS.values()])
    tinted = [
        (scene, thing) for scene in scenes for thing in scene.objects if thing.colour in COLOURS
    ]
    assert {thing.colour for _, thing in tinted} == set(COLOURS)
    for scene, thing in tinted:
        opaque = sprites(CELL, 1)[OBJECTS.index(thing.name), -1, ..., 3] == 255
        rows, columns = np.nonzero(sprites(CELL, 1)[OBJECTS.index(thing.name), -1, ..., 3] > 24)
        top, left = thing.box[1] - rows.min(), thing.box[0] - columns.min()
        pixels = scene.image[top : top + CELL, left : left + CELL][opaque]
        assert COLOURS[((middles - pixels.mean(0)) ** 2).sum(1).argmin()] == thing.colour


def test_objects_never_overlap(scenes: list[Scene]) -> None:
    for scene in scenes:
        for first, second in combinations(scene.objects, 2):
            apart_x = first.box[2] <= second.box[0] or second.box[2] <= first.box[0]
            apart_y = first.box[3] <= second.box[1] or second.box[3] <= first.box[1]
            assert apart_x or apart_y


def test_relations_hold_by_genevals_rule_and_their_opposites_do_not(
    geneval_relations: Relations,
) -> None:
    """Exactly on all of 1,000 scenes; y grows downwards (hand check: 100,100,200,200 against
    300,100,400,200 is left)."""
    assert geneval_relations((100, 100, 200, 200), (300, 100, 400, 200)) == {"left of"}
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for scene in World({"position": 1.0}).scenes(1_000_001, 1_000):
        subject, target = scene.objects
        holds = geneval_relations(subject.box, target.box)
        assert scene.relation in holds
        assert opposite[scene.relation] not in holds


def test_grammar_is_genevals() -> None:
    """Sentences copied from the published prompt list, one per category and each quirk."""
    assert geneval((Group("umbrella"),), None) == "a photo of an umbrella"
    assert (
        geneval((Group("bench"), Group("sports ball")), None)
        == "a photo of a bench and a sports ball"
    )
    assert geneval((Group("toothbrush", 2),), None) == "a photo of two toothbrushs"
    assert geneval((Group("bus", 3),), None) == "a photo of three buses"
    assert geneval((Group("fire hydrant", 1, "blue"),), None) == "a photo of a blue fire hydrant"
    assert (
        geneval((Group("dog"), Group("teddy bear")), "right of")
        == "a photo of a dog right of a teddy bear"
    )
    assert (
        geneval((Group("wine glass", 1, "purple"), Group("apple", 1, "black")), None)
        == "a photo of a purple wine glass and a black apple"
    )


def test_metadata_has_the_published_form() -> None:
    position = next(World({"position": 1.0}).scenes(0, 1)).metadata()
    assert [sorted(clause) for clause in position["include"]] == [
        ["class", "count"],
        ["class", "count", "position"],
    ]
    counting = next(World({"count": 1.0}).scenes(0, 1)).metadata()
    assert counting["exclude"] == [
        {"class": counting["include"][0]["class"], "count": counting["include"][0]["count"] + 1}
    ]
    subject, relation, target = re.match(
        r"a photo of an? (.*) (left of|right of|above|below) an? (.*)", position["prompt"]
    ).groups()  # type: ignore[union-attr]
    assert position["include"][1] == {"class": subject, "count": 1, "position": [relation, 0]}
    assert position["include"][0]["class"] == target
    with pytest.raises(ValueError, match="three"):
        next(World({"three": 1.0}).scenes(0, 1)).metadata()


def holds(scene: Scene, metadata: dict[str, Any], geneval_relations: Relations) -> bool:
    """The truth of a prompt for the rendered objects, by counting."""
    groups = []
    for clause in metadata["include"]:
        found = [
            o
            for o in scene.objects
            if o.name == clause["class"] and o.colour == clause.get("color", o.colour)
        ]
        if len(found) < clause["count"]:
            return False
        if "position" in clause:
            relation, index = clause["position"]
            if not all(
                relation in geneval_relations(o.box, t.box) for o in found for t in groups[index]
            ):
                return False
        groups.append(found)
    return all(
        sum(o.name == c["class"] for o in scene.objects) < c["count"]
        for c in metadata.get("exclude", ())
    )


def test_own_metadata_is_true_and_wrong_metadata_is_false(
    scenes: list[Scene], geneval_relations: Relations
) -> None:
    assert all(holds(scene, scene.metadata(), geneval_relations) for scene in scenes if scene.tag)
    pairs = list(World().wrong(1_000_002, 600))
    assert len(pairs) == 600
    assert not any(holds(*pair, geneval_relations) for pair in pairs)
    assert {metadata["tag"] for _, metadata in pairs} == {tag for tag in KINDS.values() if tag}


def test_mixture_is_followed_and_checked() -> None:
    kinds = [scene.kind for scene in World({"single": 3.0, "two": 1.0}).scenes(0, 400)]
    # 300 expected with a standard deviation of 8.7; five of them.
    assert set(kinds) == {"single", "two"}
    assert abs(kinds.count("single") - 300) < 44
    with pytest.raises(ValueError, match="portrait"):
        World({"portrait": 1.0})
    with pytest.raises(ValueError, match="positive sum"):
        World({"single": 0.0})
