"""Published scores of models by their hub ids. None was made with the scorers or settings of this
package: an orientation, not a target."""

from __future__ import annotations

from collections.abc import Mapping

from diffalign.tasks.compbench.prompts import CATEGORIES
from diffalign.tasks.geneval.prompts import TAGS

FLOW_GRPO = "Liu et al. 2025, Flow-GRPO, table 1"
BENCH = "Huang et al. 2025, table XIII"
GENEVAL: dict[str, tuple[str, str]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "Ghosh et al. 2023",
        ".43 .97 .38 .35 .76 .04 .06",
    ),
    "stabilityai/stable-diffusion-2-1": ("Ghosh et al. 2023", ".50 .98 .51 .44 .85 .07 .17"),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "Ghosh et al. 2023",
        ".55 .98 .74 .39 .85 .15 .23",
    ),
    "stabilityai/sdxl-turbo": ("Esser et al. 2024", ".55 1.00 .72 .49 .80 .10 .18"),
    "PixArt-alpha/PixArt-XL-2-1024-MS": ("Esser et al. 2024", ".48 .98 .50 .44 .80 .08 .07"),
    "stabilityai/stable-diffusion-3.5-medium": (FLOW_GRPO, ".63 .98 .78 .50 .81 .24 .52"),
    "stabilityai/stable-diffusion-3.5-large": (FLOW_GRPO, ".71 .98 .89 .73 .83 .34 .47"),
    "black-forest-labs/FLUX.1-dev": (FLOW_GRPO, ".66 .98 .81 .74 .79 .22 .45"),
    "black-forest-labs/FLUX.1-schnell": ("HyperNoise, table 1", ".68"),
    "Qwen/Qwen-Image": ("as published with the model", ".87 .99 .92 .89 .88 .76 .77"),
}
"""Hub id -> source and numbers: the overall, then the categories in GenEval's order if known."""
COMPBENCH: dict[str, tuple[str, str]] = {
    "CompVis/stable-diffusion-v1-4": (
        BENCH,
        ".3765 .3576 .4156 .1246 .3030 .4456 .3079 .3080",
    ),
    "stabilityai/stable-diffusion-2": (BENCH, ".5065 .4221 .4922 .1342 .3230 .4582 .3127 .3386"),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        BENCH,
        ".5879 .4687 .5299 .2133 .3566 .4991 .3119 .3237",
    ),
    "black-forest-labs/FLUX.1-schnell": (BENCH, ".7407 .5718 .6922 .2863 .3866 .6185 .3127 .3703"),
}
"""Hub id -> source and the eight categories in the order of ``CATEGORIES``."""
COPIES = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
"""Hub id -> that of the same weights above."""


def published(benchmark: str, model: str, scores: Mapping[str, float]) -> dict[str, object] | None:
    """Where the published scores of a model stand, and beside each of them how much that of
    ``scores`` is above it; None where none is known.

    ``scores``: by category, and "overall" for GenEval.
    """
    tables = {"geneval": (GENEVAL, ("overall", *TAGS)), "compbench": (COMPBENCH, CATEGORIES)}
    if benchmark not in tables:
        return None
    table, names = tables[benchmark]
    source, numbers = table.get(COPIES.get(model, model), ("", ""))
    values = {name: float(text) for name, text in zip(names, numbers.split())}
    rows = {
        name: {"published": values[name], "difference": score - values[name]}
        for name, score in scores.items()
        if name in values
    }
    return {"source": source, "scores": rows} if rows else None
