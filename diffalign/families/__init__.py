"""Everything that is known of each pipeline family; one file per family.

Knows diffusers classes by name only.
"""

from diffalign.families.family import Family
from diffalign.families.table import FAMILIES, refusals
from diffalign.families.table import family_of as _family_of


def family_of(cls: type) -> Family:
    return _family_of(cls)[0]


def modular_families() -> dict[str, Family]:
    from diffalign.families import table

    return {
        "StableDiffusionXLModularPipeline": table.SDXL,
        "StableDiffusion3ModularPipeline": table.SD3,
        "WanModularPipeline": table.WAN,
        "Wan22ModularPipeline": table.WAN,
        "QwenImageModularPipeline": table.QWEN,
    }


__all__ = ["FAMILIES", "Family", "family_of", "refusals"]
