"""Texts encoded for NAG are what each pipeline itself gives its denoiser for a negative prompt; the
text encoders are stand-ins."""

import inspect
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from diffalign.core import UnsupportedModel
from diffalign.families import FAMILIES
from diffalign.families.text import has_text_encoder
from diffalign.testing.tiny import tiny_inputs, tiny_pipeline


class Tokenizer:
    """Bytes as tokens, padded on the right."""

    model_max_length = 77
    padding_side = "right"
    added_tokens_encoder: ClassVar[dict[str, int]] = {}
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, texts, padding=False, max_length=None, truncation=False, **options):
        rows = [
            [1, *(3 + b for b in text.encode())]
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        limit = max_length or self.model_max_length
        rows = [row[:limit] if truncation else row for row in rows]
        length = limit if padding == "max_length" else max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return Batch(input_ids=ids, attention_mask=(ids > 0).long())

    def tokenize(self, text):
        return list(text)

    def batch_decode(self, ids, **options):
        return [""] * len(ids)

    def encode(self, text, **options):
        return self(text).input_ids[0].tolist()

    def apply_chat_template(self, messages, **options):
        return "<user> " + messages[-1]["content"]


class Batch(dict):
    __getattr__ = dict.__getitem__

    def to(self, *args, **kwargs):
        return self


class Encoder(nn.Module):
    """An embedding of bytes and positions with every kind of output that a pipeline asks for."""

    def __init__(self, width, pooled=None):
        super().__init__()
        rng = torch.Generator().manual_seed(width)
        self.table = nn.Parameter(torch.randn(300, width, generator=rng), requires_grad=False)
        self.config = SimpleNamespace(use_attention_mask=False, hidden_size=width)
        self.text_model = SimpleNamespace(final_layer_norm=nn.Identity())
        self.pooled = pooled

    @property
    def dtype(self):
        return self.table.dtype

    @property
    def device(self):
        return self.table.device

    def forward(self, input_ids=None, attention_mask=None, **options):
        hidden = self.table[input_ids] + torch.arange(input_ids.shape[1])[:, None] / 100
        pooled = hidden[:, 1, : self.pooled] if self.pooled else hidden.mean(1)
        states = (hidden * 0.5, hidden * 0.7, hidden)
        return Output(
            pooled if self.pooled and not options.get("plain") else hidden, hidden, pooled, states
        )


class Output:
    def __init__(self, first, hidden, pooled, states):
        (
            self.first,
            self.last_hidden_state,
            self.pooler_output,
            self.text_embeds,
            self.hidden_states,
        ) = first, hidden, pooled, pooled, states

    def __getitem__(self, index):
        return (
            (self.first, self.last_hidden_state)[index]
            if isinstance(index, int)
            else self.hidden_states
        )


PARTS = {
    "PixArtAlphaPipeline": {"text_encoder": (24, None)},
    "PixArtSigmaPipeline": {"text_encoder": (24, None)},
    "SanaPipeline": {"text_encoder": (24, None)},
    "LTXPipeline": {"text_encoder": (24, None)},
    "WanPipeline": {"text_encoder": (24, None)},
    "Lumina2Pipeline": {"text_encoder": (24, None)},
    "ZImagePipeline": {"text_encoder": (24, None)},
    "QwenImagePipeline": {"text_encoder": (24, None)},
    "ChromaPipeline": {"text_encoder": (32, None)},
    "StableDiffusion3Pipeline": {"text_encoder": (8, 8), "text_encoder_2": (8, 8)},
    "FluxPipeline": {"text_encoder": (16, 16), "text_encoder_2": (32, None)},
}


def with_encoders(name):
    if name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        return tiny_pipeline(name, text=True)
    pipe = tiny_pipeline(name)
    for part, (width, pooled) in PARTS[name].items():
        setattr(pipe, part, Encoder(width, pooled))
        setattr(pipe, part.replace("text_encoder", "tokenizer"), Tokenizer())
    return pipe


def inputs(name, pipe, **texts):
    given = {
        key: value
        for key, value in tiny_inputs(name, steps=2).items()
        if "embeds" not in key and "mask" not in key
    }
    known = inspect.signature(type(pipe).__call__).parameters
    if "max_sequence_length" in known:
        given["max_sequence_length"] = 64
    return {**given, **texts}


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", *PARTS])
def test_negative_texts_are_the_pipelines_own(name):
    """The unconditional rows (or call) of the pipeline with CFG, against our encoding of the same
    text."""
    pipe = with_encoders(name)
    family, denoiser = FAMILIES[name], getattr(pipe, "unet", None) or pipe.transformer
    seen = []
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True
    )
    names = list(inspect.signature(denoiser.forward).parameters)
    denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen[-1].update(zip(names, args)), with_kwargs=True
    )
    call = inputs(name, pipe, prompt="two red apples on a bench", negative_prompt="blurry")
    pipe(**call)
    handle.remove()
    sequential = family.mode == "sequential"
    native = seen[1] if sequential else seen[0]
    encoder = family.encoder
    got = encoder.denoiser(encoder.embeddings(pipe, ["blurry"], negative=True, call=call))
    assert family.text[0].name in got
    for key, value in got.items():
        there = native[key]
        if isinstance(value, list):
            assert torch.equal(value[0], there[-1])
            continue
        mine = there if sequential else there[:1]
        mine = mine[:, : value.shape[1]]  # Chroma's mask goes on over the image tokens
        assert value.shape == mine.shape
        assert torch.equal(value.to(mine.dtype), mine)
    if family.mode != "sequential" and family.name != "z-image":
        assert not torch.equal(native[family.text[0].name][:1], native[family.text[0].name][1:])


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", *PARTS])
def test_prompts_are_the_pipelines_own(name):
    """``family.encoder`` against the conditional rows (or call)."""
    pipe = with_encoders(name)
    family, denoiser = FAMILIES[name], getattr(pipe, "unet", None) or pipe.transformer
    seen = []
    names = list(inspect.signature(denoiser.forward).parameters)
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append({**dict(zip(names, args)), **kwargs}),
        with_kwargs=True,
    )
    call = inputs(name, pipe, prompt="two red apples", negative_prompt="blurry")
    pipe(**call)
    handle.remove()
    encoder = family.encoder
    got = encoder.denoiser(encoder.embeddings(pipe, ["two red apples"], call=call))
    assert set(family.encoder(pipe, ["two red apples"])) == set(got)  # with the call's defaults
    for key, value in got.items():
        there = seen[0][key]
        if isinstance(value, list):
            assert torch.equal(value[0], there[0])
            continue
        mine = there if family.mode == "sequential" else there[1:]
        assert torch.equal(value.to(mine.dtype), mine[:, : value.shape[1]])


def test_without_text_encoder_there_is_a_clear_error():
    pipe = tiny_pipeline("FluxPipeline")
    assert not has_text_encoder(pipe)
    with pytest.raises(UnsupportedModel, match="no text encoder"):
        FAMILIES["FluxPipeline"].encoder(pipe, ["a cat"])
