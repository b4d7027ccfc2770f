"""The parts of ``emoji-video``, and the ``AnyFlowFARPipeline`` that holds them.

A clip of 13 pictures is four latents, one a chunk: the latent of a key picture is what the
autoencoder of ``emoji`` makes of that picture, so the denoiser learns on key pictures alone, and
the decoder knows how things go from one to the next (``train_video_vae``).

Three numbers of the transformer keep it the same in all of the pipeline's ways to run it.

- Older chunks are not compressed: their patches are those of the newest one, and ``export`` copies
  the weights. So context is one thing, whichever chunk asks.
- ``full_chunk_limit`` is 2, the least: with more, the pipeline cannot make a first chunk alone.
- ``gate_value`` is 0: it is a plain flow model, and the end of a step says nothing to it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AutoencoderKLWan,
    FlowMapEulerDiscreteScheduler,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffalign.embedded.world.clips import KEYS
from diffalign.embedded.world.stories import story_words

CHANNELS, SIDE = 16, 8
"""Channels of a latent, and its side."""

LENGTH, FULL = 24, 512
"""Tokens of a caption in training, and the number that the pipeline fills up to by default."""

PAD, END, UNKNOWN = 0, 1, 2

SHIFT = 3.0
"""The sampler's shift of the noise levels towards noise."""

TEXT = 128
"""Width of the text features."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the stories and the comma, one for all other words, and one for
    the end."""
    names = ["<pad>", "</s>", "<unk>", *story_words()]
    words = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=FULL,
    )


def text_encoder(seed: int) -> UMT5EncoderModel:
    """The untrained text encoder in fp32, two layers of width 128; initial weights from ``seed``
    without touching the global generator."""
    config = UMT5Config(
        vocab_size=3 + len(story_words()),
        d_model=TEXT,
        d_kv=32,
        d_ff=2 * TEXT,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_max_distance=32,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UMT5EncoderModel(config)


def transformer(seed: int, width: int = 160, layers: int = 6) -> AnyFlowFARTransformer3DModel:
    """The untrained denoiser in fp32; initial weights from ``seed`` without touching the global
    generator.

    Gates, shifts and scales and the last layer start at zero, as in Peebles & Xie, "Scalable
    Diffusion Models with Transformers" (2022, arXiv:2212.09748), section 3.2. The weights that
    never matter are no parameters of a training: the compressed patches and the end of a step.
    ValueError for a width whose four heads cannot be turned along time, height and width.
    """
    if width % 8 or width < 24:
        raise ValueError(f"width: expected a multiple of 8 of at least 24, got {width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AnyFlowFARTransformer3DModel(
            patch_size=(1, 1, 1),
            compressed_patch_size=(1, 1, 1),
            full_chunk_limit=2,
            num_attention_heads=4,
            attention_head_dim=width // 4,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT,
            freq_dim=128,
            ffn_dim=3 * width,
            num_layers=layers,
            rope_max_seq_len=32,
            gate_value=0.0,
            chunk_partition=(1,) * KEYS,
        )
    embedder = model.condition_embedder
    with torch.no_grad():
        for layer in (embedder.time_proj, model.proj_out):
            layer.weight.zero_()
            layer.bias.zero_()
        for table in (model.scale_shift_table, *(b.scale_shift_table for b in model.blocks)):
            table.zero_()
        for parameter in embedder.delta_embedder.parameters():
            parameter.zero_()
    model.far_patch_embedding.requires_grad_(False)
    embedder.delta_embedder.requires_grad_(False)
    return model


def autoencoder(seed: int) -> AutoencoderKLWan:
    """The untrained autoencoder in fp32, 13 x 64 x 64 x 3 pixels to 4 x 8 x 8 x 16; initial weights
    from ``seed`` without touching the global generator. Its posterior has a deviation of .002."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=16,
            decoder_base_dim=24,
            z_dim=CHANNELS,
            dim_mult=[1, 2, 3],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
            in_channels=12,
            out_channels=12,
            patch_size=2,
        )
    with torch.no_grad():
        identity = torch.eye(2 * CHANNELS)
        identity[CHANNELS:] = 0
        vae.quant_conv.weight.copy_(identity[:, :, None, None, None])
        vae.quant_conv.bias.zero_()
        vae.quant_conv.bias[CHANNELS:] = -12.0
    return vae


def features(text: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """What the pipeline passes to the denoiser for token ids [B, L]: tokens [B, L, 128], zero
    behind the end."""
    mask = (ids != PAD).long()
    tokens: Tensor = text(input_ids=ids, attention_mask=mask).last_hidden_state
    return tokens * mask[..., None]


@torch.no_grad()
def pipeline(
    denoiser: AnyFlowFARTransformer3DModel, vae: AutoencoderKLWan, text: UMT5EncoderModel
) -> AnyFlowFARPipeline:
    """The parts as a plain pipeline; the patches of older chunks become those of the newest."""
    denoiser.far_patch_embedding.load_state_dict(denoiser.patch_embedding.state_dict())
    for part in (denoiser, vae, text):
        part.eval().requires_grad_(False)
    return AnyFlowFARPipeline(
        tokenizer=tokenizer(),
        text_encoder=text,
        transformer=denoiser,
        vae=vae,
        scheduler=FlowMapEulerDiscreteScheduler(shift=SHIFT),
    )


def save(pipe: AnyFlowFARPipeline, out: Path) -> None:
    """Write the pipeline as fp16 safetensors; loaded without ``dtype`` all its parts are fp32."""
    parts: list[nn.Module] = [pipe.text_encoder, pipe.transformer, pipe.vae]
    for part in parts:
        part.half()
    pipe.save_pretrained(out)
    for part in parts:
        part.float()
    # transformers loads a model in the type that its config names, diffusers in fp32
    config = out / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
