"""BLIP-shaped rewards on small random checkpoints in the published formats and names, against a
plain float64 BLIP."""

import math

import pytest
import torch
from torch.nn import functional as F

from diffalign.rewards import load
from diffalign.rewards.blip_reader import SIDE
from diffalign.rewards.image_reward import CENTRE, SPREAD
from diffalign.rewards.preprocessing import fitted, normalised
from diffalign.rewards.questions import Question

DOUBLE = {"dtype": "fp64"}
VOCABULARY = 40


def image_reward_state():
    """Names and shapes of ``ImageReward.pt``, two layers, 32 pixels in patches of 16."""
    vision, text, hidden = 128, 64, 96
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, 5, vision),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": (vision,),
        "blip.visual_encoder.norm.weight": (vision,),
        "blip.visual_encoder.norm.bias": (vision,),
        "blip.vision_proj.weight": (8, vision),
        "blip.vision_proj.bias": (8,),
        "blip.text_proj.weight": (8, text),
        "blip.text_proj.bias": (8,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (VOCABULARY + 2, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (64, text),
        "blip.text_encoder.embeddings.LayerNorm.weight": (text,),
        "blip.text_encoder.embeddings.LayerNorm.bias": (text,),
    }

    def dense(name, width, after):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (after, width), (after,)

    def layer_norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for i in range(2):
        block = f"blip.visual_encoder.blocks.{i}."
        layer_norm(f"{block}norm1", vision)
        layer_norm(f"{block}norm2", vision)
        dense(f"{block}attn.qkv", vision, 3 * vision)
        dense(f"{block}attn.proj", vision, vision)
        dense(f"{block}mlp.fc1", vision, hidden)
        dense(f"{block}mlp.fc2", hidden, vision)
        layer = f"blip.text_encoder.encoder.layer.{i}."
        for kind, width in (("attention", text), ("crossattention", vision)):
            dense(f"{layer}{kind}.self.query", text, text)
            dense(f"{layer}{kind}.self.key", width, text)
            dense(f"{layer}{kind}.self.value", width, text)
            dense(f"{layer}{kind}.output.dense", text, text)
            layer_norm(f"{layer}{kind}.output.LayerNorm", text)
        dense(f"{layer}intermediate.dense", text, hidden)
        dense(f"{layer}output.dense", hidden, text)
        layer_norm(f"{layer}output.LayerNorm", text)
    for place, width, after in ((0, text, 48), (2, 48, 32), (4, 32, 24), (6, 24, 16), (7, 16, 1)):
        dense(f"mlp.layers.{place}", width, after)
    rng = torch.Generator().manual_seed(8)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=rng)
        scaled = noise / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.2 * noise
        state[name] = scaled + (1 if "orm" in name and name.endswith("weight") else 0)
    for name in ("cls_token", "pos_embed"):
        state[f"blip.visual_encoder.{name}"] *= 10
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    return state


@pytest.fixture(scope="module")
def image_reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("image-reward") / "ImageReward.pt"
    torch.save(image_reward_state(), path)
    return path


@pytest.fixture(scope="module")
def image_reward(image_reward_file, bert_folder):
    return load("image-reward", source=image_reward_file, tokenizer=bert_folder, **DOUBLE)


def test_image_reward_is_a_plain_blip_and_five_linear_maps(
    image_reward, bert_folder, images, prompts, slow
):
    from transformers import AutoTokenizer

    state = {name.removeprefix("blip."): t.double() for name, t in image_reward_state().items()}
    blip = slow.blip(state)
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    expected = []
    for image, prompt in zip(images, prompts):
        pixels = normalised(fitted(image[None], 32, "crop"))[0]
        ids = torch.tensor(tokenizer(prompt).input_ids)
        x = blip.text(ids, blip.vision(pixels))[0]
        for place in (0, 2, 4, 6, 7):
            x = slow.linear(state, f"mlp.layers.{place}", x)
        expected.append((float(x) - CENTRE) / SPREAD)
    scores = image_reward(images, prompts)
    assert scores.tolist() == pytest.approx(expected, rel=1e-8, abs=1e-8)
    assert image_reward.unit(scores).tolist() == pytest.approx([(s + 3) / 6 for s in expected])


def test_slopes_and_batches(image_reward, images, prompts, slopes_agree, batch_is_singles):
    slopes_agree(image_reward, images, prompts)
    batch_is_singles(image_reward, images, prompts)


def test_the_image_counts_and_so_does_the_prompt(image_reward, images):
    same = image_reward(images, ["a red dog"] * 3)
    assert float(same.std()) > 1e-4
    other = image_reward(images, ["two dogs"] * 3)
    assert float((same - other).abs().min()) > 1e-6


def test_a_long_prompt_is_cut_at_35_tokens(image_reward, images):
    long = " ".join(["dog"] * 40)
    with pytest.warns(UserWarning, match="has 42 tokens and its text tower reads 35"):
        score = image_reward(images[:1], [long])
    # [CLS], 33 words, [SEP]
    assert torch.allclose(score, image_reward(images[:1], [" ".join(["dog"] * 33)]))


def test_foreign_files_are_named(tmp_path, bert_folder, image_reward_file):
    state = image_reward_state()
    del state["mlp.layers.4.weight"]
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"not ImageReward's: 'head.layers.4.weight' is missing"):
        load("image-reward", source=tmp_path, tokenizer=bert_folder)
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        load("image-reward", source=image_reward_file, tokenizer=tmp_path)


def blip_config(side):
    from transformers import BlipConfig

    return BlipConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": 96,
        },
        text_config={
            "vocab_size": VOCABULARY + 2,
            "hidden_size": 128,
            "encoder_hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            # what the class has by default; BLIP's weights are for heads of 64
            "num_attention_heads": 8,
            "bos_token_id": VOCABULARY,
            "sep_token_id": 3,
        },
        image_text_hidden_size=16,
    )


def saved(cls, folder, randomised, bert_folder):
    from transformers import AutoTokenizer

    with torch.random.fork_rng(devices=[]):
        model = cls(blip_config(384)).eval()
    randomised(model)
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.mul_(5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(folder)
    return model.state_dict()


@pytest.fixture(scope="module")
def vqa(randomised, bert_folder, tmp_path_factory):
    """Folder and weights of a question answering model."""
    from transformers import BlipForQuestionAnswering

    folder = tmp_path_factory.mktemp("vqa")
    return folder, saved(BlipForQuestionAnswering, folder, randomised, bert_folder)


@pytest.fixture(scope="module")
def itm(randomised, bert_folder, tmp_path_factory):
    from transformers import BlipForImageTextRetrieval

    folder = tmp_path_factory.mktemp("itm")
    return folder, saved(BlipForImageTextRetrieval, folder, randomised, bert_folder)


def original_names(state):
    """transformers' names of the vision tower as BLIP's own file has them."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in (
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.post_layernorm", "visual_encoder.norm"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"),
            ("self_attn.projection", "attn.proj"),
            ("self_attn", "attn"),
            ("layer_norm", "norm"),
        ):
            name = name.replace(old, new) if not name.startswith("text") else name
        renamed[name] = tensor.double()
    return renamed


def slow_answers(state, slow, image, ids, start):
    """Logits [V] of the first token of BLIP's answer to a question about one image."""
    blip = slow.blip(original_names(state), eps=1e-5)
    s = blip.state
    places = s["visual_encoder.pos_embed"][0]
    grid = places[1:].T.reshape(1, -1, 4, 4)
    grid = F.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False)
    positions = torch.cat([places[:1], grid[0].flatten(1).T])
    pixels = normalised(fitted(image[None], SIDE, "squash"))[0]
    tokens = blip.vision(pixels, positions=positions)
    question = blip.text(ids, tokens)
    x = blip.text(torch.tensor([start]), question, prefix="text_decoder.bert.")
    head = "text_decoder.cls.predictions."
    x = slow.gelu(slow.linear(s, f"{head}transform.dense", x))
    x = slow.norm(s, f"{head}transform.LayerNorm", x, 1e-12)[0]
    weight = s["text_decoder.bert.embeddings.word_embeddings.weight"]
    return x @ weight.T + s[f"{head}bias"]


@pytest.fixture(scope="module")
def answers(vqa, bert_folder, slow):
    """``answers(image, question)`` by the plain BLIP: logits of "yes", of "no", and of all."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])

    def ask(image, question):
        ids = tokenizer(question).input_ids
        logits = slow_answers(
            vqa[1], slow, image, torch.tensor([VOCABULARY + 1, *ids[1:]]), VOCABULARY
        )
        return float(logits[yes]), float(logits[no]), logits

    return ask


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_blip_vqa_is_the_product_over_phrases(vqa, answers, images, prompts):
    reward = load("blip-vqa", source=vqa[0], **DOUBLE)
    scores = reward(images, prompts)
    asked = (
        ["a red dog?", "a blue car?"],
        ["two dogs?", "a green apple?"],
        ["a cat?"],
    )
    expected = []
    for image, questions in zip(images, asked):
        logits = [answers(image, question) for question in questions]
        expected.append(math.prod(sigmoid(yes - no) for yes, no, _ in logits))
    assert scores.tolist() == pytest.approx(expected, rel=1e-8)
    log = load("blip-vqa", source=vqa[0], log=True, **DOUBLE)(images, prompts)
    assert log.tolist() == pytest.approx([math.log(value) for value in expected], rel=1e-8)


def test_da_score_is_the_mean_over_all_words(vqa, answers, images, prompts):
    table = {p: ["is there a dog in the image?", "is the car blue?"] for p in prompts}
    reward = load("da-score", source=vqa[0], questions=table, **DOUBLE)
    expected = []
    for image in images:
        logits = [answers(image, question) for question in table[prompts[0]]]
        shares = [math.exp(yes - float(every.logsumexp(0))) for yes, _, every in logits]
        expected.append(sum(shares) / 2)
    assert reward(images, prompts).tolist() == pytest.approx(expected, rel=1e-8)
    with pytest.raises(ValueError, match="the prompt 'a bus' has no questions"):
        reward(images[:1], ["a bus"])


def test_blip_itm_is_transformers_own_forward(itm, images, prompts):
    from transformers import AutoTokenizer, BlipForImageTextRetrieval

    reward = load("blip-itm", source=itm[0], **DOUBLE)
    config = reward.network.config
    assert config.text_config.num_attention_heads == 2
    model = BlipForImageTextRetrieval.from_pretrained(itm[0], config=config).double()
    tokens = AutoTokenizer.from_pretrained(itm[0])(prompts, padding=True, return_tensors="pt")
    pixels = normalised(fitted(images, 384, "squash"))
    with torch.no_grad():
        logits = model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels
        ).itm_score
    assert torch.allclose(reward(images, prompts), logits.softmax(-1)[:, 1], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip-vqa", "da-score", "tifa", "dsg"])
def test_question_rewards_have_slopes_and_independent_rows(
    name, vqa, images, prompts, slopes_agree, batch_is_singles
):
    reward = load(name, source=vqa[0], **DOUBLE)
    slopes_agree(reward, images, prompts)
    batch_is_singles(reward, images, prompts)


@pytest.mark.slow
def test_itm_has_slopes_and_independent_rows(itm, images, prompts, slopes_agree, batch_is_singles):
    reward = load("blip-itm", source=itm[0], **DOUBLE)
    slopes_agree(reward, images, prompts)
    batch_is_singles(reward, images, prompts)


def test_choices_must_differ_in_their_first_token(vqa, images):
    questions = {"a dog": [Question("is there a dog?", "red dog", ("red dog", "red car"))]}
    reward = load("tifa", source=vqa[0], questions=questions)
    with pytest.raises(ValueError, match="begin with the same token"):
        reward(images[:1].float(), ["a dog"])
    unknown = {"a dog": [Question("is there a dog?", "zebra", ("zebra", "dog"))]}
    with pytest.raises(ValueError, match="'zebra' of 'is there a dog\\?' has no token"):
        load("tifa", source=vqa[0], questions=unknown)(images[:1].float(), ["a dog"])


def test_a_blip_of_another_kind_is_named(itm, tmp_path):
    with pytest.raises(ValueError, match="is no complete BlipForQuestionAnswering"):
        load("da-score", source=itm[0])
    with pytest.raises(ValueError, match="da-score: no BlipForQuestionAnswering could be loaded"):
        load("da-score", source=tmp_path)


@pytest.mark.hub
@pytest.mark.slow
def test_golden_scores_of_image_reward(tmp_path):
    """The four example images of the authors' README, from their repository."""
    import io
    from urllib.request import urlopen

    import numpy as np
    from PIL import Image

    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    page = "https://raw.githubusercontent.com/THUDM/ImageReward/main/assets/images/"
    reward, scores = load("image-reward"), []
    for number in range(1, 5):
        with urlopen(f"{page}{number}.webp") as reply:
            picture = Image.open(io.BytesIO(reply.read())).convert("RGB")
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        scores.append(float(reward(image, [prompt])))
    assert scores == pytest.approx([0.58116, 0.27453, -1.41318, -2.02957], abs=0.02)
