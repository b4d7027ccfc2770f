"""Rewards by vision-language models on tiny random ones, against the models' own processors and
``generate``, as the published scores are computed."""

import hashlib
import json
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffalign.rewards import load
from diffalign.rewards.hps_v3 import INSTRUCTION, PIXELS
from diffalign.rewards.questions import Question
from diffalign.rewards.qwen_images import patches
from diffalign.rewards.vlm_reader import VlmReader

DOUBLE = {"dtype": "fp64"}
SPECIAL = "<|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE = 28 * 4
"""Of images that fit the processor: 4 x 4 merged squares of 28 pixels."""


def processor(patch):
    """Byte-level tokens, the words that answer, and Qwen2-VL's image processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["Ye", "Yes", "ye", "yes", "No", "no", "ĠYes"]
    vocabulary = {piece: i for i, piece in enumerate([*letters, *pieces])}
    merges = [("Y", "e"), ("Ye", "s"), ("y", "e"), ("ye", "s"), ("N", "o"), ("n", "o")]
    merges += [("Ġ", "Yes")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|im_end|>")
    fast.add_tokens(SPECIAL.split(), special_tokens=True)
    size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(patch_size=patch, size=size),
        fast,
        Qwen2VLVideoProcessor(patch_size=patch),
        chat_template=TEMPLATE,
    )


def tokens_of(processor):
    ids = processor.tokenizer.convert_tokens_to_ids(SPECIAL.split())
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, ids[2:]))


TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
}


def qwen2(processor):
    from transformers import Qwen2VLConfig

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    rows = len(processor.tokenizer)
    return Qwen2VLConfig(
        text_config={**TEXT, "vocab_size": rows}, vision_config=vision, **tokens_of(processor)
    )


def qwen3(processor):
    from transformers import Qwen3VLConfig

    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": (0,),
    }
    rows = len(processor.tokenizer)
    return Qwen3VLConfig(
        text_config={**TEXT, "vocab_size": rows, "head_dim": 32},
        vision_config=vision,
        **tokens_of(processor),
    )


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl"])
def vlm(request, randomised, tmp_path_factory):
    """Folder, processor and model in float64 of a tiny Qwen."""
    from transformers import AutoModelForImageTextToText

    kind = request.param
    tools = processor(14 if kind == "qwen2_vl" else 16)
    config = qwen2(tools) if kind == "qwen2_vl" else qwen3(tools)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config).eval()
    randomised(model)
    folder = tmp_path_factory.mktemp(kind)
    model.save_pretrained(folder)
    tools.save_pretrained(folder)
    return folder, tools, model.double()


@pytest.fixture
def in_double(monkeypatch):
    """Norms and rotary positions compute in float32 in these models; here in float64, or the
    differences of scores would be noise."""

    def change(network):
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for module in network.modules():
            if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
                module.forward = double_norm(module)

    return change


def double_norm(module):
    return lambda x: (
        module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    )


def exact_images():
    """Two images of 8-bit values."""
    rng = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (2, 3, SIDE, SIDE), generator=rng).double() / 255


def encoded(tools, image, text):
    chat = tools.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    inputs = tools(text=[chat], images=[picture], return_tensors="pt")
    return {k: v.double() if k == "pixel_values" else v for k, v in inputs.items()}


def test_patches_are_the_processors(vlm):
    _, tools, _ = vlm
    image = exact_images()[0]
    fits = image[:, :96, :64]  # a multiple of 28 or 32 in both axes is not touched
    side = 2 * tools.image_processor.patch_size
    fits = image[:, : SIDE // side * side, : 2 * side]
    tools.image_processor.size = {
        "shortest_edge": fits[0].numel(),
        "longest_edge": fits[0].numel(),
    }
    official = tools.image_processor(
        [Image.fromarray((fits * 255).round().byte().permute(1, 2, 0).numpy())],
        return_tensors="pt",
    )
    tools.image_processor.size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    _, rows, columns = official["image_grid_thw"][0].tolist()
    ours = patches(fits, tools.image_processor, (rows, columns))
    assert torch.allclose(ours, official["pixel_values"].double(), rtol=0, atol=1e-6)


def test_patches_of_a_resized_image_are_close(vlm):
    _, tools, _ = vlm
    rng = torch.Generator().manual_seed(9)
    rough = torch.rand(1, 3, 12, 9, generator=rng)
    smooth = torch.nn.functional.interpolate(rough, (150, 110), mode="bilinear")[0]
    image = (smooth * 255).round() / 255
    official = tools.image_processor(
        [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())],
        return_tensors="pt",
    )
    _, rows, columns = official["image_grid_thw"][0].tolist()
    ours = patches(image, tools.image_processor, (rows, columns))
    # 8-bit levels after resizing, in units of the smallest standard deviation
    assert float((ours - official["pixel_values"]).abs().max()) < 1.5 / 255 / 0.26


def test_vqa_score_is_the_first_token_of_generate(vlm):
    folder, tools, model = vlm
    reward = load("vqa-score", source=folder, **DOUBLE)
    assert reward.name == f"vqa-score({folder.name})"
    images, prompts = exact_images(), ["a red dog", "two cats"]
    if SIDE % (2 * tools.image_processor.patch_size):
        # the processor resizes to another multiple; make images that it leaves alone
        side = 2 * tools.image_processor.patch_size
        images = images[..., : SIDE // side * side, : SIDE // side * side]
        edge = images.shape[-1] ** 2
        reward.reader.processor.image_processor.size = {"shortest_edge": edge, "longest_edge": edge}
        tools.image_processor.size = {"shortest_edge": edge, "longest_edge": edge}
    yes = tools.tokenizer.convert_tokens_to_ids("Yes")
    expected = []
    for image, prompt in zip(images, prompts):
        question = f'Does this figure show "{prompt}"? Please answer Yes or No.'
        output = model.generate(
            **encoded(tools, image, question),
            max_new_tokens=1,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        expected.append(float(output.scores[0][0].double().softmax(-1)[yes]))
    scores = reward(images, prompts)
    # generate keeps its scores in float32
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    log = load("vqa-score", source=folder, log=True, **DOUBLE)
    log.reader.processor.image_processor.size = reward.reader.processor.image_processor.size
    assert log(images, prompts).tolist() == pytest.approx([math.log(p) for p in expected], rel=1e-5)


@pytest.mark.slow
def test_slopes_and_independent_rows(
    vlm, images, prompts, in_double, slopes_agree, batch_is_singles
):
    reward = load("vqa-score", source=vlm[0], **DOUBLE)
    assert reward.differentiable
    in_double(reward.network)
    slopes_agree(reward, images, prompts)
    batch_is_singles(reward, images, prompts)


def test_spellings_count_once_and_blanks_do_not(vlm):
    folder, tools, _ = vlm
    reader = VlmReader(folder, None, "test")
    ids = tools.tokenizer.convert_tokens_to_ids
    # "Yes", "yes" and " Yes"; " yes" begins with a token of one space
    assert reader._tokens("yes") == {ids("Yes"), ids("yes"), ids("ĠYes")}
    exact = VlmReader(folder, None, "test", spellings=False)
    assert exact._tokens("Yes") == {ids("Yes")}
    image = exact_images()[:1].float()
    (row,) = reader.log_choices(image, [[Question("is it?")]])
    assert float(row[0].detach().exp().sum()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="begin with the same token"):
        reader.log_choices(image, [[Question("is it?", "yes", ("yes", "Yes"))]])


def test_questions_by_a_vlm(vlm, images, prompts):
    reward = load("tifa", source=vlm[0], reader="vlm", **DOUBLE)
    with torch.no_grad():
        scores = reward(images, prompts)
    assert bool(((scores > 0) & (scores < 1)).all())


@pytest.fixture(scope="module")
def hps3(randomised, tmp_path_factory):
    """Folder with the base's configuration and processor and a file in the authors' old names; the
    model and the head in float64."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    folder, tools = tmp_path_factory.mktemp("hps3"), processor(14)
    config: Qwen2VLConfig = qwen2(tools)
    config.save_pretrained(folder)
    tools.save_pretrained(folder)
    config.text_config.vocab_size += 1
    with torch.random.fork_rng(devices=[]):
        model = Qwen2VLModel(config).eval()
        head = [torch.nn.Linear(*shape) for shape in ((64, 32), (32, 16), (16, 2))]
    randomised(model)
    state = {}
    for name, tensor in model.state_dict().items():
        old = name if name.startswith("visual.") else name.replace("language_model.", "model.")
        state[old] = tensor.clone()
    state["lm_head.weight"] = torch.zeros(config.text_config.vocab_size, 64)
    for place, layer in zip((0, 3, 5), head):
        state[f"rm_head.{place}.weight"] = layer.weight.detach().clone()
        state[f"rm_head.{place}.bias"] = layer.bias.detach().clone()
    save_file(state, folder / "HPSv3.safetensors")
    return folder, tools, model.double(), [layer.double() for layer in head]


@pytest.mark.slow
def test_hps_v3_reads_the_reward_token(hps3):
    folder, tools, model, head = hps3
    reward = load("hps-v3", source=folder, base=folder, **DOUBLE)
    assert reward.processor.image_processor.size == {
        "shortest_edge": PIXELS,
        "longest_edge": PIXELS,
    }
    # a smaller image for the test
    for each in (tools, reward.processor):
        each.image_processor.size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    images, prompts = exact_images(), ["a red {dog}", "two cats"]
    tools.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    token = tools.tokenizer.convert_tokens_to_ids("<|Reward|>")
    expected = []
    for image, prompt in zip(images, prompts):
        text = INSTRUCTION.read_text().replace("{text_prompt}", prompt)
        inputs = encoded(tools, image, text)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
            (x,) = states[inputs["input_ids"] == token]
            x = head[1](head[0](x).relu()).relu()
            expected.append(float(head[2](x)[0]))
    scores = reward(images, prompts)
    # the processor's pixels are float32
    assert scores.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert reward.unit(scores).tolist() == pytest.approx([(s + 5) / 20 for s in expected], abs=1e-6)


@pytest.mark.slow
def test_hps_v3_has_slopes_and_independent_rows(
    hps3, images, prompts, in_double, slopes_agree, batch_is_singles
):
    reward = load("hps-v3", source=hps3[0], base=hps3[0], **DOUBLE)
    reward.processor.image_processor.size = {"shortest_edge": 56**2, "longest_edge": 56**2}
    in_double(reward.network)
    slopes_agree(reward, images, prompts)
    batch_is_singles(reward, images, prompts)


def test_the_instruction_is_the_released_one():
    """Its bytes are part of the model; this is their hash."""
    digest = hashlib.sha256(INSTRUCTION.read_bytes()).hexdigest()
    assert digest == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


def test_foreign_files(hps3, vlm, tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=r"is not HPSv3's: '.*' is missing"):
        load("hps-v3", source=tmp_path, base=hps3[0])
    with pytest.raises(ValueError, match="no processor could be loaded"):
        load("hps-v3", source=hps3[0], base=tmp_path)
    with pytest.raises(ValueError, match="no AutoModelForImageTextToText could be loaded"):
        load("vqa-score", source=tmp_path)


@pytest.fixture(scope="module")
def flan(randomised, tmp_path_factory):
    """Folder in the published form (a T5 with a projector among its weights, in two files), CLIP's
    folder, and the models in float64."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5ForConditionalGeneration,
    )

    words = ["<pad>", "</s>", "<unk>", "Yes", "Does", "figure", "show", "red", "dog", "two", "USER"]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    folder, tower = (tmp_path_factory.mktemp(name) for name in ("flan", "tower"))
    config = T5Config(
        vocab_size=len(words),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        mm_vision_tower=str(tower),
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    with torch.random.fork_rng(devices=[]):
        t5, clip = T5ForConditionalGeneration(config).eval(), CLIPVisionModel(vision).eval()
    randomised(t5)
    randomised(clip, 6).save_pretrained(tower)
    rng = torch.Generator().manual_seed(2)
    projector = {
        f"mm_projector.{place}.{kind}": torch.randn(shape, generator=rng) / 6
        for place in (0, 2)
        for kind, shape in (("weight", (32, 32)), ("bias", (32,)))
    }
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {name: tensor.clone() for name, tensor in t5.state_dict().items()}
    torch.save(weights, folder / "pytorch_model-00001-of-00002.bin")
    torch.save(projector, folder / "pytorch_model-00002-of-00002.bin")
    places = dict.fromkeys(weights, "pytorch_model-00001-of-00002.bin")
    places |= dict.fromkeys(projector, "pytorch_model-00002-of-00002.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    tables = {name: tensor.double() for name, tensor in projector.items()}
    return folder, tokenizer, t5.double(), clip.double(), tables


def test_vqa_score_t5_is_exp_of_minus_the_cross_entropy(flan, slow):
    """The reference pads with Pillow-like pasting, cuts the prompt at the image and takes the loss
    that transformers computes."""
    folder, tokenizer, t5, clip, projector = flan
    reward = load("vqa-score-t5", source=folder, **DOUBLE)
    rng = torch.Generator().manual_seed(4)
    images = torch.rand(2, 3, 28, 20, generator=rng, dtype=torch.float64)
    prompts = ["red dog", "two dog"]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)
    expected = []
    for image, prompt in zip(images, prompts):
        square = mean.view(3, 1, 1).expand(3, 28, 28).clone()
        square[:, :, 4:24] = image
        pixels = (square - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        with torch.no_grad():
            states = clip(pixel_values=pixels[None], output_hidden_states=True).hidden_states
            x = states[2][0, 1:]  # the last but one of three layers
            x = slow.gelu(slow.linear(projector, "mm_projector.0", x))
            x = slow.linear(projector, "mm_projector.2", x)
            chunks = (
                "A chat between a curious user and an artificial intelligence assistant. The "
                "assistant gives helpful, detailed, and polite answers to the user's questions. "
                f'USER: <image>\nDoes this figure show "{prompt}"? Please answer yes or no. '
                "ASSISTANT: "
            ).split("<image>")
            first, last = (torch.tensor(tokenizer(chunk).input_ids) for chunk in chunks)
            words = t5.shared.weight
            inputs = torch.cat([words[first], x, words[last]])[None]
            labels = torch.tensor([tokenizer("Yes").input_ids])
            assert labels.tolist() == [[3, 1]]
            expected.append(math.exp(-float(t5(inputs_embeds=inputs, labels=labels).loss)))
    # T5's norms compute in float32
    assert reward(images, prompts).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_vqa_score_t5_has_slopes_and_independent_rows(
    flan, images, prompts, in_double, slopes_agree, batch_is_singles
):
    reward = load("vqa-score-t5", source=flan[0], **DOUBLE)
    in_double(reward.network)
    slopes_agree(reward, images, prompts)
    batch_is_singles(reward, images, prompts)


def test_vqa_score_t5_refuses_what_cannot_work(flan, tmp_path):
    with pytest.raises(ValueError, match="T5 overflows in fp16"):
        load("vqa-score-t5", source=flan[0], dtype="fp16")
    with pytest.raises(ValueError, match="no configuration of CLIP-FlanT5"):
        load("vqa-score-t5", source=tmp_path / "nowhere")
    shutil.copytree(flan[0], tmp_path / "blind")
    text = (tmp_path / "blind" / "config.json").read_text()
    facts = {k: v for k, v in json.loads(text).items() if k != "mm_vision_tower"}
    (tmp_path / "blind" / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="a T5 without eyes"):
        load("vqa-score-t5", source=tmp_path / "blind")
