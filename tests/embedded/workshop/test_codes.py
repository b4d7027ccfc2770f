"""The laid-down latent: words apart, every number of a cell as the table says, and a picture that
can be put together from it."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from diffalign.embedded.load import FOLDER
from diffalign.embedded.workshop.codes import LOUDNESS, class_words, code, codes, pictures, spoilt
from diffalign.embedded.world.editions import ALIGNED, SECOND
from diffalign.embedded.world.glyphs import sprite
from diffalign.embedded.world.scenes import Scene, World
from diffalign.embedded.world.vocabulary import NATIVE, OBJECTS


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
        assert latent.shape == (25, 32, 32)
        for (x, y, side), thing in zip(scene.layout, scene.objects, strict=True):
            rows, columns = slice(y // 4, (y + side) // 4), slice(x // 4, (x + side) // 4)
            free[rows, columns] = False
            cell = latent[7:, rows, columns] / LOUDNESS
            word = class_words()[OBJECTS.index(thing.name)]
            assert np.abs(cell[:7] - word[:, None, None]).max() < 1e-6
            ramp = np.linspace(-1 + 4 / side, 1 - 4 / side, side // 4)
            assert np.abs(cell[7] - ramp[None, :]).max() < 1e-5
            assert np.abs(cell[8] - ramp[:, None]).max() < 1e-5
            assert cell[9] == pytest.approx((side - 44) / 20)
            angles = [np.pi * k * wave for k in (1, 2) for wave in (cell[7], cell[8])]
            waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
            assert np.abs(cell[10:] - np.stack(waves)).max() < 1e-5
        assert (latent[3:, free] == 0).all()


def test_colours_are_those_of_the_picture(scenes: list[Scene]) -> None:
    """An object has one colour in the latent, that of its pixels by their opacity, and says whether
    it is its natural one; a background of one tone is that tone, under objects too."""
    for scene in scenes:
        latent = code(scene)
        ground, colour = latent[:3] / 3 + 0.53, latent[3:6] / 3 + 0.5
        assert (
            np.abs(ground - scene.tones.repeat(2, 0).repeat(2, 1).transpose(2, 0, 1) / 255).max()
            < 1e-6
        )
        for (x, y, side), thing in zip(scene.layout, scene.objects, strict=True):
            rows, columns = slice(y // 4, (y + side) // 4), slice(x // 4, (x + side) // 4)
            assert np.ptp(colour[:, rows, columns], axis=(1, 2)).max() == 0
            sign = -1 if thing.colour == NATIVE else 1
            assert (latent[6, rows, columns] == sign * LOUDNESS).all()
            pixels = np.asarray(sprite(thing.name, thing.colour, side - 2), dtype=np.float64)
            opacity = pixels[..., 3:] / 255
            mean = pixels[..., :3].sum((0, 1)) / opacity.sum() / 255
            assert colour[:, rows, columns][:, 0, 0] == pytest.approx(mean, abs=1e-5)


def test_a_scene_off_the_grid_is_refused() -> None:
    free = World({"single": 1.0}, edition=SECOND).scenes(2, 20)
    scene = next(scene for scene in free if scene.layout[0][0] % 4)
    with pytest.raises(ValueError, match="take scenes of the edition ALIGNED"):
        code(scene)


def test_a_batch_is_its_scenes(scenes: list[Scene]) -> None:
    assert (codes(scenes[:3]).numpy() == np.stack([code(scene) for scene in scenes[:3]])).all()


def test_a_spoilt_object_is_none_and_all_else_stays(scenes: list[Scene]) -> None:
    """In each latent the cells of one object change, in what they say of the class at least; their
    words are none of the 80 any more."""
    latents = codes(scenes)
    found = spoilt(latents, scenes, torch.Generator().manual_seed(3))
    for scene, before, after in zip(scenes, latents, found, strict=True):
        changed, own = (before != after).any(0), []
        for x, y, side in scene.layout:
            cell = torch.zeros(32, 32, dtype=torch.bool)
            cell[y // 4 : (y + side) // 4, x // 4 : (x + side) // 4] = True
            own += [cell] if torch.equal(cell, changed) else []
        assert len(own) == 1
        assert torch.equal(before[:6], after[:6])
        words = after[7:14, own[0]].T / LOUDNESS
        away = torch.cdist(words, torch.from_numpy(class_words())).amin(1).mean()
        assert away > 0.3


def test_pictures_are_the_decoders(scenes: list[Scene]) -> None:
    vae = AutoencoderTiny.from_pretrained(FOLDER / "emoji-dit" / "vae")
    latents = codes(scenes[:2])
    rng = torch.Generator().manual_seed(1)
    plain = pictures(vae.decoder, latents, rng)
    with torch.no_grad():
        expected = (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(plain, expected)
    truth = torch.from_numpy(np.stack([scene.image for scene in scenes[:2]])).permute(0, 3, 1, 2)
    assert float((plain - truth / 255).abs().mean()) < 0.03
    noisy = pictures(vae.decoder, latents, rng, 0.5)
    assert float((noisy - plain).abs().mean()) > 0.001
