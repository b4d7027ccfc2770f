"""The lesson's pairs: exchanged places, true sentences, and the share of each wording."""

from typing import Any

import numpy as np
import pytest

from diffalign.embedded.workshop.relation_pairs import arrays, leading
from diffalign.embedded.world.scenes import CELL, stamp
from diffalign.tasks.geneval.verdict import parse_prompt


def centre(image: np.ndarray, name: str) -> tuple[float, float]:
    """Where on the grid the picture of ``name`` lies: the place at which it explains all pixels
    that are opaque in it."""
    picture = stamp(name, "native", CELL)
    colour, solid = picture.colour, picture.clear[..., 0] == 0
    places = [(x, y) for x in range(0, 33, 8) for y in range(0, 33, 8)]

    def distance(place: tuple[int, int]) -> float:
        x, y = place
        cell = image[y : y + CELL, x : x + CELL].astype(int)
        return float(np.abs(cell - colour)[solid].mean())

    x, y = min(places, key=distance)
    assert distance((x, y)) == 0
    return x + CELL / 2, y + CELL / 2


def facts(caption: str) -> tuple[str, str, str]:
    """Subject, relation and target that GenEval's parser reads."""
    record: Any = parse_prompt(caption)
    assert record is not None
    target, subject = record["include"]
    return subject["class"], subject["position"][0], target["class"]


@pytest.mark.parametrize("forward", [0.0, 0.5, 1.0])
def test_captions_are_true_and_places_exchanged(forward: float) -> None:
    images, captions = arrays(3, 100, forward)
    for i in range(0, 200, 2):
        places = []
        for image, caption in zip(images[i : i + 2], captions[i : i + 2], strict=True):
            subject, relation, target = facts(caption)
            (x1, y1), (x2, y2) = centre(image, subject), centre(image, target)
            side = {"left of": x2 - x1, "right of": x1 - x2, "above": y2 - y1, "below": y1 - y2}
            assert side[relation] >= CELL
            places.append({subject: (x1, y1), target: (x2, y2)})
        first, second = places
        assert sorted(first) == sorted(second)
        assert [first[name] for name in sorted(first)] == [
            second[name] for name in sorted(first, reverse=True)
        ]


@pytest.mark.slow
def test_share_of_forward_relations() -> None:
    """One or none as asked; half within 4.5 standard errors of 1,000 pairs, .07."""
    for forward, margin in ((0.0, 0.0), (1.0, 0.0), (0.5, 0.07)):
        captions = arrays(4, 1_000, forward)[1]
        share = np.mean([facts(caption)[1] in ("left of", "above") for caption in captions])
        assert share == pytest.approx(forward, abs=margin)


def test_a_seed_fixes_the_pairs() -> None:
    first, second = arrays(5, 20, 0.5), arrays(5, 20, 0.5)
    assert (first[0] == second[0]).all()
    assert first[1] == second[1]
    assert arrays(6, 20, 0.5)[1] != first[1]


def test_the_lesson_by_hand() -> None:
    assert [leading(place) for place in (0.0, 0.3, 0.6, 1.0)] == [1.0, 1.0, 0.5, 0.5]
    assert leading(0.45) == pytest.approx(0.75)


def test_an_impossible_share_is_refused() -> None:
    with pytest.raises(ValueError, match="forward: expected a share"):
        arrays(0, 1, 1.5)
