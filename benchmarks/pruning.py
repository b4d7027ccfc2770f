"""How long does a step take that leaves image tokens out? Processor seconds of one thread beside
the count of operations, and beside fewer steps of the same length.

    python benchmarks/pruning.py [--rounds 2] [--blocks 2] [--output benchmarks/results]
    python benchmarks/pruning.py --model emoji-dit [--prompts 48] [--samples 1] [--steps 28 50]
    python benchmarks/pruning.py --caches [--rounds 2] [--sides 32 64]

Stable Diffusion 3 medium and PixArt-Sigma at their true width and heads, with few blocks and random
weights, and one row: what is timed does not depend on the weights. Each block that is missing is
counted as long as the first one takes, so that what stands around the blocks has the share that it
has in the whole model. Steps with all tokens and with some take turns.

With ``--model`` what is lost is measured on a trained model, beside fewer steps, cache-dit and
AdaptiveGuidance, in hours that can be interrupted (pruning_quality.py); with ``--caches`` time
alone, beside the step caches of diffusers, on a small network of Flux's form (pruning_caches.py).
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pruning_caches
import pruning_quality
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from results import Row, command_line, save
from rich.progress import track
from torch import Tensor

import diffalign as da
from diffalign.core import StepInfo
from diffalign.testing.tiny.parts import image_vae

COLUMNS = {
    "tokens": "image tokens",
    "full_s": "processor seconds of a step of the whole model with all tokens, median of rounds",
    "pruned_s": "those of a step that leaves tokens out",
    "speedup": "full_s / pruned_s, median of rounds",
    "bound": "the same ratio of operations, by the formula of CAT's documentation",
    "of bound": "speedup / bound",
    "choice_ms": "milliseconds of choosing the tokens of a step",
    "choice share": "of pruned_s",
    "run of 28": "as long as so many full steps, 8 of them full",
    "run of 50": "as long as so many full steps, 8 of them full",
    "cache MiB": "keys and values of the whole model's blocks, one row, 16 bits",
}


def text(tokens: int, channels: int) -> Tensor:
    """Embeddings [1, L, E] of a prompt."""
    return torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, slots=True)
class Model:
    """A published model at its true width."""

    # (side of the image in tokens, blocks) -> pipeline, arguments of a call without guidance
    make: Callable[[int, int], tuple[Any, dict[str, Any]]]
    blocks: int
    width: int
    text: int
    # whether text and image are in one softmax
    joint: bool

    def operations(self, tokens: int, computed: int) -> float:
        """Of a block that computes so many of the image's tokens."""
        c, n, s, t = self.width, tokens, computed, self.text
        if self.joint:
            return 24 * c * c * (s + t) + 4 * c * (s + t) * (n + t)
        return 28 * c * c * s + 4 * c * c * t + 4 * c * s * (n + t)


def sd3(side: int, blocks: int) -> tuple[Any, dict[str, Any]]:
    """Width 1,536 in 24 heads, 333 tokens of text."""
    transformer = SD3Transformer2DModel(
        sample_size=2 * side,
        num_layers=blocks,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )
    none = dict.fromkeys(
        f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=image_vae(16, shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **none,
    )
    return pipe, {
        "prompt_embeds": text(333, 4096),
        "pooled_prompt_embeds": text(1, 2048)[:, 0],
        "guidance_scale": 1.0,
    }


def sigma(side: int, blocks: int) -> tuple[Any, dict[str, Any]]:
    """Width 1,152 in 16 heads, 300 tokens of text."""
    transformer = PixArtTransformer2DModel(
        sample_size=2 * side,
        num_layers=blocks,
        attention_head_dim=72,
        num_attention_heads=16,
        cross_attention_dim=1152,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer,
        vae=image_vae(4),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return pipe, {
        "negative_prompt": None,
        "prompt_embeds": text(300, 4096),
        "prompt_attention_mask": torch.ones(1, 300),
        "use_resolution_binning": False,
        "guidance_scale": 1.0,
    }


MODELS: Mapping[str, Model] = {
    "SD3 medium": Model(sd3, 24, 1536, 333, True),
    "PixArt-Sigma": Model(sigma, 28, 1152, 300, False),
}


STEPS, FULL, PRUNED = 5, 1, 3
"""Steps of a run, the one with all tokens that counts, and the first that leaves some out: step 0
warms up, and the one before keeps keys and values."""


@contextmanager
def stopwatch(module: torch.nn.Module) -> Iterator[list[float]]:
    """Processor seconds of each call of a module."""
    times: list[float] = []

    def begin(module: object, args: object, kwargs: object) -> None:
        times.append(-time.process_time())

    def end(module: object, args: object, output: object) -> None:
        times[-1] += time.process_time()

    handles = [
        module.register_forward_pre_hook(begin, with_kwargs=True),
        module.register_forward_hook(end),
    ]
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


def step_seconds(
    pipe: Any, call: dict[str, Any], technique: Any, blocks: int
) -> tuple[list[float], Any]:
    """Seconds of each denoiser call of one run as of ``blocks`` blocks, and the report."""
    missing = blocks - len(pipe.transformer.transformer_blocks)
    with (
        stopwatch(pipe.transformer) as whole,
        stopwatch(pipe.transformer.transformer_blocks[0]) as first,
        da.apply(pipe, technique) as session,
    ):
        pipe(**call, num_inference_steps=STEPS, output_type="latent")
    return [a + missing * b for a, b in zip(whole, first, strict=True)], session.report()


def choosing(technique: Any, side: int, channels: int, rounds: int) -> float:
    """Seconds that the technique itself takes in a step: it chooses and it observes."""
    grid, rng = (1, side, side), torch.Generator().manual_seed(0)
    state, seconds = technique.init(1), []
    latest = torch.randn(1, side * side, channels, generator=rng)
    for index in range(technique.start - 2, technique.start + 1 + rounds):
        step = StepInfo(index, 100, 0.5)
        began = time.process_time()
        chosen = technique.choose(step, state)
        state = technique.observe(latest, chosen, grid, step, state)
        seconds.append(time.process_time() - began)
        latest = latest + 0.1 * torch.randn(latest.shape, generator=rng)
    return statistics.median(seconds[3:])


def row(name: str, side: int, keep: float, options: Namespace) -> Row:
    """One line of the table."""
    model = MODELS[name]
    pipe, call = model.make(side, options.blocks)
    pipe.set_progress_bar_config(disable=True)
    call |= {"height": 4 * side, "width": 4 * side}  # the VAE halves each side
    call["generator"] = torch.Generator().manual_seed(0)
    technique = da.CAT(keep, start=PRUNED)
    pairs = []
    for _ in range(options.rounds):
        seconds, report = step_seconds(pipe, call, technique, model.blocks)
        pairs.append((seconds[FULL], statistics.mean(seconds[PRUNED:])))
    full, pruned = (statistics.median(column) for column in zip(*pairs))
    facts = report.pruning["CAT"]
    tokens, computed = int(facts["tokens"]), int(facts["computed"])
    assert tokens == side * side
    bound = model.operations(tokens, tokens) / model.operations(tokens, computed)
    channels = pipe.transformer.proj_out.out_features
    choice = choosing(technique, side, channels, max(3, options.rounds))
    share = statistics.median(b / a for a, b in pairs)
    length = tokens + model.text * model.joint
    return {
        "method": f"{name}, keep {keep:g}",
        "tokens": tokens,
        "full_s": full,
        "pruned_s": pruned,
        "speedup": 1 / share,
        "bound": bound,
        "of bound": 1 / share / bound,
        "choice_ms": 1e3 * choice,
        "choice share": choice / pruned,
        "run of 28": 8 + 20 * share,
        "run of 50": 8 + 42 * share,
        "cache MiB": 2 * 2 * model.blocks * length * model.width / 2**20,
        "computed": computed,
    }


def main() -> None:
    parser = command_line(__doc__ or "", rounds=2, blocks=2)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--caches", action="store_true", help="beside the caches of diffusers")
    parser.add_argument("--model", choices=["emoji-dit"], help="measure what is lost on it")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--scale", type=float, help="the model's own if left out")
    parser.add_argument("--work", default="runs/pruning")
    options = parser.parse_args()
    if not (1 <= options.samples <= 16 and options.prompts >= 12 and options.rounds >= 1):
        parser.error(
            "--samples is 1 to 16, --prompts at least 12, two of each tag, and --rounds at least 1."
        )
    if options.blocks < 2 or min(options.steps) < 10:
        parser.error("--blocks is at least 2, and --steps at least 10: CAT begins at step 8.")
    if options.model or options.caches:
        (pruning_quality if options.model else pruning_caches).study(options)
        return
    torch.set_num_threads(1)
    cells = [(n, side, keep) for n in MODELS for side in options.sides for keep in options.keep]
    rows = [row(*cell, options) for cell in track(cells, "timing")]
    save("pruning", rows, options, COLUMNS, {"blocks": options.blocks})


if __name__ == "__main__":
    main()
