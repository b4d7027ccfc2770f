"""The one seed rule: the noise of an image depends on the base seed, its prompt and its number.

So an image does not change with the other prompts of a run, their order, the size of a batch or
the number of machines.
"""

from __future__ import annotations

import hashlib


def seed_of(text: str, index: int, base: int = 0) -> int:
    """The seed of image ``index`` of ``text``: the first 63 bits of SHA-256.

    ``text``: the prompt, or the key of a prompt in a published list, such as "geneval/17".
    """
    digest = hashlib.sha256(f"{base}/{text}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
