"""The parts of ``emoji-dit`` that are not trained with it: its text encoders, and the pipeline that
holds all parts.

``StableDiffusion3Pipeline`` has three text encoders and calls the first two always. The first is
the text tower of an ``emoji`` pipeline. The second adds eight zeros to each of its tokens. The
third stands for T5: without it the pipeline would append 256 rows of zeros to every prompt, twice
the work of all image tokens; here it is a Funnel transformer without weights, which pools whatever
length it is asked for to a single row of zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    FunnelBaseModel,
    FunnelConfig,
    PreTrainedTokenizerFast,
)

from diffalign.embedded.world.tokens import LENGTH

EXTRA = 8
"""Width of the second text encoder, which says nothing."""

SHIFT = 3.0
"""The sampler's shift of the noise levels towards noise."""


@torch.no_grad()
def _silent(module: nn.Module) -> nn.Module:
    """``module`` with all weights zero, so that its answers are zeros."""
    for parameter in module.parameters():
        parameter.zero_()
    return module.eval().requires_grad_(False)


SCALE = 2.0**-8
"""Scale of the tower's residual stream; every layer normalises it, so that only a rest of it in the
tokens tells the difference."""


@torch.no_grad()
def tower(folder: Path) -> CLIPTextModelWithProjection:
    """The text tower of the pipeline in ``folder`` in the form that Stable Diffusion 3 reads.

    That pipeline takes the tokens before the last layer and without the last norm. So the tower
    gets a layer that adds the normed tokens, and one that leaves them as they are; what the source
    had in its residual stream stays in the tokens at a scale of ``SCALE``. The pooled text is the
    norm of the end token's state. Frozen, fp32.
    """
    source = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    config = CLIPTextConfig(**source.config.to_dict())
    depth = config.num_hidden_layers
    config.num_hidden_layers = depth + 2
    config.layer_norm_eps *= SCALE**2
    config.projection_dim = config.hidden_size
    config.architectures = None
    result = CLIPTextModelWithProjection(config)
    weights = {
        f"text_model.{k.removeprefix('text_model.')}": v for k, v in source.state_dict().items()
    }
    result.load_state_dict(weights, strict=False)
    text = result.text_model
    for embedding in (text.embeddings.token_embedding, text.embeddings.position_embedding):
        embedding.weight.mul_(SCALE)
    for layer in text.encoder.layers[:depth]:
        for branch in (layer.self_attn.out_proj, layer.mlp.fc2):
            branch.weight.mul_(SCALE)
            branch.bias.mul_(SCALE)
    norm, last = text.encoder.layers[depth], text.final_layer_norm
    for layer in text.encoder.layers[depth:]:
        _silent(layer.self_attn)
        _silent(layer.mlp)
    norm.layer_norm2.load_state_dict(last.state_dict())
    nn.init.ones_(last.weight)
    nn.init.zeros_(last.bias)
    _identity(norm.mlp)
    nn.init.eye_(result.text_projection.weight)
    return result.eval().requires_grad_(False)


def _identity(mlp: Any) -> None:
    """The weights with which a two-layer perceptron with ``quick_gelu`` returns its input: that
    activation of x less that of -x is x."""
    width = mlp.fc1.in_features
    for start, sign in ((0, 1.0), (width, -1.0)):
        mlp.fc1.weight[start : start + width] = sign * torch.eye(width)
        mlp.fc2.weight[:, start : start + width] = sign * torch.eye(width)


def silent_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer to which all words are one."""
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    )


def silent_clip() -> CLIPTextModelWithProjection:
    """The second text encoder: ``EXTRA`` zeros a token, as many pooled."""
    config = CLIPTextConfig(
        vocab_size=2,
        hidden_size=EXTRA,
        intermediate_size=EXTRA,
        projection_dim=EXTRA,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _silent(CLIPTextModelWithProjection(config))


def silent_funnel(width: int) -> FunnelBaseModel:
    """The third text encoder: any number of tokens up to 512 to one row of ``width`` zeros."""
    config = FunnelConfig(
        vocab_size=2,
        block_sizes=(1,) * 10,
        num_decoder_layers=0,
        d_model=width,
        n_head=1,
        d_head=2,
        d_inner=2,
        separate_cls=False,
        attention_type="factorized",
    )
    return _silent(FunnelBaseModel(config))


@torch.no_grad()
def features(text: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the pipeline passes to the denoiser for token ids [B, LENGTH]: tokens [B, LENGTH + 1,
    E] and pooled text [B, E]."""
    answer = text(ids, output_hidden_states=True)
    tokens = nn.functional.pad(answer.hidden_states[-2], (0, EXTRA, 0, 1))
    return tokens, nn.functional.pad(answer.text_embeds, (0, EXTRA))


def pipeline(
    transformer: SD3Transformer2DModel,
    vae: AutoencoderTiny,
    text: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
) -> StableDiffusion3Pipeline:
    """The parts as a plain Stable Diffusion 3 pipeline."""
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        text_encoder_2=silent_clip(),
        tokenizer_2=silent_tokenizer(),
        text_encoder_3=silent_funnel(transformer.config.joint_attention_dim),
        tokenizer_3=silent_tokenizer(),
    )


def save(pipe: StableDiffusion3Pipeline, out: Path) -> None:
    """Write the pipeline as fp16 safetensors; loaded without ``dtype`` all its parts are fp32."""
    pipe.to(torch.float16).save_pretrained(out)
    pipe.to(torch.float32)
    # transformers loads a model in the type that its config names, diffusers in fp32
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        config = out / name / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
