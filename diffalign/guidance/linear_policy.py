"""The fitted part of LinearAG: which steps estimate the unconditional prediction, and from what (arXiv:2312.12487, section 5.2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.core import UnsupportedModel

Mode = Literal["guided", "estimated", "conditional"]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a policy was fitted on; it means nothing anywhere else. ``shape``: of one prediction, ``model``: hash of the denoiser."""

    model: str
    scheduler: str
    steps: int
    scale: float
    shape: tuple[int, ...]
    negative_prompt: str

    def check(self, found: Identity, owner: str) -> None:
        """Raise ``UnsupportedModel`` naming both identities where they differ."""
        wrong = [f.name for f in fields(self) if getattr(self, f.name) != getattr(found, f.name)]
        if wrong:
            said = ", ".join(f"{n}: fitted {getattr(self, n)!r}, here {getattr(found, n)!r}" for n in wrong)
            raise UnsupportedModel(f"{owner} was fitted for another setting ({said}). Fit one for this: diffalign fit linear-ag.")


def model_hash(module: Any) -> str:
    """Hash of a denoiser's class, shapes and the first values of every tensor: cheap for billions of parameters."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[:4].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def default_plan(steps: int) -> tuple[Mode, ...]:
    """The paper's: in the first half even steps guided and odd ones estimated, then conditional. 20 steps cost 25 evaluations."""
    half = steps // 2
    return tuple("conditional" if i >= half else "estimated" if i % 2 else "guided" for i in range(steps))


@dataclass(frozen=True, slots=True)
class LinearPolicy:
    """``plan``: one mode per step. ``coefficients``: for each estimated step i, weights of e_c(0..i) then e_n(0..i-1), noise predictions.

    ``r2``: share of the variance of e_n that the estimate explains, per estimated step; ``gain``: share of ``|e_n - e_c|^2``, the part that
    plain conditional sampling would miss. Both on the fitted trajectories. ``trajectories``: how many.
    """

    identity: Identity
    plan: tuple[Mode, ...]
    coefficients: dict[int, Tensor]
    r2: dict[int, float]
    gain: dict[int, float]
    trajectories: int

    def save(self, path: str | Path) -> None:
        """``<path>.json`` and ``<path>.safetensors``."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = {"identity": asdict(self.identity), "plan": self.plan, "r2": self.r2, "gain": self.gain, "trajectories": self.trajectories}
        target.with_suffix(".json").write_text(json.dumps(text, indent=1) + "\n")
        save_file({str(i): value.double().contiguous() for i, value in self.coefficients.items()}, target.with_suffix(".safetensors"))

    @classmethod
    def load(cls, path: str | Path) -> LinearPolicy:
        """Read what ``save`` wrote. Raises ValueError when either file is missing."""
        target = Path(path).with_suffix(".json")
        if not target.exists() or not target.with_suffix(".safetensors").exists():
            raise ValueError(f"LinearAG(policy=...) needs {target.name} and {target.with_suffix('.safetensors').name} in {target.parent}.")
        text = json.loads(target.read_text())
        identity = Identity(**{**text["identity"], "shape": tuple(text["identity"]["shape"])})
        values = {int(i): value for i, value in load_file(target.with_suffix(".safetensors")).items()}
        r2, gain = ({int(i): float(v) for i, v in text[key].items()} for key in ("r2", "gain"))
        return cls(identity, tuple(text["plan"]), values, r2, gain, int(text["trajectories"]))


def solve(
    gram: Tensor, sums: Tensor, size: int, plan: Sequence[Mode], ridge: float = 1e-6
) -> tuple[dict[int, Tensor], dict[int, float], dict[int, float]]:
    """Least squares for every estimated step, from inner products alone.

    ``gram`` [2S, 2S] float64: of e_c(0..S-1), e_n(0..S-1) summed over trajectories and values; ``sums`` [2S]: their sums; ``size``: values
    summed. Earlier estimates stand in for e_n where the plan will have nothing else. ``ridge``: relative to the mean diagonal (the columns
    are nearly parallel). Returns coefficients, r2 and gain per estimated step.
    """
    steps = len(plan)
    history = torch.zeros(steps, 2 * steps, dtype=torch.float64)  # the e_n that sampling will hold, as combinations of the true vectors
    coefficients: dict[int, Tensor] = {}
    r2: dict[int, float] = {}
    gain: dict[int, float] = {}
    unit = torch.eye(2 * steps, dtype=torch.float64)
    for i, mode in enumerate(plan):
        history[i] = unit[steps + i]
        if mode != "estimated":
            continue
        features = torch.cat([unit[: i + 1], history[:i]])
        a, target = features @ gram @ features.T, unit[steps + i]
        b = features @ gram @ target
        weights = torch.linalg.solve(a + ridge * a.diagonal().mean() * torch.eye(len(a), dtype=torch.float64), b)
        residual = target - weights @ features
        error = float(residual @ gram @ residual)
        variance = float(gram[steps + i, steps + i] - sums[steps + i] ** 2 / size)
        away = unit[steps + i] - unit[i]
        coefficients[i], r2[i], gain[i] = weights, 1.0 - error / variance, 1.0 - error / float(away @ gram @ away)
        history[i] = weights @ features
    return coefficients, r2, gain
