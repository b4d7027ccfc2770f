"""The denoiser of ``emoji-video`` over all chunks of a clip at once, for training.

``AnyFlowFARPipeline`` makes one chunk after the other: it runs the clean chunks through the
transformer at noise level 0, keeps their keys and values, and lets the noisy chunk attend to them.
Here the clean chunks and all noisy ones, each at a level of its own, go through once; what each of
them attends to is the same. Two facts of the pipeline are kept with it:

- it pads the keys of a noisy chunk to a multiple of 128 with zeros that attract attention (``sink``
  of them: 64 for 64 tokens),
- it fills the text up with zeros, to which all tokens attend. They are all alike, so the last row
  stands for the ``extra`` ones that are not computed.

Attention is written out, and rotation is in the model's type: the pipeline's flexible attention and
complex numbers of 128 bits are slow on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers import AnyFlowFARTransformer3DModel
    from diffusers.models.normalization import RMSNorm
    from diffusers.models.transformers.transformer_anyflow_far import (
        AnyFlowAttention,
        AnyFlowTransformerBlock,
    )


@dataclass(frozen=True)
class Window:
    """What the tokens of one chunk attend to."""

    # index of the chunk
    query: int
    # indices of the chunks that it sees
    keys: tuple[int, ...]
    # zeros among the keys that are not computed
    sink: int = 0


def windows(chunks: int, tokens: int) -> list[Window]:
    """The windows of ``chunks - 1`` clean and then ``chunks`` noisy chunks of ``tokens`` tokens."""
    clean = [Window(j, tuple(range(j + 1))) for j in range(chunks - 1)]
    noisy = [
        Window(chunks - 1 + j, (*range(j), chunks - 1 + j), -tokens % 128) for j in range(chunks)
    ]
    return clean + noisy


def _attended(
    query: Tensor, key: Tensor, value: Tensor, sink: int = 0, bias: Tensor | None = None
) -> Tensor:
    """Attention of [B, A, Q, D] to [B, A, K, D]; ``sink`` keys are zeros, and so are their
    values."""
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    if sink:
        logits = F.pad(logits, (0, 1), value=math.log(sink))
    weights = logits.softmax(-1)
    result: Tensor = (weights[..., :-1] if sink else weights) @ value
    return result


def _heads(attn: AnyFlowAttention, x: Tensor) -> Tensor:
    rows, tokens, _ = x.shape
    return x.view(rows, tokens, int(attn.heads), -1).transpose(1, 2)


def _scaled(norm: RMSNorm, x: Tensor) -> Tensor:
    """The norm of queries and keys in the type of ``x``; its own form goes through fp32."""
    size = x.square().mean(-1, keepdim=True) + norm.eps
    result: Tensor = x * size.rsqrt() * norm.weight
    return result


def _rotated(x: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
    """[B, A, L, D] with each pair of channels turned by its angle; cosines and sines are [L, D /
    2]."""
    cosine, sine = place
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    return torch.stack(turned, -1).flatten(-2)


def _self_attention(
    attn: AnyFlowAttention, x: Tensor, parts: Sequence[Window], place: tuple[Tensor, Tensor]
) -> Tensor:
    query = _rotated(_heads(attn, _scaled(attn.norm_q, attn.to_q(x))), place)
    key = _rotated(_heads(attn, _scaled(attn.norm_k, attn.to_k(x))), place)
    value = _heads(attn, attn.to_v(x))
    # split once: a slice a window would cost a full gradient each
    queries, keys, values = (source.chunk(len(parts), 2) for source in (query, key, value))
    answers = [
        _attended(
            queries[part.query],
            torch.cat([keys[i] for i in part.keys], 2),
            torch.cat([values[i] for i in part.keys], 2),
            part.sink,
        )
        for part in parts
    ]
    result: Tensor = attn.to_out[0](torch.cat(answers, 2).transpose(1, 2).flatten(2))
    return result


def _cross_attention(attn: AnyFlowAttention, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
    query = _heads(attn, _scaled(attn.norm_q, attn.to_q(x)))
    key = _heads(attn, _scaled(attn.norm_k, attn.to_k(text)))
    answer = _attended(query, key, _heads(attn, attn.to_v(text)), bias=bias)
    result: Tensor = attn.to_out[0](answer.transpose(1, 2).flatten(2))
    return result


def _block(
    block: AnyFlowTransformerBlock,
    x: Tensor,
    text: Tensor,
    times: Tensor,
    parts: Sequence[Window],
    place: tuple[Tensor, Tensor],
    bias: Tensor,
) -> Tensor:
    """One block on tokens [B, F, N, d] of F chunks with time features [B, F, 6, d]."""
    table = (block.scale_shift_table + times).unsqueeze(-2)
    shift, scale, gate, shift2, scale2, gate2 = table.unbind(2)
    shape = x.shape
    y = (_normed(x) * (1 + scale) + shift).flatten(1, 2)
    x = x + _self_attention(block.attn1, y, parts, place).view(shape) * gate
    y = block.norm2(x).flatten(1, 2)
    x = x + _cross_attention(block.attn2, y, text, bias).view(shape)
    y = _normed(x) * (1 + scale2) + shift2
    result: Tensor = x + block.ffn(y) * gate2
    return result


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _times(model: AnyFlowFARTransformer3DModel, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Time features [B, F, d] and [B, F, 6, d] of noise levels [B, F] in [0, 1]."""
    embedder = model.condition_embedder
    waves = embedder.timesteps_proj(1000 * levels.flatten()).to(embedder.time_proj.weight.dtype)
    features = embedder.time_embedder(waves)
    many = embedder.time_proj(embedder.act_fn(features))
    return features.unflatten(0, levels.shape), many.unflatten(0, levels.shape).unflatten(
        2, (6, -1)
    )


def velocities(
    model: AnyFlowFARTransformer3DModel,
    noisy: Tensor,
    clean: Tensor,
    levels: Tensor,
    text: Tensor,
    extra: Tensor,
) -> Tensor:
    """What the model predicts for each noisy chunk, one latent each, behind the clean chunks before
    it: [B, F, C, h, w] like ``noisy``.

    ``clean``: [B, F - 1, C, h, w]; ``levels``: noise levels [B, F] of the noisy chunks in [0, 1];
    ``text``: [B, L, E] with at least one row of zeros at the end; ``extra``: how many more of those
    the pipeline has, [B].
    """
    chunks, side = noisy.shape[1], noisy.shape[-1]
    frames = torch.cat([clean, noisy], 1).transpose(1, 2)
    x = model.patch_embedding(frames).flatten(3).permute(0, 2, 3, 1)
    angles = model.rope._forward_full_frame(chunks, side, noisy.shape[-2], noisy.device)
    angles = angles.flatten(1, 2)
    turns = torch.cat([angles[:-1], angles]).flatten(0, 1)
    place = (turns.real.to(x.dtype), turns.imag.to(x.dtype))
    pooled, many = _times(model, F.pad(levels, (chunks - 1, 0)))
    words = model.condition_embedder.text_embedder(text)
    bias = torch.zeros(len(text), 1, 1, text.shape[1])
    bias[..., -1] = torch.log1p(extra.float())[:, None, None]
    parts = windows(chunks, x.shape[2])
    for block in model.blocks:
        x = _block(block, x, words, many, parts, place, bias.to(x.dtype))
    x, pooled = x[:, chunks - 1 :], pooled[:, chunks - 1 :]
    shift, scale = (model.scale_shift_table + pooled.unsqueeze(2)).unsqueeze(-2).unbind(2)
    answer = model.proj_out(_normed(x) * (1 + scale) + shift)
    result: Tensor = answer.transpose(2, 3).unflatten(3, noisy.shape[-2:])
    return result
