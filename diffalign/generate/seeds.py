"""The one seed rule: the noise of an image depends on the base seed, its prompt and its number.

So an image does not change with the other prompts of a run, their order, the size of a batch or
the number of machines.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """One image that is to be made."""

    prompt: str
    # of its own generator, in [0, 2^63)
    seed: int
    # names the image among all jobs of a run
    key: str


def seed_of(text: str, index: int, base: int = 0) -> int:
    """The seed of image ``index`` of ``text``: the first 63 bits of SHA-256.

    ``text``: the prompt, or the key of a prompt in a published list, such as "geneval/17".
    """
    digest = hashlib.sha256(f"{base}/{text}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
