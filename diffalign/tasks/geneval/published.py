"""Published overall scores of models by their hub ids. None was made with this package's detector
or settings: an orientation, not a target."""

PUBLISHED: dict[str, tuple[float, str]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (0.43, "Ghosh et al. 2023"),
    "runwayml/stable-diffusion-v1-5": (0.43, "Ghosh et al. 2023"),
    "stabilityai/stable-diffusion-2-1": (0.50, "Ghosh et al. 2023"),
    "stabilityai/stable-diffusion-xl-base-1.0": (0.55, "Ghosh et al. 2023"),
    "stabilityai/sdxl-turbo": (0.55, "Esser et al. 2024"),
    "PixArt-alpha/PixArt-XL-2-1024-MS": (0.48, "Esser et al. 2024"),
    "stabilityai/stable-diffusion-3.5-medium": (0.63, "Liu et al. 2025, Flow-GRPO"),
    "stabilityai/stable-diffusion-3.5-large": (0.71, "Liu et al. 2025, Flow-GRPO"),
    "black-forest-labs/FLUX.1-dev": (0.66, "Liu et al. 2025, Flow-GRPO"),
    "black-forest-labs/FLUX.1-schnell": (0.68, "HyperNoise, table 1"),
    "Qwen/Qwen-Image": (0.87, "as published with the model"),
}
"""Hub id -> overall and its source."""


def published(model: str, overall: float) -> dict[str, object] | None:
    """The published overall of a model, its source, and how much ``overall`` is above it."""
    if model not in PUBLISHED:
        return None
    score, source = PUBLISHED[model]
    return {"overall": score, "source": source, "difference": overall - score}
