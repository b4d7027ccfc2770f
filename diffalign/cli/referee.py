"""GenEval's verdict on images of an embedded model, given by the judge that ships with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from diffalign.generate.models import Model
from diffalign.tasks.geneval.verdict import Verdict, parse_prompt, verdict


class Referee:
    """Verdicts for the prompts of GenEval's grammar; the others have none. ``name``: the judge's."""

    def __init__(self, name: str, judge: Any, prompts: Sequence[str]) -> None:
        self.name, self._judge = name, judge
        self._metadata = [parse_prompt(prompt) for prompt in prompts]

    def judge(self, prompts: Sequence[int], images: Sequence[Image.Image]) -> list[Verdict | None]:
        """The verdict on each image, None where its prompt (an index) is not in the grammar."""
        import numpy as np
        import torch

        pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
        found = self._judge.detect(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0)
        metadata = [self._metadata[prompt] for prompt in prompts]
        return [
            None if m is None else verdict(m, seen, self._judge.thresholds)
            for m, seen in zip(metadata, found)
        ]


def referee(model: Model, prompts: Sequence[str]) -> tuple[Referee | None, str]:
    """The referee for this model and these prompts, or None and the reason why there are no
    verdicts."""
    from diffalign.embedded import available, load

    name = f"{model.name}-judge"
    if model.kind != "embedded":
        return None, "no verdicts: only embedded models have a judge on board."
    if not any(parse_prompt(prompt) for prompt in prompts):
        return (
            None,
            "no verdicts: no prompt is in GenEval's grammar (like 'a photo of a red apple and a "
            "green clock').",
        )
    if name not in {entry.name for entry in available()}:
        return None, f"no verdicts: {name} is not installed."
    return Referee(name, load(name), prompts), ""
