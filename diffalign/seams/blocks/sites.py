"""Transformer blocks of a denoiser: which there are, and in what order their streams leave them.

The order in which a block returns its streams differs between classes, so the families say it;
``tests/seams/blocks/test_sites.py`` checks each with text and image sequences of unequal lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from diffalign.core import BlockSite, UnsupportedModel
from diffalign.core.errors import nearest
from diffalign.families import block_streams
from diffalign.seams.swap import original_class, unwrapped


def sites(denoiser: nn.Module) -> tuple[BlockSite, ...]:
    """The blocks of a denoiser, in the order in which they run.

    Empty for an architecture whose family lists none.

    Text and noise refiners (Lumina2, Z-Image) are not listed: they prepare one stream for the
    others.
    """
    streams = block_streams()
    listed = [
        (name, module)
        for name, module in unwrapped(denoiser).named_modules()
        if original_class(module).__name__ in streams and "refiner" not in name
    ]
    # a U-Net registers its middle last, and cache-dit puts lists back in another order; families
    # name the classes of their blocks in the order in which they run
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    order = {name: i for i, name in enumerate(streams)}
    listed.sort(
        key=lambda item: (
            stage.get(item[0].partition(".")[0], 0),
            order[original_class(item[1]).__name__],
        )
    )
    last = len(listed) - 1
    return tuple(
        BlockSite(
            name,
            streams[original_class(block).__name__],
            "context_pre_only"
            if getattr(block, "context_pre_only", False)
            else "first"
            if i == 0
            else "last"
            if i == last
            else None,
        )
        for i, (name, block) in enumerate(listed)
    )


def select(
    owner: str, option: str, denoiser: nn.Module, blocks: Sequence[int | str] | None
) -> tuple[str, ...]:
    """Names of the blocks that ``blocks`` picks: positions from 0, names, or patterns such as
    ``"single_transformer_blocks.*"``.

    None picks every block but the first, the last and those that drop a stream. Raises
    ``UnsupportedModel`` when nothing is picked.
    """
    listed = sites(denoiser)
    kind = original_class(unwrapped(denoiser)).__name__
    if not listed:
        raise UnsupportedModel(
            f"{owner} skips transformer blocks, and diffalign knows none in {kind}; use a "
            "guidance without block skipping."
        )
    if blocks is None:
        inner = tuple(site.name for site in listed if site.edge is None)
        if not inner:
            raise UnsupportedModel(
                f"{owner}: {kind} has only {len(listed)} blocks, and the first and last are not "
                f"skipped by default. Pass {option}=..."
            )
        return inner
    names = [site.name for site in listed]
    picked: dict[str, None] = {}
    for item in blocks:
        if isinstance(item, int):
            if not 0 <= item < len(names):
                raise UnsupportedModel(
                    f"{owner}({option}=...): {kind} has blocks 0 to {len(names) - 1}; got {item}."
                )
            picked[names[item]] = None
            continue
        matching = [name for name in names if fnmatchcase(name, item)]
        if not matching:
            raise UnsupportedModel(
                f"{owner}({option}=...): {kind} has no block {item!r}. Nearest: "
                f"{nearest(item, names)}."
            )
        picked.update(dict.fromkeys(matching))
    return tuple(picked)
