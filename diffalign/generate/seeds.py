"""Jobs: the images of a run, each with its seed and its key."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from diffalign.core.seeds import seed_of


@dataclass(frozen=True, slots=True)
class Job:
    """One image that is to be made."""

    prompt: str
    # of its own generator, in [0, 2^63)
    seed: int
    # names the image among all jobs of a run
    key: str


def jobs_of(prompts: Iterable[str], *, count: int = 1, base: int = 0) -> list[Job]:
    """``count`` images of each prompt, prompt by prompt, with seeds from ``base``.

    A prompt that stands twice goes on counting, so no two images share their noise and prompt.
    Keys are readable and good as file names.
    """
    jobs: list[Job] = []
    images: Counter[str] = Counter()
    for number, prompt in enumerate(prompts):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-") or "prompt"
        for _ in range(count):
            index = images[prompt]
            images[prompt] += 1
            key = f"{number:03d}-{slug}-s{base}-{index}"
            jobs.append(Job(prompt, seed_of(prompt, index, base), key))
    return jobs
