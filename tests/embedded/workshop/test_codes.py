"""The laid-down latent: words apart, every number of a cell as the table says, and read back."""

import numpy as np
import pytest

from diffalign.embedded.workshop.codes import class_words, code, codes, colour_words
from diffalign.embedded.world.editions import ALIGNED, SECOND
from diffalign.embedded.world.scenes import Scene, World
from diffalign.embedded.world.vocabulary import COLOURS, OBJECTS


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(World(edition=ALIGNED).scenes(1_000_000, 60))


@pytest.mark.parametrize(
    ("words", "count", "norm", "apart"),
    [(class_words(), 80, 7**0.5, 7**0.5), (colour_words(), 11, 3**0.5, 3**0.5)],
)
def test_words_have_one_norm_and_their_distance(
    words: np.ndarray, count: int, norm: float, apart: float
) -> None:
    distances = np.linalg.norm(words[:, None].astype(float) - words[None], axis=-1)
    assert len(words) == count
    assert np.linalg.norm(words, axis=1) == pytest.approx(norm, rel=1e-6)
    assert distances[~np.eye(count, dtype=bool)].min() == pytest.approx(apart, rel=1e-6)


def test_cells_of_objects_hold_their_facts(scenes: list[Scene]) -> None:
    """Nearest words are the truth's; offsets run from one edge of the object to the other."""
    for scene in scenes:
        latent, free = code(scene), np.ones((16, 16), dtype=bool)
        for (x, y, side), thing in zip(scene.layout, scene.objects, strict=True):
            rows, columns = slice(y // 8, (y + side) // 8), slice(x // 8, (x + side) // 8)
            cell = latent[:, rows, columns]
            free[rows, columns] = False
            kinds = ((cell[:7, None] - class_words().T[:, :, None, None]) ** 2).sum(0).argmin(0)
            tints = ((cell[7:10, None] - colour_words().T[:, :, None, None]) ** 2).sum(0).argmin(0)
            assert (kinds == OBJECTS.index(thing.name)).all()
            assert (tints == (*COLOURS, "native").index(thing.colour)).all()
            edge = 1.7 * (1 - 8 / side)
            ramp = np.linspace(-edge, edge, side // 8)
            assert np.abs(cell[10] - ramp[None, :]).max() < 1e-5
            assert np.abs(cell[11] - ramp[:, None]).max() < 1e-5
            assert cell[12] == pytest.approx((side - 44) / 13)
        assert (latent[:13, free] == 0).all()
        assert latent.shape == (16, 16, 16)


def test_backgrounds_are_their_mean_colours(scenes: list[Scene]) -> None:
    """Far from objects the channels give the picture's own mean colour, to rounding."""
    for scene in scenes[:20]:
        free = np.ones((16, 16), dtype=bool)
        for x, y, side in scene.layout:
            free[y // 8 : (y + side) // 8, x // 8 : (x + side) // 8] = False
        blocks = scene.image.reshape(16, 8, 16, 8, 3).mean((1, 3))
        colours = (code(scene)[13:].transpose(1, 2, 0) / 5 + 0.53) * 255
        assert np.abs(colours - blocks)[free].max() < 1


def test_free_places_take_the_cells_whose_centres_they_hold() -> None:
    for scene in World({"single": 1.0}, edition=SECOND).scenes(2, 20):
        ((x, y, side),) = scene.layout
        rows, columns = np.nonzero(np.abs(code(scene)[:7]).sum(0))
        for found, start in ((columns, x), (rows, y)):
            inside = [i for i in range(16) if start < 8 * i + 4 < start + side]
            assert sorted(set(found)) == inside


def test_a_batch_is_its_scenes(scenes: list[Scene]) -> None:
    assert (codes(scenes[:3]).numpy() == np.stack([code(scene) for scene in scenes[:3]])).all()
