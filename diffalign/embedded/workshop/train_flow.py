"""Train the flow-matching model ``emoji-dit``: ``python -m diffalign.embedded.workshop.train_flow
--vae FOLDER --text FOLDER --out FOLDER [--resume]``.

An ``SD3Transformer2DModel`` over the codes (``workshop.codes``) of aligned scenes of the world's
second edition, 16 x 16 tokens, by flow matching (Lipman et al., "Flow Matching for Generative
Modeling", 2022, arXiv:2210.02747; noise levels as in Esser et al., "Scaling Rectified Flow
Transformers for High-Resolution Image Synthesis", 2024, arXiv:2403.03206, equation 19). Its text
tower is that of an ``emoji`` pipeline and stays as it is. ``--from`` goes on from the weights and
the tower of an export. Captions leave facts out or get them
wrong (``workshop.noisy_captions``), so that the model needs guidance. Early batches hold mostly
single objects. ``--export`` writes the averaged weights of a saved state as a
``StableDiffusion3Pipeline`` folder in fp16. Cost: one thread, about two hours.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.embedded.workshop import flow_parts, noisy_captions, relation_pairs, training
from diffalign.embedded.workshop.averaged import AveragedTrainer, weights
from diffalign.embedded.workshop.codes import CHANNELS, COLOURS, codes
from diffalign.embedded.workshop.noisy_captions import CaptionNoise
from diffalign.embedded.workshop.precision import precision
from diffalign.embedded.workshop.train_denoiser import EASY
from diffalign.embedded.workshop.training import (
    STATE,
    Course,
    FlatAdam,
    step_generator,
    step_seed,
    train,
)
from diffalign.embedded.world.editions import ALIGNED, CLOSE
from diffalign.embedded.world.scenes import World
from diffalign.embedded.world.tokens import encode

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

SIDE, PATCH = 32, 2
"""Side of the latents, and of a token in them."""

MIX: dict[str, float] = {
    "single": 0.11, "colour": 0.14, "two": 0.15, "count": 0.18, "position": 0.18,
    "two_coloured": 0.17, "count_coloured": 0.02, "position_coloured": 0.02, "numbers": 0.02,
    "three": 0.01,
}  # fmt: skip
"""The mixture of kinds at the end of the curriculum."""

TOP = 0.85
"""The noise level above which it is not settled yet what is where: there a caption is news. The
lesson's pairs and a share ``--top`` of a batch are there."""


class PlainJointAttention:
    """The attention of a ``JointTransformerBlock`` in its plain form, whose backward pass is faster
    on a CPU than that of ``scaled_dot_product_attention``; for training alone."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        rows, image = hidden_states.shape[:2]
        text = encoder_hidden_states
        heads = (rows, -1, attn.heads, hidden_states.shape[2] // attn.heads)
        query, key, value = (
            torch.cat([layer(hidden_states), other(text)], dim=1).view(heads).transpose(1, 2)
            for layer, other in (
                (attn.to_q, attn.add_q_proj),
                (attn.to_k, attn.add_k_proj),
                (attn.to_v, attn.add_v_proj),
            )
        )
        weights = (query * heads_scale(query) @ key.transpose(-1, -2)).softmax(-1)
        result = (weights @ value).transpose(1, 2).flatten(2)
        first, last = result[:, :image], result[:, image:]
        return attn.to_out[0](first), last if attn.context_pre_only else attn.to_add_out(last)


def heads_scale(query: Tensor) -> float:
    """The factor of the logits of one head."""
    return float(query.shape[-1] ** -0.5)


def build(seed: int, text: int, width: int = 192, layers: int = 6) -> SD3Transformer2DModel:
    """The untrained transformer in fp32, for text features of width ``text``; initial weights from
    ``seed`` without touching the global generator.

    Gates, shifts and scales of the blocks and the last layer start at zero, as in Peebles & Xie,
    "Scalable Diffusion Models with Transformers" (2022, arXiv:2212.09748), section 3.2.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=PATCH,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=layers,
            attention_head_dim=width // 4,
            num_attention_heads=4,
            joint_attention_dim=text,
            caption_projection_dim=width,
            pooled_projection_dim=text,
            pos_embed_max_size=SIDE // PATCH,
        )
    with torch.no_grad():
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm1_context):
                norm.linear.weight.zero_()
                norm.linear.bias.zero_()
        for layer in (model.norm_out.linear, model.proj_out):
            layer.weight.zero_()
            layer.bias.zero_()
    return model


def curriculum(share: float) -> dict[str, float]:
    """Mixture of kinds: from ``EASY`` at a ``share`` of 0 linearly to ``MIX`` at 1 and above."""
    share = min(1.0, max(0.0, share))
    return {
        kind: (1 - share) * EASY.get(kind, 0.0) + share * weight for kind, weight in MIX.items()
    }


def noise_levels(size: int, mean: float, generator: torch.Generator) -> Tensor:
    """``size`` noise levels in (0, 1), stratified: the logistic function of a normal variable of
    this mean and variance 1 (Esser et al., equation 19), float [size]."""
    place = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    normal = torch.erfinv((2 * place - 1).clamp(-0.9999, 0.9999)) * math.sqrt(2)
    return torch.sigmoid(mean + normal)


class FlowTrainer(AveragedTrainer):
    """The state of a run; ``options`` are those of ``parser``."""

    def __init__(
        self,
        options: argparse.Namespace,
        text: CLIPTextModelWithProjection,
        vocab: dict[str, int],
    ) -> None:
        self.text, self.vocab = text, vocab
        width = text.config.hidden_size + flow_parts.EXTRA
        self.model = build(options.seed, width, options.width, options.layers)
        if options.source is not None:
            first = SD3Transformer2DModel.from_pretrained(options.source / "transformer")
            self.model.load_state_dict(first.float().state_dict())
        self.model.set_attn_processor(PlainJointAttention())
        self.positions = self.model.pos_embed.pos_embed.clone()
        self.captions = CaptionNoise()
        super().__init__(options, FlatAdam([self.model]))
        self.forward = torch.compile(self.model) if options.compile else self.model

    def close(self) -> bool:
        """Whether the next step's scenes lie on a quarter of the canvas: it costs half as much and
        shows the objects as large."""
        after = self.done - self.options.close
        turn = self.options.every > 0 and after % self.options.every == 0
        return bool(after < 0 or turn)

    def pairs(self) -> int:
        """Pairs of exchanged objects in the next step's batch: none before the lesson, then
        ``pairs``, and one after it; none on a quarter of the canvas."""
        start, end = self.options.lesson
        if self.done < start or not self.options.pairs or self.close():
            return 0
        return int(self.options.pairs) if self.done < end else 1

    def batch(self) -> tuple[Tensor, Tensor]:
        """Latents float [B, C, 32, 32] and token ids [B, LENGTH] of the next step's scenes; the
        lesson's pairs come last. At first they are twice as many on a quarter of the canvas."""
        first, last = self.options.close, self.options.curriculum
        share = (self.done - first) / max(1, last - first)
        close = self.close()
        world = World(curriculum(share), edition=CLOSE if close else ALIGNED)
        seed = step_seed(self.options.seed, 0, self.done)
        pairs = self.pairs()
        size = self.options.batch * (2 if close else 1) - 2 * pairs
        scenes, captions = noisy_captions.told(world, self.captions, seed, size)
        if pairs:
            start, end = self.options.lesson
            forward = relation_pairs.leading((self.done - start) / max(1, end - start))
            exchanged = relation_pairs.scenes(seed, pairs, forward, ALIGNED)
            scenes += exchanged
            captions += [scene.caption for scene in exchanged]
        return codes(scenes), torch.tensor([encode(self.vocab, text) for text in captions])

    def draws(self, shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise levels [B] and noise [B, C, 32, 32] of the next step; the pictures of a pair share
        theirs, at levels above ``TOP``."""
        pairs = self.pairs()
        size = shape[0] - 2 * pairs
        rest = size - round(self.options.top * size)
        levels = torch.cat(
            [
                noise_levels(rest, self.options.mean, generator),
                TOP + (1 - TOP) * torch.rand(size - rest, generator=generator),
            ]
        )
        noise = torch.randn(shape, generator=generator)
        if pairs:
            high = TOP + (1 - TOP) * torch.rand(pairs, generator=generator)
            levels = torch.cat([levels, high.repeat_interleave(2)])
            noise[-2 * pairs + 1 :: 2] = noise[-2 * pairs :: 2]
        return levels, noise

    def step(self) -> dict[str, float]:
        """One update; returns the mean loss, and that of the noisiest and the cleanest half."""
        latents, ids = self.batch()
        size = len(ids)
        generator = step_generator(self.options.seed, 0, self.done)
        ids[torch.rand(size, generator=generator) < 0.1] = torch.tensor(encode(self.vocab, ""))
        tokens, pooled = flow_parts.features(self.text, ids)
        levels, noise = self.draws(latents.shape, generator)
        self.place(latents.shape[-1], generator)
        clean, level = latents, levels.view(-1, 1, 1, 1)
        answer = self.forward(
            hidden_states=((1 - level) * clean + level * noise).to(precision()),
            timestep=1000 * levels,
            encoder_hidden_states=tokens.to(precision()),
            pooled_projections=pooled.to(precision()),
            return_dict=False,
        )[0]
        errors = F.mse_loss(answer.float(), noise - clean, reduction="none").mean((2, 3))
        losses = errors.mean(1)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        norm = self.update()
        values = losses.detach()[levels.argsort(stable=True)]
        half = size // 2
        return {
            "loss": float(values.mean()),
            "clean": float(values[:half].mean()),
            "noisy": float(values[half:].mean()),
            "norm": norm,
            "colours": float(errors.detach()[:, :COLOURS].mean()),
            "words": float(errors.detach()[:, COLOURS:].mean()),
        }

    def place(self, side: int, generator: torch.Generator) -> None:
        """Put latents of ``side`` at a random place of the canvas: they see its positions."""
        embedding, count = self.model.pos_embed, SIDE // PATCH
        reach = (SIDE - side) // PATCH // 2
        shift = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        table = self.positions.view(1, count, count, -1).roll(shift, (1, 2))
        embedding.pos_embed = table.reshape(self.positions.shape)


def texts(options: argparse.Namespace) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    """The frozen text tower, in the form that Stable Diffusion 3 reads, and its tokenizer: those of
    the export in ``options.source``, or else made of the pipeline in ``options.text``."""
    if options.source is None:
        tower, folder = flow_parts.tower(options.text), options.text
    else:
        folder = options.source
        tower = CLIPTextModelWithProjection.from_pretrained(
            folder / "text_encoder", dtype=torch.float32
        )
    return tower.eval().requires_grad_(False), CLIPTokenizer.from_pretrained(folder / "tokenizer")


def run(options: argparse.Namespace) -> None:
    """Train until ``options.updates``; a state every ``options.save`` updates."""
    torch.set_num_threads(1)
    text, tokenizer = texts(options)
    trainer = FlowTrainer(options, text, tokenizer.get_vocab())
    header = {"model": "emoji-dit", **{key: str(value) for key, value in vars(options).items()}}
    course = Course(
        end=options.updates, samples=options.batch, save=options.save, window=50, early=0
    )
    train(trainer, options, header, course, facts=lambda: {"rate": round(trainer.rate(), 7)})


def export(
    options: argparse.Namespace, out: Path | None, *, averaged: bool = True
) -> StableDiffusion3Pipeline:
    """The pipeline of the state in ``options.out`` in fp32; with ``out`` also written there as fp16
    safetensors. ``averaged`` chooses the averaged weights.

    ``options`` needs out, vae, text, source, width and layers, as in training. ValueError without a
    state.
    """
    vector = weights(options.out / STATE, averaged=averaged)
    encoder, tokenizer = texts(options)
    text = encoder.config.hidden_size + flow_parts.EXTRA
    model = build(0, text, options.width, options.layers)
    FlatAdam([model]).write(vector)
    pipe = flow_parts.pipeline(
        model.eval(),
        AutoencoderTiny.from_pretrained(options.vae),
        encoder,
        tokenizer,
    )
    if out is not None:
        flow_parts.save(pipe, out)
    return pipe


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = training.parser(__doc__, seed=31, save=250)
    add = result.add_argument
    add("--vae", type=Path, required=True, help="folder of the second edition's autoencoder")
    first = result.add_mutually_exclusive_group(required=True)
    first.add_argument("--text", type=Path, help="pipeline folder with the text tower")
    first.add_argument(
        "--from", dest="source", type=Path, help="export of this script to go on from"
    )
    add("--width", type=int, default=192, help="channels of a token")
    add("--layers", type=int, default=6, help="blocks of the transformer")
    add("--batch", type=int, default=16)
    add("--rate", type=float, default=1e-3, help="largest learning rate")
    add("--updates", type=int, default=24_000)
    add("--decay-from", type=int, default=18_000, help="update at which the rate begins to fall")
    add("--close", type=int, default=6_000, help="updates on a quarter of the canvas")
    add("--every", type=int, default=2, help="after those, every so many updates are on it again")
    add("--curriculum", type=int, default=9_000, help="update at which the mixture is reached")
    add("--lesson", type=int, nargs=2, default=(8_000, 14_000), help="first and last update with")
    add("--pairs", type=int, default=2, help="so many pairs of exchanged objects in a batch")
    add("--mean", type=float, default=0.6, help="mean of the noise levels' logit")
    add("--top", type=float, default=0.33, help="share of a batch at the highest noise levels")
    add("--decay", type=float, default=0.9985, help="of the averaged weights, per update")
    add("--compile", action="store_true", help="compile the transformer")
    return result


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    if options.export is not None:
        export(options, options.export)
        return
    run(options)


if __name__ == "__main__":
    main()
