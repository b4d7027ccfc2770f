"""Distil a pipeline into one that draws in one to four steps without guidance: ``python -m
diffalign.embedded.workshop.train_turbo --pipeline FOLDER --out FOLDER [--resume]``.

First the teacher draws: ``--pairs`` pictures by eight guided steps of DPM-Solver++, and every point
of their way is kept. Then a student learns to go from any of these points to the end in one step,
without guidance. Its target is the end itself, by a distance that counts cells and not squares, so
that a cell takes one of two objects and not their mean. From update ``--matching`` a second loss
joins: distribution matching (Yin et al., "One-step Diffusion with Distribution Matching
Distillation", 2023, arXiv:2311.18828, equations 7 and 8). A second denoiser follows what the
student draws, and the student moves from where that one would clean its pictures to where the
guided teacher would. It sees pictures of one step, and of the last of two to four steps, where the
student begins at points that it came to by itself (Yin et al., "Improved Distribution Matching
Distillation for Fast Image Synthesis", 2024, arXiv:2405.14867, section 4.5). A third loss is a
reward: the student's pictures, noised, are to show their captions to ``emoji-evaluator``.

The student is the teacher plus a low-rank difference of every linear and convolution layer, a LoRA
(Hu et al., 2021, arXiv:2106.09685) in the format of diffusers. ``--export`` writes the averaged
one of a saved state, with its scheduler; ``score --adapter`` judges it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from diffalign.core.types import Pipeline
from diffalign.embedded.adapter import sampler
from diffalign.embedded.load import load, pipeline_in
from diffalign.embedded.nets.evaluator import word_mask
from diffalign.embedded.workshop.precision import precision
from diffalign.embedded.workshop.training import (
    STATE,
    Course,
    FlatAdam,
    State,
    cosine,
    save_state,
    saved_state,
    step_generator,
    step_seed,
    train,
)
from diffalign.embedded.workshop.training import parser as shared
from diffalign.embedded.world.scenes import World
from diffalign.embedded.world.tokens import encode

MIX: dict[str, float] = {
    "single": 0.10, "colour": 0.15, "two": 0.15, "count": 0.20, "position": 0.20,
    "two_coloured": 0.20,
}  # fmt: skip
"""The mixture of scenes whose captions the teacher draws."""

SHARD = 256
"""Ways in a file of the bank."""

HUBER = 0.1
"""Distance of a cell, in standard deviations of the latent, below which it counts squared."""


@dataclass(frozen=True)
class Bank:
    """Ways of the teacher from noise to picture."""

    # fp16 [N, K + 1, C, 8, 8]: the points before each of K steps, and the end
    points: Tensor
    # of the captions, int16 [N, 24]
    ids: Tensor
    # int64 [K], noisiest first
    steps: Tensor

    @classmethod
    def load(cls, folder: Path) -> Bank:
        """The files of a folder in one piece."""
        shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
        points, ids = (torch.cat([shard[key] for shard in shards]) for key in ("points", "ids"))
        return cls(points, ids, shards[0]["steps"])


class Teacher:
    """A pipeline's denoiser in ``precision()``, with guidance."""

    def __init__(self, pipe: Pipeline, scale: float) -> None:
        self.unet = copy.deepcopy(pipe.unet).requires_grad_(False).to(precision())
        self.unet.set_attn_processor(AttnProcessor())
        self.text = copy.deepcopy(pipe.text_encoder).requires_grad_(False).to(precision())
        self.vocab, self.scale = pipe.tokenizer.get_vocab(), scale
        self.config = pipe.scheduler.config
        cumulative = pipe.scheduler.alphas_cumprod
        self.signal, self.noise = cumulative.sqrt(), (1 - cumulative).sqrt()
        self.empty = self.context(self.ids([""]))

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Token ids [B, 24], int64."""
        return torch.tensor([encode(self.vocab, caption) for caption in captions])

    def context(self, ids: Tensor) -> Tensor:
        """Text states [B, 24, W] of token ids [B, 24]."""
        with torch.no_grad():
            states: Tensor = self.text(ids.long()).last_hidden_state
        return states

    def levels(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of signal and noise at steps [B], each [B, 1, 1, 1]."""
        return self.signal[steps].view(-1, 1, 1, 1), self.noise[steps].view(-1, 1, 1, 1)

    def velocity(self, noisy: Tensor, steps: Tensor, context: Tensor, scale: float) -> Tensor:
        """The guided prediction of v, fp32 [B, C, 8, 8]; two rows a picture."""
        both = torch.cat([self.empty.expand(len(context), -1, -1), context])
        rows = noisy.to(precision()).repeat(2, 1, 1, 1)
        with torch.no_grad():
            plain, text = self.unet(rows, steps.repeat(2), both).sample.float().chunk(2)
        guided: Tensor = plain + scale * (text - plain)
        return guided

    def ways(self, noise: Tensor, context: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The points of ``count`` steps and the end [B, count + 1, C, 8, 8], and the steps."""
        solver = DPMSolverMultistepScheduler.from_config(
            self.config, timestep_spacing="trailing", final_sigmas_type="zero"
        )
        solver.set_timesteps(count)
        points = [noise]
        for step in solver.timesteps:
            velocity = self.velocity(points[-1], step.repeat(len(noise)), context, self.scale)
            points.append(solver.step(velocity, step, points[-1]).prev_sample)
        return torch.stack(points, 1), solver.timesteps


def fill(teacher: Teacher, folder: Path, pairs: int, seed: int, count: int = 8) -> None:
    """Write the bank's files that are not there yet, until it has ``pairs`` ways.

    Cost: ``2 * count`` rows of the denoiser a way.
    """
    world = World(MIX)
    for shard in range(-(-pairs // SHARD)):
        path = folder / f"{shard:04d}.pt"
        if path.exists():
            continue
        parts, size = [], min(SHARD, pairs - shard * SHARD)
        _, captions, _ = world.arrays(step_seed(seed, 1, shard), size)
        ids = teacher.ids(captions)
        noise = torch.randn(size, *_latent(teacher.unet), generator=step_generator(seed, 1, shard))
        for part, words in zip(torch.split(noise, 32), torch.split(ids, 32), strict=True):
            points, steps = teacher.ways(part, teacher.context(words), count)
            parts.append(points.half())
        state = {"points": torch.cat(parts), "ids": ids.short(), "steps": steps}
        save_state(path, state)


def _latent(unet: UNet2DConditionModel) -> tuple[int, int, int]:
    """The shape of a latent."""
    size = int(unet.config.sample_size)
    return int(unet.config.in_channels), size, size


class LowRank:
    """A low-rank difference of all linear and convolution layers of a network in ``precision()``.

    The layers keep their form: after each update the sum of weight and difference is written into
    them, and the gradient of the sum gives that of the two factors. So an update costs what it
    costs without a difference.
    """

    def __init__(self, network: nn.Module, weights: nn.Module, rank: int, seed: int) -> None:
        kinds = (nn.Linear, nn.Conv2d)
        self.layers = {name: m for name, m in network.named_modules() if isinstance(m, kinds)}
        network.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.base: list[Tensor] = []
        self.down: list[nn.Parameter] = []
        self.up: list[nn.Parameter] = []
        for name, layer in self.layers.items():
            layer.weight.requires_grad_(True)
            base = weights.get_parameter(f"{name}.weight").detach().float()
            out, inner = base.flatten(1).shape
            size = min(rank, out, inner)
            self.base.append(base)
            draw = torch.rand(size, inner, generator=generator) * 2 - 1
            self.down.append(nn.Parameter(draw / inner**0.5))
            self.up.append(nn.Parameter(torch.zeros(out, size)))
        self.factors = self.down + self.up
        self.average = [factor.detach().clone() for factor in self.factors]
        self.optimizer = torch.optim.AdamW(
            self.factors, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Write the sum into the network."""
        for layer, base, down, up in zip(
            self.layers.values(), self.base, self.down, self.up, strict=True
        ):
            layer.weight.copy_(base + (up @ down).view_as(base))

    def step(self, rate: float, decay: float, clip: float = 1.0) -> float:
        """One update from the gradients of the network; returns the norm before clipping."""
        for layer, down, up in zip(self.layers.values(), self.down, self.up, strict=True):
            assert layer.weight.grad is not None
            gradient = layer.weight.grad.float().flatten(1)
            down.grad, up.grad = up.detach().T @ gradient, gradient @ down.detach().T
            layer.weight.grad = None
        norm = nn.utils.clip_grad_norm_(self.factors, clip, error_if_nonfinite=True)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [f.detach() for f in self.factors], 1 - decay)
        self.publish()
        return float(norm)

    def adapter(self, factors: list[Tensor]) -> dict[str, Tensor]:
        """Factors as diffusers names and shapes them, fp16."""
        table = {}
        half = len(factors) // 2
        for (name, layer), down, up in zip(
            self.layers.items(), factors[:half], factors[half:], strict=True
        ):
            if isinstance(layer, nn.Conv2d):
                down, up = down.view(-1, *layer.weight.shape[1:]), up[:, :, None, None]
            table[f"{name}.lora_A.weight"] = down.detach().half().contiguous()
            table[f"{name}.lora_B.weight"] = up.detach().half().contiguous()
        return table

    def state(self) -> State:
        """Everything a resumed run needs."""
        return {
            "factors": [factor.detach() for factor in self.factors],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Inverse of ``state``."""
        for name, tensors in (("factors", self.factors), ("average", self.average)):
            for tensor, value in zip(tensors, state[name], strict=True):
                tensor.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.publish()


class TurboTrainer:
    """The student, its follower and their teacher.

    ``options`` needs seed, batch, rank, rate, updates, decay_from, decay, first (share of a batch
    at the noisiest point), matching (update at which distribution matching begins), weight (of
    matching), hold (weight of the distance to the ends beside it), match_scale (guidance of its
    teacher), matched (pictures of a batch that it sees, noisiest first), steps (pictures that it
    sees beside them, of later steps), reward (weight of the evaluator's loss), ahead (updates that
    the follower has before) and follower (its rate).
    """

    def __init__(self, options: argparse.Namespace, pipe: Pipeline, bank: Bank) -> None:
        self.options, self.bank = options, bank
        self.teacher = Teacher(pipe, options.scale)
        self.student = copy.deepcopy(self.teacher.unet)
        self.low = LowRank(self.student, pipe.unet, options.rank, options.seed)
        self.follower = copy.deepcopy(pipe.unet).requires_grad_(True)
        self.follower.set_attn_processor(AttnProcessor())
        self.flat = FlatAdam([self.follower])
        self.evaluator = load("emoji-evaluator")
        self.reader = load("emoji").text_encoder.requires_grad_(False)
        self.done = 0

    def step(self) -> dict[str, float]:
        """One update; returns the distance to the ends, over all points and at the first."""
        generator = step_generator(self.options.seed, 0, self.done)
        size = self.options.batch
        rows = torch.randint(len(self.bank.ids), (size,), generator=generator)
        places = torch.randint(1, len(self.bank.steps), (size,), generator=generator)
        places[: round(self.options.first * size)] = 0
        noisy, ends = self.bank.points[rows, places].float(), self.bank.points[rows, -1].float()
        ids, steps = self.bank.ids[rows], self.bank.steps[places]
        matching = self.done >= self.options.matching
        if matching:
            later = self.later(generator)
            noisy, steps, ids = (
                torch.cat(pair) for pair in zip((noisy, steps, ids), later, strict=True)
            )
        context = self.teacher.context(ids)
        clean = self.clean(self.student, noisy, steps, context)
        cells = (clean[:size] - ends).square().sum(1)
        distances = ((cells + HUBER**2).sqrt() - HUBER).mean((1, 2))
        loss, values = distances.mean() * (self.options.hold if matching else 1.0), {}
        picks = [*range(min(self.options.matched, size)), *range(size, len(clean))]
        outputs, words = clean[picks], context[picks]
        if matching:
            push = self.push(outputs.detach(), words, generator)
            values["push"] = float(push.square().mean().sqrt())
            loss = loss + self.options.weight * (outputs * push).mean()
        if matching and self.options.reward:
            doubt = self.doubt(outputs, ids[picks], generator)
            values["doubt"] = float(doubt.detach())
            loss = loss + self.options.reward * doubt
        torch.autograd.backward(loss)
        decay = min(self.options.decay, (1 + self.done) / (10 + self.done))
        norm = self.low.step(self.rate(), decay)
        if self.done >= self.options.matching - self.options.ahead:
            values["follower"] = self.follow(outputs.detach(), words, generator)
        self.done += 1
        distances = distances.detach()
        first = float(distances[places == 0].mean())
        return {"loss": float(distances.mean()), "first": first, "norm": norm} | values

    @torch.no_grad()
    def later(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Points before the second to fourth of four steps, as the student comes to them from new
        noise and new noise after each step, with their steps and token ids; ``options.steps`` of
        them."""
        count, levels = self.options.steps, self.bank.steps[:: max(1, len(self.bank.steps) // 4)]
        rows = torch.randint(len(self.bank.ids), (count,), generator=generator)
        ids = self.bank.ids[rows]
        context = self.teacher.context(ids)
        places = torch.randint(1, len(levels), (count,), generator=generator)
        points = torch.randn(count, *self.bank.points.shape[2:], generator=generator)
        for place in range(len(levels) - 1):
            on = places > place
            if not on.any():
                continue
            steps = levels[place].repeat(int(on.sum()))
            clean = self.clean(self.student, points[on], steps, context[on])
            signal, noise = self.teacher.levels(levels[place + 1].repeat(len(steps)))
            fresh = torch.randn(clean.shape, generator=generator)
            points[on] = signal * clean + noise * fresh
        return points, levels[places], ids

    def clean(
        self, unet: UNet2DConditionModel, noisy: Tensor, steps: Tensor, context: Tensor
    ) -> Tensor:
        """The picture that a denoiser sees in noisy latents [B, C, 8, 8], fp32."""
        signal, noise = self.teacher.levels(steps)
        velocity = unet(noisy.to(precision()), steps, context).sample.float()
        picture: Tensor = signal * noisy - noise * velocity
        return picture

    def push(self, clean: Tensor, context: Tensor, generator: torch.Generator) -> Tensor:
        """The gradient of distribution matching at pictures [B, C, 8, 8]: what the follower sees
        less what the guided teacher sees, at one noise, over the mean error of the teacher."""
        steps = torch.randint(20, 981, (len(clean),), generator=generator)
        signal, noise = self.teacher.levels(steps)
        noisy = signal * clean + noise * torch.randn(clean.shape, generator=generator)
        guided = self.teacher.velocity(noisy, steps, context, self.options.match_scale)
        teacher = signal * noisy - noise * guided
        with torch.no_grad():
            follower = self.clean(self.follower, noisy, steps, context)
        scale = (clean - teacher).abs().mean((1, 2, 3), keepdim=True)
        return (follower - teacher) / scale

    def doubt(self, clean: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        """Mean surprise of the evaluator that pictures [B, C, 8, 8] show their captions, at one
        noise each; differentiable in the pictures."""
        steps = torch.randint(20, 701, (len(clean),), generator=generator)
        signal, noise = self.teacher.levels(steps)
        noisy = signal * clean + noise * torch.randn(clean.shape, generator=generator)
        with torch.no_grad():
            words = self.reader(ids.long()).last_hidden_state
        levels = (noise / signal).flatten()
        logits: Tensor = self.evaluator(noisy, levels, words, word_mask(ids.long()))
        return nn.functional.softplus(-logits).mean()

    def follow(self, clean: Tensor, context: Tensor, generator: torch.Generator) -> float:
        """One update of the follower on pictures of the student; returns its v-loss."""
        steps = torch.randint(0, 1000, (len(clean),), generator=generator)
        signal, spread = self.teacher.levels(steps)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = (signal * clean + spread * noise).to(precision())
        velocity = self.follower(noisy, steps, context).sample.float()
        loss = (velocity - signal * noise + spread * clean).square().mean()
        loss.backward()
        self.flat.step(self.options.follower)
        return float(loss.detach())

    def rate(self) -> float:
        """Learning rate of the next update."""
        hold = self.options.decay_from / self.options.updates
        return cosine(self.done, self.options.updates, self.options.rate, warm=100, hold=hold)

    def state(self) -> State:
        """Everything a resumed run needs."""
        return {"low": self.low.state(), "flat": self.flat.state(), "done": self.done}

    def load(self, state: State) -> None:
        """Inverse of ``state``."""
        self.low.load(state["low"])
        self.flat.load(state["flat"])
        self.done = int(state["done"])


def run(options: argparse.Namespace) -> None:
    """Fill the bank, then train until ``options.updates``."""
    torch.set_num_threads(1)
    pipe = pipeline_in(options.pipeline)
    fill(Teacher(pipe, options.scale), options.out / "bank", options.pairs, options.seed)
    trainer = TurboTrainer(options, pipe, Bank.load(options.out / "bank"))
    header = {
        "model": "emoji in few steps",
        **{key: str(value) for key, value in vars(options).items()},
    }
    course = Course(
        end=options.updates, samples=options.batch, save=options.save, window=100, early=0
    )
    train(trainer, options, header, course, facts=lambda: {"rate": round(trainer.rate(), 7)})


def export(state: Path, pipeline: Path, out: Path, rank: int, *, averaged: bool = True) -> None:
    """Write the difference of a saved state, and its scheduler, to a folder."""
    pipe = pipeline_in(pipeline)
    low = LowRank(copy.deepcopy(pipe.unet), pipe.unet, rank, 0)
    factors = saved_state(state)["trainer"]["low"]["average" if averaged else "factors"]
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=low.adapter(factors))
    sampler(pipe.scheduler).save_pretrained(out / "scheduler")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = shared(__doc__, seed=71, save=500)
    add = result.add_argument
    add("--pipeline", type=Path, required=True, help="folder of the teacher")
    add("--scale", type=float, default=3.0, help="guidance scale of the teacher")
    add("--pairs", type=int, default=12_288, help="ways in the bank")
    add("--batch", type=int, default=12)
    add("--rank", type=int, default=64, help="of the difference")
    add("--rate", type=float, default=1e-3)
    add("--updates", type=int, default=6_000)
    add("--decay-from", type=int, default=4_800, help="update at which the rate begins to fall")
    add("--decay", type=float, default=0.998, help="of the averaged factors, per update")
    add("--first", type=float, default=2 / 3, help="share of a batch at the noisiest point")
    add("--matching", type=int, default=2_000, help="update at which matching begins")
    add("--match-scale", type=float, default=2.0, help="guidance scale of the teacher in matching")
    add("--matched", type=int, default=8, help="pictures of a batch that matching sees")
    add("--steps", type=int, default=4, help="pictures of later steps that it sees beside them")
    add("--ahead", type=int, default=200, help="updates that the follower has before matching")
    add("--weight", type=float, default=3.0, help="of matching")
    add("--hold", type=float, default=0.1, help="weight of the distance to the ends beside it")
    add("--reward", type=float, default=0.4, help="weight of the evaluator's surprise, 0 for none")
    add("--follower", type=float, default=3e-4, help="learning rate of the follower")
    return result


def main() -> None:
    """Command line."""
    options = parser().parse_args()
    if options.export is not None:
        export(options.out / STATE, options.pipeline, options.export, options.rank)
        return
    run(options)


if __name__ == "__main__":
    main()
