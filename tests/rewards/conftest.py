"""Small random checkpoints in the published formats, and what every reward with a network must do:
slopes, batches, memory of scores, clear errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

TEXT = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a the and of in is are there image photo red blue green two "
    "dog dogs cat car apple on left right yes no one three ? . , does show exactly ! over under"
)
WORDS = TEXT.split()
PROMPTS = ["a red dog on the left of a blue car", "two dogs and a green apple", "a photo of a cat"]


@pytest.fixture(scope="session")
def prompts():
    return PROMPTS


@pytest.fixture(scope="session")
def images():
    """Three float64 images [3, 3, 37, 50], whose values leave room for what resizing overshoots."""
    rng = torch.Generator().manual_seed(11)
    return 0.3 + 0.4 * torch.rand(3, 3, 37, 50, generator=rng, dtype=torch.float64)


@pytest.fixture(scope="session")
def randomised():
    """Random weights of a size that makes every part matter, from a seed."""

    def fill(module: nn.Module, seed: int = 5) -> nn.Module:
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=rng)
                norm = "norm" in name.lower() or "ln_" in name or "gamma" in name
                if parameter.ndim == 1 and norm and "bias" not in name:
                    parameter.copy_(1 + 0.2 * noise)
                elif parameter.ndim >= 2:
                    fan = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
                    parameter.copy_(noise / math.sqrt(fan))
                elif parameter.ndim == 1:
                    parameter.copy_(0.2 * noise)
        return module

    return fill


@pytest.fixture(scope="session")
def tiny_clip(randomised):
    """A ``CLIPModel`` of 28 pixels in patches of 14, one head of 80 and one of 64 numbers."""

    def build(seed: int = 5, **vision):
        from transformers import CLIPConfig, CLIPModel

        config = CLIPConfig(
            projection_dim=24,
            vision_config={
                "hidden_size": 80,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 1,
                "image_size": 28,
                "patch_size": 14,
                "projection_dim": 24,
                "hidden_act": "gelu",
                **vision,
            },
            text_config={
                "hidden_size": 64,
                "intermediate_size": 80,
                "num_hidden_layers": 2,
                "num_attention_heads": 1,
                "projection_dim": 24,
                "hidden_act": "gelu",
            },
        )
        with torch.random.fork_rng(devices=[]):
            model = CLIPModel(config).eval()
        randomised(model, seed)
        with torch.no_grad():
            model.logit_scale.fill_(math.log(100.0))
        return model

    return build


@pytest.fixture(scope="session")
def clip_folder(tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    """A BERT tokenizer of few words."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def slopes_agree():
    """Gradients of a float64 reward against central differences, in eight directions."""

    def check(reward, images, prompts, tolerance=1e-4):
        leaf = images[:2].clone().requires_grad_()
        scores = reward(leaf, prompts[:2])
        assert scores.requires_grad
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        assert gradient.dtype == torch.float64
        assert float(gradient.abs().max()) > 0
        rng, step = torch.Generator().manual_seed(3), 1e-5
        for _ in range(8):
            way = torch.randn(leaf.shape, generator=rng, dtype=torch.float64)
            with torch.no_grad():
                ends = [reward(images[:2] + s * step * way, prompts[:2]).sum() for s in (1, -1)]
            slope = float(ends[0] - ends[1]) / (2 * step)
            # a central difference errs by step**2 times the third derivative
            assert slope == pytest.approx(float((gradient * way).sum()), rel=tolerance, abs=1e-8)

    return check


@pytest.fixture(scope="session")
def batch_is_singles():
    """Each image scores alone what it scores among others, to the last bits of float64."""

    def check(reward, images, prompts):
        with torch.no_grad():
            together = reward(images, prompts)
            reward._scores.clear()
            alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
        assert together.shape == (3,)
        assert float(together.std()) > 1e-6, "scores that do not differ say nothing"
        assert torch.allclose(together, alone, rtol=0, atol=1e-6)

    return check


def attention(query, key, value, heads, mask=None):
    """Softmax attention in float64, a head at a time; mask [L] of keys that count."""
    parts = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1)):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask.bool(), float("-inf"))
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, -1)


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def norm(state, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class SlowBlip:
    """BLIP in plain float64 tensor code, written from its paper and the names of its published
    file; one image at a time."""

    def __init__(self, state, head=64, eps=1e-6):
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.head, self.eps = head, eps

    def vision(self, pixels, prefix="visual_encoder.", positions=None):
        """Tokens [N, D] of pixels [3, S, S]; names of BLIP's own file."""
        s = self.state
        kernel = s[f"{prefix}patch_embed.proj.weight"]
        size = kernel.shape[-1]
        squares = pixels.unfold(1, size, size).unfold(2, size, size)  # 3, h, w, p, p
        squares = squares.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
        x = squares @ kernel.flatten(1).T + s[f"{prefix}patch_embed.proj.bias"]
        x = torch.cat([s[f"{prefix}cls_token"][0], x])
        x = x + (s[f"{prefix}pos_embed"][0] if positions is None else positions)
        depth = len({n.split(".")[2] for n in s if n.startswith(f"{prefix}blocks.")})
        heads = x.shape[-1] // self.head
        for i in range(depth):
            block = f"{prefix}blocks.{i}."
            y = norm(s, f"{block}norm1", x, self.eps)
            y = attention(*linear(s, f"{block}attn.qkv", y).chunk(3, -1), heads)
            x = x + linear(s, f"{block}attn.proj", y)
            y = gelu(linear(s, f"{block}mlp.fc1", norm(s, f"{block}norm2", x, self.eps)))
            x = x + linear(s, f"{block}mlp.fc2", y)
        return norm(s, f"{prefix}norm", x, self.eps)

    def text(self, ids, image, prefix="text_encoder.", mask=None):
        """States [L, D] of token ids that read image tokens [N, E]; BERT's names."""
        s, eps = self.state, 1e-12
        x = s[f"{prefix}embeddings.word_embeddings.weight"][ids]
        x = x + s[f"{prefix}embeddings.position_embeddings.weight"][: len(ids)]
        x = norm(s, f"{prefix}embeddings.LayerNorm", x, eps)
        depth = len({n.split(".layer.")[1].split(".")[0] for n in s if f"{prefix}encoder.l" in n})
        heads = x.shape[-1] // self.head
        for i in range(depth):
            layer = f"{prefix}encoder.layer.{i}."
            for kind, context in (("attention", None), ("crossattention", image)):
                other = x if context is None else context
                q = linear(s, f"{layer}{kind}.self.query", x)
                k = linear(s, f"{layer}{kind}.self.key", other)
                v = linear(s, f"{layer}{kind}.self.value", other)
                y = linear(s, f"{layer}{kind}.output.dense", attention(q, k, v, heads))
                x = norm(s, f"{layer}{kind}.output.LayerNorm", x + y, eps)
            y = gelu(linear(s, f"{layer}intermediate.dense", x))
            y = linear(s, f"{layer}output.dense", y)
            x = norm(s, f"{layer}output.LayerNorm", x + y, eps)
        return x


@pytest.fixture(scope="session")
def slow():
    """The plain pieces and BLIP made of them."""

    class Pieces:
        blip = SlowBlip
        linear, norm, gelu, attention = (
            staticmethod(linear),
            staticmethod(norm),
            staticmethod(gelu),
            staticmethod(attention),
        )

    return Pieces
