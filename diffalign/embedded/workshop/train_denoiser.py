"""Train the text-to-image model ``emoji``: ``python -m diffalign.embedded.workshop.train_denoiser
--vae FOLDER --out FOLDER [--resume]``.

A ``UNet2DConditionModel`` over 8 x 8 x 16 latents and a ``CLIPTextModel``, both from scratch,
v-prediction (Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022,
arXiv:2202.00512, appendix D). Scenes are rendered and encoded on the fly; early batches hold mostly
single objects, so that shapes are learnt before compositions. ``--export`` writes the averaged
weights of a saved state as a ``StableDiffusionPipeline`` folder in fp16.

A second stage, ``--from FOLDER --captions noisy``, goes on from the weights of a pipeline folder
with captions that leave facts out or get them wrong (``workshop.noisy_captions``). ``--lesson``
begins it with a lesson in relations (``workshop.relation_pairs``), ``--mix relations`` shows more
relations throughout, ``--top`` more of the noisiest steps, at which a layout is decided.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.embedded.workshop import noisy_captions, relation_pairs
from diffalign.embedded.workshop.averaged import AveragedTrainer, weights
from diffalign.embedded.workshop.noisy_captions import CaptionNoise
from diffalign.embedded.workshop.precision import precision
from diffalign.embedded.workshop.train_vae import CHANNELS, pixels
from diffalign.embedded.workshop.training import (
    Course,
    FlatAdam,
    Team,
    launch,
    step_generator,
    step_seed,
    train,
)
from diffalign.embedded.world.scenes import DEFAULT_MIX, World
from diffalign.embedded.world.tokens import LENGTH, encode, tokenizer_in

STATE = "state-{rank}.pt"
EASY = {
    "single": 0.4,
    "colour": 0.4,
    "two": 0.05,
    "count": 0.05,
    "position": 0.05,
    "two_coloured": 0.05,
}

RELATIONS_MIX: dict[str, float] = {
    "single": 0.08, "colour": 0.12, "two": 0.12, "count": 0.15, "position": 0.30,
    "two_coloured": 0.15, "count_coloured": 0.02, "position_coloured": 0.03, "numbers": 0.02,
    "three": 0.01,
}  # fmt: skip
"""The mixture of ``--mix relations``: twice as many relations as in ``DEFAULT_MIX``."""

TOP = 0.15
"""The share of the schedule, from its noisy end, that ``--top`` and the lesson's pairs get."""


def build(
    seed: int, vocabulary: int, channels: int = CHANNELS
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The untrained networks in fp32; initial weights from ``seed`` without touching the global
    generator. 11.2 M and 1.3 M parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(128, 192),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=192,
            norm_num_groups=16,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=192,
                intermediate_size=512,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
    return unet, text


def scheduler() -> DDIMScheduler:
    """The noise schedule of training, as the sampler that ships."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def curriculum(place: float) -> dict[str, float]:
    """Mixture of kinds at ``place`` in [0, 1] of the curriculum: ``EASY`` for the first half, then
    linearly to ``DEFAULT_MIX``."""
    share = min(1.0, max(0.0, 2 * place - 1))
    return {
        kind: (1 - share) * EASY.get(kind, 0.0) + share * weight
        for kind, weight in DEFAULT_MIX.items()
    }


def noise_steps(size: int, count: int, top: float, generator: torch.Generator) -> Tensor:
    """``size`` steps of a schedule of ``count``, int64.

    They are stratified over the batch, and their density grows with noise: the decoder forgives
    small errors, so late steps need less capacity. A share ``top`` of them is spread over the
    noisiest ``TOP`` instead. Only there the picture does not show yet where its objects will be, so
    only there the relation in a caption is news.
    """
    uniform = torch.rand(size, generator=generator)
    rest = size - round(top * size)
    place = (torch.arange(rest) + uniform[:rest]) / rest
    high = (torch.arange(size - rest) + uniform[rest:]) / max(1, size - rest)
    places = torch.cat([place**0.75, 1 - TOP * (1 - high)])
    return (places * count).long().clamp(max=count - 1)


def _read(folder: Path, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
    """Put the weights of a pipeline folder into networks of the same form, as fp32."""
    if not (folder / "model_index.json").exists():
        raise ValueError(
            f"from: expected the folder of a pipeline, found no model_index.json in {folder};"
            " pass a folder that --export has written"
        )
    unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    text.load_state_dict(encoder.state_dict())


class DenoiserTrainer(AveragedTrainer):
    """The state of one process.

    ``options`` needs seed, batch, rate, updates, decay_from, curriculum (update at which it ends),
    decay, source (folder of the first weights or None), captions, mix, top, lesson (update at which
    it ends) and pairs (in a batch of the lesson).
    """

    warm = 200
    every = 8

    def __init__(
        self, team: Team, options: argparse.Namespace, vae: AutoencoderTiny, vocab: dict[str, int]
    ) -> None:
        self.team, self.vocab = team, vocab
        self.encoder = vae.encoder.to(
            precision(), memory_format=torch.channels_last
        ).requires_grad_(False)
        self.unet, self.text = build(options.seed, len(vocab), vae.config.latent_channels)
        if options.source is not None:
            _read(options.source, self.unet, self.text)
        self.captions = CaptionNoise() if options.captions == "noisy" else None
        # The backward pass of scaled_dot_product_attention is slow on a CPU for narrow heads; the
        # plain form computes the same.
        self.unet.set_attn_processor(AttnProcessor())
        self.text.set_attn_implementation("eager")
        super().__init__(options, FlatAdam([self.unet, self.text]))
        cumulative = scheduler().alphas_cumprod
        self.signal, self.noise = cumulative.sqrt(), (1 - cumulative).sqrt()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Latents [B, C, 8, 8] and token ids [B, LENGTH] of the next step's scenes; the
        lesson's pairs come last."""
        early = curriculum(self.done / max(1, self.options.curriculum))
        world = World(RELATIONS_MIX if self.options.mix == "relations" else early)
        seed = step_seed(self.options.seed, self.team.rank, self.done)
        pairs = self.pairs()
        size = self.options.batch - 2 * pairs
        if self.captions is None:
            images, captions, _ = world.arrays(seed, size)
        else:
            images, captions = noisy_captions.arrays(world, self.captions, seed, size)
        if pairs:
            forward = relation_pairs.leading(self.done / self.options.lesson)
            pictures, sentences = relation_pairs.arrays(seed, pairs, forward)
            images, captions = np.concatenate([images, pictures]), captions + sentences
        with torch.no_grad():
            latents = self.encoder(pixels(images, precision())).contiguous()
        return latents, torch.tensor([encode(self.vocab, caption) for caption in captions])

    def pairs(self) -> int:
        """Pairs in the next step's batch."""
        return int(self.options.pairs) if self.done < self.options.lesson else 0

    def draws(self, shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Steps int64 [B] and noise [B, C, 8, 8] of the next step; the pictures of a pair share
        theirs, among the noisiest steps."""
        pairs, count = self.pairs(), len(self.signal)
        steps = noise_steps(shape[0] - 2 * pairs, count, self.options.top, generator)
        if pairs:
            high = noise_steps(pairs, count, 1.0, generator)
            steps = torch.cat([steps, high.repeat_interleave(2)])
        noise = torch.randn(shape, generator=generator)
        if pairs:
            noise[-2 * pairs + 1 :: 2] = noise[-2 * pairs :: 2]
        return steps, noise

    def step(self) -> dict[str, float]:
        """One update; returns the mean v-loss of this process's batch, and of its noisiest and
        cleanest half."""
        latents, ids = self.batch()
        size = len(ids)
        generator = step_generator(self.options.seed, self.team.rank, self.done)
        empty = torch.tensor(encode(self.vocab, ""))
        ids[torch.rand(size, generator=generator) < 0.1] = empty
        steps, noise = self.draws(latents.shape, generator)
        signal, spread = (table[steps].view(-1, 1, 1, 1) for table in (self.signal, self.noise))
        clean = latents.float()
        noisy = (signal * clean + spread * noise).to(precision())
        target = signal * noise - spread * clean
        context = self.text(ids).last_hidden_state
        losses = (self.unet(noisy, steps, context).sample.float() - target).square().mean((1, 2, 3))
        losses.mean().backward()
        norm = self.update()
        values = losses.detach()[steps.argsort(stable=True)]
        half = size // 2
        return {
            "loss": float(values.mean()),
            "clean": float(values[:half].mean()),
            "noisy": float(values[half:].mean()),
            "norm": norm,
        }

    def meet(self) -> None:
        """The processes take the mean of their weights."""
        self.team.average(self.flat.master.data)
        self.flat.publish()


def run(team: Team, options: argparse.Namespace) -> None:
    """Train until ``options.updates``; a state every ``options.save`` updates."""
    torch.set_num_threads(1)
    vae = AutoencoderTiny.from_pretrained(options.vae)
    tokenizer = CLIPTokenizer.from_pretrained(options.out / "tokenizer")
    trainer = DenoiserTrainer(team, options, vae, tokenizer.get_vocab())
    header = {"model": "emoji", **{key: str(value) for key, value in vars(options).items()}}
    course = Course(
        end=options.updates,
        samples=options.batch * team.size,
        save=options.save,
        window=options.window,
        early=0,
        state=STATE,
        log="log-{rank}.jsonl",
    )
    train(trainer, options, header, course, team.rank, lambda: {"rate": round(trainer.rate(), 7)})


def pipeline(
    vae: AutoencoderTiny, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel, text: CLIPTextModel
) -> StableDiffusionPipeline:
    """The parts as a plain Stable Diffusion pipeline without safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(
    state: Path, vae: Path, tokenizer: Path, out: Path | None, *, averaged: bool = True
) -> StableDiffusionPipeline:
    """The pipeline of a saved state in fp32; with ``out`` also written there as fp16 safetensors.
    ``averaged`` chooses the EMA weights."""
    vector = weights(state, averaged=averaged)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    autoencoder = AutoencoderTiny.from_pretrained(vae)
    unet, text = build(0, len(words.get_vocab()), autoencoder.config.latent_channels)
    FlatAdam([unet, text]).write(vector)
    pipe = pipeline(autoencoder, words, unet.eval(), text.eval())
    if out is not None:
        pipe.to(torch.float16).save_pretrained(out)
        pipe.to(torch.float32)
        # transformers loads a text encoder in the type that its config names, diffusers the rest in
        # fp32; without this a folder loaded without ``dtype`` has parts that do not fit together.
        config = out / "text_encoder" / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    return pipe


def _add_stage(result: argparse.ArgumentParser) -> None:
    """The options of a second stage; their defaults are those of the first."""
    add = result.add_argument
    add("--from", dest="source", type=Path, help="pipeline folder whose weights are the first")
    add(
        "--captions",
        choices=("true", "noisy"),
        default="true",
        help="noisy: some leave a fact out or get one wrong",
    )
    add(
        "--mix",
        choices=("curriculum", "relations"),
        default="curriculum",
        help="mixture of the kinds of scene",
    )
    add("--top", type=float, default=0.0, help="share of a batch at the noisiest steps")
    add("--lesson", type=int, default=0, help="update until which pairs teach the relations")
    add("--pairs", type=int, default=6, help="pairs in a batch of the lesson")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--vae", type=Path, default=Path("runs/vae/vae"))
    result.add_argument("--out", type=Path, default=Path("runs/emoji"))
    result.add_argument("--seed", type=int, default=12)
    result.add_argument("--batch", type=int, default=16)
    result.add_argument("--rate", type=float, default=1e-3)
    result.add_argument("--updates", type=int, default=24_000)
    result.add_argument(
        "--decay-from",
        type=int,
        default=16_000,
        help="update at which the learning rate begins to fall",
    )
    result.add_argument(
        "--curriculum",
        type=int,
        default=7_000,
        help="update at which the shipped mixture of scenes is reached",
    )
    _add_stage(result)
    result.add_argument(
        "--decay", type=float, default=0.9995, help="of the averaged weights, per update"
    )
    result.add_argument("--window", type=int, default=100, help="updates per log record")
    result.add_argument(
        "--save", type=int, default=600, help="updates between states; a multiple of 8"
    )
    result.add_argument("--processes", type=int, default=1)
    result.add_argument("--resume", action="store_true")
    result.add_argument(
        "--export",
        type=Path,
        help="write the averaged weights of the saved state to this folder and stop",
    )
    return result


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    if options.export is not None:
        export(
            options.out / STATE.format(rank=0),
            options.vae,
            options.out / "tokenizer",
            options.export,
        )
        return
    words = tokenizer_in(options.out / "tokenizer")
    parameters = sum(
        p.numel() for part in build(0, len(words.get_vocab())) for p in part.parameters()
    )
    launch(run, options.processes, parameters, (options,))


if __name__ == "__main__":
    main()
