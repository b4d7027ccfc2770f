"""How good ``emoji-evaluator`` is: ``python -m diffalign.embedded.workshop.evaluator_report
[--count 600] [--trajectories FILE]`` prints JSON.

On held-out pairs of scenes that differ in one fact, noised: how often the true caption beats the
other one, by noise level and by kind of change. On sampled latents with verdicts of the second
judge (``workshop.trajectories``, other prompts than in training): the area under the ROC curve of
the score within each prompt by sampler step; and the mean score at each guidance scale against the
share of right pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffalign.core.types import Json, Pipeline
from diffalign.embedded.load import load
from diffalign.embedded.nets.evaluator import EvaluatorNet, LatentEvaluator, load_evaluator
from diffalign.embedded.workshop.clip_report import auc
from diffalign.embedded.workshop.pairs import CHANGES, Pair, pairs
from diffalign.embedded.workshop.trajectories import Trajectories
from diffalign.embedded.world.scenes import DEFAULT_MIX, HELD_OUT

TIMES = (949, 799, 649, 499, 349, 199, 49)
"""Timesteps at which held-out scenes are judged."""


@torch.no_grad()
def choice_by_level(
    net: EvaluatorNet,
    pipe: Pipeline,
    pairs: Sequence[Pair],
    times: Sequence[int] = TIMES,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Share of latents whose own caption scores strictly above the partner's: timestep -> "all" and
    per change."""
    pictures = [picture for pair in pairs for picture in (pair.first, pair.second)]
    judge = LatentEvaluator(net, pipe, [picture.caption for picture in pictures])
    changes, places = [pair.change for pair in pairs for _ in range(2)], np.arange(len(pictures))
    images = (
        torch.from_numpy(np.stack([picture.image for picture in pictures]))
        .permute(0, 3, 1, 2)
        .float()
        / 255
    )
    clean = torch.cat([pipe.vae.encoder(part * 2 - 1) for part in torch.split(images, 256)])
    rng, cumulative, answer = torch.Generator().manual_seed(seed), pipe.scheduler.alphas_cumprod, {}
    for time in times:
        signal, spread = float(cumulative[time].sqrt()), float((1 - cumulative[time]).sqrt())
        noisy = signal * clean + spread * torch.randn(clean.shape, generator=rng)
        scores = [
            torch.cat(
                [
                    judge.score(noisy[part], spread / signal, rows[part].tolist())
                    for part in np.array_split(places, len(places) // 256 + 1)
                ]
            )
            for rows in (places, places ^ 1)
        ]
        wins = (scores[0] > scores[1]).tolist()
        answer[str(time)] = {"all": sum(wins) / len(wins)} | {
            change: float(
                np.mean([win for win, kind in zip(wins, changes, strict=True) if kind == change])
            )
            for change in CHANGES
        }
    return answer


@torch.no_grad()
def within_prompts(net: EvaluatorNet, pipe: Pipeline, sampled: Trajectories) -> Json:
    """Mean area under the curve within the mixed prompts, by sampler step; and by scale: the mean
    place of the score among a prompt's pictures, averaged over steps (0 lowest, 1 highest), and the
    share of right ones."""
    judge, count = LatentEvaluator(net, pipe, sampled.captions), sampled.latents.shape[1]
    rows = [row for row in range(len(sampled.captions)) for _ in range(count)]
    areas, ranks = [], []
    for step, sigma in enumerate(sampled.sigmas.tolist()):
        scores = judge.score(sampled.latents[:, :, step].flatten(0, 1).float(), sigma, rows).view(
            -1, count
        )
        areas.append(
            float(
                np.mean(
                    [
                        auc(scores[i].tolist(), sampled.right[i].tolist())
                        for i in sampled.mixed().tolist()
                    ]
                )
            )
        )
        ranks.append(scores.argsort(1).argsort(1).float().mean(0) / (count - 1))
    places = torch.stack(ranks).mean(0).tolist()
    return {
        "prompts": len(sampled.mixed()),
        "auc by step": [round(area, 3) for area in areas],
        "scales": [
            {"scale": scale, "place": round(place, 3), "right": round(float(share), 3)}
            for scale, place, share in zip(
                sampled.scales, places, sampled.right.float().mean(0), strict=True
            )
        ],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a folder with another export of the evaluator")
    parser.add_argument("--trajectories", type=Path, help="sampled latents with verdicts")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=HELD_OUT[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = load("emoji-evaluator") if options.folder is None else load_evaluator(options.folder)
    pipe = load("emoji")
    figures: dict[str, object] = {"count": options.count, "seed": options.seed}
    figures["choice"] = choice_by_level(
        net, pipe, list(pairs(options.seed, options.count, DEFAULT_MIX, plain=1.0))
    )
    if options.trajectories is not None:
        figures["within prompts"] = within_prompts(
            net, pipe, Trajectories.load(options.trajectories)
        )
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
