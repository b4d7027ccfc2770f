"""The laid-down latent: words apart, and every number of a cell as the table says."""

import numpy as np
import pytest

from diffalign.embedded.workshop.codes import LOUDNESS, class_words, code, codes
from diffalign.embedded.world.editions import ALIGNED, SECOND
from diffalign.embedded.world.scenes import Scene, World
from diffalign.embedded.world.vocabulary import OBJECTS


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(World(edition=ALIGNED).scenes(1_000_000, 60))


def test_words_have_one_norm_and_are_as_far_apart() -> None:
    words = class_words().astype(float)
    distances = np.linalg.norm(words[:, None] - words[None], axis=-1)
    norm = 0.6 * 7**0.5
    assert words.shape == (80, 7)
    assert np.linalg.norm(words, axis=1) == pytest.approx(norm, rel=1e-6)
    assert distances[~np.eye(80, dtype=bool)].min() == pytest.approx(norm, rel=1e-6)


def test_cells_of_objects_hold_their_class_and_their_place_in_it(scenes: list[Scene]) -> None:
    for scene in scenes:
        latent, free = code(scene), np.ones((32, 32), dtype=bool)
        assert latent.shape == (21, 32, 32)
        for (x, y, side), thing in zip(scene.layout, scene.objects, strict=True):
            rows, columns = slice(y // 4, (y + side) // 4), slice(x // 4, (x + side) // 4)
            free[rows, columns] = False
            word = class_words()[OBJECTS.index(thing.name)]
            cell = latent[:, rows, columns] / LOUDNESS
            assert (cell[3:10] == word[:, None, None]).all()
            ramp = np.linspace(-1 + 4 / side, 1 - 4 / side, side // 4)
            assert np.abs(cell[10] - ramp[None, :]).max() < 1e-5
            assert np.abs(cell[11] - ramp[:, None]).max() < 1e-5
            assert cell[12] == pytest.approx((side - 44) / 20)
            angles = [np.pi * k * wave for k in (1, 2) for wave in (cell[10], cell[11])]
            waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
            assert np.abs(cell[13:] - np.stack(waves)).max() < 1e-5
        assert (latent[3:, free] == 0).all()


def test_colours_are_the_pictures_own_means(scenes: list[Scene]) -> None:
    for scene in scenes[:20]:
        latent = code(scene)
        for y, x in ((0, 0), (7, 30), (31, 16)):
            block = scene.image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].reshape(16, 3)
            colour = (latent[:3, y, x] / 3 + 0.53) * 255
            assert np.abs(colour - block.mean(0)).max() < 1e-3


def test_free_places_take_the_cells_whose_centres_they_hold() -> None:
    for scene in World({"single": 1.0}, edition=SECOND).scenes(2, 40):
        ((x, y, side),) = scene.layout
        rows, columns = np.nonzero(np.abs(code(scene)[3:]).sum(0))
        for cells, start in ((columns, x), (rows, y)):
            inside = [i for i in range(32) if start <= 4 * i + 2 < start + side]
            assert sorted(set(cells.tolist())) == inside


def test_a_batch_is_its_scenes(scenes: list[Scene]) -> None:
    assert (codes(scenes[:3]).numpy() == np.stack([code(scene) for scene in scenes[:3]])).all()
