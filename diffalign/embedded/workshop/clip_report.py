"""How good a dual encoder is: ``python -m diffalign.embedded.workshop.clip_report [--model
emoji-clip-2] [--count 2000] [--samples FILE]`` prints JSON.

On held-out pairs of scenes that differ in one fact: how often the true caption beats the other one,
overall and for each kind of change. On generated pictures with verdicts (``workshop.samples``): the
area under the ROC curve of the score within each prompt, averaged over the prompts that have both
right and wrong pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffalign.embedded.nets.clip import Clip, load_clip
from diffalign.embedded.workshop.pairs import CHANGES, Pair, pairs
from diffalign.embedded.workshop.samples import Samples
from diffalign.embedded.world.editions import FIRST, SECOND
from diffalign.embedded.world.scenes import DEFAULT_MIX, HELD_OUT


def auc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Chance that a right picture scores above a wrong one, ties half (Mann-Whitney).

    ValueError unless there are both.
    """
    good = [score for score, answer in zip(scores, right, strict=True) if answer]
    bad = [score for score, answer in zip(scores, right, strict=True) if not answer]
    if not good or not bad:
        raise ValueError(
            f"auc needs right and wrong pictures; got {len(good)} right and {len(bad)} wrong."
        )
    return sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))


@torch.no_grad()
def choice_figures(clip: Clip, pairs: Sequence[Pair], batch: int = 128) -> dict[str, float]:
    """Share of pictures whose own caption is strictly nearer than the partner's: "all" and per
    change. Both pictures of a pair count."""
    wins: dict[str, list[bool]] = {change: [] for change in ("all", *CHANGES)}
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        pictures = np.stack(
            [picture.image for pair in part for picture in (pair.first, pair.second)]
        )
        images = clip.image(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
        words = clip.text(
            [picture.caption for pair in part for picture in (pair.first, pair.second)]
        )
        own, other = (
            (images * words).sum(-1),
            (images * words[torch.arange(len(words)) ^ 1]).sum(-1),
        )
        for win, change in zip(
            (own > other).tolist(), (pair.change for pair in part for _ in range(2)), strict=True
        ):
            wins["all"].append(win)
            wins[change].append(win)
    return {change: sum(values) / len(values) for change, values in wins.items() if values}


@torch.no_grad()
def within_prompt(clip: Clip, samples: Samples) -> dict[str, float]:
    """Mean area under the curve over the prompts with both verdicts, and their number."""
    areas = []
    for images, caption, right in zip(samples.images, samples.captions, samples.right, strict=True):
        if 0 < int(right.sum()) < len(right):
            areas.append(
                auc(
                    clip.similarity(images.float() / 255, [caption] * len(images)).tolist(),
                    right.tolist(),
                )
            )
    return {"auc": sum(areas) / len(areas), "prompts": len(areas)} if areas else {"prompts": 0}


def main() -> None:
    """Command line."""
    from diffalign.embedded.load import folder_of

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("emoji-clip", "emoji-clip-2"), default="emoji-clip")
    parser.add_argument("--folder", type=Path, help="a folder with another export of the model")
    parser.add_argument("--samples", type=Path, help="generated pictures with verdicts")
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=HELD_OUT[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    clip = load_clip(options.folder or folder_of(options.model))
    edition = FIRST if clip.side == FIRST.side else SECOND
    figures: dict[str, object] = {"count": options.count, "seed": options.seed}
    for name, plain in (("choice", 1.0), ("choice, paraphrases", 0.0)):
        found = pairs(options.seed, options.count, DEFAULT_MIX, plain, edition=edition)
        figures[name] = choice_figures(clip, list(found))
    if options.samples is not None:
        figures["within prompts"] = within_prompt(clip, Samples.load(options.samples))
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
