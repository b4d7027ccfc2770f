"""The small network that turns an embedding into one score."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

LAYERS = (0, 2, 4, 6, 7)
"""Places of the linear layers; the published ones have dropout between, which acts in training
only, so that the whole is one linear map."""


class Head(nn.Module):
    """[B, D] to [B]: five linear layers without activation, as ImageReward and the second
    aesthetic predictor have, with their key names ``layers.N``."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Identity() for _ in range(LAYERS[-1] + 1)))
        for place, width, after in zip(LAYERS, widths, (*widths[1:], 1)):
            self.layers[place] = nn.Linear(width, after)

    @classmethod
    def like(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> Head:
        """A head of the widths of these weights. Raises: KeyError where a layer is missing."""
        return cls(tuple(tensors[f"{prefix}layers.{place}.weight"].shape[1] for place in LAYERS))

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.layers(features)
        return scores.squeeze(-1)
