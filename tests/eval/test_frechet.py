"""The Fréchet distance against closed forms and scipy's matrix root."""

import numpy as np
import pytest

from diffalign.eval.frechet import distance, frechet


def test_one_dimension_is_means_and_deviations():
    a, b = np.array([[0.0], [2.0], [4.0]]), np.array([[5.0], [6.0], [10.0]])
    expected = (2.0 - 7.0) ** 2 + (np.std(a, ddof=1) - np.std(b, ddof=1)) ** 2
    assert distance(a, b) == pytest.approx(expected)
    assert distance(a, a) == pytest.approx(0.0, abs=1e-12)


def test_against_the_matrix_root_of_scipy():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5))
    b = rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)) + 0.5
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(first @ second).real
    means = a.mean(0) - b.mean(0)
    assert distance(a, b) == pytest.approx(means @ means + np.trace(first + second - 2 * root))


def test_interval_is_repeatable_and_the_distance_symmetric():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) + 1.0
    one = frechet(a, b, draws=50)
    assert one == frechet(a, b, draws=50)
    assert one.low < one.high
    assert one.distance == pytest.approx(frechet(b, a, draws=2).distance)
    with pytest.raises(ValueError, match=r"at least two images"):
        frechet(a[:1], b)
    with pytest.raises(ValueError, match=r"\[40, 3\] and \[40, 2\]"):
        frechet(a, b[:, :2])


@pytest.mark.slow
def test_folders_and_runs_of_images(evaluated, tmp_path):
    import torch

    from diffalign.eval.encoders import encoder, features_of, images_in
    from diffalign.eval.files import RunError
    from diffalign.eval.scoring import read_image

    evaluated("run")
    paths = images_in(tmp_path / "run")
    assert paths == images_in(tmp_path / "run" / "images")
    assert len(paths) == 10
    encode, facts = encoder("emoji-clip")
    features = features_of(paths, encode)
    with torch.no_grad():
        assert torch.equal(encode(read_image(paths[3])).double(), torch.from_numpy(features[3]))
    assert (features.shape[0], facts["name"]) == (10, "emoji-clip")
    assert frechet(features, features, draws=2).distance == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="cannot be read"):
        encoder(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="holds 0 images"):
        images_in(tmp_path / "empty")


@pytest.mark.slow
def test_a_clip_of_the_hub_is_read_as_transformers_does(tmp_path):
    """Resizing apart, which is compared with torchvision's."""
    import torch
    import torchvision.transforms.functional as vision
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from diffalign.eval.encoders import encoder

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=4,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    encode, facts = encoder(str(tmp_path))
    small = vision.resize(
        image, [16, 16], interpolation=vision.InterpolationMode.BICUBIC, antialias=True
    ).clamp(0, 1)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    model = CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(pixel_values=vision.normalize(small, mean, std)[None]).image_embeds[0]
        assert encode(image) == pytest.approx(expected, abs=1e-5)
    assert facts["side"] == 16
