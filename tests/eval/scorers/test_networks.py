"""Detectors, BLIP and depth: small random checkpoints in the published format, read by our loaders
and by a slow computation of the test's own."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from diffalign.eval.scorers.blip import Blip, forms_of, question_of
from diffalign.eval.scorers.boxes import Boxes, detections, renamed
from diffalign.eval.scorers.colours import TEMPLATES, Colours
from diffalign.eval.scorers.compbench import QuestionScorer, soft_tifa
from diffalign.eval.scorers.depth import Depth
from diffalign.eval.scorers.geneval import GenEvalScorer
from diffalign.eval.scorers.mask2former import Mask2Former, box_of, instances
from diffalign.tasks.compbench.rules import Labelled
from diffalign.tasks.geneval.prompts import COLORS, class_names

IMAGE = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))


def slow_instances(classes, masks, padded, inside, size):
    """The five steps of the official post-processing, pair by pair, in float64."""
    classes, masks = classes.double(), masks.double()
    pairs = []
    for query in range(classes.shape[0]):
        exps = [math.exp(v) for v in classes[query].tolist()]
        pairs += [(exps[k] / sum(exps), query, k) for k in range(len(exps) - 1)]
    results = []
    for p, query, label in sorted(pairs, key=lambda pair: -pair[0])[:100]:
        full = interpolate(masks[query][None, None], padded, mode="bilinear")
        part = full[:, :, : inside[0], : inside[1]]
        logits = interpolate(part, size, mode="bilinear")[0, 0].numpy()
        mask = logits > 0
        score = p * (1 / (1 + np.exp(-logits)) * mask).sum() / (mask.sum() + 1e-6)
        ys, xs = np.nonzero(mask)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else (0, 0, 0, 0)
        results.append((score, label, tuple(map(float, box))))
    return sorted(results, key=lambda r: -r[0])


def test_instances_of_a_hand_made_output():
    """Two queries, three classes, one query taken twice, an image of 4 x 8 in an input of 8 x 8."""
    classes = torch.tensor([[3.0, 2.9, -9, -9], [-9, -9, 4.0, 0.0]])
    masks = torch.full((2, 8, 8), -20.0)
    masks[0, 1:3, 2:6] = 20.0
    masks[1, 0:4, 0:1] = 20.0
    objects = instances(classes, masks, (8, 8), (4, 8), (4, 8))
    assert [f.label for f in objects] == [2, 0, 1]
    assert [f.box for f in objects] == [(0, 0, 1, 4), (2, 1, 6, 3), (2, 1, 6, 3)]
    assert objects[0].score == pytest.approx(math.exp(4) / (math.exp(4) + 1), rel=1e-3)
    slow = slow_instances(classes, masks, (8, 8), (4, 8), (4, 8))
    assert [f.score for f in objects] == pytest.approx([s for s, _, _ in slow[:3]], rel=1e-5)
    assert box_of(torch.zeros(4, 4, dtype=torch.bool)) == (0, 0, 0, 0)


def test_instances_against_the_slow_computation():
    rng = torch.Generator().manual_seed(1)
    classes = 3 * torch.randn(20, 9, generator=rng)
    masks = 4 * torch.randn(20, 8, 12, generator=rng)
    objects = instances(classes, masks, (32, 64), (30, 45), (40, 60))
    slow = [r for r in slow_instances(classes, masks, (32, 64), (30, 45), (40, 60)) if r[0] > 0.05]
    assert len(objects) == len(slow) > 10
    assert [f.score for f in objects] == pytest.approx([s for s, _, _ in slow], rel=1e-4)
    assert [(f.label, f.box) for f in objects] == [(label, box) for _, label, box in slow]


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    """A folder with a random Mask2Former of COCO's 80 classes."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    names = list(class_names())
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=12, id2label=dict(enumerate(names)),
        label2id={name: n for n, name in enumerate(names)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
        with torch.no_grad():
            model.class_predictor.weight.mul_(60)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_mask2former_in_the_published_format(mask2former, monkeypatch):
    """A small input, or the pure Python of the attention takes minutes."""
    import torchvision.transforms.functional as vision
    from transformers import Mask2FormerForUniversalSegmentation

    from diffalign.eval.scorers import mask2former as module

    monkeypatch.setattr(module, "SHORT", 96)
    objects = Mask2Former(str(mask2former), "cpu").detect(IMAGE)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    small = vision.resize(IMAGE, [96, 144], antialias=True)
    small = vision.normalize(small, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    pixels = torch.zeros(1, 3, 96, 160)
    pixels[..., :144] = small
    valid = torch.zeros(1, 96, 160).long()
    valid[..., :144] = 1
    with torch.no_grad():
        output = model(pixel_values=pixels, pixel_mask=valid)
    args = ((96, 160), (96, 144), (40, 60))
    slow = slow_instances(output.class_queries_logits[0], output.masks_queries_logits[0], *args)
    slow = [entry for entry in slow if entry[0] > 0.05]
    assert len(objects) == len(slow) > 0
    assert [f.score for f in objects] == pytest.approx([s for s, _, _ in slow], rel=1e-3)
    assert [(f.label, f.box) for f in objects] == [(label, box) for _, label, box in slow]


@pytest.mark.slow
def test_half_a_checkpoint_is_refused(mask2former, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(mask2former, other)
    weights = load_file(other / "model.safetensors")
    weights.pop("class_predictor.weight")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing.*class_predictor\.weight"):
        Mask2Former(str(other), "cpu")
    config = json.loads((mask2former / "config.json").read_text())
    config["id2label"]["0"] = "toothbrush"
    shutil.rmtree(other)
    shutil.copytree(mask2former, other)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="COCO's 80"):
        Mask2Former(str(other), "cpu")
    with pytest.raises(ValueError, match="cannot be read"):
        Mask2Former(str(tmp_path / "nothing"), "cpu")


class FlatClip(torch.nn.Module):
    """A colour's text is its own axis; every image is near the fifth."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def encode_text(self, tokens):
        return torch.tensor([torch.eye(10)[n].tolist() for n in tokens])

    def encode_image(self, pixels):
        return torch.eye(10)[[4]] + 0.1


def test_colours_see_the_object_before_grey_and_know_the_templates():
    net, texts = FlatClip(), []

    def tokenize(prompts):
        texts.extend(prompts)
        return [next(i for i, c in enumerate(COLORS) if f" {c}" in p) for p in prompts]

    class Tokens(list):
        def to(self, device):
            return self

    crops = []

    def preprocess(picture):
        crops.append(np.asarray(picture))
        return torch.zeros(3, 2, 2)

    colours = Colours(net, preprocess, lambda prompts: Tokens(tokenize(prompts)))
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[5:10, 20:30] = True
    assert colours.of(IMAGE, (20.0, 5.0, 30.0, 12.0), mask, "car") == "blue"
    assert crops[0].shape == (7, 10, 3)
    assert (crops[0][5:] == 153).all()
    expected = (IMAGE[:, 5:10, 20:30] * 255).round().byte().permute(1, 2, 0).numpy()
    assert (crops[0][:5] == expected).all()
    assert texts[:3] == [t.format(colour="red", name="car") for t in TEMPLATES]
    assert texts[1] == "a photo of a red-colored car"
    assert len(texts) == 30
    colours.of(IMAGE, (0.0, 0.0, 5.0, 5.0), None, "car")
    assert len(texts) == 30


def test_geneval_scorer_needs_both_networks():
    """One red car in the detector's eyes: right for a red car, wrong for a blue one."""
    from types import SimpleNamespace

    from diffalign.eval.benchmarks import Item

    car = class_names().index("car")
    mask = torch.ones(40, 60, dtype=torch.bool)
    objects = [SimpleNamespace(label=car, score=0.95, box=(0.0, 0.0, 9.0, 9.0), mask=mask)]
    detector = SimpleNamespace(detect=lambda image: objects, facts=dict)
    colours = SimpleNamespace(of=lambda *a: "red", facts=dict)
    scorer = GenEvalScorer("mask2former", detector, colours)
    for colour, score in (("red", 1.0), ("blue", 0.0)):
        facts = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": colour}]}
        item = Item(0, "a car", "colors", "x", facts)
        (outcome,) = scorer.score([IMAGE], item)
        assert outcome.score == score
    assert outcome.reason == "expected blue car>=1, found 0 blue; and 1 red"
    assert "it sees car" in scorer.canary()
    assert not scorer.knows(Item(0, "a", "x", "x", {}))


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A random BLIP of two layers and its vocabulary of thirteen words."""
    from transformers import BertTokenizerFast, BlipConfig, BlipForQuestionAnswering

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "red", "cat", "?"]
    (folder / "vocab.txt").write_text("\n".join([*words, "[DEC]", "[ENC]"]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    text = {**sizes, "num_attention_heads": 2, "vocab_size": 13, "encoder_hidden_size": 16}
    text |= {"bos_token_id": 11, "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3}
    vision = {**sizes, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(8)
    model.save_pretrained(folder)
    return folder


IDS = {"yes": 5, "no": 6, "start": 11, "encode": 12}


@pytest.mark.slow
def test_blip_asks_as_the_published_program_does(blip):
    """The same numbers from transformers' own generation with the question's first token put right,
    and other ones without."""
    from transformers import BlipForQuestionAnswering

    ours = Blip(str(blip), side=16, ids=IDS)
    value = ours.yes(IMAGE, "A red cat.")
    model = BlipForQuestionAnswering.from_pretrained(blip).eval()
    pixels = interpolate(IMAGE[None], (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.stack([(pixels[0, c] - mean[c]) / std[c] for c in range(3)])[None]

    def generated(first):
        ids = torch.tensor([[first, 7, 8, 9, 10, 3]])
        answer = model.generate(
            ids, pixels, max_new_tokens=1, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        yes, no = answer.logits[0][0].softmax(-1)[[5, 6]].tolist()
        return yes / (yes + no)

    assert value == pytest.approx(generated(12), abs=1e-5)
    assert abs(value - generated(2)) > 1e-4
    with pytest.raises(ValueError, match="not the published vocabulary"):
        Blip(str(blip), side=16)


def test_questions_are_cleaned():
    assert question_of("The red (big) Cat.") == "the red big cat ?"
    assert question_of("a cat") == "a cat?"
    assert len(question_of("x " * 80).split()) == 50


def test_a_number_is_right_in_words_and_in_digits():
    """The probabilities of both are added; other answers have one form."""
    assert forms_of("Three ") == forms_of("3") == ["three", "3"]
    assert (forms_of("Yes"), forms_of("30")) == (["yes"], ["30"])
    reader = object.__new__(Blip)
    vocabulary = {"three": 7, "3": 8, "yes": 5}
    reader.tokenizer = lambda text, **options: SimpleNamespace(input_ids=[vocabulary[text], 9])
    reader.answers = lambda image, question, tokens: [
        {5: 0.25, 7: 0.125, 8: 0.5}[t] for t in tokens
    ]
    assert reader.correct(IMAGE, "How many cats?", "three") == 0.625
    assert reader.correct(IMAGE, "Is it a cat?", "Yes") == 0.25


@pytest.mark.slow
def test_soft_tifa_is_two_means(blip):
    from diffalign.eval.benchmarks import Item

    assert soft_tifa([0.5, 0.125]) == pytest.approx((0.3125, 0.25))
    scorer = QuestionScorer(Blip(str(blip), side=16, ids=IDS))
    item = Item(0, "x", "x", "x", {"questions": [["a red cat?", "yes"], ["a cat?", "no"]]})
    (outcome,) = scorer.score([IMAGE], item)
    answers = outcome.measured["answers"]
    assert outcome.score == pytest.approx(sum(answers) / 2)
    blip_yes = scorer.blip.answers(IMAGE, "a red cat?", [5])
    assert answers[0] == pytest.approx(blip_yes[0])


@pytest.mark.slow
def test_depth_in_the_published_format(tmp_path):
    """Against transformers' own processor up to its 8 bits: rows, columns, nearer is larger."""
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DPTForDepthEstimation(config).save_pretrained(tmp_path)
    rows = Depth(str(tmp_path)).map(IMAGE)
    assert (len(rows), len(rows[0])) == (479, 718)
    model = DPTForDepthEstimation.from_pretrained(tmp_path).eval()
    pixels = interpolate(IMAGE[None], (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        depth = model(pixel_values=(pixels - 0.5) / 0.5).predicted_depth[0].double().numpy()
    depth = (depth - depth.min()) / (depth.max() - depth.min())

    def at(y, x):
        """Bilinear value of the map at a pixel of the image, corners on corners."""
        v, u = y * (depth.shape[0] - 1) / 39, x * (depth.shape[1] - 1) / 59
        i, j = min(int(v), depth.shape[0] - 2), min(int(u), depth.shape[1] - 2)
        a, b = v - i, u - j
        top = depth[i, j] * (1 - b) + depth[i, j + 1] * b
        return top * (1 - a) + (depth[i + 1, j] * (1 - b) + depth[i + 1, j + 1] * b) * a

    scale = 479 / 40
    for y in (3, 20, 36):
        for x in (4, 30, 55):
            row, column = int((y + 0.5) * scale), int((x + 0.5) * scale)
            assert rows[row][column] == pytest.approx(at(y, x), abs=3 / 255)


def test_boxes_by_hand_and_in_the_published_format(tmp_path):
    logits = torch.tensor([[2.0, -5.0], [1.0, 0.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]])
    objects = detections(logits, boxes, (100, 200))
    assert [f[0] for f in objects] == [0, 0, 1, 1]
    assert objects[0][2] == pytest.approx((80, 30, 120, 70))
    assert objects[1][2] == pytest.approx((0, 0, 100, 100))
    assert objects[2][1] == 0.5
    assert renamed(Labelled("cabinet/shelf", 1.0, (0, 0, 1, 1)), ["shelf"]).label == "shelf"
    assert renamed(Labelled("tv", 1.0, (0, 0, 1, 1)), ["television"]).label == "television"
    assert renamed(Labelled("carpet", 1.0, (0, 0, 1, 1)), ["car"]).label == "carpet"


@pytest.mark.slow
def test_dfine_in_the_published_format(tmp_path):
    """Against transformers' own post-processing."""
    from transformers import (
        DFineConfig,
        DFineForObjectDetection,
        HGNetV2Config,
        RTDetrImageProcessor,
    )

    backbone = HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 16], stage_mid_channels=[4] * 4,
        stage_out_channels=[8, 16, 16, 16], stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4,
        hidden_sizes=[8, 16, 16, 16], out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DFineConfig(
            backbone_config=backbone, encoder_in_channels=[16] * 3, encoder_hidden_dim=16,
            encoder_ffn_dim=16,
            encoder_attention_heads=2, d_model=16, num_queries=30, decoder_in_channels=[16] * 3,
            decoder_ffn_dim=16, decoder_layers=2, decoder_attention_heads=2, num_labels=5,
            hidden_expansion=0.5, decoder_n_points=[2, 2, 2],
        )  # fmt: skip
        model = DFineForObjectDetection(config)
    model.save_pretrained(tmp_path)
    objects = Boxes(str(tmp_path)).detect(IMAGE)
    pixels = interpolate(IMAGE[None], (640, 640), mode="bilinear", antialias=True).clamp(0, 1)
    model.eval()
    with torch.no_grad():
        output = model(pixel_values=pixels)
    processor = RTDetrImageProcessor()
    (expected,) = processor.post_process_object_detection(output, 0.0, torch.tensor([[479, 718]]))
    count = len(expected["scores"])
    assert [f.score for f in objects[:count]] == pytest.approx(
        expected["scores"].tolist(), abs=1e-5
    )
    for one, box in zip(objects[:20], expected["boxes"][:20].tolist()):
        assert one.box == pytest.approx(box, abs=0.05)
