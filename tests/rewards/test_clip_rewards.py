"""CLIP-shaped rewards on small random checkpoints in both published formats, against transformers'
and open_clip's own models in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffalign.rewards import load
from diffalign.rewards.clip_towers import token_ids
from diffalign.rewards.preprocessing import fitted, normalised

DOUBLE = {"dtype": "fp64"}


@pytest.fixture(scope="module")
def open_clip_model(randomised):
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    with torch.random.fork_rng(devices=[]):
        model = CLIP(
            24,
            CLIPVisionCfg(image_size=28, patch_size=14, width=160, layers=2, head_width=80),
            CLIPTextCfg(width=128, heads=2, layers=2),
        )
    assert open_clip.__version__
    return randomised(model).eval()


@pytest.fixture(scope="module")
def hps_file(open_clip_model, tmp_path_factory):
    """As the authors save it: half precision, under "state_dict"."""
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    state = {name: tensor.half() for name, tensor in open_clip_model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, path)
    open_clip_model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return path


@pytest.fixture(scope="module")
def clip(clip_folder):
    return load("clip", source=clip_folder, **DOUBLE)


@pytest.fixture(scope="module")
def hps(hps_file):
    return load("hps-v2.1", source=hps_file, **DOUBLE)


def test_clip_score_is_the_logit_of_transformers(clip, tiny_clip, images, prompts):
    from transformers import CLIPTokenizer  # noqa: F401  (the ids below are open_clip's)

    model = tiny_clip().double()
    pixels = normalised(fitted(images, 28, "crop"))
    with torch.no_grad():
        expected = model(input_ids=token_ids(prompts, ""), pixel_values=pixels).logits_per_image
        assert torch.allclose(clip(images, prompts), expected.diagonal(), rtol=1e-9, atol=1e-9)


def test_pick_score_has_the_same_form_and_another_unit(clip_folder, clip, images, prompts):
    pick = load("pick-score", source=clip_folder, **DOUBLE)
    scores = pick(images, prompts)
    assert torch.equal(scores, clip(images, prompts))
    assert torch.allclose(pick.unit(scores), scores / 26)
    assert torch.allclose(clip.unit(scores), scores / 100)


def test_hps_is_the_cosine_of_open_clip(hps, open_clip_model, images, prompts):
    import open_clip

    ids = open_clip.get_tokenizer("ViT-H-14")(prompts)
    pixels = normalised(fitted(images, 28, "pad"))
    model = open_clip_model.double()
    with torch.no_grad():
        image = F.normalize(model.encode_image(pixels), dim=-1)
        text = F.normalize(model.encode_text(ids), dim=-1)
    expected = (image * text).sum(-1)
    scores = hps(images, prompts)
    assert torch.allclose(scores, expected, rtol=0, atol=1e-9)
    assert torch.allclose(hps.unit(scores), 2 * scores)


def test_official_padding_and_crop_differ(hps, hps_file, images, prompts):
    crop = load("hps-v2-1", source=hps_file, fit="crop", **DOUBLE)
    assert float((crop(images, prompts) - hps(images, prompts)).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["clip", "hps"])
def test_slopes_and_batches(name, request, images, prompts, slopes_agree, batch_is_singles):
    reward = request.getfixturevalue(name)
    slopes_agree(reward, images, prompts)
    batch_is_singles(reward, images, prompts)


def test_a_prompt_is_read_once_and_its_end_may_be_padded_in_two_ways(clip, images, prompts):
    count = []
    handle = clip.text.register_forward_hook(lambda *_: count.append(1))
    try:
        clip(images, ["a new prompt"] * 3)
        clip(images.flip(3), ["a new prompt"] * 3)
    finally:
        handle.remove()
    assert len(count) == 1
    ids = token_ids(["a red dog"], "")
    ends = ids.masked_fill(ids == 0, 49407)
    with torch.no_grad():
        assert torch.equal(clip.text(ids), clip.text(ends))


def test_a_long_prompt_warns_and_its_tail_does_not_count(clip, images):
    long = " ".join(["dog"] * 90)
    with pytest.warns(UserWarning, match="has 92 tokens and its text tower reads 77"):
        score = clip(images[:1], [long])
    assert torch.allclose(score, clip(images[:1], [f"{long} cat"]))


@pytest.mark.slow
def test_low_precision_networks_score_in_float32(clip_folder, images, prompts):
    low = load("clip", source=clip_folder, dtype="bf16")(images.float(), prompts)
    exact = load("clip", source=clip_folder)(images.float(), prompts)
    assert low.dtype == exact.dtype == torch.float32
    # bfloat16 keeps 8 bits of each of two features; cosines of 100 err by a few units at most
    assert float((low - exact).abs().max()) < 100 * 8 * 2**-8


@pytest.mark.slow
def test_a_file_in_open_clips_format_serves_clip_score_too(hps_file, hps, images, prompts):
    scores = load("clip", source=hps_file, **DOUBLE)(images, prompts)
    assert bool(scores.isfinite().all())
    crop = load("hps-v2-1", source=hps_file, fit="crop", **DOUBLE)(images, prompts)
    assert torch.allclose(scores / scores[0], crop / crop[0])


def test_options_in_the_name(clip_folder, clip, images, prompts):
    reward = load(f"clip:source={clip_folder},dtype=fp64,batch=2,offload=true")
    assert (reward.batch, reward.offload) == (2, True)
    assert torch.allclose(reward(images, prompts), clip(images, prompts))
    with pytest.raises(ValueError, match=r"clip has no option 'sorce'\. Nearest: source"):
        load("clip:sorce=x")
    with pytest.raises(ValueError, match=r"'offload' in .* is not key=value"):
        load("clip:offload")
    with pytest.raises(ValueError, match="clip:batch must be an integer; got 'two'"):
        load("clip:batch=two")
    with pytest.raises(ValueError, match="dtype must be one of fp32"):
        load("clip", source=clip_folder, dtype="int8")


def test_missing_foreign_and_damaged_files(clip_folder, hps_file, tmp_path):
    with pytest.raises(ValueError, match="clip: no CLIPModel could be loaded from"):
        load("clip", source=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"hps-v2-1: the folder .* holds no HPS_v2.1"):
        load("hps-v2-1", source=clip_folder)
    with pytest.raises(ValueError, match=r"hps-v2: HPS_v2_compressed.pt was not found at"):
        load("hps-v2", source="nobody/nothing")
    foreign = tmp_path / "foreign.pt"
    torch.save({"state_dict": {"weight": torch.ones(2)}}, foreign)
    with pytest.raises(ValueError, match="not that of a CLIP model with a vision transformer"):
        load("hps-v2-1", source=foreign)
    whole = hps_file.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.pt (cannot be read|is damaged)"):
        load("hps-v2-1", source=tmp_path / "cut.pt")
    cut = tmp_path / "cut-folder"
    cut.mkdir()
    for path in clip_folder.iterdir():
        data = path.read_bytes()
        (cut / path.name).write_bytes(data if path.suffix == ".json" else data[: len(data) // 2])
    with pytest.raises(ValueError, match="no CLIPModel could be loaded"):
        load("clip", source=cut)


def test_a_pickle_is_refused(tmp_path):
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="holds Python objects, which are not read"):
        load("hps-v2-1", source=path)


def test_a_file_that_lacks_weights_is_named(hps_file, tmp_path):
    state = torch.load(hps_file, weights_only=True)["state_dict"]
    state["visual.extra"] = torch.ones(1)
    del state["ln_final.bias"]
    torch.save(state, tmp_path / "lacking.pt")
    text = r"1 missing \(text_model.final_layer_norm.bias\); 1 unknown \(visual.extra\)"
    with pytest.raises(ValueError, match=text):
        load("hps-v2-1", source=tmp_path / "lacking.pt")


@pytest.mark.slow
def test_noise_is_optimised_for_it_and_for_several(clip_folder):
    """ReNO climbs on the tiny CLIP, alone and in a weighted sum; the other reward is reported."""
    import diffalign as da

    pipe, prompt = da.load("emoji"), "a photo of a red apple"
    one = load("clip", source=clip_folder)
    for reward in (one, da.rewards.Weighted([(one, 1.0), ("brightness", 5.0)])):
        result = da.align(
            pipe,
            prompt,
            method=da.ReNO(iterations=4, rate=0.1, regulariser=0.0),
            reward=reward,
            judges=[da.rewards.HeldOut("redness")],
            num_inference_steps=2,
            guidance_scale=3.0,
        )
        assert result.score > result.first.score
        score = float(reward(result.tensor[None], [prompt]))
        assert result.score == pytest.approx(score, rel=1e-5)
        assert "held-out(redness)" in result.judges
    with pytest.raises(ValueError, match="reported and never optimised"):
        da.align(pipe, prompt, method="best-of-n:n=2", reward=da.rewards.HeldOut("redness"))


@pytest.mark.hub
@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "pick-score"])
def test_published_scales(name):
    """The learned factor of the published files is about 100."""
    assert math.isclose(load(name).scale, 100.0, rel_tol=0.02)


def test_the_words_of_the_text_tower(hps, prompts):
    words = hps.words
    tokens = words.tokens("a red dog")
    assert words.text(tokens) == "a red dog"
    assert words.room == 75
    row = torch.tensor([tokens])
    with torch.no_grad():
        features = F.normalize(words.features(row), dim=-1)
        assert torch.equal(features, hps.texts(["a red dog"]))
        assert torch.equal(words.features(row, words.table[row]), words.features(row))


def test_texts_are_differentiable_in_their_embeddings(hps):
    words = hps.words
    row = torch.tensor([words.tokens("a red dog")])
    leaf = words.table[row].clone().requires_grad_()
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)).double()
    (slope,) = torch.autograd.grad(words.features(row, leaf).sum(), leaf)
    step = 1e-5 * direction.to(leaf)
    with torch.no_grad():
        up, down = (words.features(row, leaf + sign * step).sum() for sign in (1, -1))
    assert float((slope * direction).sum()) == pytest.approx(float((up - down) / 2e-5), rel=1e-5)
