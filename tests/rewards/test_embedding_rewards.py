"""Rewards of one image embedding: aesthetic predictors, subjects, and MPS."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from diffalign.rewards import load
from diffalign.rewards.clip_towers import token_ids
from diffalign.rewards.mps import CONDITION
from diffalign.rewards.preprocessing import fitted, normalised

DOUBLE = {"dtype": "fp64"}


def features_of(model, images):
    """Unit features of the tiny CLIP by transformers' own method."""
    pixels = normalised(fitted(images, 28, "crop"))
    with torch.no_grad():
        output = model.get_image_features(pixel_values=pixels)
    return F.normalize(getattr(output, "pooler_output", output), dim=-1)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Files of both predictors' layers, for embeddings of 24 numbers."""
    folder, rng = tmp_path_factory.mktemp("heads"), torch.Generator().manual_seed(1)
    second, widths = {}, (24, 20, 16, 12, 8, 1)
    for place, width, after in zip((0, 2, 4, 6, 7), widths, widths[1:]):
        second[f"layers.{place}.weight"] = torch.randn(after, width, generator=rng)
        second[f"layers.{place}.bias"] = torch.randn(after, generator=rng)
    torch.save(second, folder / "second.pth")
    first = {
        "weight": torch.randn(1, 24, generator=rng),
        "bias": torch.randn(1, generator=rng),
    }
    torch.save(first, folder / "first.pth")
    return folder, first, second


def test_the_second_predictor_is_one_linear_map(heads, clip_folder, tiny_clip, images, prompts):
    folder, _, second = heads
    reward = load("aesthetic", source=clip_folder, head=folder / "second.pth", **DOUBLE)
    vector, offset = torch.eye(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    for place in (0, 2, 4, 6, 7):
        weight = second[f"layers.{place}.weight"].double()
        vector, offset = weight @ vector, weight @ offset + second[f"layers.{place}.bias"].double()
    expected = features_of(tiny_clip().double(), images) @ vector[0] + offset
    scores = reward(images, prompts)
    assert torch.allclose(scores, expected, rtol=1e-8)
    calls = []
    handle = reward.network["head"].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(scores, reward(images, ["another"] * 3))
    assert not calls, "the prompt does not count, so no image is scored again"
    handle.remove()
    assert not reward.needs_prompt


def test_the_first_predictor(heads, clip_folder, tiny_clip, images, prompts):
    folder, first, _ = heads
    reward = load("aesthetic-v1", source=clip_folder, head=folder / "first.pth", **DOUBLE)
    expected = features_of(tiny_clip().double(), images) @ first["weight"][0].double()
    assert torch.allclose(reward(images, prompts), expected + first["bias"].double(), rtol=1e-9)


def test_heads_of_another_kind_are_named(heads, clip_folder):
    folder = heads[0]
    with pytest.raises(ValueError, match=r"has no 'layers.0.weight'.*The first one is"):
        load("aesthetic", source=clip_folder, head=folder / "first.pth")
    with pytest.raises(ValueError, match="The second predictor is 'aesthetic'"):
        load("aesthetic-v1", source=clip_folder, head=folder / "second.pth")


@pytest.mark.parametrize("name", ["aesthetic", "aesthetic-v1"])
def test_aesthetics_have_slopes_and_independent_rows(
    name, heads, clip_folder, images, prompts, slopes_agree, batch_is_singles
):
    head = heads[0] / ("second.pth" if name == "aesthetic" else "first.pth")
    reward = load(name, source=clip_folder, head=head, **DOUBLE)
    slopes_agree(reward, images, prompts)
    batch_is_singles(reward, images, prompts)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The same two pictures as tensors, as files and as Pillow images."""
    rng = np.random.default_rng(2)
    pixels = [rng.integers(70, 180, (40, 30 + 10 * i, 3), dtype=np.uint8) for i in range(2)]
    folder = tmp_path_factory.mktemp("references")
    paths = []
    for i, values in enumerate(pixels):
        paths.append(folder / f"{i}.png")
        Image.fromarray(values).save(paths[-1])
    tensors = [torch.from_numpy(v).permute(2, 0, 1).double() / 255 for v in pixels]
    return tensors, paths, [Image.fromarray(v) for v in pixels]


def test_clip_i_is_the_mean_cosine(references, clip_folder, tiny_clip, images, prompts):
    tensors, paths, pictures = references
    model = tiny_clip().double()
    targets = torch.cat([features_of(model, image[None]) for image in tensors])
    expected = (features_of(model, images) @ targets.T).mean(1)
    for kind in (tensors, paths, pictures):
        reward = load("clip-i", references=kind, source=clip_folder, **DOUBLE)
        # bytes are divided in float32
        assert torch.allclose(reward(images, prompts), expected, rtol=0, atol=1e-6)
    alone = load("clip-i", references=tensors[:1], source=clip_folder, **DOUBLE)
    assert float(alone(tensors[0][None], ["x"])) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def dino_folder(randomised, tmp_path_factory):
    """As published: a ViT without its pooling layer."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=224,
        patch_size=56,
    )
    with torch.random.fork_rng(devices=[]):
        model = ViTModel(config, add_pooling_layer=False).eval()
    folder = tmp_path_factory.mktemp("dino")
    randomised(model).save_pretrained(folder)
    return folder


def test_dino_is_the_class_token(references, dino_folder, images, prompts):
    from torchvision.transforms import v2
    from transformers import ViTModel

    model = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).double()
    usual = v2.Compose(
        [
            v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(224),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    reward = load("dino", references=references[0], source=dino_folder, **DOUBLE)
    with torch.no_grad():
        tokens = [
            F.normalize(model(pixel_values=usual(image[None])).last_hidden_state[0, 0], dim=0)
            for image in [*references[0], *images]
        ]
    expected = [float((x @ tokens[0] + x @ tokens[1]) / 2) for x in tokens[2:]]
    # no pixel leaves [0, 1] by resizing, where ours would be cut
    assert reward(images, prompts).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["clip-i", "dino"])
def test_subjects_have_slopes_and_independent_rows(
    name, references, clip_folder, dino_folder, images, prompts, slopes_agree, batch_is_singles
):
    folder = clip_folder if name == "clip-i" else dino_folder
    reward = load(name, references=references[0], source=folder, **DOUBLE)
    slopes_agree(reward, images, prompts)
    batch_is_singles(reward, images, prompts)


def test_bad_references(clip_folder):
    with pytest.raises(ValueError, match="at least one image; got none"):
        load("clip-i", references=[], source=clip_folder)
    with pytest.raises(ValueError, match=r"must be images \[3, H, W\]"):
        load("clip-i", references=torch.zeros(2, 4, 4), source=clip_folder)


@pytest.fixture(scope="module")
def mps(tiny_clip, tmp_path_factory):
    """File in the authors' names, for a CLIP whose features have 64 numbers, and its weights."""
    model = tiny_clip(seed=9)
    rng = torch.Generator().manual_seed(12)
    state = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}

    def draw(*shape):
        return torch.randn(shape, generator=rng) / math.sqrt(shape[-1])

    width, head = 64, 64
    state["model.text_projection.weight"] = draw(width, 64)
    state["model.visual_projection.weight"] = draw(width, 80)
    for i in range(2):
        reads, thinks = (f"cross_model.layers.{i}.{k}.fn." for k in (0, 1))
        for name in (reads, thinks):
            state[f"{name}norm.gamma"] = 1 + 0.2 * torch.randn(width, generator=rng)
            state[f"{name}norm.beta"] = torch.zeros(width)
        state[f"{reads}to_q.weight"] = draw(width, width)
        state[f"{reads}to_kv.weight"] = draw(2 * head, width)
        state[f"{reads}to_out.weight"] = draw(width, width)
        state[f"{reads}ff.0.weight"] = draw(8 * width, width)
        state[f"{reads}ff.2.weight"] = draw(width, 4 * width)
        state[f"{thinks}fused_attn_ff_proj.weight"] = draw(width + 2 * head + 8 * width, width)
        state[f"{thinks}attn_out.weight"] = draw(width, width)
        state[f"{thinks}ff_out.1.weight"] = draw(width, 4 * width)
        state[f"{thinks}rotary_emb.inv_freq"] = torch.ones(32)
    folder = tmp_path_factory.mktemp("mps")
    save_file(state, folder / "model.safetensors")
    return folder, {name: tensor.double() for name, tensor in state.items()}


def layer_norm(x, gamma):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gamma


def swiglu(x):
    half = x.shape[-1] // 2
    gate = x[..., half:]
    return x[..., :half] * gate / (1 + torch.exp(-gate))


def slow_attention(q, k, v, mask=None):
    scores = q @ k.T / math.sqrt(64)
    if mask is not None:
        scores[:, ~mask] = -math.inf
    return scores.softmax(-1) @ v


def turned(x):
    """Rotary positions, a pair of numbers at a time."""
    result = x.clone()
    for n in range(x.shape[0]):
        for j in range(32):
            angle = n / 10000 ** (2 * j / 64)
            a, b = float(x[n, j]), float(x[n, j + 32])
            result[n, j] = a * math.cos(angle) - b * math.sin(angle)
            result[n, j + 32] = b * math.cos(angle) + a * math.sin(angle)
    return result


def slow_mps(state, model, image, prompt, threshold):
    """The score of one image, from the paper's formulas; one head of 64."""
    pixels = normalised(fitted(image[None], 28, "crop"))
    ids, aspects = token_ids([prompt, CONDITION], "")
    with torch.no_grad():
        x = model.vision_model(pixel_values=pixels).last_hidden_state[0]
        w, v = (
            model.text_model(input_ids=row[None]).last_hidden_state[0] for row in (ids, aspects)
        )
    x = x @ state["model.visual_projection.weight"].T
    w, v = (tokens @ state["model.text_projection.weight"].T for tokens in (w, v))
    likeness = torch.tensor([max(float(a @ b) for b in v) for a in w])
    counts = likeness / likeness.max() > threshold
    assert 0 < int(counts.sum()) < 77
    for i in range(2):
        reads, thinks = (f"cross_model.layers.{i}.{k}.fn." for k in (0, 1))
        y = layer_norm(x, state[f"{reads}norm.gamma"])
        key, value = (w @ state[f"{reads}to_kv.weight"].T).chunk(2, -1)
        seen = slow_attention(y @ state[f"{reads}to_q.weight"].T, key, value, counts)
        hidden = swiglu(y @ state[f"{reads}ff.0.weight"].T)
        x = x + seen @ state[f"{reads}to_out.weight"].T + hidden @ state[f"{reads}ff.2.weight"].T
        y = layer_norm(x, state[f"{thinks}norm.gamma"])
        fused = y @ state[f"{thinks}fused_attn_ff_proj.weight"].T
        q, key, value, hidden = fused.split((64, 64, 64, 512), -1)
        seen = slow_attention(turned(q), turned(key), value) @ state[f"{thinks}attn_out.weight"].T
        x = x + seen + swiglu(hidden) @ state[f"{thinks}ff_out.1.weight"].T
    end = w[int((ids == 49407).int().argmax())]
    return 100 * float(x[0] @ end / (x[0].norm() * end.norm()))


@pytest.mark.slow
def test_mps_is_the_papers_formula(mps, tiny_clip, images, prompts):
    folder, state = mps
    # random tokens are all alike: a threshold that strikes out some of them
    reward = load("mps", source=folder, threshold=0.9, **DOUBLE)
    model = tiny_clip(seed=9).double()
    expected = [slow_mps(state, model, i, p, 0.9) for i, p in zip(images, prompts)]
    assert reward(images, prompts).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_mps_has_slopes_and_independent_rows(mps, images, prompts, slopes_agree, batch_is_singles):
    reward = load("mps", source=mps[0], **DOUBLE)
    slopes_agree(reward, images, prompts)
    batch_is_singles(reward, images, prompts)


@pytest.mark.slow
def test_mps_depends_on_its_condition_and_refuses_the_authors_pickle(mps, images, tmp_path):
    one = load("mps", source=mps[0], **DOUBLE)(images, ["a red dog on a table"] * 3)
    other = load("mps", source=mps[0], threshold=0.9, **DOUBLE)(
        images, ["a red dog on a table"] * 3
    )
    assert float((one - other).abs().max()) > 1e-6
    torch.save(torch.nn.Linear(2, 2), tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(ValueError, match="Python objects, which are not read"):
        load("mps", source=tmp_path / "MPS_overall_checkpoint.pth")
